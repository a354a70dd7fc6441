"""The worker process as its parent sees it: started, watched, ended. Used on the link's thread only."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swiftbalancer.config import WorkerConfig
from swiftbalancer.errors import WorkerLost

log = logging.getLogger("swiftbalancer.worker")

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
MAX_LINE_BYTES = 8192
LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARNING": logging.WARNING, "ERROR": logging.ERROR}
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
"""Ctrl-C is for the engine. No session of its own where that can be helped: Linux may schedule whole sessions against
each other (autogroup), and niceness does not count between them. Beside engines that spin, a worker was seen to get a
hundredth of a core."""


class WorkerProcess:
    """One life of a spawned worker.

    Its stdin is a pipe that nobody writes to: the worker ends when the pipe closes, and the pipe's error state
    tells the parent at once that the worker has ended. Its stderr becomes log records of ours.
    """

    def __init__(self, endpoint: str, config: WorkerConfig, *, extra: Sequence[str] = ()) -> None:
        """Starts the process; raises `WorkerLost` if the system refuses."""
        command = [sys.executable, "-m", "swiftbalancer_worker", "--endpoint", endpoint]
        command += [
            "--parent",
            str(os.getpid()),
            "--log-level",
            config.log_level,
            *_placement_flags(config),
            *extra,
        ]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_environment(),
                **OWN_GROUP,
            )
        except OSError as error:
            raise WorkerLost(f"the worker cannot be started ({command[0]}): {error}") from None
        assert self._process.stdin is not None and self._process.stderr is not None
        self.life_fd = self._process.stdin.fileno()
        """Write end of a pipe: an error on it means that the worker has ended."""
        self.stderr_fd = self._process.stderr.fileno()
        os.set_blocking(self.stderr_fd, False)
        self._partial = b""
        self._last_lines: deque[str] = deque(maxlen=5)

    @property
    def pid(self) -> int:
        return self._process.pid

    def read_stderr(self) -> bool:
        """Forwards what the worker has written to the log; False once it has closed its end."""
        try:
            block = os.read(self.stderr_fd, 65536)
        except BlockingIOError:
            return True
        *lines, self._partial = (self._partial + block).split(b"\n")
        self._partial = self._partial[:MAX_LINE_BYTES]
        for line in lines:
            self._forward(line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip())
        return bool(block)

    def _forward(self, line: str) -> None:
        if not line:
            return
        self._last_lines.append(line)
        log.log(LEVELS.get(line.split(" ", 1)[0], logging.WARNING), "%s", line)

    def end_reason(self) -> str:
        """How the process ended, with the last thing it said; call once it is gone or should be."""
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
        self.read_stderr()
        how = (
            "is still running" if code is None else f"was ended by signal {-code}" if code < 0 else f"exited: {code}"
        )
        said = f"; it said: {self._last_lines[-1]}" if self._last_lines else ""
        return f"worker process {self.pid} {how}{said}"

    def kill(self) -> None:
        """SIGKILL, which also ends a stopped process, and reaps it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._reap(5.0)

    def stop(self, timeout_s: float) -> None:
        """Asks the worker to end by closing its stdin; SIGKILL after `timeout_s`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            log.warning("worker process %d did not end within %.1f s: killed", self.pid, timeout_s)
            self._process.kill()
        self._reap(5.0)

    def _reap(self, timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        for pipe in (self._process.stdin, self._process.stderr):
            if pipe is not None:
                pipe.close()


def _placement_flags(config: WorkerConfig) -> list[str]:
    flags = ["--niceness", str(config.niceness)]
    if config.cpus is not None:
        flags += ["--cpus", ",".join(str(c) for c in config.cpus)]
    return flags


def _environment() -> dict[str, str]:
    """Our environment with one numeric thread, and with our packages importable if they are not installed."""
    return {**os.environ, **ONE_THREAD, **import_path("swiftbalancer", "swiftbalancer_worker")}


def import_path(*packages: str) -> dict[str, str]:
    """The `PYTHONPATH` with which a child process imports our packages as this one does; empty if installed.

    Raises `WorkerLost` if one of them is not there at all.
    """
    found = [importlib.util.find_spec(name) for name in packages]
    if None in found:
        raise WorkerLost(f"one of the packages {', '.join(packages)} is not installed; they come with swiftbalancer")
    folders = dict.fromkeys(str(Path(s.origin).parent.parent) for s in found if s and s.origin)
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    wanted = [f for f in folders if f not in installed]
    return {"PYTHONPATH": os.pathsep.join([*wanted, *filter(None, [os.environ.get("PYTHONPATH")])])} if wanted else {}
