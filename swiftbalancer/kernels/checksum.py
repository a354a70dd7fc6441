"""The checksums of `swiftbalancer.verify` for any number of tensors in one launch and one pass over the bytes.

The launch itself never changes, so that it can be recorded: what to sum is in a table on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

BLOCK = 4096
SHARES = 64
"""Parts of a segment that programs take in turn."""
PROGRAMS = 128
"""Few enough to leave most of the device to the forward pass, enough to keep the memory busy."""
COLUMNS = 5

ALIGNED, BYTES, UNALIGNED = 0, 1, 2
"""How a segment's words are read: int32 at once, uint8, or int32 from four bytes each."""


def table_size(num_segments: int) -> int:
    """Entries of a table of so many segments."""
    return 1 + COLUMNS * num_segments


def segment_table(experts: Sequence[Sequence[torch.Tensor]], *, first: int = 0) -> NDArray[np.int64]:
    """`[1 + 5 * segments]`: how many, then each one's address, words, number of its first word, kind, and expert.

    A segment is a contiguous tensor `[n]` uint8; it counts as n / 4 words of int32 if that is whole, else as n of
    uint8. An expert's words are numbered through its tensors, experts from `first` on. The tensors must live until
    the launch that uses the table has run, or be freed in the order of its stream.
    """
    rows: list[int] = [0]
    for number, expert in enumerate(experts, first):
        words_before = 0
        for data in expert:
            address, num_bytes = data.data_ptr(), data.numel()
            kind = BYTES if num_bytes % 4 else UNALIGNED if address % 4 else ALIGNED
            words = num_bytes if kind == BYTES else num_bytes // 4
            rows += (address, words, words_before, kind, number)
            words_before += words
    rows[0] = len(rows) // COLUMNS
    return np.array(rows, np.int64)


def add(out: torch.Tensor, table: torch.Tensor) -> None:
    """Adds each segment's weighted sum to its expert's place in `out` `[experts]` int64; `table` is on the device."""
    _add[(PROGRAMS,)](out, table, shares=SHARES, block=BLOCK, num_warps=8)


@triton.jit  # type: ignore[untyped-decorator]
def _add(out, table, shares: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    total_shares = tl.load(table) * shares
    share = tl.program_id(0).to(tl.int64)
    while share < total_shares:
        row = table + 1 + 5 * (share // shares)
        _add_share(out, row, share % shares, shares, block)
        share += tl.num_programs(0)


@triton.jit  # type: ignore[untyped-decorator]
def _add_share(out, row, share, shares: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    address = tl.load(row)
    count = tl.load(row + 1)
    first = tl.load(row + 2)
    kind = tl.load(row + 3)
    expert = tl.load(row + 4)
    start = share * block
    if start < count:
        total = tl.zeros((block,), tl.int64)
        while start < count:
            at = start + tl.arange(0, block)
            inside = at < count
            if kind == 0:
                word = tl.load(address.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0).to(tl.int64)
            elif kind == 1:
                word = tl.load(address.to(tl.pointer_type(tl.uint8)) + at, mask=inside, other=0).to(tl.int64)
            else:
                byte = address.to(tl.pointer_type(tl.uint8)) + 4 * at
                value = tl.load(byte, mask=inside, other=0).to(tl.int32)
                value |= tl.load(byte + 1, mask=inside, other=0).to(tl.int32) << 8
                value |= tl.load(byte + 2, mask=inside, other=0).to(tl.int32) << 16
                value |= tl.load(byte + 3, mask=inside, other=0).to(tl.int32) << 24
                word = value.to(tl.int64)
            total += word * (((at + first) * -7046029254386353131) | 1)
            start += shares * block
        tl.atomic_add(out + expert, tl.sum(total))
