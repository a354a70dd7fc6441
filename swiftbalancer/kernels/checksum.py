"""The checksums of `swiftbalancer.verify` for any number of tensors in one launch and one pass over the bytes.

The launch itself never changes, so that it can be recorded: what to sum is in a table on the device.
"""

from __future__ import annotations

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


def segment_table(addresses: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[1 + 5 * segments]`: how many, then each one's address, words, number of its first word, kind, and expert.

    `addresses` and `sizes` (bytes) are `[experts, tensors]`. A segment is a tensor, contiguous on the device. It
    counts as bytes / 4 words of int32 if that is whole, else as words of a byte. An expert's words are numbered
    through its tensors. The memory must stay until the launch that uses the table has run,
    or be freed in the order of its stream.
    """
    in_bytes = sizes % 4 != 0
    kinds = np.where(in_bytes, BYTES, np.where(addresses % 4 != 0, UNALIGNED, ALIGNED))
    words = np.where(in_bytes, sizes, sizes // 4)
    before = np.cumsum(words, axis=1) - words
    experts = np.broadcast_to(np.arange(len(sizes))[:, None], sizes.shape)
    rows = np.stack([addresses, words, before, kinds, experts], axis=-1)
    return np.concatenate([[sizes.size], rows.reshape(-1)])


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
