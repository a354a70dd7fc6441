"""An engine as the worker sees it: a hello, plan requests for a small model, and ways to wait for answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from swiftbalancer.config import from_dict, to_dict
from swiftbalancer.dispatch import uniform_table
from swiftbalancer.link import WorkerLink
from swiftbalancer.mailbox import Reply, RequestFailed
from swiftbalancer.placement import Placement
from swiftbalancer.plan import PlanKind
from swiftbalancer.topology import Topology
from swiftbalancer.wire import Arrays, Hello, Measured, ModelSpec, PlanRequest, specs

ROOT = Path(__file__).resolve().parents[2]
LAYERS, EXPERTS, SUB_WINDOWS = 2, 8, 3
TOPOLOGY = Topology.for_experts(EXPERTS, num_redundant=4, num_ranks=2)
PLACEMENT = Placement.initial(TOPOLOGY, EXPERTS, num_layers=LAYERS)
LONG_S = 60.0
"""Longer than any wait below takes, even on a busy machine."""


def hello(name: str = "engine", **settings: Any) -> Hello:
    """A hello with these settings in its configuration."""
    config = from_dict({"policy": {"name": "swift"}, **settings})
    return Hello(name, ModelSpec("tiny", LAYERS, EXPERTS, 2, 1 << 20), TOPOLOGY, to_dict(config))


def plan_request(number: int, *, kind: PlanKind = "placement", step: int = 96) -> tuple[PlanRequest, Arrays]:
    """A request whose loads depend on `number` only; 32 steps per sub-window."""
    rng = np.random.default_rng(number)
    arrays: Arrays = {
        "placement": PLACEMENT.physical_to_logical_map,
        "loads": rng.gamma(0.5, 1000.0, (SUB_WINDOWS, LAYERS, EXPERTS)).astype(np.float32),
        "table": uniform_table(PLACEMENT, 16),
    }
    request = PlanRequest(
        request=number,
        kind=kind,
        epoch=0,
        step=step,
        dispatch_kind="table",
        dispatch_width=16,
        staging_experts=4,
        steps_per_sub_window=32,
        measured=Measured(),
        arrays=specs(arrays),
    )
    return request, arrays


def wait_for(condition: Callable[[], Any], *, timeout_s: float = LONG_S) -> Any:
    """The first true value of `condition`; fails the test after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"nothing came of it within {timeout_s} s")


def ask(link: WorkerLink, number: int, **options: Any) -> Reply | RequestFailed:
    """The answer to a request, however long the link takes to be ready for it."""
    wait_for(lambda: link.request(*plan_request(number, **options)))
    answer: Reply | RequestFailed = wait_for(link.poll)
    return answer


def is_alive(pid: int) -> bool:
    """Whether a process runs and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def environment() -> dict[str, str]:
    """Ours, with the packages importable and numba's compiler off: start-up counts here, planning speed does not."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "worker", "adaptors"))
    return {**os.environ, "PYTHONPATH": path, "NUMBA_DISABLE_JIT": "1"}


class StandaloneWorker:
    """`swiftbalancer worker` as a process of its own; `log` is what it wrote."""

    def __init__(self, endpoint: str, *arguments: str, folder: Path) -> None:
        self.endpoint = endpoint
        self._log = folder / f"worker-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "swiftbalancer.cli", "worker", "--endpoint", endpoint, *arguments]
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(command, stderr=file, env=environment())

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_listening(self) -> StandaloneWorker:
        wait_for(lambda: "listening" in self.log or self.process.poll() is not None)
        assert self.process.poll() is None, self.log
        return self

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(LONG_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LONG_S)
