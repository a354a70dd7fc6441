"""How the vLLM benchmark compares steps beside which threads of ours computed with others."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.vllmbench.report import NEAR, note_ratios, note_work, print_missing

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


@pytest.mark.parametrize(("measured", "said"), [(("warm", "idle", "busy"), ""), (("warm",), "idle, busy")])
def test_a_run_that_was_ended_early_says_what_is_missing(
    measured: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [{"name": name} for name in ("settle", "warm", "sleep", "idle", "busy")]
    print_missing({"settings": {"phases": phases}, "records": [{"phase": name} for name in measured]})
    told = capsys.readouterr().out
    assert told.strip().endswith(said) if said else not told
