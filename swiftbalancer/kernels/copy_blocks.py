"""Copies any number of blocks of memory to other places in one launch, for the commit of a batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WORD = 8
"""Bytes a thread copies at once, where length and both addresses allow; single bytes elsewhere."""
WORDS = 4096
"""Words a program copies at once."""
SHARES = 64
"""Parts of a block that programs take in turn."""
PROGRAMS = 512
"""More than a device runs at once, few enough to start in a microsecond."""


def copy_blocks(table: torch.Tensor) -> None:
    """Copies what each row of a table reads to where it writes, on the current stream.

    `table` is that of `swiftbalancer.kernels.segments`, on the device. What it names must stay until this has run.
    """
    _copy[(PROGRAMS,)](table, shares=SHARES, words=WORDS, word=WORD, num_warps=8)


@triton.jit  # type: ignore[untyped-decorator]
def _copy(table, shares: tl.constexpr, words: tl.constexpr, word: tl.constexpr):  # type: ignore[no-untyped-def]
    total_shares = tl.load(table) * shares
    share = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, words)
    while share < total_shares:
        row = table + 2 + 4 * (share // shares)
        source = tl.load(row)
        target = tl.load(row + 1)
        size = tl.load(row + 2)
        start = (share % shares) * words
        if target != 0:
            if (source | target | size) % word == 0:
                while start < size // word:
                    inside = start + at < size // word
                    value = tl.load(source.to(tl.pointer_type(tl.int64)) + start + at, mask=inside)
                    tl.store(target.to(tl.pointer_type(tl.int64)) + start + at, value, mask=inside)
                    start += shares * words
            else:
                while start < size:
                    inside = start + at < size
                    byte = tl.load(source.to(tl.pointer_type(tl.uint8)) + start + at, mask=inside)
                    tl.store(target.to(tl.pointer_type(tl.uint8)) + start + at, byte, mask=inside)
                    start += shares * words
        share += tl.num_programs(0)
