"""What one engine's requests and news say, as a recording: each sub-window once, though requests overlap."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.errors import RecordingError
from swiftbalancer.wire import Arrays, Hello, Message, NothingToDo, Outcome, PlanReply, PlanRequest, num_moves
from swiftbalancer_worker.recording import Manifest, OutcomeEvent, PlanEvent, WindowIndex
from swiftbalancer_worker.recording_writer import RecordingWriter

log = logging.getLogger(__name__)
REMEMBERED = 4
"""Placements kept for sub-windows that come late."""


class Journal:
    """Records one engine below `folder`, in a folder of its name. Trouble with the disk is logged, never raised."""

    def __init__(self, folder: Path, hello: Hello, *, max_bytes: int) -> None:
        self._folder = folder / folder_name(hello.engine)
        self._hello = hello
        self._max_bytes = max_bytes
        self._writer: RecordingWriter | None = None
        self._broken = False
        self._placements: dict[int, NDArray[np.int32]] = {}

    def request(self, request: PlanRequest, arrays: Arrays) -> None:
        """Appends the sub-windows that no earlier request brought."""
        writer = self._open(request)
        if writer is None:
            return
        loads: NDArray[np.float32] = arrays["loads"]
        if request.step < writer.last_step:
            writer.last_step = -1  # the engine has started again and counts from 0
        self._remember(request.epoch, arrays["placement"])
        now, step_s = time.time(), request.measured.seconds_per_step
        epochs = request.window_epochs or [request.epoch] * len(loads)
        apart = request.steps_per_sub_window
        steps = request.window_steps or [request.step - apart * ago for ago in reversed(range(len(loads)))]
        for window, epoch, step in zip(loads, epochs, steps, strict=True):
            if step > writer.last_step and step >= 0:
                entry = WindowIndex(step, now - (request.step - step) * step_s, epoch, step_s)
                writer.window(entry, window, self._placements.get(epoch))

    def _remember(self, epoch: int, placement: NDArray[np.int32]) -> None:
        """Sub-windows may come after the placement they were seen under was left."""
        self._placements[epoch] = np.array(placement)
        while len(self._placements) > REMEMBERED:
            del self._placements[next(iter(self._placements))]

    def answered(self, request: PlanRequest, message: Message) -> None:
        """Appends the plan, or why there is none."""
        if self._writer is None or request.observe_only or not isinstance(message, PlanReply | NothingToDo):
            return
        self._writer.event(
            PlanEvent(
                time=time.time(),
                request=request.request,
                kind=message.kind if isinstance(message, PlanReply) else "nothing",
                epoch=request.epoch,
                moves=num_moves(message) if isinstance(message, PlanReply) else 0,
                imbalance_now=message.imbalance_now,
                imbalance_predicted=message.imbalance_predicted,
                plan_seconds=message.plan_seconds,
                reason=message.reason if isinstance(message, NothingToDo) else "",
            )
        )

    def outcome(self, outcome: Outcome) -> None:
        """Appends how a cycle ended."""
        if self._writer is None:
            return
        known = {name: getattr(outcome, name) for name in OutcomeEvent.__struct_fields__ if name != "time"}
        self._writer.event(OutcomeEvent(time=time.time(), **known))

    def idle(self) -> None:
        """Writes what has waited for long."""
        if self._writer is not None:
            self._writer.flush_if_due()

    def close(self) -> None:
        """Writes the rest."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, request: PlanRequest) -> RecordingWriter | None:
        if self._writer is None and not self._broken:
            manifest = Manifest(
                engine=self._hello.engine,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                model=self._hello.model,
                topology=self._hello.topology,
                steps_per_sub_window=request.steps_per_sub_window,
            )
            try:
                self._writer = RecordingWriter(self._folder, manifest, max_bytes=self._max_bytes)
            except RecordingError as error:
                self._broken = True
                log.warning("no recording of engine=%s: %s", self._hello.engine, error)
        return self._writer


def folder_name(engine: str) -> str:
    """An engine's name as a folder's: safe characters, and a digest where that changed something."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", engine).strip(".-")[:80]
    if safe == engine:
        return safe
    return f"{safe or 'engine'}-{hashlib.blake2b(engine.encode(), digest_size=4).hexdigest()}"
