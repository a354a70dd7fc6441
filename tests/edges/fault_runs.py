"""Starts ranks that live through faults, and gathers what they report."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("faulty_rank.py")
QUICK: dict[str, Any] = {
    "policy": {"name": "random"},
    "window": {"sub_window_steps": 8, "sub_windows": 2, "replan_sub_windows": 2},
    "agreement": {"idle_round_steps": 4, "deadline_s": 20.0},
    "transport": {"deadline_s": 4.0},
    "worker": {"plan_timeout_s": 4.0, "start_timeout_s": 100.0, "restart_backoff_s": 0.1, "niceness": 0},
    "breaker": {"max_failures": 1000},
}
"""Short windows and deadlines; plans that move something every time."""
TIMEOUT_S = 400.0


@dataclass
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


def run_ranks(folder: Path, faults: list[str], *, seats: Sequence[Seat] = (Seat(), Seat()), **options: Any) -> Run:
    """Serves with these faults, one rank on each seat; `options` are those of `faulty_rank`."""
    out, settings = folder / "out", folder / "options.json"
    wanted = {"out": str(out), "faults": faults, "config": QUICK, "ranks": len(seats), **options}
    settings.write_text(json.dumps(wanted))
    path = os.pathsep.join(str(ROOT / part) for part in ("", "worker", "adaptors"))
    shared = {"WORLD_SIZE": str(len(seats)), "MASTER_PORT": str(free_port()), "PYTHONPATH": path}
    # Plans are tiny here: interpreted kernels are quicker than starting a compiler with every worker.
    shared |= {"OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1"}
    processes = [
        subprocess.Popen(
            [*seat.before, sys.executable, str(SCRIPT), str(settings)],
            env={**os.environ, **shared, **seat.environment, "RANK": str(rank)},
            stderr=(folder / f"log.{rank}").open("w"),
        )
        for rank, seat in enumerate(seats)
    ]
    codes = wait_for(processes, TIMEOUT_S)
    log = "\n".join((folder / f"log.{rank}").read_text() for rank in range(len(seats)))
    reports = [Path(f"{out}.{rank}") for rank in range(len(seats))]
    return Run([json.loads(r.read_text()) for r in reports if r.exists()], log, codes)


def wait_for(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """Exit codes; when one process fails, the others have half a minute to notice."""
    end = time.monotonic() + timeout_s
    failed = False
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        if not failed and any(p.poll() for p in processes):
            failed, end = True, time.monotonic() + 30.0
        time.sleep(0.1)
    for process in processes:
        process.kill()
    return [process.wait() for process in processes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quick_to_give_up() -> dict[str, Any]:
    return {**QUICK, "agreement": {"idle_round_steps": 4, "deadline_s": 2.0}}


def assert_exact(rank: dict[str, Any]) -> None:
    clean = {"wrong_outputs": 0, "wrong_maps": 0, "epochs_apart": 0, "raised": ""}
    clean["changed_without_commit"] = 0
    assert rank["watch"] == {**rank["watch"], **clean}


LEFT = ("threads_left", "native_threads_left", "sockets_left", "shared_memory_left", "worker_left", "folder_left")


def assert_nothing_left(rank: dict[str, Any]) -> None:
    assert rank["close_s"] < 10, f"rank {rank['rank']} took {rank['close_s']:.1f} s to close"
    left = {name: rank[name] for name in LEFT if rank[name]}
    assert not left, f"rank {rank['rank']}, closed, still has {left}"
