"""Threads of ours compute for a share of a step, and for the rest of what they have to do in the next ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest

from swiftbalancer import throttle as module
from swiftbalancer.lane import BACKLOG, FULL, Lane
from swiftbalancer.throttle import Throttle

SHARE = 0.1
AGES_S = 60.0
STEP_S = 2 * AGES_S
"""Nobody stops resting within a test but by what it tests."""
SHORT_STEP_S = 0.05
STEP_OF_ENGINE_S = 0.01


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_REST_S", STEP_S)


@pytest.fixture
def throttle() -> Iterator[Throttle]:
    throttle = Throttle(SHARE)
    yield throttle
    throttle.open()


@pytest.fixture
def tiny_share() -> Iterator[Throttle]:
    """A millisecond of a step that does not end."""
    throttle = Throttle(0.001 / STEP_S)
    throttle.steps_took([(STEP_S, throttle.total_s)], judged=True)
    yield throttle
    throttle.open()


def compute(seconds: float) -> None:
    """Processor time, however busy the machine is."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def start(*work: Callable[[], None]) -> tuple[threading.Thread, list[int]]:
    """Does `work` one after another on a thread; the list grows with what is done."""
    done: list[int] = []

    def run() -> None:
        for number, piece in enumerate(work):
            piece()
            done.append(number)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, done


def allowed_s(throttle: Throttle) -> float:
    return max(throttle.share * throttle._step_s, module.LEAST_S)


def too_much(throttle: Throttle) -> tuple[Callable[[], None], ...]:
    """Uses up the share, then rests."""
    return throttle.rest, lambda: compute(2 * allowed_s(throttle)), throttle.rest


def assert_resting(thread: threading.Thread, done: list[int]) -> None:
    end = time.monotonic() + AGES_S
    while done != [0, 1]:
        assert time.monotonic() < end
        time.sleep(0.001)
    thread.join(0.2)
    assert done == [0, 1]


def test_who_has_used_up_the_share_rests_until_the_step_is_over(throttle: Throttle) -> None:
    throttle.steps_took([(SHORT_STEP_S, throttle.total_s)], judged=True)
    began = time.monotonic()
    thread, done = start(*too_much(throttle))
    thread.join(AGES_S)
    assert done == [0, 1, 2]
    assert time.monotonic() - began >= SHORT_STEP_S


@pytest.mark.parametrize("since_hook", [0.0, 0.3, 0.5, 0.7, 1.0, 7.9])
@pytest.mark.parametrize(("pieces", "span"), [(1.1, 1), (0.9, 2), (0.3, 4), (0.2, 8), (0.01, 8)])
def test_who_rested_goes_on_in_the_middle_of_a_step_that_ranks_share(
    throttle: Throttle, pieces: float, span: int, since_hook: float
) -> None:
    """A step has room for so many pieces of work."""
    throttle.steps_took([(SHORT_STEP_S, throttle.total_s)], judged=True)
    throttle.share = pieces * module.LEAST_S / SHORT_STEP_S
    throttle.rest()
    assert throttle._span_s == pytest.approx(span * SHORT_STEP_S)
    for hook in range(20, 20 + span):
        hook_ended = 1000.0
        throttle.last_hook = lambda step=hook, ended=hook_ended: (step, ended)
        now = hook_ended + since_hook * SHORT_STEP_S
        step = hook + (throttle._a_span_after(now, span) - hook_ended) / SHORT_STEP_S
        assert step % span == pytest.approx(0.5)
        assert step - hook - since_hook == pytest.approx(span, abs=span / 2 + 1e-6)


def test_who_has_used_up_the_share_rests_while_the_step_lasts(tiny_share: Throttle) -> None:
    assert_resting(*start(*too_much(tiny_share)))


def test_within_the_share_nobody_rests(throttle: Throttle) -> None:
    throttle.steps_took([(STEP_S, throttle.total_s)], judged=True)
    thread, done = start(throttle.rest, lambda: compute(0.001), throttle.rest)
    thread.join(AGES_S)
    assert done == [0, 1, 2]


def test_before_any_step_nobody_rests(throttle: Throttle) -> None:
    thread, done = start(throttle.rest, lambda: compute(0.001), throttle.rest)
    thread.join(AGES_S)
    assert done == [0, 1, 2]


def test_spans_end_also_if_one_began_before_any_step(throttle: Throttle) -> None:
    throttle.rest()
    throttle.steps_took([(SHORT_STEP_S, throttle.total_s)], judged=True)
    thread, done = start(*too_much(throttle))
    thread.join(AGES_S)
    assert done == [0, 1, 2]
    assert throttle._span_s == SHORT_STEP_S


def test_what_a_thread_does_is_counted_once(throttle: Throttle) -> None:
    throttle.steps_took([(STEP_S, throttle.total_s)], judged=True)
    for _ in range(3):
        throttle.rest()
        compute(0.001)
    throttle.rest()
    assert throttle.total_s >= 0.003
    assert throttle._used_s == pytest.approx(throttle.total_s + module.PIECE_S)


@pytest.mark.parametrize("spans", [1, 3])
def test_what_exceeds_a_share_is_made_up_for_in_the_next_spans(throttle: Throttle, spans: int) -> None:
    throttle.steps_took([(SHORT_STEP_S, throttle.total_s)], judged=True)
    throttle.share = SHARE / 2
    throttle.rest()
    throttle._used_s += spans * allowed_s(throttle) + 0.001
    ends = throttle._span_ends
    throttle.rest()
    assert throttle._span_ends >= ends + spans * SHORT_STEP_S - 1e-6


def test_where_steps_get_no_longer_nothing_is_to_be_made_up_for(throttle: Throttle) -> None:
    throttle.steps_took([(SHORT_STEP_S, throttle.total_s)], judged=True)
    throttle.rest()
    throttle._used_s = 30 * allowed_s(throttle)
    throttle.rest()
    assert throttle._used_s == module.PIECE_S


def test_spans_that_passed_since_have_made_up_for_it(throttle: Throttle, monkeypatch: pytest.MonkeyPatch) -> None:
    throttle.steps_took([(SHORT_STEP_S, throttle.total_s)], judged=True)
    throttle.share = SHARE / 2
    throttle.rest()
    monkeypatch.setattr(throttle, "_wait", lambda: pytest.fail("it rests"))
    throttle._used_s = 3 * allowed_s(throttle)
    time.sleep(max(throttle._span_ends - time.perf_counter(), 0.0) + 3 * SHORT_STEP_S)
    throttle.rest()


def test_steps_of_no_length_stop_nobody(throttle: Throttle) -> None:
    throttle.last_hook = lambda: (3, time.perf_counter())
    throttle.steps_took([(0.0, throttle.total_s)], judged=True)
    thread, done = start(*too_much(throttle))
    thread.join(AGES_S)
    assert done == [0, 1, 2]


def test_the_share_is_that_of_all_threads_together(tiny_share: Throttle) -> None:
    assert_resting(*start(*too_much(tiny_share)))
    second, others = start(tiny_share.rest)
    second.join(0.2)
    assert not others


def test_of_several_that_would_go_on_at_once_one_does(throttle: Throttle) -> None:
    """What they will use is not known yet; each goes on in a span of its own, if that has room for one alone."""
    throttle.steps_took([(STEP_S, throttle.total_s)], judged=True)
    throttle.share = 0.01 * module.LEAST_S / STEP_S
    waiting = threading.Event()

    def work() -> None:
        waiting.wait(AGES_S)

    first, done = start(throttle.rest, work)
    while not done:
        time.sleep(0.001)
    second, others = start(throttle.rest)
    second.join(0.2)
    assert not others
    waiting.set()
    first.join(AGES_S)


@pytest.mark.parametrize(("share", "at_once"), [(SHARE / 2, 1), (SHARE, 3)])
def test_where_steps_get_longer_one_thread_at_a_time_goes_on(throttle: Throttle, share: float, at_once: int) -> None:
    """Though a span has room for three pieces of work."""
    throttle.share = share
    throttle.steps_took([(2.5 * module.PIECE_S / share, throttle.total_s)], judged=True)
    throttle._span_ends = time.perf_counter() + AGES_S
    throttle._allowed_s, throttle._span_s = 2.5 * module.PIECE_S, AGES_S
    over = threading.Event()

    def work() -> None:
        over.wait(AGES_S)

    threads = [start(throttle.rest, work) for _ in range(5)]
    end = time.monotonic() + AGES_S
    while sum(len(done) for _, done in threads) < at_once:
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(0.2)
    assert sum(len(done) for _, done in threads) == at_once
    over.set()


def test_a_rest_is_never_long(tiny_share: Throttle, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was used before it is forgotten, or the next ones would be as long."""
    monkeypatch.setattr(module, "LONGEST_REST_S", SHORT_STEP_S)
    thread, done = start(*too_much(tiny_share))
    thread.join(AGES_S)
    assert done == [0, 1, 2]
    assert tiny_share._used_s == module.PIECE_S


def test_who_have_rested_for_as_long_as_one_may_go_on_in_different_spans(
    throttle: Throttle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much there is to be made up for."""
    monkeypatch.setattr(module, "LONGEST_REST_S", 4 * SHORT_STEP_S)
    throttle.steps_took([(SHORT_STEP_S, throttle.total_s)], judged=True)
    throttle.share /= 2
    throttle.rest()
    throttle._used_s = AGES_S
    began, spans = time.monotonic(), []
    threads = [start(throttle.rest, lambda: spans.append(throttle._span_ends))[0] for _ in range(3)]
    for thread in threads:
        thread.join(AGES_S)
    assert time.monotonic() - began >= 4 * SHORT_STEP_S
    assert len(set(spans)) == 3


def test_one_long_step_does_not_lengthen_the_rests_of_short_ones(throttle: Throttle) -> None:
    throttle.steps_took([(SHORT_STEP_S, throttle.total_s)], judged=True)
    throttle.steps_took([(STEP_S, throttle.total_s)], judged=True)
    thread, done = start(*too_much(throttle))
    thread.join(AGES_S)
    assert done == [0, 1, 2]


def test_steps_that_have_become_long_allow_more(throttle: Throttle) -> None:
    throttle.steps_took([(SHORT_STEP_S, throttle.total_s)], judged=True)
    short = allowed_s(throttle)
    for _ in range(200):
        throttle.steps_took([(STEP_S, throttle.total_s)], judged=True)
    thread, done = start(throttle.rest, lambda: compute(2 * short), throttle.rest)
    thread.join(AGES_S)
    assert done == [0, 1, 2]


def test_nobody_rests_while_the_main_thread_waits(tiny_share: Throttle) -> None:
    with tiny_share.opened():
        thread, done = start(*too_much(tiny_share))
        thread.join(AGES_S)
        assert done == [0, 1, 2]
    later, none = start(tiny_share.rest)
    later.join(0.2)
    assert not none


def test_who_rests_goes_on_once_the_main_thread_waits(tiny_share: Throttle) -> None:
    thread, done = start(*too_much(tiny_share))
    assert_resting(thread, done)
    with tiny_share.opened():
        thread.join(AGES_S)
    assert done == [0, 1, 2]


def test_a_share_of_one_bounds_nothing() -> None:
    throttle = Throttle(1.0)
    throttle.steps_took([(STEP_S, throttle.total_s)], judged=True)
    thread, done = start(throttle.rest, lambda: compute(0.01), throttle.rest)
    thread.join(AGES_S)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("bound", ["device", "host"])
def test_where_steps_get_no_longer_the_share_grows_and_where_they_do_it_shrinks(bound: str) -> None:
    """As steps are that wait for the device, and as those are that wait for their own Python.

    Work of ours comes in stretches, and the engine is half as slow again for hundreds of steps now and then.
    """
    rng = np.random.default_rng(2)
    throttle = Throttle(0.02)

    def steps(num: int, *, bound: str) -> None:
        slow = 1.0
        for number in range(num):
            if number % 150 == 0:
                slow = rng.choice([1.0, 1.5])
            used_s = 0.02 * STEP_OF_ENGINE_S if number % 100 < 60 and number % 3 == 0 else 0.0
            throttle.total_s += used_s
            longer_s = used_s if bound == "host" else 0.0
            step_s = slow * STEP_OF_ENGINE_S * rng.normal(1.0, 0.01) + longer_s + (0.1 if number % 20 == 0 else 0.0)
            throttle.steps_took([(step_s, throttle.total_s)], judged=True)

    steps(50, bound=bound)
    assert throttle.share == 0.02, "after too few steps nothing is known"
    steps(4000, bound=bound)
    least, most = pytest.approx(0.02 / module.RANGE), pytest.approx(0.02 * module.RANGE)
    if bound == "host":
        assert throttle.share == least
    else:
        assert throttle.share == most
        steps(4000, bound="host")
        assert throttle.share == least


def test_steps_beside_which_weights_move_say_nothing_of_our_threads() -> None:
    throttle = Throttle(0.02)
    for moving, then in ((True, 0.02), (False, pytest.approx(0.02 / module.RANGE))):
        for number in range(1000):
            used_s = 0.02 * STEP_OF_ENGINE_S if number % 3 == 0 else 0.0
            throttle.total_s += used_s
            throttle.steps_took([(STEP_OF_ENGINE_S + used_s, throttle.total_s)], judged=not moving)
        assert throttle.share == then


def test_who_is_in_a_hurry_goes_on_in_the_next_step(throttle: Throttle) -> None:
    """And what was used is forgotten, or the next rest would be as long."""
    throttle.steps_took([(SHORT_STEP_S, throttle.total_s)], judged=True)
    throttle.share = 0.01 * module.LEAST_S / SHORT_STEP_S
    throttle.rest()
    assert throttle._span_s == pytest.approx(module.LONGEST_SPAN * SHORT_STEP_S)
    spans = AGES_S / throttle._span_s
    throttle._used_s = spans * throttle._allowed_s
    began = time.perf_counter()
    throttle.last_hook = lambda: (1, began)
    ends: list[float] = []

    def hurried() -> None:
        throttle.rest(hurry=True)
        ends.append(time.perf_counter())

    thread, done = start(hurried)
    thread.join(AGES_S / 2)
    assert done == [0]
    assert ends[0] >= began + SHORT_STEP_S / 2, "it rests all the same"
    assert throttle._used_s <= 2 * module.PIECE_S


@pytest.mark.parametrize("since_hook", [0.0, 0.4, 0.6, 2.3])
def test_a_span_that_ends_soon_ends_in_the_middle_of_a_step(throttle: Throttle, since_hook: float) -> None:
    throttle.steps_took([(STEP_S, throttle.total_s)], judged=True)
    throttle.share = 0.01 * module.LEAST_S / STEP_S
    throttle.rest()
    hook_ended = time.perf_counter() - since_hook * STEP_S
    throttle.last_hook = lambda: (7, hook_ended)
    throttle._span_ends = hook_ended + 100 * STEP_S
    throttle._end_span_soon()
    steps = (throttle._span_ends - hook_ended) / STEP_S
    assert steps % 1 == pytest.approx(0.5)
    assert 0.5 - 1e-3 <= steps - since_hook <= 1.5 + 1e-3
    sooner = throttle._span_ends = hook_ended + (since_hook + 0.01) * STEP_S
    throttle._end_span_soon()
    assert throttle._span_ends == sooner


class Rested(NamedTuple):
    done: int
    """Jobs by then."""
    hurry: bool


def test_a_lane_with_a_backlog_hurries_and_one_that_is_full_rests_from_nothing() -> None:
    """Sub-windows may end faster than a share of the steps can bring their loads together."""
    began, waiting, over = (threading.Event() for _ in range(3))
    rested: list[Rested] = []
    done: list[int] = []

    def rest(*, hurry: bool = False) -> None:
        rested.append(Rested(len(done), hurry))

    def first() -> None:
        began.set()
        waiting.wait(AGES_S)

    lane = Lane("test", on_error=lambda error: pytest.fail(str(error)), rest=rest)
    lane.put(first)
    assert began.wait(AGES_S)
    num = FULL + 3
    for number in range(num):
        lane.put(lambda number=number: done.append(number))  # type: ignore[misc]
    lane.put(over.set)
    waiting.set()
    assert over.wait(AGES_S)
    assert lane.close(AGES_S)
    assert done == list(range(num))
    before_each = [Rested(number, num - number >= BACKLOG) for number in range(num + 1)]  # and one waits, for the end
    assert rested[1:] == before_each[-FULL:], "with so few jobs waiting it rests again, and with fewer does not hurry"
