"""Copies any number of blocks of memory to other places in one launch, for the commit of a batch.

The launch itself never changes, so that it can be recorded: what to copy is in a table on the device, and a fixed
number of programs take its tiles in turn.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

WORD = 8
"""Bytes a thread copies at once, where length and both addresses allow; single bytes elsewhere."""
TILE_WORDS = 4096
"""Words a program copies at once."""
TILE = 4 * TILE_WORDS * WORD
"""Bytes of an entry of the table: few entries, since the host makes them."""
PROGRAMS = 512
"""More than a device runs at once, few enough to start in a microsecond."""


def table_size(num_bytes: int, num_blocks: int) -> int:
    """Entries of a table that holds any `num_blocks` blocks of `num_bytes` in all."""
    return 1 + 3 * (num_bytes // TILE + num_blocks)


def tile_table(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[1 + 3 * tiles]`: how many tiles, then for each the addresses to read and to write, and the bytes.

    `blocks` `[n, 3]` are the same for whole blocks, whose memory must stay until the launch that uses the table has
    run.
    """
    tiles = -(-blocks[:, 2] // TILE)
    rows = np.repeat(blocks, tiles, axis=0)
    first = np.repeat(np.cumsum(tiles) - tiles, tiles)
    offsets = (np.arange(len(rows)) - first) * TILE
    rows[:, :2] += offsets[:, None]
    rows[:, 2] = np.minimum(rows[:, 2] - offsets, TILE)
    return np.concatenate([[len(rows)], rows.reshape(-1)])


def copy_tiles(table: torch.Tensor) -> None:
    """Does the copies of a `tile_table`, int64 on the device, on the current stream."""
    _copy[(PROGRAMS,)](table, words=TILE_WORDS, word=WORD, num_warps=8)


@triton.jit  # type: ignore[untyped-decorator]
def _copy(table, words: tl.constexpr, word: tl.constexpr):  # type: ignore[no-untyped-def]
    count = tl.load(table)
    tile = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, words)
    while tile < count:
        source = tl.load(table + 1 + 3 * tile)
        target = tl.load(table + 2 + 3 * tile)
        size = tl.load(table + 3 + 3 * tile)
        start = size * 0
        if (source | target | size) % word == 0:
            while start < size // word:
                inside = start + at < size // word
                value = tl.load(source.to(tl.pointer_type(tl.int64)) + start + at, mask=inside)
                tl.store(target.to(tl.pointer_type(tl.int64)) + start + at, value, mask=inside)
                start += words
        else:
            while start < size:
                byte = tl.load(source.to(tl.pointer_type(tl.uint8)) + start + at, mask=start + at < size)
                tl.store(target.to(tl.pointer_type(tl.uint8)) + start + at, byte, mask=start + at < size)
                start += words
        tile += tl.num_programs(0)
