"""Writes recordings (see `swiftbalancer_worker.recording`): append-only, whole after any crash, bounded in size."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from swiftbalancer.errors import RecordingError
from swiftbalancer_worker.recording import (
    MANIFEST,
    ChunkIndex,
    Manifest,
    RecordedEvent,
    WindowIndex,
    chunks_in,
    read_index,
    read_manifest,
)

log = logging.getLogger(__name__)
WINDOWS_PER_CHUNK = 64
BYTES_PER_CHUNK = 16 << 20
SECONDS_PER_CHUNK = 30.0


@dataclass(slots=True)
class _Pending:
    """What the next chunk will hold."""

    windows: list[WindowIndex] = field(default_factory=list)
    loads: list[NDArray[np.float32]] = field(default_factory=list)
    placements: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    events: list[RecordedEvent] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    @property
    def is_due(self) -> bool:
        many = len(self.windows) >= WINDOWS_PER_CHUNK or sum(a.nbytes for a in self.loads) >= BYTES_PER_CHUNK
        return many or (bool(self.windows or self.events) and time.monotonic() - self.since > SECONDS_PER_CHUNK)


class RecordingWriter:
    """Appends to the recording in `folder`; goes on where an earlier worker stopped.

    A disk that is full or gone costs the chunks that do not fit, never a plan: `lost_chunks` counts them.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, max_bytes: int) -> None:
        """Raises `RecordingError` if the folder cannot be used or belongs to another recording or writer."""
        self.folder = folder
        self.lost_chunks = 0
        self._max_bytes = max_bytes
        self._placements_shape = (-1, manifest.model.num_layers, manifest.topology.num_slots)
        self._pending = _Pending()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with contextlib.ExitStack() as refused:
                refused.callback(os.close, self._lock)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._next = self._resume(manifest)
                refused.pop_all()
        except BlockingIOError:
            raise RecordingError(f"{folder}: another worker is recording here") from None
        except OSError as error:
            raise RecordingError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
        self.last_step = self._last_step()

    def window(self, entry: WindowIndex, loads: NDArray[np.float32], placement: NDArray[np.int32] | None) -> None:
        """Appends a sub-window's `[layers, experts]` tokens, seen under `placement` `[layers, slots]`, if known."""
        self._pending.windows.append(entry)
        self._pending.loads.append(np.array(loads, np.float32))
        if placement is not None and entry.epoch not in self._pending.placements:
            self._pending.placements[entry.epoch] = np.array(placement, np.int32)
        self.last_step = entry.step
        self.flush_if_due()

    def event(self, event: RecordedEvent) -> None:
        """Appends an event."""
        self._pending.events.append(event)

    def flush_if_due(self) -> None:
        """Writes a chunk if enough has gathered or it has waited for long enough."""
        if self._pending.is_due:
            self.flush()

    def flush(self) -> None:
        """Writes what has gathered as one chunk."""
        pending, self._pending = self._pending, _Pending()
        if not pending.windows:
            self._pending.events = pending.events[-WINDOWS_PER_CHUNK:]
            return
        try:
            self._write(pending)
            self._make_room()
        except OSError as error:
            self.lost_chunks += 1
            with contextlib.suppress(OSError):
                self._forget_leftovers()
            log.warning(
                "recording %s: %d windows are lost: %s", self.folder, len(pending.windows), error.strerror or error
            )

    def close(self) -> None:
        """Writes the rest and lets the folder go."""
        self.flush()
        os.close(self._lock)

    def _write(self, pending: _Pending) -> None:
        stem = f"chunk-{self._next:08d}"
        epochs = list(pending.placements)
        placements = np.array([pending.placements[e] for e in epochs], np.int32)
        index = ChunkIndex(
            windows=pending.windows,
            placement_epochs=epochs,
            events=pending.events,
            loads_crc32=_save(self.folder / f"{stem}.loads.npy", np.stack(pending.loads)),
            placements_crc32=_save(
                self.folder / f"{stem}.placements.npy", placements.reshape(self._placements_shape)
            ),
        )
        _replace(self.folder / f"{stem}.json", msgspec.json.encode(index))
        self._next += 1

    def _make_room(self) -> None:
        """Removes the oldest chunks until the recording fits its bound; the newest stays in any case."""
        sizes = {
            n: sum(p.stat().st_size for p in self.folder.glob(f"chunk-{n:08d}.*")) for n in chunks_in(self.folder)
        }
        total = sum(sizes.values())
        for number in sorted(sizes)[:-1]:
            if total <= self._max_bytes:
                return
            _remove_chunk(self.folder, number)
            total -= sizes[number]

    def _resume(self, manifest: Manifest) -> int:
        path = self.folder / MANIFEST
        if path.exists():
            old = read_manifest(self.folder)
            if (old.model, old.topology) != (manifest.model, manifest.topology):
                raise RecordingError(
                    f"{self.folder}: holds a recording of another model or topology ({old.model.name})"
                )
        else:
            _replace(path, msgspec.json.encode(manifest))
        whole = chunks_in(self.folder)
        self._forget_leftovers()
        return whole[-1] + 1 if whole else 0

    def _forget_leftovers(self) -> None:
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)

    def _last_step(self) -> int:
        with contextlib.suppress(RecordingError):
            return read_index(self.folder, self._next - 1).windows[-1].step if self._next else -1
        return -1


def _save(path: Path, array: NDArray[Any]) -> int:
    """Writes an array under another name, renames it, and gives the CRC-32 of the file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    crc = zlib.crc32(temporary.read_bytes())
    temporary.replace(path)
    return crc


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _remove_chunk(folder: Path, number: int) -> None:
    """The index first: without it the rest is no chunk."""
    for name in ("json", "loads.npy", "placements.npy"):
        (folder / f"chunk-{number:08d}.{name}").unlink(missing_ok=True)
