"""Checksums of experts, computed where the weights are.

The checksum of words `x_0, x_1, ...` is `sum x_i * w_i` modulo 2**64 with odd weights `w_i` spread by Weyl's
sequence (multiples of 2**64 over the golden ratio). An odd factor is invertible, so any change within one word,
hence any flipped bit, changes the sum with certainty; wider damage escapes with a chance of about 2**-64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.device.operators import has_kernels
from swiftbalancer.kernels.segments import BYTES, COLUMNS, FIRST_WORD, READ, first_words, segment_table

WEYL = 0x9E3779B97F4A7C15 - (1 << 64)
"""As a signed 64-bit number."""
BLOCK_WORDS = 1 << 18


def checksums_into(out: torch.Tensor, experts: Sequence[Sequence[torch.Tensor]]) -> None:
    """Writes to `out` `[n]` int64 the checksum of each of `n` experts, a list of `[m]` uint8 tensors on out's device.

    Runs on the current stream. A kernel reads each byte once, in one launch for all; without one torch does, in
    blocks that bound the extra memory to a few MiB, and waits for nothing.
    """
    out.zero_()
    if has_kernels(out.device):
        _add_kernel(out, experts)
        return
    for number, expert in enumerate(experts):
        first = 0
        for data in map(words_of, expert):
            _add_torch(out[number : number + 1], data, first)
            first += data.numel()


def words_of(data: torch.Tensor) -> torch.Tensor:
    """uint8 seen as int32 where the length allows, which is the same at both ends of a move."""
    if data.numel() % 4:
        return data
    return (data if data.data_ptr() % 4 == 0 else data.clone()).view(torch.int32)


def _add_torch(out: torch.Tensor, words: torch.Tensor, first: int) -> None:
    for start in range(0, words.numel(), BLOCK_WORDS):
        block = words[start : start + BLOCK_WORDS].to(torch.int64)
        index = torch.arange(first + start, first + start + block.numel(), device=out.device)
        out += (block * ((index * WEYL) | 1)).sum()


def _add_kernel(out: torch.Tensor, experts: Sequence[Sequence[torch.Tensor]]) -> None:
    from swiftbalancer.kernels.checksum import add

    add(out, torch.from_numpy(segment_table(rows_of(experts))).to(out.device))


def rows_of(experts: Sequence[Sequence[torch.Tensor]]) -> NDArray[np.int64]:
    """`[experts, tensors, 4]`, the rows by which a kernel reads lists of `[m]` uint8 tensors."""
    rows = np.zeros((len(experts), max(map(len, experts), default=0), COLUMNS), np.int64)
    for row, expert in zip(rows, experts, strict=True):
        row[: len(expert), READ] = [data.data_ptr() for data in expert]
        row[: len(expert), BYTES] = [data.numel() for data in expert]
    rows[..., FIRST_WORD] = first_words(rows[..., BYTES])
    return rows
