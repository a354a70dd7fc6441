"""Single decisions of the cycle, spelled out; every interleaving of them is in `test_cycle_model`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from swiftbalancer.cycle import (
    VOTE_SIZE,
    Announced,
    BatchStaged,
    Command,
    CommitBatch,
    Cycle,
    DiscardPlan,
    DrainWanted,
    EndCycle,
    Event,
    Failed,
    Fault,
    GroupBroken,
    Phase,
    PlanChecked,
    ReceivePlan,
    RoundLost,
    RoundTaken,
    StageBatch,
    StopServing,
    SwitchOff,
    Vote,
    post,
    step,
)


class Group:
    """Ranks that post and take their rounds together."""

    def __init__(self, size: int = 2) -> None:
        self.cycles = [Cycle(rank=r) for r in range(size)]
        self.step = 0

    def tell(self, rank: int, event: Event) -> list[Command]:
        self.cycles[rank], commands = step(self.cycles[rank], event)
        return commands

    def tell_all(self, event: Event) -> None:
        for rank in range(len(self.cycles)):
            self.tell(rank, event)

    def vote(self) -> tuple[Vote, ...]:
        """Every rank posts; the votes of the round."""
        self.step += 1
        self.cycles = [post(c, self.step, window=0, passes=self.step) for c in self.cycles]
        return tuple(c.posted for c in self.cycles if c.posted is not None)

    def round(self, **odd: int) -> list[Command]:
        """A whole round; `odd` alters the last rank's vote. The leader's commands, which others share."""
        votes = self.vote()
        if odd:
            votes = (*votes[:-1], replace(votes[-1], **odd))
            self.cycles[-1] = replace(self.cycles[-1], posted=votes[-1])
        commands = [self.tell(rank, RoundTaken(votes)) for rank in range(len(self.cycles))]
        shared = [c for c in commands[0] if not isinstance(c, DiscardPlan)]
        assert all(c == shared for c in commands[1:])
        return commands[0]

    def begin(self, *, num_batches: int = 2, has_moves: bool = True) -> None:
        """Up to a plan that every rank holds."""
        self.tell(0, Announced(100))
        begun = self.round()
        assert begun == [ReceivePlan(self.cycles[0].cycle, 100)]
        number = self.cycles[0].cycle
        self.tell_all(PlanChecked(number, digest=7, num_batches=num_batches, has_moves=has_moves))

    def move(self) -> None:
        """Up to a first batch that every rank has staged."""
        self.begin()
        assert self.round() == [StageBatch(self.cycles[0].cycle, 0)]
        self.tell_all(BatchStaged(self.cycles[0].cycle, 0))


def kinds(commands: Sequence[Command]) -> list[str]:
    return [type(c).__name__ for c in commands]


def test_a_plan_in_two_batches_commits_each_and_ends() -> None:
    group = Group()
    group.move()
    assert group.round() == [CommitBatch(1, 0, 1), StageBatch(1, 1)]
    assert group.round() == []
    group.tell_all(BatchStaged(1, 1))
    assert group.round() == [CommitBatch(1, 1, 2), EndCycle(1, True, "", False)]
    assert [(c.phase, c.epoch) for c in group.cycles] == [(Phase.IDLE, 2)] * 2


def test_a_plan_without_moves_commits_as_soon_as_all_hold_it() -> None:
    group = Group()
    group.begin(num_batches=1, has_moves=False)
    assert group.round() == [CommitBatch(1, 0, 1), EndCycle(1, True, "", False)]


def test_one_rank_that_is_not_ready_holds_the_commit_back_everywhere() -> None:
    group = Group(3)
    group.move()
    assert group.round(ready=0) == []
    assert kinds(group.round()) == ["CommitBatch", "StageBatch"]


@pytest.mark.parametrize("fault", [f for f in Fault if f not in (Fault.NONE, Fault.GROUP_BROKEN)])
@pytest.mark.parametrize("moving", [False, True])
def test_every_fault_drops_the_cycle_and_names_its_rank(fault: Fault, moving: bool) -> None:
    group = Group(3)
    group.move() if moving else group.begin()
    group.tell(2, Failed(1, fault))
    [end] = group.round()
    assert end == EndCycle(1, False, f"rank 2: {fault.name.lower()}", transfer_in_flight=moving)
    group.move()
    assert kinds(group.round()) == ["CommitBatch", "StageBatch"], "the next cycle succeeds"


def test_plans_with_different_digests_drop_the_cycle() -> None:
    group = Group()
    group.begin()
    [end] = group.round(digest=8)
    assert end == EndCycle(1, False, "ranks hold different plans", transfer_in_flight=False)


@pytest.mark.parametrize(("name", "value"), [("step", 99), ("window", 1), ("passes", 99)])
def test_a_rank_out_of_lockstep_is_named_and_stops_the_cycle(name: str, value: int) -> None:
    group = Group(3)
    group.move()
    [end] = group.round(**{name: value})
    assert isinstance(end, EndCycle) and not end.committed
    assert end.reason.startswith(f"rank 2 is off: its {name} is {value}")


def test_a_rank_out_of_lockstep_keeps_a_cycle_from_beginning() -> None:
    group = Group(3)
    group.tell(0, Announced(100))
    votes = group.vote()
    votes = (*votes[:-1], replace(votes[-1], passes=17))
    [discard] = group.tell(0, RoundTaken(votes))
    assert isinstance(discard, DiscardPlan) and "rank 2 is off" in discard.reason


@pytest.mark.parametrize("name", ["epoch", "cycle", "phase"])
def test_ranks_whose_states_differ_stop_serving(name: str) -> None:
    group = Group(3)
    group.begin()
    [stop] = group.round(**{name: 0 if name != "epoch" else 5})
    assert isinstance(stop, StopServing) and f"differ in {name}" in stop.reason


def test_a_rank_in_doubt_about_a_commit_is_told_to_stop() -> None:
    group = Group()
    group.move()
    group.vote()
    commands = group.tell(0, RoundLost("no outcome within 30 s"))
    assert kinds(commands) == ["EndCycle", "StopServing"]
    assert commands[1] == StopServing("voted to commit epoch 1 and cannot learn the outcome: no outcome within 30 s")


def test_a_rank_in_doubt_about_a_dispatch_plan_is_told_to_stop() -> None:
    group = Group()
    group.begin(num_batches=1, has_moves=False)
    group.vote()
    assert kinds(group.tell(1, RoundLost("cut"))) == ["EndCycle", "StopServing"]


@pytest.mark.parametrize("fault", [True, False])
def test_a_rank_that_had_not_voted_for_a_commit_only_switches_off(fault: bool) -> None:
    group = Group()
    group.move()
    group.tell(0, Failed(1, Fault.CHECKSUM) if fault else DrainWanted(True))
    group.vote()
    assert kinds(group.tell(0, RoundLost("cut"))) == ["EndCycle", "SwitchOff"]


def test_a_rank_that_only_agreed_to_a_plan_with_moves_switches_off_without_doubt() -> None:
    group = Group()
    group.begin()
    group.vote()
    assert kinds(group.tell(0, RoundLost("cut"))) == ["EndCycle", "SwitchOff"]


def test_a_rank_that_failed_after_its_yes_is_still_in_doubt() -> None:
    group = Group()
    group.move()
    group.vote()
    group.tell(0, Failed(1, Fault.INTERNAL))
    assert kinds(group.tell(0, RoundLost("cut"))) == ["EndCycle", "StopServing"]


def test_losing_an_idle_round_switches_off_and_nothing_follows() -> None:
    group = Group()
    group.vote()
    assert group.tell(0, RoundLost("cut")) == [SwitchOff("cut")]
    assert group.tell(0, Announced(5)) == []
    with pytest.raises(AssertionError, match="balancing is off"):
        post(group.cycles[0], 9, 0, 0)


@pytest.mark.parametrize("moving", [False, True])
def test_a_broken_group_on_one_rank_ends_balancing_on_all_at_once(moving: bool) -> None:
    group = Group(3)
    if moving:
        group.move()
    group.tell(2, GroupBroken())
    commands = group.round()
    assert kinds(commands) == (["EndCycle", "SwitchOff"] if moving else ["SwitchOff"])
    assert commands[-1] == SwitchOff("rank 2: its group for loads and plans is broken")
    assert all(c.phase is Phase.OFF for c in group.cycles)


def test_a_plan_announced_during_a_cycle_is_discarded_at_once() -> None:
    group = Group()
    group.begin()
    [discard] = group.tell(0, Announced(50))
    assert isinstance(discard, DiscardPlan)
    group.tell(1, Failed(1, Fault.PLAN_INVALID))
    assert kinds(group.round()) == ["EndCycle"]
    assert group.round() == [], "the discarded plan starts no cycle"


def test_a_drain_ends_the_cycle_and_holds_plans_off_until_withdrawn() -> None:
    group = Group()
    group.move()
    group.tell(1, DrainWanted(True))
    assert not group.cycles[1].drained
    [end] = group.round()
    assert end == EndCycle(1, False, "rank 1 asked for a drain", transfer_in_flight=True)
    assert group.cycles[1].drained
    group.tell(0, Announced(10))
    assert kinds(group.round()) == ["DiscardPlan"]
    group.tell(1, DrainWanted(False))
    group.tell(0, Announced(10))
    assert kinds(group.round()) == ["ReceivePlan"]


def test_a_drain_is_not_done_while_an_earlier_vote_may_still_begin_a_cycle() -> None:
    group = Group()
    group.tell(0, Announced(10))
    group.vote()
    group.tell(1, DrainWanted(True))
    assert not group.cycles[1].drained


def test_late_events_of_an_ended_cycle_change_nothing() -> None:
    group = Group()
    group.begin()
    group.tell(1, Failed(1, Fault.PLAN_DAMAGED))
    group.round()
    before = group.cycles[0]
    for event in (BatchStaged(1, 0), Failed(1, Fault.TRANSFER_TIMEOUT), PlanChecked(1, 7, 1, False)):
        assert group.tell(0, event) == []
    assert group.cycles[0] == before


def test_votes_that_are_not_ours_are_our_own_bug() -> None:
    group = Group()
    votes = group.vote()
    with pytest.raises(AssertionError, match="not the round posted in"):
        group.tell(0, RoundTaken((replace(votes[0], step=-1), votes[1])))


def test_a_vote_survives_the_wire() -> None:
    vote = Vote(*range(VOTE_SIZE))
    assert len(vote.to_list()) == VOTE_SIZE
    assert Vote.from_list(vote.to_list()) == vote
