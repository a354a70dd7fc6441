"""Serves through faults on real processes; what must hold afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.edges.processes import TIMEOUT_S, Run, Seat, run_script

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


def run_ranks(
    folder: Path,
    faults: list[str],
    *,
    seats: Sequence[Seat] = (Seat(), Seat()),
    timeout_s: float = TIMEOUT_S,
    **options: Any,
) -> Run:
    """Serves with these faults, one rank on each seat; `options` are those of `faulty_rank`."""
    wanted = {"out": str(folder / "out"), "faults": faults, "config": QUICK, "ranks": len(seats), **options}
    return run_script(SCRIPT, wanted, seats=seats, timeout_s=timeout_s)


def quick_to_give_up(*, channel: str = "auto") -> dict[str, Any]:
    return {**QUICK, "agreement": {"idle_round_steps": 4, "deadline_s": 2.0, "channel": channel}}


def assert_exact(rank: dict[str, Any]) -> None:
    clean = {"wrong_outputs": 0, "wrong_maps": 0, "epochs_apart": 0, "raised": ""}
    clean["changed_without_commit"] = 0
    assert rank["watch"] == {**rank["watch"], **clean}


LEFT = ("threads_left", "native_threads_left", "sockets_left", "shared_memory_left", "worker_left", "folder_left")


def assert_nothing_left(rank: dict[str, Any]) -> None:
    assert rank["close_s"] < 10, f"rank {rank['rank']} took {rank['close_s']:.1f} s to close"
    left = {name: rank[name] for name in LEFT if rank[name]}
    assert not left, f"rank {rank['rank']}, closed, still has {left}"
