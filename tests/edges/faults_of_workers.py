"""Faults of the worker process, and of what it says."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from typing_extensions import override

from swiftbalancer.cycle import Phase
from tests.edges.fault import Fault, Place


class SignalWorker(Fault):
    """The worker process gets a signal, at once or in a given phase: SIGKILL ends it, SIGSTOP makes it silent."""

    def __init__(self, number: signal.Signals, phase: Phase | None = None) -> None:
        super().__init__()
        self._number, self._phase = number, phase

    @override
    def begin(self, place: Place) -> None:
        if self._phase is None:
            self._send(place)

    @override
    def tick(self, place: Place) -> None:
        if not self.fired and place.balancer.phase is self._phase:
            self._send(place)

    def _send(self, place: Place) -> None:
        pid = place.link.worker_pid
        assert pid is not None
        os.kill(pid, self._number)
        self.fired = True


class KillWorkerAtWork(Fault):
    """SIGKILL while a request is at the worker, which is held up so that there is one."""

    _pid: int | None = None

    @override
    def begin(self, place: Place) -> None:
        self._pid = place.link.worker_pid
        assert self._pid is not None
        os.kill(self._pid, signal.SIGSTOP)

    @override
    def tick(self, place: Place) -> None:
        if not self.fired and self._pid is not None and place.link._mailbox.outstanding is not None:
            os.kill(self._pid, signal.SIGKILL)
            self.fired = True


class ScriptWorker(Fault):
    """The scripted worker commits an offence at its next answer."""

    def __init__(self, offence: str) -> None:
        super().__init__()
        self._offence = offence

    @override
    def begin(self, place: Place) -> None:
        draft = place.control.with_suffix(".draft")
        draft.write_text(self._offence)
        draft.rename(place.control)

    @override
    def tick(self, place: Place) -> None:
        self.fired = self.fired or not place.control.exists()


class RemoveEndpoint(Fault):
    """The socket's folder vanishes, and with the worker's death the connection too."""

    @override
    def begin(self, place: Place) -> None:
        endpoint, pid = place.link.endpoint, place.link.worker_pid
        assert endpoint is not None and pid is not None
        shutil.rmtree(Path(endpoint.removeprefix("ipc://")).parent)
        os.kill(pid, signal.SIGKILL)
        self.fired = True
