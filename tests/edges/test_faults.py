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
    codes = wait_for(processes, timeout_s)
    log = "\n".join((folder / f"log.{rank}").read_text() for rank in range(2))
    reports = [Path(f"{out}.{rank}") for rank in range(2)]
    return Run([json.loads(r.read_text()) for r in reports if r.exists()], log, codes, time.monotonic() - began)


def wait_for(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """Exit codes; when one process fails, the others have half a minute to notice."""
    end = time.monotonic() + timeout_s
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        if any(p.poll() for p in processes) and end > time.monotonic() + 30.0:
            end = time.monotonic() + 30.0
        time.sleep(0.1)
    for process in processes:
        process.kill()
    return [process.wait() for process in processes]


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
        assert not cost["dropped"] and cost["late_rounds"] > 0
    else:
        assert cost[counter] == 1 and reason in transient.log


def test_outputs_stay_exact_through_all_of_them(transient: Run) -> None:
    assert transient.exit_codes == [0, 0]
    for rank in transient.ranks:
        assert rank["watch"]["passes"] > 1000
        assert_exact(rank)
        assert not rank["off_reason"]


def test_nothing_is_left_after_a_run_full_of_faults(transient: Run) -> None:
    for rank in transient.ranks:
        assert_nothing_left(rank)


def test_losing_an_idle_round_switches_balancing_off_and_serving_goes_on(tmp_path: Path) -> None:
    run = run_ranks(tmp_path, ["round lost while idle"], config=quick_to_give_up())
    assert run.exit_codes == [0, 0]
    for rank in run.ranks:
        assert rank["phase"] == "OFF" and "round" in rank["off_reason"]
        assert_exact(rank)
        assert_nothing_left(rank)
    assert run.log.count("balancing is off, serving goes on as placed") == 2


def test_a_rank_in_doubt_about_a_commit_raises_to_the_engine(tmp_path: Path) -> None:
    run = run_ranks(tmp_path, ["round lost in doubt"], config=quick_to_give_up())
    for rank in run.ranks:
        assert rank["watch"]["raised"].startswith("AgreementLost: voted to commit epoch")
        assert_nothing_left(rank)


@pytest.mark.parametrize("phase", ["idle", "moving"])
def test_survivors_of_a_dead_rank_end_within_seconds(phase: str, tmp_path: Path) -> None:
    run = run_ranks(tmp_path, [f"rank dies while {phase}"], config=quick_to_give_up())
    assert run.exit_codes == [0, -9]
    [survivor] = run.ranks
    assert survivor["watch"]["raised"], "the engine's own collective must have failed"
    assert survivor["watch"]["wrong_slots"] == survivor["watch"]["wrong_maps"] == 0
    assert_nothing_left(survivor)


@pytest.mark.parametrize("phase", ["IDLE", "RECEIVING", "MOVING"])
def test_shutting_down_in_any_phase_leaves_nothing(phase: str, tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    run = run_ranks(tmp_path, [], close_in=phase)
    assert run.exit_codes == [0, 0]
    for rank in run.ranks:
        assert rank["phase"] == phase
        assert_exact(rank)
        assert_nothing_left(rank)
    assert set(os.listdir("/dev/shm")) <= before


def test_shutting_down_with_a_stuck_transfer_is_bounded_and_the_process_ends(tmp_path: Path) -> None:
    run = run_ranks(tmp_path, ["transfer never completes"], close_in="MOVING")
    assert run.exit_codes == [0, 0]
    for rank in run.ranks:
        assert rank["phase"] == "MOVING" and rank["close_s"] < 10
        assert not rank["worker_left"] and not rank["folder_left"]


def test_a_full_disk_costs_the_recording_and_nothing_else(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        (disk / "ballast").write_bytes(b"x" * (56 << 10))  # room for a manifest and little more
        config = {**QUICK, "record": {"directory": str(disk)}}
        run = run_ranks(tmp_path, ["nothing for a while"], config=config)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "64 windows are lost" in run.log, "the disk never filled up"
    assert all(cost["recovered"] for cost in run.ranks[0]["costs"])
    for rank in run.ranks:
        assert_exact(rank)
        assert_nothing_left(rank)


def quick_to_give_up() -> dict[str, Any]:
    return {**QUICK, "agreement": {"idle_round_steps": 4, "deadline_s": 2.0}}


def assert_exact(rank: dict[str, Any]) -> None:
    clean = {"wrong_slots": 0, "wrong_maps": 0, "epochs_apart": 0, "raised": ""}
    assert rank["watch"] == {**rank["watch"], **clean}


def assert_nothing_left(rank: dict[str, Any]) -> None:
    assert rank["close_s"] < 10
    assert rank["threads_left"] == []
    assert not rank["worker_left"] and not rank["folder_left"]
