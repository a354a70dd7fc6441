"""The checksum of `swiftbalancer.verify` as one pass over the bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
BLOCKS_PER_SM = 2
"""Few enough blocks to leave the device to the forward pass, enough to keep the memory busy."""


def add(out: torch.Tensor, words: torch.Tensor, first: int) -> None:
    """Adds the weighted sum of `words` (`[n]` int32 or uint8), numbered from `first`, to `out` `[1]` int64."""
    if not words.numel():
        return
    sms = torch.cuda.get_device_properties(out.device).multi_processor_count
    add_blocks(out, words, first, min(triton.cdiv(words.numel(), BLOCK), BLOCKS_PER_SM * sms))


def add_blocks(out: torch.Tensor, words: torch.Tensor, first: int, num_blocks: int) -> None:
    """`add` with `num_blocks` programs; the result does not depend on how many."""
    _add[(num_blocks,)](out, words, words.numel(), first, block=BLOCK)


@triton.jit(do_not_specialize=["count", "first"])  # type: ignore[untyped-decorator]
def _add(out, words, count, first, block: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros((block,), tl.int64)
    start = tl.program_id(0) * block
    while start < count:
        at = start + tl.arange(0, block)
        word = tl.load(words + at, mask=at < count, other=0).to(tl.int64)
        weight = ((at.to(tl.int64) + first) * -7046029254386353131) | 1
        total += word * weight
        start += tl.num_programs(0) * block
    tl.atomic_add(out, tl.sum(total))
