"""How the vLLM benchmark compares steps beside which threads of ours computed with others."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.vllmbench.report import NEAR, note_ratios, note_work, on_fast_cores, print_bound, print_missing

STEP_S = 0.005


def record(gap_ms: float, *, ours_ms: float = 0.0) -> dict[str, Any]:
    return {"gap_ms": gap_ms, "ours_ms": ours_ms}


def ratios(records: list[dict[str, Any]]) -> list[float]:
    note_ratios(records)
    return [each["ratio"] for each in records]


def test_a_step_is_compared_with_the_restful_ones_around_it() -> None:
    """The engine is twice as slow in the second half, which is not ours."""
    half = 4 * NEAR
    usual = [4.0] * half + [8.0] * half
    records = [record(ms * 1.25, ours_ms=1.0) if number % 2 else record(ms) for number, ms in enumerate(usual)]
    alone = [each for number, each in enumerate(ratios(records)) if abs(number - half) > 2 * NEAR]
    assert set(alone) == {1.0, 1.25}


def test_a_step_is_not_compared_with_itself() -> None:
    assert ratios([record(4.0), record(6.0), record(4.0)]) == [4 / 5, 6 / 4, 4 / 5]


def test_where_no_step_is_restful_none_is_longer() -> None:
    assert ratios([record(4.0, ours_ms=1.0), record(6.0, ours_ms=1.0)]) == [1.0, 1.0]


def test_a_step_counts_as_busy_as_the_busiest_rank_is_beside_it() -> None:
    """A step lasts until the slowest rank is done."""
    records = [{"gap_ms": STEP_S * 1e3, "end_s": number * STEP_S} for number in range(1, 4)]
    ranks = [[(2.1 * STEP_S, 2.9 * STEP_S, 0.5, "late")], [(0.9 * STEP_S, 1.1 * STEP_S, 2.0, "across a step's end")]]
    note_work({"records": records}, ranks)
    assert [each["ours_ms"] for each in records] == pytest.approx([1.0, 1.0, 0.5])


def test_where_nothing_was_noted_all_steps_are_restful() -> None:
    records = [{"gap_ms": 5.0, "end_s": 1.0}]
    note_work({"records": records}, [])
    assert records[0]["ours_ms"] == 0.0


def rank_result(core_ms: list[float]) -> dict[str, Any]:
    records = [{"phase": "idle", "step": step, "core_ms": each} for step, each in enumerate(core_ms)]
    return {"records": records}


def test_a_core_that_is_slow_on_any_rank_takes_out_the_step_that_ends_then_and_the_next() -> None:
    ranks = [rank_result([0.07] * 8), rank_result([0.08, 0.09, 0.08, 0.15, 0.08, 0.08, 0.08, 0.08])]
    assert on_fast_cores(ranks) == {("idle", step) for step in (1, 2, 5, 6, 7)}


def test_busy_steps_are_held_against_those_of_all_idle_phases(capsys: pytest.CaptureFixture[str]) -> None:
    def steps(phase: str, gaps: list[float]) -> list[dict[str, Any]]:
        return [{"phase": phase, "step": step, "gap_ms": gap} for step, gap in enumerate(gaps)]

    groups = {
        "calm, all": steps("calm0", [4.0] * 100),
        "idle, all": steps("idle0", [4.0] * 99 + [6.0]),
        "busy, all": steps("busy0", [4.2] * 97 + [4.9, 5.1, 7.0]),
    }
    print_bound(groups, {("calm0", 0), ("busy0", 97), ("busy0", 98)})
    rows = [line for line in capsys.readouterr().out.splitlines() if "steps |" in line or "fast" in line]
    assert rows[1:] == [
        "| all steps | 100, 200 | +5.0% | +75.0% | 2 | 1 |",
        "| all cores fast | 2, 1 | +27.5% | +27.5% | 1 | 0 |",
    ]


def test_without_idle_steps_there_is_nothing_to_hold_busy_ones_against(capsys: pytest.CaptureFixture[str]) -> None:
    print_bound({"busy, all": [{"phase": "busy", "step": 0, "gap_ms": 1.0}]}, set())
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("measured", "said"), [(("warm", "idle", "busy"), ""), (("warm",), "idle, busy")])
def test_a_run_that_was_ended_early_says_what_is_missing(
    measured: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [{"name": name} for name in ("settle", "warm", "sleep", "idle", "busy")]
    print_missing({"settings": {"phases": phases}, "records": [{"phase": name} for name in measured]})
    told = capsys.readouterr().out
    assert told.strip().endswith(said) if said else not told
