"""Counts read into memory: checked, bounded, and made dense."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from swiftbalancer.errors import RecordingError

MAX_CELLS = 1 << 28
"""Bound of steps x layers x experts of formats that are read into memory: 1 GiB of float32."""
MAX_GAPS = 1000
"""How many cells one count may stand for: a few lines with large ids must not become a huge array."""
FREE_CELLS = 1 << 20
"""Arrays up to this size may be as empty as they like."""
CountArray = NDArray[np.float32]


def dense(counts: Mapping[tuple[int, int], CountArray], num_experts: int, path: Path) -> CountArray:
    """`[steps, layers, experts]` from `[experts]` rows by step and layer; what is missing is 0."""
    steps = {value: index for index, value in enumerate(sorted({step for step, _ in counts}))}
    layers = {value: index for index, value in enumerate(sorted({layer for _, layer in counts}))}
    check_cells((len(steps), len(layers), num_experts), len(counts) * num_experts, path)
    out = np.zeros((len(steps), len(layers), num_experts), np.float32)
    for (step, layer), row in counts.items():
        out[steps[step], layers[layer]] = row
    return out


def numbers(values: ArrayLike, path: Path) -> CountArray:
    """`values` as float32; raises `RecordingError` if they are no counts or too many."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or array.ndim < 2:
        raise RecordingError(f"{path}: holds {array.dtype} of shape {array.shape}, expected counts")
    if array.size > MAX_CELLS:
        raise RecordingError(f"{path}: {array.size} values, at most {MAX_CELLS} are read into memory")
    return array.astype(np.float32)


def check_cells(shape: tuple[int, int, int], num_counts: int, path: Path) -> None:
    """Raises `RecordingError` if `[steps, layers, experts]` is too large to be made from so many counts."""
    steps, layers, experts = shape
    cells = steps * layers * experts
    if cells > MAX_CELLS:
        raise RecordingError(
            f"{path}: {steps} steps x {layers} layers x {experts} experts; at most {MAX_CELLS} cells are read into "
            "memory, larger recordings must come as .npy"
        )
    if cells > max(FREE_CELLS, MAX_GAPS * num_counts):
        raise RecordingError(
            f"{path}: {num_counts} counts for {steps} steps x {layers} layers x {experts} experts; are the ids right?"
        )
