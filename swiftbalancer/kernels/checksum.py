"""The checksums of `swiftbalancer.verify` for any number of tensors in one launch and one pass over the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

BLOCK = 4096
BLOCKS_PER_SEGMENT = 16
"""Few enough to leave most of the device to the forward pass, enough to keep the memory busy."""


ALIGNED, BYTES, UNALIGNED = 0, 1, 2
"""How a segment's words are read: int32 at once, uint8, or int32 from four bytes each."""


def segment_table(experts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """`[5, segments]` int64 on the host: address, words, number of the first word, how to read it, expert.

    A segment is a contiguous tensor `[n]` uint8; it counts as n / 4 words of int32 if that is whole, else as n of
    uint8. An expert's words are numbered through its tensors. The tensors must live until the launch that uses
    the table has run, or be freed in the order of its stream.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    for number, expert in enumerate(experts):
        first = 0
        for data in expert:
            address, num_bytes = data.data_ptr(), data.numel()
            kind = BYTES if num_bytes % 4 else UNALIGNED if address % 4 else ALIGNED
            words = num_bytes if kind == BYTES else num_bytes // 4
            rows.append((address, words, first, kind, number))
            first += words
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5).t().contiguous()


def add(out: torch.Tensor, table: torch.Tensor) -> None:
    """Adds each segment's weighted sum to its expert's place in `out` `[experts]` int64; `table` is on the device."""
    num_segments = table.shape[1]
    if num_segments:
        _add[(BLOCKS_PER_SEGMENT, num_segments)](out, table, num_segments, block=BLOCK, num_warps=8)


@triton.jit(do_not_specialize=["num_segments"])  # type: ignore[untyped-decorator]
def _add(out, table, num_segments, block: tl.constexpr):  # type: ignore[no-untyped-def]
    segment = tl.program_id(1)
    address = tl.load(table + segment)
    count = tl.load(table + num_segments + segment)
    first = tl.load(table + 2 * num_segments + segment)
    kind = tl.load(table + 3 * num_segments + segment)
    expert = tl.load(table + 4 * num_segments + segment)
    start = tl.program_id(0).to(tl.int64) * block
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
            start += tl.num_programs(0) * block
        tl.atomic_add(out + expert, tl.sum(total))
