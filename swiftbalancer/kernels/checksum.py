"""The checksums of `swiftbalancer.verify` for any number of tensors in one launch and one pass over the bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
SHARES = 64
"""Parts of a segment that programs take in turn."""
PROGRAMS = 128
"""Few enough to leave most of the device to the forward pass, enough to keep the memory busy."""


def add(out: torch.Tensor, table: torch.Tensor) -> None:
    """Adds each row's weighted sum to its expert's place in `out` `[experts]` int64.

    `table` is that of `swiftbalancer.kernels.segments`, on the device. What it names must stay until this has run.
    """
    _add[(PROGRAMS,)](out, table, shares=SHARES, block=BLOCK, num_warps=8)


@triton.jit  # type: ignore[untyped-decorator]
def _add(out, table, shares: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    total_shares = tl.load(table) * shares
    tensors = tl.load(table + 1)
    share = tl.program_id(0).to(tl.int64)
    while share < total_shares:
        segment = share // shares
        _add_share(out + segment // tensors, table + 2 + 4 * segment, share % shares, shares, block)
        share += tl.num_programs(0)


@triton.jit  # type: ignore[untyped-decorator]
def _add_share(out, row, share, shares: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    address = tl.load(row)
    size = tl.load(row + 2)
    first = tl.load(row + 3)
    in_bytes = size % 4 != 0
    count = tl.where(in_bytes, size, size // 4)
    start = share * block
    if start < count:
        total = tl.zeros((block,), tl.int64)
        while start < count:
            at = start + tl.arange(0, block)
            inside = at < count
            if in_bytes:
                word = tl.load(address.to(tl.pointer_type(tl.uint8)) + at, mask=inside, other=0).to(tl.int64)
            elif address % 4 == 0:
                word = tl.load(address.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0).to(tl.int64)
            else:
                byte = address.to(tl.pointer_type(tl.uint8)) + 4 * at
                value = tl.load(byte, mask=inside, other=0).to(tl.int32)
                value |= tl.load(byte + 1, mask=inside, other=0).to(tl.int32) << 8
                value |= tl.load(byte + 2, mask=inside, other=0).to(tl.int32) << 16
                value |= tl.load(byte + 3, mask=inside, other=0).to(tl.int32) << 24
                word = value.to(tl.int64)
            total += word * (((at + first) * -7046029254386353131) | 1)
            start += shares * block
        tl.atomic_add(out, tl.sum(total))
