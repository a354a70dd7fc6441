"""What the kernels that sum and copy experts work through: a table on the device, of a row for each of their tensors.

Launches never change, so that they can be recorded; the table does, from batch to batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HEADER = 2
"""How many rows follow, and how many belong to an expert."""
COLUMNS = 4
READ, WRITE, BYTES, FIRST_WORD = range(COLUMNS)
"""Addresses on the device to read from and to write to, 0 for none; bytes, contiguous; the number of the first word,
where an expert's words are counted through its tensors."""


def table_size(num_segments: int) -> int:
    """Entries of a table of so many rows."""
    return HEADER + COLUMNS * num_segments


def first_words(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The column `FIRST_WORD` for tensors of `sizes` `[..., tensors]` bytes.

    A tensor counts as bytes / 4 words of int32 if that is whole, else as words of a byte.
    """
    words = np.where(sizes % 4 != 0, sizes, sizes // 4)
    first: NDArray[np.int64] = np.cumsum(words, axis=-1) - words
    return first


def segment_table(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The table of `rows` `[experts, tensors, 4]`."""
    return np.concatenate([[rows.shape[0] * rows.shape[1], rows.shape[1]], rows.reshape(-1)])
