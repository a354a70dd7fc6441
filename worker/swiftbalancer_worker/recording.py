"""Recordings: an append-only folder of what the worker saw and did, whole after any crash.

    manifest.json                       format, version, engine, model, topology
    chunk-00000000.loads.npy            [windows, layers, experts] float32, tokens per sub-window
    chunk-00000000.placements.npy       [epochs, layers, slots] int32, the placements these windows were seen under
    chunk-00000000.json                 `ChunkIndex`: steps, times and epochs of the windows, events, checksums

Files are written under another name and renamed; the index comes last, so a chunk is there as a whole or not at
all. The arrays can be memory-mapped.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from swiftbalancer.errors import RecordingError
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer.wire import ModelSpec

FORMAT = "swiftbalancer-recording"
VERSION = 1
MANIFEST = "manifest.json"
MAGIC = b"\x93NUMPY"
CHUNK_NAME = re.compile(r"chunk-(\d{8})\.json")
Natural = Annotated[int, Meta(ge=0, le=2**62)]


class Manifest(msgspec.Struct, frozen=True):
    """What a recording is of."""

    engine: str
    created: str
    model: ModelSpec
    topology: Topology
    steps_per_sub_window: Annotated[int, Meta(ge=1)] = 1
    format: Literal["swiftbalancer-recording"] = "swiftbalancer-recording"
    version: int = VERSION


class WindowIndex(msgspec.Struct, frozen=True):
    """One sub-window: the step it ended at, when it was seen (Unix time), placement epoch, measured step time."""

    step: Natural
    time: float
    epoch: Natural
    seconds_per_step: float = 0.0


class PlanEvent(msgspec.Struct, frozen=True, tag="plan"):
    """A plan was made; imbalances are predictions, means over layers."""

    time: float
    request: Natural
    kind: str
    epoch: Natural
    moves: Natural
    imbalance_now: float
    imbalance_predicted: float
    plan_seconds: float
    reason: str = ""


class OutcomeEvent(msgspec.Struct, frozen=True, tag="outcome"):
    """A cycle ended; `imbalance` was measured over the last sub-window."""

    time: float
    request: Natural
    kind: str
    committed: bool
    reason: str
    epoch: Natural
    step: Natural
    moves: Natural
    moved_bytes: Natural
    imbalance: float


RecordedEvent = PlanEvent | OutcomeEvent


class ChunkIndex(msgspec.Struct, frozen=True):
    """The index of one chunk; the CRCs are of the array files' bytes."""

    windows: list[WindowIndex]
    placement_epochs: list[Natural]
    events: list[RecordedEvent]
    loads_crc32: Natural
    placements_crc32: Natural


@dataclass(frozen=True, slots=True)
class Chunk:
    """One whole chunk of a recording: index and memory-mapped arrays."""

    index: ChunkIndex
    loads: NDArray[np.float32]
    placements: NDArray[np.int32]


class Recording:
    """A recording on disk, read without loading it. `chunks` are whole ones, oldest first."""

    def __init__(self, folder: Path) -> None:
        """Raises `RecordingError` if `folder` holds no recording, or one this version cannot read."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.chunks: list[Chunk] = []
        self.skipped = 0
        """Chunks at the end that were cut off or damaged, and are not in `chunks`."""
        numbers = chunks_in(folder)
        for number in numbers:
            try:
                self.chunks.append(self._chunk(number))
            except RecordingError:
                if number != numbers[-1]:
                    raise
                self.skipped = 1

    @property
    def num_windows(self) -> int:
        return sum(len(chunk.loads) for chunk in self.chunks)

    @property
    def windows(self) -> list[WindowIndex]:
        """Step, time and epoch of every window."""
        return [window for chunk in self.chunks for window in chunk.index.windows]

    @property
    def events(self) -> list[RecordedEvent]:
        """Plans and outcomes in order."""
        return [event for chunk in self.chunks for event in chunk.index.events]

    def placements(self) -> dict[int, Placement]:
        """The placements by epoch."""
        topology, experts = self.manifest.topology, self.manifest.model.num_experts
        return {
            epoch: Placement(topology, experts, np.asarray(rows))
            for chunk in self.chunks
            for epoch, rows in zip(chunk.index.placement_epochs, chunk.placements, strict=True)
        }

    def _chunk(self, number: int) -> Chunk:
        stem = self.folder / f"chunk-{number:08d}"
        index = read_index(self.folder, number)
        model, slots = self.manifest.model, self.manifest.topology.num_slots
        loads = load_array(Path(f"{stem}.loads.npy"), np.float32)
        placements = load_array(Path(f"{stem}.placements.npy"), np.int32)
        if loads.shape != (len(index.windows), model.num_layers, model.num_experts):
            raise RecordingError(f"{stem}.loads.npy: shape {loads.shape} does not fit index and manifest")
        if placements.shape != (len(index.placement_epochs), model.num_layers, slots):
            raise RecordingError(f"{stem}.placements.npy: shape {placements.shape} does not fit index and manifest")
        return Chunk(index, loads, placements)

    def check(self) -> None:
        """Compares all checksums; raises `RecordingError` naming a damaged file."""
        for number, chunk in zip(chunks_in(self.folder), self.chunks, strict=False):
            stem = f"chunk-{number:08d}"
            for name, crc in (("loads", chunk.index.loads_crc32), ("placements", chunk.index.placements_crc32)):
                path = self.folder / f"{stem}.{name}.npy"
                if zlib.crc32(path.read_bytes()) != crc:
                    raise RecordingError(f"{path}: damaged, its checksum does not match")


def chunks_in(folder: Path) -> list[int]:
    """Numbers of the chunks whose index is there, ascending."""
    try:
        names = [CHUNK_NAME.fullmatch(entry.name) for entry in os.scandir(folder)]
    except OSError as error:
        raise RecordingError(f"{folder}: cannot be read: {error.strerror}") from None
    return sorted(int(name[1]) for name in names if name)


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; raises `RecordingError` if there is none, or it is not ours."""
    path = folder / MANIFEST
    manifest: Manifest = _decode(path, Manifest)
    if manifest.version != VERSION:
        raise RecordingError(f"{path}: version {manifest.version}; this program reads version {VERSION}")
    return manifest


def read_index(folder: Path, number: int) -> ChunkIndex:
    """The index of one chunk; raises `RecordingError`."""
    index: ChunkIndex = _decode(folder / f"chunk-{number:08d}.json", ChunkIndex)
    return index


def load_array(path: Path, dtype: Any) -> NDArray[Any]:
    """A memory-mapped `.npy` of this dtype, never unpickled; raises `RecordingError` if it is cut off or foreign."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise RecordingError(f"{path}: not a .npy file")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except RecordingError:
        raise
    except FileNotFoundError:
        raise RecordingError(f"{path}: missing") from None
    except Exception as error:  # numpy parses the header with Python's own tokenizer and evaluator
        raise RecordingError(f"{path}: not a whole .npy file: {error}") from None
    if not isinstance(array, np.ndarray) or (dtype is not None and array.dtype != dtype):
        raise RecordingError(f"{path}: holds {getattr(array, 'dtype', 'an archive')}, expected {np.dtype(dtype)}")
    return array


def _decode(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise RecordingError(f"{path}: missing; not a recording") from None
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # values refuse themselves, e.g. a topology that does not divide
        raise RecordingError(f"{path}: damaged or foreign: {error}") from None
