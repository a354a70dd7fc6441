"""Mapping and counting: the operator against a plain loop, and the Triton kernel, interpreted, against it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from swiftbalancer.dispatch import column_of
from swiftbalancer.routing import map_and_count

EXPERTS, WIDTH, SLOTS = 20, 16, 24
HAS_TRITON = importlib.util.find_spec("triton") is not None


def case(tokens: int, top_k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids, some out of range, and a table with a hole."""
    generator = torch.Generator().manual_seed(tokens * 100 + top_k)
    ids = torch.randint(-1, EXPERTS + 1, (tokens, top_k), generator=generator).to(dtype)
    table = torch.randint(0, SLOTS, (EXPERTS, WIDTH), generator=generator, dtype=torch.int32)
    table[3, 5] = -1
    return ids, table


def by_hand(ids: torch.Tensor, table: torch.Tensor, *, valid: int) -> tuple[list[list[int]], list[int]]:
    """The definition as a loop over Python numbers."""
    counts = [0] * SLOTS
    slots = []
    for token, row in enumerate(ids.tolist()):
        column = int(column_of(np.array([token]), table.shape[1])[0])
        mapped = [int(table[e, column]) if 0 <= e < EXPERTS else -1 for e in row]
        slots.append(mapped)
        for slot in mapped:
            if slot >= 0 and token < valid:
                counts[slot] += 1
    return slots, counts


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 8), (1, 8), (33, 1), (130, 6), (700, 8)])
def test_ids_become_slots_and_every_slot_is_counted(tokens: int, top_k: int, dtype: torch.dtype) -> None:
    ids, table = case(tokens, top_k, dtype)
    counts = torch.full((SLOTS,), 5, dtype=torch.int32)
    slots = map_and_count(ids, table, counts=counts)
    want, hits = by_hand(ids, table, valid=tokens)
    assert slots.dtype == dtype
    assert slots.tolist() == want
    assert counts.tolist() == [5 + h for h in hits]


@pytest.mark.parametrize("valid", [0, 7, 40, 1000])
def test_padding_is_mapped_and_not_counted(valid: int) -> None:
    ids, table = case(40, 4, torch.int64)
    want, hits = by_hand(ids, table, valid=valid)
    for given in (valid, torch.tensor([valid], dtype=torch.int32)):
        counts = torch.zeros(SLOTS, dtype=torch.int32)
        assert map_and_count(ids, table, counts=counts, num_valid_tokens=given).tolist() == want
        assert counts.tolist() == hits


def test_recording_is_switched_by_a_flag_on_the_device() -> None:
    ids, table = case(40, 4, torch.int32)
    flag = torch.zeros(1, dtype=torch.bool)
    counts = torch.zeros(SLOTS, dtype=torch.int32)
    off = map_and_count(ids, table, counts=counts, record=flag)
    assert counts.sum() == 0
    flag.fill_(True)
    on = map_and_count(ids, table, counts=counts, record=flag)
    assert counts.sum() > 0
    assert torch.equal(off, on)


def test_a_compiled_function_keeps_the_count() -> None:
    def step(ids: torch.Tensor, table: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return map_and_count(ids, table, counts=counts) + 1

    ids, table = case(12, 2, torch.int64)
    counts, again = torch.zeros(2, SLOTS, dtype=torch.int32).unbind(0)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids, table, counts), step(ids, table, again))
    assert counts.tolist() == again.tolist() == by_hand(ids, table, valid=12)[1]


def test_the_operator_keeps_torchs_rules() -> None:
    ids, table = case(9, 2, torch.int64)
    arguments = (ids, table, torch.zeros(SLOTS, dtype=torch.int32), torch.ones(1), None, 9)
    torch.library.opcheck(torch.ops.swiftbalancer.map_and_count, arguments)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_the_triton_kernel_interpreted_gives_the_same_bits() -> None:
    environ = dict(os.environ, TRITON_INTERPRET="1")
    root = str(Path(__file__).parents[2])
    script = "from tests.edges.test_routing import compare_kernels; compare_kernels()"
    done = subprocess.run([sys.executable, "-c", script], env=environ, cwd=root, timeout=150, check=False)
    assert done.returncode == 0


def compare_kernels() -> None:
    """Runs in a process of its own, since Triton decides at import whether to interpret."""
    from swiftbalancer.kernels import map_and_count as kernel
    from swiftbalancer.routing import map_and_count_torch

    valids = (None, torch.tensor([11], dtype=torch.int32))
    flags = (None, torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.bool))
    for tokens, dtype, valid, flag in product((1, 40, 1100), (torch.int32, torch.int64), valids, flags):
        ids, table = case(tokens, 8, dtype)
        mine, reference = torch.zeros(2, SLOTS, dtype=torch.int32).unbind(0)
        out = torch.empty_like(ids)
        kernel.launch(out, ids, table, mine, record=flag, num_valid_tokens=valid, limit=tokens)
        want = map_and_count_torch(ids, table, reference, flag, valid, tokens)
        assert torch.equal(out, want), (tokens, dtype, valid, flag)
        assert torch.equal(mine, reference), (tokens, dtype, valid, flag)
