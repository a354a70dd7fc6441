"""The protocol holds in every reachable state, and the search that says so notices a broken one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from pathlib import Path

import pytest
from msgspec.structs import replace

from swiftbalancer import cycle as protocol
from swiftbalancer.config import AgreementConfig
from swiftbalancer.cycle import (
    BatchStaged,
    Cycle,
    Event,
    Failed,
    GroupBroken,
    Phase,
    PlanChecked,
    RoundTaken,
    Step,
    Vote,
)
from tests.core.protocol import ranks
from tests.core.protocol.explore import Explored, Search
from tests.core.protocol.ranks import Settings, Violation

PAIR = Settings(num_ranks=2, lag_steps=2, draining_ranks=1)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def explore(settings: Settings) -> Explored:
    """What is found, which must be what the page on reliability says."""
    found = Search(settings).run()
    print(f"\n{settings}\n{found}")
    drains = {0: "none", 1: "one", settings.num_ranks: "all"}[settings.draining_ranks]
    idle = "" if settings.idle_round_steps == 1 else f", idle rounds every {settings.idle_round_steps}"
    key = f"{settings.num_ranks}(?:, slow)? \\| {settings.lag_steps}{idle} \\| {settings.run_ahead} \\| {drains}"
    assert re.findall(rf"^\| {key} \| ([\d,]+) \| ([\d,]+) \|$", PAGE.read_text(), re.MULTILINE) == [
        (f"{found.num_states:,}", f"{found.num_transitions:,}")
    ]
    return found


def test_two_ranks_that_may_all_drain_never_part() -> None:
    found = explore(changed(PAIR, draining_ranks=2))
    assert found.num_states > 5_000
    assert found.num_commits > 10 and found.num_stopped > 100


def test_two_ranks_whose_hosts_run_ahead_never_part() -> None:
    assert explore(changed(PAIR, run_ahead=2)).num_states > 5_000


def test_two_ranks_with_rare_idle_rounds_never_part() -> None:
    assert explore(changed(PAIR, idle_round_steps=5)).num_states > 5_000


def test_three_ranks_at_lag_one_never_part() -> None:
    assert explore(Settings(lag_steps=1, draining_ranks=0)).num_states > 12_000


def test_three_ranks_at_lag_two_never_part() -> None:
    found = explore(Settings(lag_steps=2))
    assert found.num_states > 80_000
    assert found.num_transitions > 500_000


def test_ranks_at_the_default_lag_never_part() -> None:
    default = AgreementConfig()
    assert default.lag_steps == 4
    assert explore(changed(PAIR, lag_steps=4, idle_round_steps=default.idle_round_steps)).num_states > 20_000
    assert explore(Settings(lag_steps=4)).num_states > 150_000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "settings",
    [
        Settings(lag_steps=2, draining_ranks=3),
        Settings(lag_steps=2, run_ahead=1),
        Settings(lag_steps=2, idle_round_steps=3),
        Settings(lag_steps=3),
        Settings(lag_steps=1, run_ahead=1, draining_ranks=3),
    ],
)
def test_three_ranks_under_wider_bounds_never_part(settings: Settings) -> None:
    assert explore(settings).num_states > 100_000


# -- broken protocols -----------------------------------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch], None]
real_step, real_post, real_move = protocol.step, protocol.post, protocol._move


def one_ready_rank_is_enough(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(protocol, "all", any, raising=False)


def nobody_has_to_be_ready(patch: pytest.MonkeyPatch) -> None:
    def never(_: object) -> bool:
        return True

    patch.setattr(protocol, "all", never, raising=False)


def faults_and_drains_are_ignored(patch: pytest.MonkeyPatch) -> None:
    def silent(_: Sequence[Vote]) -> str:
        return ""

    patch.setattr(protocol, "_objection", silent)


def drains_are_ignored(patch: pytest.MonkeyPatch) -> None:
    def only_faults(votes: Sequence[Vote]) -> str:
        return "fault" if any(v.fault for v in votes) else ""

    patch.setattr(protocol, "_objection", only_faults)


def digests_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    def without_digest(*args: int) -> Cycle:
        posted = real_post(*args)  # type: ignore[arg-type]
        assert posted.posted is not None
        return replace(posted, posted=replace(posted.posted, digest=0))

    patch.setattr(protocol, "post", without_digest)


def plans_for_another_epoch_are_taken(patch: pytest.MonkeyPatch) -> None:
    real = ranks._receptions

    def trusting(rank: ranks.Rank) -> list[ranks.Move]:
        if rank.held != ranks.STALE:
            return real(rank)
        checked = PlanChecked(rank.cycle.cycle, digest=ranks.STALE, num_batches=1, has_moves=False)
        return [ranks._happens(True, rank._replace(running=False), checked)]

    patch.setattr(ranks, "_receptions", trusting)


def events_of_older_cycles_count(patch: pytest.MonkeyPatch) -> None:
    def rash(cycle: Cycle, event: Event) -> Step:
        if isinstance(event, PlanChecked | BatchStaged | Failed):
            event = replace(event, cycle=cycle.cycle)
        return real_step(cycle, event)

    patch.setattr(protocol, "step", rash)


def events_of_other_batches_count(patch: pytest.MonkeyPatch) -> None:
    def rash(cycle: Cycle, event: Event) -> Step:
        if isinstance(event, BatchStaged):
            event = replace(event, batch=cycle.batch)
        return real_step(cycle, event)

    patch.setattr(protocol, "step", rash)


def readiness_outlives_a_batch(patch: pytest.MonkeyPatch) -> None:
    def moving_ready(cycle: Cycle, batch: int) -> Step:
        moved, commands = real_move(cycle, batch)
        return replace(moved, ready=True), commands

    patch.setattr(protocol, "_move", moving_ready)


def a_damaged_transfer_counts_as_staged(patch: pytest.MonkeyPatch) -> None:
    def trusting(cycle: Cycle, event: Event) -> Step:
        if isinstance(event, Failed) and cycle.phase == Phase.MOVING:
            event = BatchStaged(event.cycle, cycle.batch)
        return real_step(cycle, event)

    patch.setattr(protocol, "step", trusting)


def a_rank_votes_yes_whatever_it_knows(patch: pytest.MonkeyPatch) -> None:
    def yes(*args: int) -> Cycle:
        posted = real_post(*args)  # type: ignore[arg-type]
        assert posted.posted is not None
        return replace(posted, posted=replace(posted.posted, ready=1, fault=0))

    patch.setattr(protocol, "post", yes)


def a_rank_in_doubt_serves_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cycle, "voted_to_commit", property(lambda _: False))


def a_lost_round_counts_as_taken_with_yes(patch: pytest.MonkeyPatch) -> None:
    def hopeful(cycle: Cycle, _reason: str) -> Step:
        assert cycle.posted is not None
        return real_step(cycle, RoundTaken((cycle.posted, cycle.posted)))

    patch.setattr(protocol, "_lost", hopeful)


def a_rank_switches_off_without_telling_its_peers(patch: pytest.MonkeyPatch) -> None:
    def alone(cycle: Cycle, event: Event) -> Step:
        if isinstance(event, GroupBroken):
            return replace(cycle, phase=Phase.OFF, posted=None), []
        return real_step(cycle, event)

    patch.setattr(protocol, "step", alone)


def a_fault_outlives_its_cycle(patch: pytest.MonkeyPatch) -> None:
    real_idle = protocol._idle

    def scarred(cycle: Cycle) -> Cycle:
        return replace(real_idle(cycle), fault=cycle.fault)

    patch.setattr(protocol, "_idle", scarred)


def every_rank_commits_on_its_own_vote(patch: pytest.MonkeyPatch) -> None:
    def alone(cycle: Cycle, event: Event) -> Step:
        if isinstance(event, RoundTaken) and cycle.posted is not None:
            assert event.votes[cycle.rank] == cycle.posted
            votes = tuple(replace(cycle.posted, announce=event.votes[0].announce) for _ in event.votes)
            return protocol._round(replace(cycle, posted=None), votes)
        return real_step(cycle, event)

    patch.setattr(protocol, "step", alone)


BROKEN: list[Break] = [
    one_ready_rank_is_enough,
    nobody_has_to_be_ready,
    faults_and_drains_are_ignored,
    drains_are_ignored,
    digests_are_not_compared,
    plans_for_another_epoch_are_taken,
    events_of_older_cycles_count,
    events_of_other_batches_count,
    readiness_outlives_a_batch,
    a_damaged_transfer_counts_as_staged,
    a_rank_votes_yes_whatever_it_knows,
    a_rank_in_doubt_serves_on,
    a_lost_round_counts_as_taken_with_yes,
    a_rank_switches_off_without_telling_its_peers,
    a_fault_outlives_its_cycle,
    every_rank_commits_on_its_own_vote,
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: b.__name__)
def test_the_search_catches_a_protocol_where(broken: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    with pytest.raises(Violation) as caught:
        Search(changed(PAIR, draining_ranks=int(broken is drains_are_ignored))).run()
    print(caught.value)


@pytest.mark.parametrize("mutation", ["hasty_leader", "take_early"])
def test_the_search_catches_a_commit_one_step_early(mutation: str) -> None:
    settings = changed(PAIR, run_ahead=1, **{mutation: True})
    with pytest.raises(Violation, match="a pass runs with the maps of epoch"):
        Search(settings).run()
