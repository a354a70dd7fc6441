"""Loads to replay, whatever they were recorded by: one shape, read as needed, never all at once."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.errors import RecordingError
from swiftbalancer.load import checked_load
from swiftbalancer.topology import Topology
from swiftbalancer_worker.recording import MANIFEST, Recording, load_array

FloatArray = NDArray[np.float64]
MAX_ELEMENTS = 1 << 33
"""Bound of steps x layers x experts: 58 layers of 288 experts for half a million steps."""
RELEASE_EVERY_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Tokens per expert over time: pieces `[steps, layers, experts]`, often memory-mapped, one after another.

    `steps_per_entry`: forward passes each entry covers. What the source does not know is None or 0.
    """

    name: str
    pieces: Sequence[NDArray[Any]]
    steps_per_entry: int = 1
    model: str = ""
    topology: Topology | None = None
    expert_bytes: int = 0

    def __post_init__(self) -> None:
        shapes = {piece.shape[1:] for piece in self.pieces}
        if not self.pieces or len(shapes) != 1 or len(next(iter(shapes))) != 2 or not len(self):
            raise RecordingError(
                f"{self.name}: expected loads of shape [steps, layers, experts], all alike; got {shapes}"
            )
        steps, layers, experts = self.shape
        if min(layers, experts) < 1 or steps * layers * experts > MAX_ELEMENTS:
            raise RecordingError(f"{self.name}: {steps} steps x {layers} layers x {experts} experts is out of bounds")
        if any(piece.dtype.kind not in "iuf" for piece in self.pieces):
            raise RecordingError(f"{self.name}: loads must be numbers, got {self.pieces[0].dtype}")

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Steps, layers, experts."""
        layers, experts = self.pieces[0].shape[1:]
        return len(self), int(layers), int(experts)

    def at(self, step: int) -> FloatArray:
        """`[layers, experts]` float64 of one step; raises `InvalidLoad` if it has NaN or negative values."""
        starts = self._starts()
        piece = bisect.bisect_right(starts, step) - 1
        return checked_load(self.pieces[piece][step - starts[piece]], name=f"{self.name}, step {step}")

    def between(self, first: int, last: int) -> FloatArray:
        """`[last - first, layers, experts]` float64."""
        return np.stack([self.at(step) for step in range(first, last)])

    def head(self, steps: int) -> Trace:
        """The first `steps` steps."""
        pieces, left = [], steps
        for piece in self.pieces:
            pieces.append(piece[:left])
            left -= len(pieces[-1])
            if left <= 0:
                break
        return replace(self, pieces=pieces)

    def __iter__(self) -> Iterator[FloatArray]:
        """The steps in order. What was read of mapped files is let go on the way, so that memory does not grow."""
        read = 0
        for step in range(len(self)):
            loads = self.at(step)
            read += loads.nbytes
            if read > RELEASE_EVERY_BYTES:
                read = 0
                self._release()
            yield loads

    def _release(self) -> None:
        """Takes the pages of mapped files out of our memory; the system still has them cached while it has room."""
        for piece in self.pieces:
            mapped = getattr(piece, "_mmap", None)
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _starts(self) -> list[int]:
        starts, total = [], 0
        for piece in self.pieces:
            starts.append(total)
            total += len(piece)
        return starts


def open_trace(path: Path) -> Trace:
    """The loads in a recording folder, an event log (`.jsonl`) or a file `convert` reads; raises `RecordingError`."""
    from swiftbalancer_worker.foreign import read_foreign

    if path.is_dir() and ((path / MANIFEST).exists() or any(path.glob(f"*/{MANIFEST}"))):
        return _of_recording(path)
    if not path.exists():
        raise RecordingError(f"{path}: no such file or folder")
    if path.suffix == ".npy":
        return Trace(path.name, [load_array(path, None)])
    return read_foreign(path)


def _of_recording(folder: Path) -> Trace:
    if not (folder / MANIFEST).exists():
        inside = sorted(entry.parent for entry in folder.glob(f"*/{MANIFEST}"))
        if len(inside) > 1:
            known = ", ".join(str(entry) for entry in inside)
            raise RecordingError(f"{folder}: holds several recordings, name one of them: {known}")
        folder = inside[0]
    recording = Recording(folder)
    if not recording.chunks:
        raise RecordingError(f"{folder}: the recording has no whole chunk yet")
    manifest = recording.manifest
    return Trace(
        name=folder.name,
        pieces=[chunk.loads for chunk in recording.chunks],
        steps_per_entry=manifest.steps_per_sub_window,
        model=manifest.model.name,
        topology=manifest.topology,
        expert_bytes=manifest.model.expert_bytes,
    )
