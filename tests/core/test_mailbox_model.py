"""Every order of requests, answers, repetitions and worker deaths, up to a depth, on the real mailbox."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from swiftbalancer.errors import WorkerLost
from swiftbalancer.mailbox import Mailbox, Reply, Request, RequestFailed
from swiftbalancer.wire import Measured, NothingToDo, PlanRequest

DEPTH = 20
Move = tuple[str, int]


@dataclass
class World:
    """A mailbox, and everything that was ever sent to a worker: any of it may be answered at any time, again."""

    box: Mailbox = field(default_factory=Mailbox)
    is_open: bool = False
    asked: int = 0
    accepted: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    outcomes: dict[int, str] = field(default_factory=dict)

    def moves(self) -> list[Move]:
        """What can happen next."""
        deliveries = [("answer", number) for number in self.sent]
        return [("offer", 0), ("send", 0), ("poll", 0), ("die" if self.is_open else "start", 0), *deliveries]

    def make(self, move: Move) -> None:
        name, number = move
        if name == "offer":
            self._offer()
        elif name == "send":
            request = self.box.take_request()
            if request is not None:
                self.sent.append(request.message.request)
        elif name == "answer":
            is_awaited = self.box.outstanding == number
            assert self.box.answer(Reply([], NothingToDo(number, "", 1.0, 1.0, 0.0), {})) == is_awaited
        elif name == "die":
            self.box.shut(WorkerLost("scripted"))
            self.is_open = False
        elif name == "start":
            self.box.open()
            self.is_open = True
        else:
            self._poll()

    def check(self) -> None:
        waiting = [n for n in self.accepted if n not in self.outcomes and n != self.box.outstanding]
        assert len(waiting) == self.box._answers.qsize(), "a request was lost, or answered twice"
        assert self.box.outstanding is None or self.box.outstanding == self.accepted[-1]

    def recover(self) -> None:
        """A healthy worker from here on: whatever is outstanding ends, and the next request is answered."""
        if not self.is_open:
            self.make(("start", 0))
        for _ in range(2):
            self.make(("send", 0))
            if self.box.outstanding is not None:
                self.make(("answer", self.box.outstanding))
            while self._poll():
                pass
            assert self.box.outstanding is None and set(self.outcomes) == set(self.accepted)
            self._offer()
            assert self.box.outstanding == self.asked, "the next request was not taken in"

    def _offer(self) -> None:
        free = self.is_open and self.box.outstanding is None
        assert self.box.offer(Request(request(self.asked + 1), {})) == free
        if free:
            self.asked += 1
            self.accepted.append(self.asked)

    def _poll(self) -> bool:
        outcome = self.box.poll()
        if outcome is None:
            return False
        number = outcome.request if isinstance(outcome, RequestFailed) else outcome.message.request
        assert number in self.accepted, "an answer to nothing"
        assert number not in self.outcomes, "two outcomes of one request"
        self.outcomes[number] = type(outcome).__name__
        return True


def request(number: int) -> PlanRequest:
    return PlanRequest(
        request=number,
        kind="placement",
        epoch=0,
        step=0,
        dispatch_kind="table",
        dispatch_width=1,
        staging_experts=1,
        steps_per_sub_window=1,
        measured=Measured(),
        arrays=[],
    )


def replayed(history: list[Move]) -> World:
    world = World()
    for move in history:
        world.make(move)
    return world


def explore(depth: int) -> int:
    """Visits every state that so many moves can reach; how many there are."""
    seen: set[tuple[object, ...]] = set()
    histories: list[list[Move]] = [[]]
    for _ in range(depth):
        longer = []
        for history in histories:
            for move in replayed(history).moves():
                world = replayed([*history, move])
                world.check()
                state = fingerprint(world)
                if state not in seen:
                    seen.add(state)
                    longer.append([*history, move])
                    world.recover()
        histories = longer
    return len(seen)


def test_every_request_has_exactly_one_outcome_in_every_order_of_events() -> None:
    num_states = explore(DEPTH)
    print(f"\n{num_states} states")
    assert num_states > 2000


def test_the_search_catches_a_mailbox_that_takes_any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def gullible(box: Mailbox, reply: Reply) -> bool:
        box._outstanding = None
        box._answers.put(reply)
        return True

    monkeypatch.setattr(Mailbox, "answer", gullible)
    with pytest.raises(AssertionError):
        explore(DEPTH)


def fingerprint(world: World) -> tuple[object, ...]:
    """What later events can tell apart: the mailbox, and which requests may still be answered."""
    box = world.box
    return (
        world.is_open,
        box.outstanding,
        box._request is not None,
        tuple(world.accepted),
        tuple(world.sent),
        tuple(world.outcomes.items()),
        box._answers.qsize(),
    )
