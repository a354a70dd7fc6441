"""The CUDA kernels against their plain torch versions, on a real device."""

from __future__ import annotations

import mmap
import os
import tempfile
from functools import partial

import numpy as np
import pytest
import torch

from swiftbalancer.device import DeviceLayer
from swiftbalancer.gathering import LoadBoard, num_bytes
from swiftbalancer.kernels.segments import WRITE
from swiftbalancer.recorder import LoadRecorder
from swiftbalancer.routing import map_and_count, map_and_count_torch
from swiftbalancer.transport.block_copy import BlockCopy
from swiftbalancer.transport.segment_table import SegmentTable
from swiftbalancer.verify import checksums_into, rows_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
EXPERTS, WIDTH, SLOTS = 256, 16, 288


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 32, 128, 1024, 16384])
def test_map_and_count_is_bit_for_bit_the_torch_version(tokens: int, dtype: torch.dtype) -> None:
    ids = torch.randint(-1, EXPERTS + 1, (tokens, 8), device="cuda").to(dtype)
    table = torch.randint(-1, SLOTS, (3, EXPERTS, WIDTH), device="cuda", dtype=torch.int32)[1]
    valid = torch.tensor([tokens - tokens // 3], device="cuda")
    for record in (torch.ones(1, device="cuda", dtype=torch.int32), torch.zeros(1, device="cuda", dtype=torch.bool)):
        mine, reference = torch.zeros(2, SLOTS, dtype=torch.int32, device="cuda").unbind(0)
        slots = map_and_count(ids, table, counts=mine, record=record, num_valid_tokens=valid)
        assert torch.equal(slots, map_and_count_torch(ids, table, reference, record, valid, tokens))
        assert torch.equal(mine, reference)
        assert bool(mine.any()) == bool(record)


def test_a_captured_graph_follows_the_flag_the_table_and_the_padding() -> None:
    ids = torch.randint(0, EXPERTS, (128, 8), device="cuda")
    table = torch.zeros(EXPERTS, WIDTH, dtype=torch.int32, device="cuda")
    counts = torch.zeros(SLOTS, dtype=torch.int32, device="cuda")
    record, valid = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.tensor([128], device="cuda")
    map_and_count(ids, table, counts=counts, record=record, num_valid_tokens=valid)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = map_and_count(ids, table, counts=counts, record=record, num_valid_tokens=valid)
    graph.replay()
    assert int(counts.sum()) == 0
    record.fill_(1)
    table.fill_(7)
    valid.fill_(100)
    graph.replay()
    assert (slots == 7).all()
    assert int(counts[7]) == int(counts.sum()) == 800


def test_a_compiled_step_gives_the_same() -> None:
    table = torch.randint(0, SLOTS, (EXPERTS, WIDTH), device="cuda", dtype=torch.int32)
    counts, again = torch.zeros(2, SLOTS, dtype=torch.int32, device="cuda").unbind(0)

    def step(ids: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        return map_and_count(ids * 2, table, counts=into) + 1

    compiled = torch.compile(step, fullgraph=True)
    ids = torch.randint(0, EXPERTS // 2, (64, 8), device="cuda")
    assert torch.equal(compiled(ids, counts), step(ids, again))
    assert torch.equal(counts, again)


@pytest.mark.parametrize("count", [1, 4, 4096, 4097, 1 << 20, (44 << 20) + 12])
def test_checksums_are_the_cpus(count: int) -> None:
    experts = [[torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda") for n in (count, 36)] for _ in range(3)]
    mine, reference = torch.zeros(3, dtype=torch.int64, device="cuda"), torch.zeros(3, dtype=torch.int64)
    checksums_into(mine, experts)
    checksums_into(reference, [[part.cpu() for part in expert] for expert in experts])
    assert torch.equal(mine.cpu(), reference)
    experts[1][0][count // 2] ^= 16
    checksums_into(mine, experts)
    assert (mine.cpu() == reference).tolist() == [True, False, True]


@pytest.mark.parametrize("count", [1, 8, 4097, 1 << 20, (44 << 20) + 4])
def test_a_commit_copies_every_block_and_nothing_else(count: int) -> None:
    sources = [torch.randint(0, 256, (n + 1,), dtype=torch.uint8, device="cuda") for n in (count, 36, 8 * count)]
    sources = [sources[0][:-1], sources[1][1:], sources[2][:-1]]
    targets = [torch.zeros(source.numel() + 16, dtype=torch.uint8, device="cuda") for source in sources]
    layer = DeviceLayer.for_device("cuda")
    for record in (True, False):
        launches = torch.zeros(1, device="cuda")
        beside = partial(layer.launch, launches.add_, 1)
        table = SegmentTable(layer, num_experts=len(sources), num_tensors=1)
        blocks = BlockCopy(layer, table, beside=beside, record=record)
        launches.zero_()
        for target in targets:
            target.zero_()
        rows = rows_of([[source] for source in sources])
        rows[:, 0, WRITE] = [to.data_ptr() + 8 for to in targets]
        table.rows(len(sources))[:] = rows
        table.send(len(sources))
        blocks.launch()
        assert launches.item() == 1
        for target, source in zip(targets, sources, strict=True):
            assert torch.equal(target[8:-8], source)
            assert not target[:8].any()
            assert not target[-8:].any()


def test_recorded_launches_do_each_time_what_they_did() -> None:
    layer = DeviceLayer.for_device("cuda")
    counters = torch.arange(12, dtype=torch.int32, device="cuda").view(3, 4)
    recorder = LoadRecorder(layer, counters, torch.full((1,), 7, device="cuda"))
    assert not counters.any()
    for window in range(10):
        counters += window + 1
        recorder.prepare_to_forget(np.array([window % 3]))
        recorder.forget()
        snapshot = recorder.take(window)
        values = recorder.land(snapshot)
        counts = np.full((3, 4), window + 1)
        counts[window % 3] = 0
        assert values.tolist() == [window + 1, *counts.reshape(-1).tolist(), 7]
        recorder.release(snapshot)
    assert recorder.overruns == 0


def test_the_device_writes_loads_where_rank_0_reads_them() -> None:
    """And does so again for who attaches anew, at whatever addresses."""
    layer = DeviceLayer.for_device("cuda")
    counters = torch.zeros(58, 288, dtype=torch.int32, device="cuda")
    width = counters.numel() + 2
    for _ in range(3):
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.truncate(num_bytes(1, width))
            board = LoadBoard(os.dup(file.fileno()), rank=0, size=1, width=width)
        recorder = LoadRecorder(layer, counters, torch.full((1,), 7, device="cuda"), board)
        for window in range(10):
            assert board.late(window) == [0]
            counters += window + 1
            snapshot = recorder.take(window)
            assert snapshot.number is not None
            snapshot.landed.synchronize()
            assert board.late(window) == []
            assert not counters.any()
            [row] = board.take(window).tolist()
            assert row == [window + 1, *[window + 1] * counters.numel(), 7]
        recorder.close()
        board.close()


def test_host_memory_that_cannot_be_registered_is_not_reached_and_nothing_else_fails_for_it() -> None:
    layer = DeviceLayer.for_device("cuda")
    memory = np.frombuffer(mmap.mmap(-1, 1 << 16), np.uint8)
    unreach = layer.reach(memory)
    assert unreach is not None
    assert layer.reach(memory) is None, "it is already"
    assert torch.ones(3, device="cuda").sum().item() == 3
    unreach()
    again = layer.reach(memory)
    assert again is not None
    again()
