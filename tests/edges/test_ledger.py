"""What the main thread and a mover's thread know of each other, with a real thread on the other side."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from swiftbalancer.errors import TransferFailed
from swiftbalancer.transport import WAITING, CommitCopies, Lately, TransferState
from swiftbalancer.transport.ledger import Ledger
from swiftbalancer.transport.seam import ROUNDS_AT_ONCE, TransferTimedOut
from tests.edges.engines import LONG_S, wait_for


class Taker:
    """A mover's thread that takes what it may, one byte after another, and counts how often it was woken."""

    def __init__(self, ledger: Ledger, num_bytes: int) -> None:
        self.ledger = ledger
        self.taken = 0
        self._thread = threading.Thread(target=self._run, args=(num_bytes,), daemon=True)
        self._thread.start()

    def _run(self, num_bytes: int) -> None:
        while self.taken < num_bytes:
            self.taken += self.ledger.take([1] * (num_bytes - self.taken), time.monotonic() + LONG_S)

    def join(self) -> None:
        self._thread.join(LONG_S)
        assert not self._thread.is_alive()


def waits(ledger: Ledger) -> Callable[[], bool]:
    return lambda: ledger.waits


def test_a_batch_rests_while_it_waits_to_be_allowed_bytes_and_at_no_other_time() -> None:
    ledger = Ledger()
    ledger.begin()
    assert ledger.lately() == Lately()
    taker = Taker(ledger, 3)
    wait_for(waits(ledger))
    assert ledger.lately() == Lately(held_back=True), "it had something to do before it waited"
    assert ledger.lately() == WAITING
    ledger.grant(0)
    assert ledger.lately() == WAITING
    ledger.grant(2)
    wait_for(lambda: taker.taken == 2 and ledger._waiting)
    assert ledger.lately() == Lately(carried=True, held_back=True)
    assert ledger.lately() == WAITING
    ledger.grant(1)
    taker.join()
    assert ledger.lately() == Lately(carried=True)
    assert ledger.lately() == Lately()


def test_a_grant_that_pays_a_debt_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    ledger.begin()
    ledger.grant(1)
    assert ledger.take([5], time.monotonic() + LONG_S) == 1
    woken: list[int] = []
    notify = ledger._changed.notify

    def noted(n: int = 1) -> None:
        woken.append(ledger._credit)
        notify(n)

    monkeypatch.setattr(ledger._changed, "notify", noted)
    taker = Taker(ledger, 1)
    wait_for(waits(ledger))
    for num_bytes in (0, 1, 3):
        ledger.grant(num_bytes)
    assert not woken
    assert taker.taken == 0
    ledger.grant(1)
    taker.join()
    assert woken == [1]


def test_a_batch_that_missed_its_deadline_does_not_rest() -> None:
    ledger = Ledger()
    ledger.begin()
    with pytest.raises(TransferTimedOut):
        ledger.take([1], time.monotonic() + 0.01)
    assert ledger.lately() == Lately(held_back=True)
    assert ledger.lately() == Lately()


def test_the_main_thread_is_nudged_when_a_batch_waits_for_bytes_and_when_it_is_over() -> None:
    nudges: list[TransferState] = []
    ledger = Ledger(lambda: nudges.append(ledger.status().state))
    ledger.begin()
    taker = Taker(ledger, 3)
    wait_for(lambda: len(nudges) == 1)
    assert ledger.waits
    assert ledger.grant(0) == 1, "one byte would do"
    assert ledger.grant(2) == 0
    wait_for(lambda: len(nudges) == 2)
    assert ledger.waits and taker.taken == 2
    assert ledger.grant(1) == 0
    taker.join()
    assert not ledger.waits
    ledger.done(CommitCopies())
    ledger.fail(TransferFailed("over"))
    assert nudges[2:] == [TransferState.DONE, TransferState.FAILED]


@pytest.mark.parametrize(
    ("costs", "at_once", "rounds"),
    [
        ([10] * 9, 0, 1),
        ([10] * 9, 10, 1),
        ([10] * 9, 11, 2),
        ([10] * 9, 30, 3),
        ([10] * 9, 1000, ROUNDS_AT_ONCE),
        ([10, 10], 1000, 2),
        ([1000, 10], 30, 1),
    ],
)
def test_a_batch_is_woken_for_as_many_rounds_at_once_as_it_asks_for(
    costs: list[int], at_once: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or for as many as it has. The last may overdraw."""
    ledger = Ledger()
    ledger.begin()
    taken: list[int] = []
    deadline = time.monotonic() + LONG_S
    taker = threading.Thread(target=lambda: taken.append(ledger.take(costs, deadline, at_once=at_once)), daemon=True)
    taker.start()
    wait_for(waits(ledger))
    woken: list[int] = []
    monkeypatch.setattr(ledger._changed, "notify", lambda: woken.append(ledger._credit))
    enough = sum(costs[: rounds - 1]) + 1
    for allowed in range(enough):
        assert ledger.grant(1 if allowed else 0) == enough - allowed
    assert not woken
    monkeypatch.undo()
    assert ledger.grant(1) == 0
    taker.join(LONG_S)
    assert taken == [rounds]
