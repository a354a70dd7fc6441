"""The routing operator beside vLLM's and SGLang's, on one GPU, in captured graphs."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch

from scripts.gpubench import peers
from swiftbalancer.dispatch import uniform_table
from swiftbalancer.placement import Placement
from swiftbalancer.routing import map_and_count
from swiftbalancer.topology import Topology

EXPERTS, REDUNDANT, RANKS, TOP_K, WIDTH = 256, 32, 32, 8, 16
TOKENS = (1, 32, 128, 1024, 16384)
UNROLLED = 20
"""Calls in one graph, so that its launch does not count."""


def bench_kernels() -> list[dict[str, Any]]:
    """A row for each batch size and id type: microseconds per call of each kernel, and the floors."""
    bandwidth = _copy_bandwidth()
    launch_us = graph_us(_tiny_kernel())
    rows = []
    for dtype in (torch.int32, torch.int64):
        for tokens in TOKENS:
            row: dict[str, Any] = {"tokens": tokens, "ids": str(dtype).removeprefix("torch.")}
            row |= {name: round(graph_us(call), 2) for name, call in _contenders(tokens, dtype).items()}
            num_bytes = tokens * TOP_K * dtype.itemsize * 2 + (EXPERTS * WIDTH + EXPERTS + REDUNDANT) * 4
            row["floor_bytes_us"] = round(num_bytes / bandwidth * 1e6, 3)
            row["floor_launch_us"] = round(launch_us, 2)
            rows.append(row)
    return rows


def bench_block_sizes() -> list[dict[str, Any]]:
    """Our kernel with other block sizes, to see that the ones chosen are right for this device."""
    from swiftbalancer.kernels import map_and_count as kernel

    usual = (kernel.DIRECT_IDS, kernel.DIRECT_BLOCK, kernel.HISTOGRAM_BLOCK)
    rows = []
    for tokens in (32, 128, 1024, 16384):
        row: dict[str, Any] = {"tokens": tokens}
        for direct, block in ((True, 64), (True, 128), (True, 256), (False, 256), (False, 1024), (False, 2048)):
            kernel.DIRECT_IDS = 1 << 30 if direct else 0
            kernel.DIRECT_BLOCK = kernel.HISTOGRAM_BLOCK = block
            call = _contenders(tokens, torch.int32)["ours_us"]
            row[f"{'direct' if direct else 'histogram'}_{block}_us"] = round(graph_us(call), 2)
        rows.append(row)
    kernel.DIRECT_IDS, kernel.DIRECT_BLOCK, kernel.HISTOGRAM_BLOCK = usual
    return rows


def _contenders(tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator("cuda").manual_seed(1)
    skew = torch.rand(EXPERTS, device="cuda", generator=generator) ** 4 + 1e-3
    ids = torch.multinomial(skew.expand(tokens, -1), TOP_K, generator=generator).to(dtype)
    topology = Topology.for_experts(EXPERTS, num_redundant=REDUNDANT, num_ranks=RANKS)
    placement = Placement.initial(topology, EXPERTS, num_layers=1)
    table = torch.from_numpy(uniform_table(placement, WIDTH)[0]).cuda()
    counts = torch.zeros(topology.num_slots, dtype=torch.int32, device="cuda")
    record = torch.ones(1, dtype=torch.int32, device="cuda")
    valid = torch.full((1,), tokens, dtype=torch.int32, device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "ours_us": lambda: map_and_count(ids, table, counts=counts, record=record, num_valid_tokens=valid)
    }
    vllm, sglang = peers.vllm_map_and_record(), peers.sglang_map_and_record()
    if vllm is not None:
        slots = torch.from_numpy(placement.logical_to_physical_map(max_replicas=1024)[0]).cuda()
        num = torch.from_numpy(placement.logical_replica_count()[0]).cuda()
        padding = [valid] if len(signature(vllm).parameters) == 6 else []  # vLLM 0.24 counts padding, too
        calls["vllm_us"] = lambda: vllm(ids, slots, num, counts, record, *padding)
    if sglang is not None:
        first = table[:, 0].contiguous()
        info = SimpleNamespace(ep_dispatch_algorithm="static", partial_logical_to_rank_dispatch_physical_map=first)
        calls["sglang_static_us"] = lambda: sglang(ids, info, counts, valid)
    return calls


def graph_us(call: Callable[[], Any], *, repeats: int = 50) -> float:
    """Microseconds per call on the device: `UNROLLED` calls per graph, the best of three series of replays."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(UNROLLED):
            call()
    best = float("inf")
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graph.replay()
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / repeats / UNROLLED)
    return best


def _tiny_kernel() -> Callable[[], Any]:
    one = torch.zeros(1, device="cuda")
    return lambda: one.add_(1)


def _copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written bytes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    microseconds = graph_us(lambda: target.copy_(source), repeats=2)
    return 2 * source.numel() / (microseconds * 1e-6)
