"""What the forward path notes of its steps reaches the pacer, the throttle and the metrics, once and by threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swiftbalancer import steptimes
from swiftbalancer.pacer import USUAL_STEPS, Pacer
from swiftbalancer.stats import Stats, StepKind, TimeRing
from swiftbalancer.steptimes import StepTimes, Stretch
from swiftbalancer.throttle import RANGE, SELDOM, Throttle
from swiftbalancer.transport import AT_WORK, WAITING, Lately

STEP_S = 0.01
LONG_S = 0.03
HOOK_S = 1e-5


@pytest.fixture
def times() -> StepTimes:
    return StepTimes(Stats(), Pacer(0.02), Throttle(0.02))


def stretch(
    kind: StepKind = StepKind.IDLE,
    *,
    quiet: int = 3,
    quiet_kind: StepKind = StepKind.IDLE,
    quiet_work: Lately | None = None,
    work: Lately | None = None,
    paced: bool = True,
    threads_s: tuple[float, float] = (0.0, 0.0),
) -> Stretch:
    steps = [(STEP_S, HOOK_S, threads_s[0])] * quiet
    return Stretch(kind, 2 * HOOK_S, steps, quiet_kind, quiet_work, LONG_S, work, paced, threads_s[1])


def counts(times: StepTimes) -> list[int]:
    return [ring.count for ring in times._stats.host_s]


def usual(times: StepTimes) -> list[float]:
    return list(times.pacer._usual)


def test_every_hook_is_counted_once_as_what_it_did(times: StepTimes) -> None:
    times.note(stretch(StepKind.PLANNING))
    times.note(stretch(StepKind.COMMITTING, quiet=2, quiet_kind=StepKind.MOVING))
    assert counts(times) == [0, 0, 0, 0], "noting is all that the forward path does"
    for _ in range(2):
        times.work_out()
        assert counts(times) == [3, 1, 2, 1]
    assert times._stats.host_s[StepKind.PLANNING].total == pytest.approx(2 * HOOK_S)
    assert times._stats.host_s[StepKind.MOVING].total == pytest.approx(2 * HOOK_S)


def test_the_pacer_gets_the_steps_that_it_is_to_know_of(times: StepTimes) -> None:
    times.note(stretch())
    times.note(stretch(paced=False))
    times.work_out()
    assert usual(times) == [STEP_S] * 3 + [LONG_S] + [STEP_S] * 3
    assert times.pacer._steps == 0, "no transfer"


def test_steps_that_wait_for_votes_are_neither_busy_nor_restful(times: StepTimes) -> None:
    times.note(stretch(quiet_kind=StepKind.MOVING, paced=False))
    times.work_out()
    assert usual(times) == []
    assert times.pacer._steps == 0


def test_steps_of_a_batch_are_what_it_did_in_them(times: StepTimes) -> None:
    times.note(stretch(quiet=USUAL_STEPS))
    times.note(stretch(quiet_kind=StepKind.MOVING, quiet_work=AT_WORK, work=WAITING))
    times.note(stretch(quiet_kind=StepKind.MOVING, quiet_work=WAITING, work=AT_WORK))
    times.work_out()
    assert times.pacer._steps == 8
    assert times.pacer._held_back == 4
    assert sorted(times.pacer._busy) == [STEP_S] * 3 + [LONG_S], "those at work"


def test_the_throttle_knows_beside_which_steps_our_threads_computed(
    times: StepTimes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, ...] | None] = []
    cost = times.throttle._cost
    monkeypatch.setattr(cost, "others", lambda number: seen.extend([None] * number))
    monkeypatch.setattr(cost, "restful", lambda step_s: seen.append((step_s,)))
    monkeypatch.setattr(cost, "beside", lambda step_s, used_s: seen.append((step_s, used_s)))
    times.note(stretch(quiet=1))
    times.note(stretch(quiet=1, threads_s=(0.004, 0.006)))
    times.note(stretch(quiet=1, quiet_kind=StepKind.PLANNING, threads_s=(0.006, 0.006)))
    times.note(stretch(quiet=1, quiet_kind=StepKind.MOVING, quiet_work=AT_WORK, threads_s=(0.006, 0.008)))
    times.note(stretch(StepKind.COMMITTING, quiet=1, threads_s=(0.008, 0.009)))
    times.note(stretch(quiet=0, threads_s=(0.009, 0.009)))
    times.work_out()
    still = [(STEP_S,), (LONG_S,), (STEP_S, 0.004), (LONG_S, pytest.approx(0.002)), (STEP_S,), (LONG_S,)]
    assert seen == [*still, None, None, None, None, (LONG_S,)]


def test_where_the_share_is_at_its_least_few_steps_are_judged_and_all_are_counted(
    times: StepTimes, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []
    monkeypatch.setattr(times.throttle._cost, "restful", lambda _: judged.append(len(told)))
    told: list[int] = []
    for share in (times.throttle.share, times.throttle.share / RANGE):
        times.throttle.share = share
        for _ in range(2 * SELDOM):
            times.note(stretch(quiet=0))
            times.work_out()
            told.append(sum(counts(times)))
    assert told == list(range(1, 4 * SELDOM + 1))
    assert judged[: 2 * SELDOM] == list(range(2 * SELDOM))
    assert np.diff(judged[2 * SELDOM :]).tolist() == [SELDOM]


@given(parts=st.lists(st.lists(st.floats(0, 1), max_size=12), max_size=8))
def test_times_added_together_are_kept_as_those_added_one_by_one(parts: list[list[float]]) -> None:
    together, alone = TimeRing(8), TimeRing(8)
    for part in parts:
        together.add_all(part)
        for each in part:
            alone.add(each)
    assert together.count == alone.count
    assert together.total == pytest.approx(alone.total)
    assert together.values().tolist() == alone.values().tolist()


def test_who_comes_while_another_works_it_out_leaves_it_to_that_one(times: StepTimes) -> None:
    times.note(stretch())
    with times._at_work:
        times.work_out()
        assert counts(times) == [0, 0, 0, 0]
    times.work_out()
    assert sum(counts(times)) == 4


def test_who_rests_tells_of_steps_now_and_then(times: StepTimes, monkeypatch: pytest.MonkeyPatch) -> None:
    for told in (4, 4, 4):
        times.note(stretch())
        times.rest()
        assert sum(counts(times)) == told
    monkeypatch.setattr(steptimes, "TELL_EVERY_S", 0.0)
    times.rest()
    assert sum(counts(times)) == 12


def test_who_changes_the_pace_knows_of_the_last_steps(times: StepTimes) -> None:
    for told in (4, 8):
        times.note(stretch())
        times.adapt()
        assert sum(counts(times)) == told


def test_who_changes_the_pace_where_work_costs_does_so_by_what_is_known(
    times: StepTimes, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted: list[int] = []
    monkeypatch.setattr(times.pacer, "adapt", lambda: adapted.append(sum(counts(times))))
    times.throttle.share /= 2
    for _ in range(3):
        times.note(stretch())
        times.adapt()
    monkeypatch.setattr(steptimes, "TELL_EVERY_S", 0.0)
    times.adapt()
    assert adapted == [4, 4, 4, 12]


def test_telling_of_steps_is_a_piece_of_work_of_its_own(times: StepTimes, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(times.throttle, "rest", lambda **_: told.append(sum(counts(times))))
    times.note(stretch())
    times.rest()
    assert told == [0, 4]


@pytest.mark.parametrize("hurry", [False, True])
def test_who_is_in_a_hurry_rests_in_a_hurry(
    times: StepTimes, monkeypatch: pytest.MonkeyPatch, *, hurry: bool
) -> None:
    rested: list[bool] = []
    monkeypatch.setattr(times.throttle, "rest", lambda *, hurry: rested.append(hurry))
    times.rest(hurry=hurry)
    assert rested == [hurry]
