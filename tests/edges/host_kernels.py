"""The kernels of a CUDA device, done on the host by what their table says, for tests without one.

Only the kernels are stand-ins: who fills the table, and what is launched when, is the product's.
"""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Callable

import pytest
import torch

from swiftbalancer.transport.block_copy import BlockCopy
from swiftbalancer.verify import checksums_into

Install = Callable[[pytest.MonkeyPatch], None]


def no_kernels(_monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has none, as CPUs and NPUs."""


def host_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a device with kernels."""
    for name, kernel in (("copy_blocks", copy_blocks), ("checksum", add)):
        module = types.ModuleType(f"swiftbalancer.kernels.{name}")
        vars(module)[kernel.__name__] = kernel
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(BlockCopy, "usable", lambda _layer: True)


def copy_blocks(table: torch.Tensor) -> None:
    for read, write, size, _ in _rows(table):
        if write:
            ctypes.memmove(write, read, size)


def add(out: torch.Tensor, table: torch.Tensor) -> None:
    rows, tensors = _rows(table), int(table[1])
    experts = [rows[first : first + tensors] for first in range(0, len(rows), tensors or 1)]
    for number, expert in enumerate(experts):
        words = 0
        for _, _, size, first_word in expert:
            assert first_word == words
            words += size if size % 4 else size // 4
        sums = torch.zeros(1, dtype=torch.int64)
        checksums_into(sums, [[_bytes_at(read, size) for read, _, size, _ in expert if size]])
        out[number] += sums[0]


def _rows(table: torch.Tensor) -> list[list[int]]:
    rows: list[list[int]] = table[2:].view(-1, 4)[: int(table[0])].tolist()
    return rows


def _bytes_at(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
