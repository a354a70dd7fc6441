"""Faults on real processes: gloo ranks, the real worker, real transfers. Every one costs a cycle at most.

All transient faults run one after another in the same two processes; each has a committed cycle before and after.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.edges.faults import TRANSIENT

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("faulty_rank.py")
QUICK: dict[str, Any] = {
    "policy": {"name": "random"},
    "window": {"sub_window_steps": 8, "sub_windows": 2, "replan_sub_windows": 2},
    "agreement": {"idle_round_steps": 4, "deadline_s": 20.0},
    "transport": {"deadline_s": 2.0},
    "worker": {"plan_timeout_s": 3.0, "start_timeout_s": 100.0, "restart_backoff_s": 0.1, "niceness": 0},
    "breaker": {"max_failures": 1000},
}


@dataclass
class Run:
    """What the ranks reported, by rank, everything they logged, and how they ended."""

    ranks: list[dict[str, Any]]
    log: str
    exit_codes: list[int]
    seconds: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(folder: Path, faults: list[str], *, timeout_s: float = 400.0, **options: Any) -> Run:
    """Serves with these faults on two ranks."""
    out, settings = folder / "out", folder / "options.json"
    settings.write_text(json.dumps({"out": str(out), "faults": faults, "config": QUICK, **options}))
    path = os.pathsep.join(str(ROOT / part) for part in ("", "worker", "adaptors"))
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "PYTHONPATH": path}
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(settings)],
            env={**shared, "RANK": str(rank), "OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1"},
            stderr=(folder / f"log.{rank}").open("w"),
        )
        for rank in range(2)
    ]
    try:
        codes = [process.wait(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    log = "\n".join((folder / f"log.{rank}").read_text() for rank in range(2))
    reports = [Path(f"{out}.{rank}") for rank in range(2)]
    return Run([json.loads(r.read_text()) for r in reports if r.exists()], log, codes, time.monotonic() - began)


EVIDENCE: dict[str, tuple[str, str]] = {
    "worker killed": ("restarts", "was ended by signal 9"),
    "worker killed at work": ("restarts", "was ended by signal 9"),
    "worker stopped": ("restarts", "no answer to request"),
    "worker exits": ("restarts", "exited: 7"),
    "worker out of memory": ("requests_failed", "MemoryError"),
    "worker babbles": ("restarts", "the worker sent rubbish"),
    "worker sends too many frames": ("restarts", "the worker sent rubbish"),
    "worker sends an oversized header": ("restarts", "the worker sent rubbish"),
    "worker silent": ("restarts", "no answer to request"),
    "endpoint removed": ("restarts", "was ended by signal 9"),
    "plan for another topology": ("dropped", "plan_invalid"),
    "plan with a wrong digest": ("dropped", "plan_invalid"),
    "plan for a stale epoch": ("dropped", "plan_invalid"),
    "plan that misroutes": ("dropped", "plan_invalid"),
    "answer to an older request": ("restarts", "no answer to request"),
    "rank slow while idle": ("late", ""),
    "rank slow while receiving": ("late", ""),
    "rank slow while moving": ("late", ""),
    "broadcast damaged": ("dropped", "plan_damaged"),
    "broadcast failed": ("dropped", "broadcast_failed"),
    "maps cannot be prepared": ("dropped", "staging_failed"),
    "bit flipped in a transfer": ("dropped", "checksum"),
    "transfer never completes": ("dropped", "transfer_timeout"),
    "transfer breaks": ("dropped", "transfer_failed"),
}
"""What must have been noticed: a counter that rose, and a reason or a log line."""


@pytest.fixture(scope="module")
def transient(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_ranks(tmp_path_factory.mktemp("transient"), list(TRANSIENT))


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_cycle_is_the_most_it_costs_when(fault: str, transient: Run) -> None:
    [cost] = [c for c in transient.ranks[0]["costs"] if c["fault"] == fault]
    assert cost["fired"], "the fault was never injected"
    assert cost["recovered"], f"no cycle succeeded afterwards: {cost}"
    counter, reason = EVIDENCE[fault]
    if counter == "dropped":
        assert list(cost["dropped"]) == [reason] and cost["dropped"][reason] == 1
    elif counter == "late":
        assert not cost["dropped"] and transient.ranks[0]["late_rounds"] > 0
    else:
        assert cost[counter] == 1 and reason in transient.log


def test_outputs_stay_exact_through_all_of_them(transient: Run) -> None:
    assert transient.exit_codes == [0, 0]
    for rank in transient.ranks:
        assert rank["watch"]["passes"] > 1000
        assert rank["watch"] == {**rank["watch"], "wrong_slots": 0, "wrong_maps": 0, "epochs_apart": 0, "raised": ""}
        assert not rank["off_reason"]


def test_nothing_is_left_after_a_run_full_of_faults(transient: Run) -> None:
    for rank in transient.ranks:
        assert_nothing_left(rank)


def test_losing_an_idle_round_switches_balancing_off_and_serving_goes_on(tmp_path: Path) -> None:
    pytest.skip("needs a fault script that ends without a recovery")


def assert_nothing_left(rank: dict[str, Any]) -> None:
    assert rank["close_s"] < 10
    assert rank["threads_left"] == []
    assert not rank["worker_left"] and not rank["folder_left"]
