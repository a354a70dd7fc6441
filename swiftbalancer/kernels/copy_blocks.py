"""Copies any number of blocks of memory to other places in one launch, for the commit of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

WORD = 8
"""Bytes a thread copies at once, where length and both addresses allow; single bytes elsewhere."""
TILE = 4096
"""Words a program copies at once."""
MOST_PROGRAMS = 64
"""Programs that share a block."""


def block_table(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """`[4, blocks]` int64 on the host (source, target, words, 1 for words of one byte), and the programs per block.

    Ends are uint8 `[n]`, contiguous, alike in length. They must live until the launch that uses the table has run.
    """
    rows: list[tuple[int, int, int, int]] = []
    for target, source in zip(targets, sources, strict=True):
        to, start, num_bytes = target.data_ptr(), source.data_ptr(), target.numel()
        narrow = (to | start | num_bytes) % WORD > 0
        rows.append((start, to, num_bytes if narrow else num_bytes // WORD, narrow))
    most = max((words for _, _, words, _ in rows), default=0)
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).t().contiguous()
    return table, min(max(-(-most // TILE), 1), MOST_PROGRAMS)


def copy_blocks(table: torch.Tensor, programs: int) -> None:
    """Does the copies of a `block_table`, which is on the device, on the current stream."""
    num_blocks = table.shape[1]
    if num_blocks:
        _copy[(programs, num_blocks)](table, num_blocks, tile=TILE, num_warps=8)


@triton.jit(do_not_specialize=["num_blocks"])  # type: ignore[untyped-decorator]
def _copy(table, num_blocks, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(1)
    source = tl.load(table + block)
    target = tl.load(table + num_blocks + block)
    words = tl.load(table + 2 * num_blocks + block)
    narrow = tl.load(table + 3 * num_blocks + block)
    start = tl.program_id(0).to(tl.int64) * tile
    while start < words:
        at = start + tl.arange(0, tile)
        inside = at < words
        if narrow == 1:
            byte = tl.load(source.to(tl.pointer_type(tl.uint8)) + at, mask=inside)
            tl.store(target.to(tl.pointer_type(tl.uint8)) + at, byte, mask=inside)
        else:
            word = tl.load(source.to(tl.pointer_type(tl.int64)) + at, mask=inside)
            tl.store(target.to(tl.pointer_type(tl.int64)) + at, word, mask=inside)
        start += tl.num_programs(0) * tile
