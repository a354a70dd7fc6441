"""Checksums: what they must catch, and that both implementations agree."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftbalancer.kernels.segments import WRITE, segment_table, table_size
from swiftbalancer.verify import WEYL, checksums_into, rows_of

HAS_TRITON = importlib.util.find_spec("triton") is not None


def checksum(*tensors: torch.Tensor) -> int:
    out = torch.full((2,), 99, dtype=torch.int64)
    checksums_into(out, [tensors, []])
    assert out[1] == 0
    return int(out[0])


def random_bytes(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_hand(*tensors: torch.Tensor) -> int:
    """The definition in Python's unbounded integers."""
    total, index = 0, 0
    for tensor in tensors:
        raw = tensor.numpy().tobytes()
        words = raw if len(raw) % 4 else memoryview(raw).cast("i").tolist()
        for word in words:
            total += word * (((index * WEYL) | 1) % 2**64)
            index += 1
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("sizes", [(4,), (7,), (0, 12), (1024, 33, 4096), (1 << 20, 3)])
def test_the_checksum_is_its_definition(sizes: tuple[int, ...]) -> None:
    tensors = [random_bytes(size, seed) for seed, size in enumerate(sizes)]
    assert checksum(*tensors) == by_hand(*tensors)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(0, 10**6), st.data())
def test_any_flipped_bit_changes_it(count: int, seed: int, data: st.DataObject) -> None:
    tensor = random_bytes(count, seed)
    damaged = tensor.clone()
    damaged[data.draw(st.integers(0, count - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(tensor) != checksum(damaged)


def test_exchanged_words_and_exchanged_tensors_change_it() -> None:
    tensor = random_bytes(64, 1)
    assert checksum(tensor) != checksum(tensor.roll(4))
    first, second = tensor[:32].clone(), tensor[32:].clone()
    assert checksum(first, second) != checksum(second, first)


def test_unaligned_memory_gives_the_same_sum() -> None:
    shifted = random_bytes(129, 2)[1:]
    assert checksum(shifted) == checksum(shifted.clone())


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("check", ["compare_checksums", "compare_copies"])
def test_the_triton_kernels_interpreted_do_the_same(check: str) -> None:
    environ = dict(os.environ, TRITON_INTERPRET="1")
    root = str(Path(__file__).parents[2])
    script = f"from tests.edges.test_verify import {check}; {check}()"
    done = subprocess.run([sys.executable, "-c", script], env=environ, cwd=root, timeout=150, check=False)
    assert done.returncode == 0


def compare_checksums() -> None:
    """Runs in a process of its own, since Triton decides at import whether to interpret."""
    from swiftbalancer.kernels.checksum import add

    experts = [[random_bytes(count, count), random_bytes(5, 1)] for count in (4, 9000, 280_000)]
    experts.append([random_bytes(4097, 9)[1:], random_bytes(0, 1)])
    rows = rows_of(experts)
    out = torch.zeros(len(experts), dtype=torch.int64)
    for num in (len(experts), 0):
        table = segment_table(rows[:num])
        assert len(table) == table_size(2 * num)
        add(out, torch.from_numpy(table))
    assert out.tolist() == [checksum(*expert) for expert in experts]


def compare_copies() -> None:
    """As above: blocks of several lengths, one not a whole number of words, one at an odd address, one to nowhere."""
    from swiftbalancer.kernels.copy_blocks import copy_blocks

    sources = [random_bytes(count, count) for count in (8, 33, 9000, 280_000, 32768, 41)]
    sources[5] = sources[5][1:]
    targets = [torch.zeros(source.numel() + 8, dtype=torch.uint8) for source in sources]
    rows = rows_of([sources, sources])
    rows[0, :, WRITE] = [target.data_ptr() for target in targets]
    copy_blocks(torch.from_numpy(segment_table(rows)))
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target[:-8], source)
        assert not target[-8:].any()
    copy_blocks(torch.zeros(2, dtype=torch.int64))
