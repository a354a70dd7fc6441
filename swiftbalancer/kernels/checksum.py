"""The checksums of `swiftbalancer.verify` for any number of tensors in one launch and one pass over the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

BLOCK = 4096
BLOCKS_PER_SEGMENT = 16
"""Few enough to leave most of the device to the forward pass, enough to keep the memory busy."""


def segment_table(experts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """`[5, segments]` int64 on the host: address, words, number of the first word, 1 for uint8 words, expert.

    A segment is a contiguous tensor of int32 or uint8 words; an expert's words are numbered through its tensors.
    The tensors must live until the launch that uses the table has run, or be freed in the order of its stream.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    for number, expert in enumerate(experts):
        first = 0
        for words in expert:
            rows.append((words.data_ptr(), words.numel(), first, int(words.dtype == torch.uint8), number))
            first += words.numel()
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
    narrow = tl.load(table + 3 * num_segments + segment)
    expert = tl.load(table + 4 * num_segments + segment)
    start = tl.program_id(0).to(tl.int64) * block
    if start < count:
        total = tl.zeros((block,), tl.int64)
        while start < count:
            at = start + tl.arange(0, block)
            if narrow == 1:
                word = tl.load(address.to(tl.pointer_type(tl.uint8)) + at, mask=at < count, other=0).to(tl.int64)
            else:
                word = tl.load(address.to(tl.pointer_type(tl.int32)) + at, mask=at < count, other=0).to(tl.int64)
            total += word * (((at + first) * -7046029254386353131) | 1)
            start += tl.num_programs(0) * block
        tl.atomic_add(out + expert, tl.sum(total))
