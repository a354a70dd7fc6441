"""Engine ranks as processes: started together, waited for, ended when they hang; and what they reported."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.edges.engines import environment

TIMEOUT_S = 400.0
NOTICE_S = 30.0
"""How long ranks may outlive one that has failed."""


@dataclass(frozen=True)
class Run:
    """What the ranks reported, by rank, everything they logged, and how they ended."""

    ranks: list[dict[str, Any]]
    log: str
    exit_codes: list[int]


@dataclass(frozen=True)
class Seat:
    """Where one rank runs: a command to put before its own, and what to add to its environment."""

    before: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)


def run_script(script: Path, options: dict[str, Any], *, seats: Sequence[Seat], timeout_s: float = TIMEOUT_S) -> Run:
    """The script once for every seat, with a file of `options` and RANK, WORLD_SIZE and MASTER_PORT.

    Beside `options["out"]`, a path, every rank leaves its log, and its report as JSON under `out` and its number.
    """
    out = Path(options["out"])
    settings = out.with_name("options.json")
    settings.write_text(json.dumps(options))
    # One thread each: there are more processes than cores.
    shared = {"WORLD_SIZE": str(len(seats)), "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, seat in enumerate(seats):
        command = [*seat.before, sys.executable, str(script), str(settings)]
        env = {**environment(), **shared, **seat.environment, "RANK": str(rank)}
        with out.with_name(f"log.{rank}").open("w") as log:
            processes.append(subprocess.Popen(command, env=env, stderr=log))
    codes = wait_for(processes, timeout_s)
    log_text = "\n".join(out.with_name(f"log.{rank}").read_text() for rank in range(len(seats)))
    reports = [Path(f"{out}.{rank}") for rank in range(len(seats))]
    return Run([json.loads(r.read_text()) for r in reports if r.exists()], log_text, codes)


def wait_for(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """Exit codes, negative by signal; -9 of those that had to be ended."""
    end = time.monotonic() + timeout_s
    failed = False
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        if not failed and any(p.poll() for p in processes):
            failed, end = True, time.monotonic() + NOTICE_S
        time.sleep(0.1)
    for process in processes:
        process.kill()
    return [process.wait() for process in processes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
