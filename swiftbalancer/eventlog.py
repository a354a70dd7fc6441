"""A JSONL file of what happened, one object a line, written by its own thread so that no step waits for a disk."""

from __future__ import annotations

import logging
import queue
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from swiftbalancer.errors import ConfigError
from swiftbalancer.interpreter_lock import stand_back
from swiftbalancer.metrics import Metrics
from swiftbalancer.wire import Hello, Outcome

log = logging.getLogger(__name__)
MAX_QUEUED = 256
FORMAT_VERSION = 1


class EventLog:
    """Appends to `path`. Lines that find the queue full, or the disk, are counted in `metrics` and forgotten.

    A run begins with `{"event": "start", "version": 1, ...}`; `window` lines carry the tokens per expert, so that
    `swiftbalancer replay` can read the file; `cycle` lines say how a plan ended.
    """

    def __init__(self, path: str | Path, metrics: Metrics) -> None:
        """Raises `ConfigError` if the file cannot be opened for appending."""
        self._metrics = metrics
        try:
            self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"metrics.event_log: {path}: cannot be written: {error.strerror}") from None
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_QUEUED)
        self._thread = threading.Thread(target=self._main, name="swiftbalancer-event-log", daemon=True)
        self._thread.start()

    def start(self, hello: Hello) -> None:
        """Who writes, for which model on which ranks."""
        described = {"engine": hello.engine, "model": hello.model, "topology": hello.topology}
        self._put({"event": "start", "version": FORMAT_VERSION, **described})

    def window(self, *, step: int, loads: ArrayLike) -> None:
        """Tokens per expert `[layers, experts]` of the sub-window that ended at `step`."""
        rounded = np.rint(np.asarray(loads, np.float64)).astype(np.int64)
        self._put({"event": "window", "step": step, "loads": rounded})

    def cycle(self, outcome: Outcome) -> None:
        """How a plan ended."""
        self._put({"event": "cycle", **{name: getattr(outcome, name) for name in outcome.__struct_fields__}})

    def close(self, timeout_s: float) -> None:
        """Writes what is queued and closes the file, within `timeout_s`."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _put(self, event: dict[str, Any]) -> None:
        try:
            self._queue.put_nowait({"time": time.time(), **event})
        except queue.Full:
            self._metrics.lost_log_lines += 1

    def _main(self) -> None:
        stand_back()
        warned = False
        while (event := self._queue.get()) is not None:
            try:
                self._file.write(msgspec.json.encode(event, enc_hook=_plain) + b"\n")
            except OSError as error:
                self._metrics.lost_log_lines += 1
                if not warned:
                    log.warning("the event log cannot be written, lines are lost: %s", error.strerror)
                warned = True
        self._file.close()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):  # row by row, so that others get the interpreter lock in between
        return list(value) if value.ndim > 1 else value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in an event")
