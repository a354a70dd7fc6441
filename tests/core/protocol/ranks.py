"""A group of ranks that run forward passes and `swiftbalancer.cycle`, as values a search can enumerate.

What is modelled, and what stands for what in the real system:

- A rank's host and device are one place: a commit is *enqueued* on the main stream between two passes, the device
  runs that stream in order, so pass `n` uses the maps whose commit was enqueued before it. `run_ahead` lets hosts
  be several passes apart, as schedulers that run ahead do.
- `advance` is one indivisible action: the end of a pass, everything after it (take a round that is due, act on the
  commands, post the next round) and the begin of the next pass. Nothing another rank does in between could be told
  apart from doing it before or after.
- A pass ends on a rank only when every rank has begun it (`run_ahead` passes earlier where hosts run ahead): the
  engine's own collectives.
- The worker is the leader's announcement of a plan: at any time, never, good, for another epoch, twice in a row. A
  worker that crashes, is silent, late or restarted is one of these.
- A broadcast or a transfer ends at any time on each rank, well or badly; late events of older cycles and batches
  arrive at any time. A rank hears of its own events after a pass, and only where it takes or posts a round: heard
  earlier, they would be seen by nobody.
- A group for loads and plans breaks on the leader at any time, and balancing has to end everywhere at once.
- A round that is due may be lost on any rank while others learn it. A slow rank is one that others pass on before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from msgspec.structs import replace

from swiftbalancer import cycle as protocol
from swiftbalancer.cycle import (
    LEADER,
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
)

MOVES, DISPATCH_ONLY, STALE = 1, 2, 3
"""Plans, by the number of bytes their announcement names: with moves in two batches, without, for another epoch."""
NUM_BATCHES = {MOVES: 2, DISPATCH_ONLY: 1}


class Violation(Exception):
    """An invariant does not hold."""


class Staged(NamedTuple):
    """What lies in the staging buffer."""

    cycle: int
    batch: int
    intact: bool


class Ending(NamedTuple):
    """How a cycle ended on a rank."""

    cycle: int
    committed: bool


class Rank(NamedTuple):
    """One rank; all counters are relative to the group's lowest."""

    cycle: Cycle
    begun: int = 0
    """Forward passes begun."""
    ran: tuple[int, ...] = (0,)
    """Epoch of the maps used by the last passes, the one just begun last."""
    log: tuple[Vote, ...] = ()
    """The votes of the last rounds, for peers that have not taken them yet."""
    rounds: int = 0
    """Rounds posted."""
    held: int = 0
    """The plan this rank holds, which may be another than the leader's."""
    running: bool = False
    """A broadcast or a transfer is in flight."""
    staged: Staged | None = None
    ended: Ending | None = None
    installed: int = 0
    """The plan of the last commit."""
    stopped: bool = False
    """The engine has been told to stop; this rank runs no more passes."""

    @property
    def off(self) -> bool:
        return self.cycle.phase == Phase.OFF


@dataclass(frozen=True)
class Settings:
    """Bounds of one exploration."""

    num_ranks: int = 3
    lag_steps: int = 2
    idle_round_steps: int = 1
    run_ahead: int = 0
    """Passes a rank's host may be ahead of the slowest, beyond the one that is running."""
    draining_ranks: int = 1
    """How many ranks, counted from the last, may ask for a drain and withdraw it."""
    take_early: bool = False
    """A mutation: rounds are taken as soon as they are complete."""
    hasty_leader: bool = False
    """A mutation: the leader takes a complete round one step before its peers do."""


class Move(NamedTuple):
    """One thing that can happen to one rank."""

    healthy: bool
    """Whether it happens without a fault, so that it may be relied on when faults have stopped."""
    commits: bool
    rank: Rank


def started(rank: int) -> Rank:
    """A rank at attach."""
    return Rank(Cycle(rank=rank))


def local_moves(rank: Rank, *, leader: bool, may_drain: bool) -> list[Move]:
    """What can happen to a rank by itself; nothing of it is seen by others before the next round."""
    if rank.stopped or rank.off:
        return []
    moves = _announcements(rank) if leader else []
    if may_drain:
        wanted = not rank.cycle.drain
        moves.append(_happens(not wanted, rank, DrainWanted(wanted)))
    if leader and not rank.cycle.broken:
        moves.append(_happens(False, rank, GroupBroken()))
    if rank.running:
        moves += _receptions(rank) if rank.cycle.phase == Phase.RECEIVING else _transfers(rank)
    elif rank.cycle.ready:
        moves.append(_happens(False, rank, Failed(rank.cycle.cycle, Fault.INTERNAL)))
    return moves + [_happens(False, rank, event) for event in _stale(rank.cycle)]


def _happens(healthy: bool, rank: Rank, event: Event) -> Move:
    after, commands = protocol.step(rank.cycle, event)
    if commands and not all(isinstance(c, DiscardPlan) for c in commands):
        raise Violation(f"{event} alone made a rank act: {commands}")
    return Move(healthy, False, rank._replace(cycle=after))


def _announcements(rank: Rank) -> list[Move]:
    if rank.cycle.announce:
        return []
    return [_happens(plan != STALE, rank, Announced(plan)) for plan in (MOVES, DISPATCH_ONLY, STALE)]


def _receptions(rank: Rank) -> list[Move]:
    """Ends of the broadcast; a rank may also receive another valid plan than its peers."""
    done = rank._replace(running=False)
    number = rank.cycle.cycle
    failed = _happens(False, done, Failed(number, Fault.BROADCAST_FAILED))
    if rank.held == STALE:
        return [failed, _happens(True, done, Failed(number, Fault.PLAN_INVALID))]
    other = DISPATCH_ONLY if rank.held == MOVES else MOVES
    swapped = done._replace(held=other)
    return [
        failed,
        _happens(True, done, _checked(number, rank.held)),
        _happens(False, swapped, _checked(number, other)),
    ]


def _checked(number: int, plan: int) -> PlanChecked:
    return PlanChecked(number, digest=plan, num_batches=NUM_BATCHES[plan], has_moves=plan == MOVES)


def _transfers(rank: Rank) -> list[Move]:
    number, batch = rank.cycle.cycle, rank.cycle.batch
    done = rank._replace(running=False)
    good = done._replace(staged=Staged(number, batch, intact=True))
    damaged = done._replace(staged=Staged(number, batch, intact=False))
    return [
        _happens(True, good, BatchStaged(number, batch)),
        _happens(False, damaged, Failed(number, Fault.CHECKSUM)),
        _happens(False, done, Failed(number, Fault.CHECKSUM)),
    ]


def _stale(cycle: Cycle) -> list[Event]:
    """Events that must change nothing: of the cycle before, of another batch, of a cycle that has ended."""
    before = cycle.cycle - 1
    events: list[Event] = [
        PlanChecked(before, digest=MOVES, num_batches=1, has_moves=False),
        BatchStaged(before, cycle.batch),
        Failed(before, Fault.INTERNAL),
        BatchStaged(cycle.cycle, 1 - cycle.batch),
    ]
    if cycle.phase == Phase.IDLE:
        events += [BatchStaged(cycle.cycle, cycle.batch), Failed(cycle.cycle, Fault.TRANSFER_TIMEOUT)]
    if cycle.ready and cycle.phase == Phase.RECEIVING:
        events.append(PlanChecked(cycle.cycle, digest=cycle.digest + 1, num_batches=1, has_moves=False))
    return events


def due(rank: Rank, settings: Settings, *, complete: bool) -> bool:
    """Whether the outstanding round is to be taken after the pass that is ending."""
    posted = rank.cycle.posted
    if posted is None:
        return False
    if settings.take_early and complete:
        return True
    hasty = settings.hasty_leader and complete and rank.cycle.rank == LEADER
    return rank.begun >= posted.step + settings.lag_steps - hasty


def posts(rank: Rank, settings: Settings) -> bool:
    """Whether a round is to be posted after the pass that is ending, if none is outstanding then."""
    cycle = rank.cycle
    if rank.off or cycle.posted is not None:
        return False
    waited = rank.begun - rank.log[-1].step if rank.log else settings.idle_round_steps
    return cycle.phase != Phase.IDLE or waited >= settings.idle_round_steps


def passes_on(rank: Rank, settings: Settings) -> Rank:
    """The pass ends, a round is posted if it is time, the next pass begins."""
    if posts(rank, settings):
        cycle = protocol.post(rank.cycle, rank.begun, 0, 0)
        assert cycle.posted is not None
        rank = rank._replace(cycle=cycle, rounds=rank.rounds + 1, log=(*rank.log, cycle.posted))
    return rank._replace(begun=rank.begun + 1, ran=(*rank.ran, rank.cycle.epoch))


def takes(rank: Rank, votes: tuple[Vote, ...], settings: Settings) -> Move:
    """The rank learns the votes of its round and acts on them."""
    after, commands = protocol.step(rank.cycle, RoundTaken(votes))
    changed = any(isinstance(c, ReceivePlan | StageBatch | CommitBatch) for c in commands)
    if changed and (rank.cycle.drained or any(v.drain for v in votes)):
        raise Violation(f"a drained rank acts: {commands}")
    rank = _act(rank._replace(cycle=after), commands, rank.cycle)
    committed = any(isinstance(c, EndCycle) and c.committed for c in commands)
    return Move(True, committed, passes_on(_forgetting(rank), settings))


def loses(rank: Rank, settings: Settings, *, forced: bool) -> Move:
    """The rank cannot learn the outcome of its round; `forced` where no rank could."""
    after, commands = protocol.step(rank.cycle, RoundLost("lost"))
    if after.phase != Phase.OFF or not any(isinstance(c, SwitchOff | StopServing) for c in commands):
        raise Violation("a lost round does not end balancing")
    rank = _act(rank._replace(cycle=after), commands, rank.cycle)
    rank = _forgetting(rank)
    return Move(forced, False, rank if rank.stopped else passes_on(rank, settings))


def _forgetting(rank: Rank) -> Rank:
    """A rank that is off, without what can no longer matter; any other as it is."""
    if not rank.off:
        return rank
    off = Cycle(rank=rank.cycle.rank, phase=Phase.OFF, epoch=rank.cycle.epoch)
    return rank._replace(cycle=off, held=0, running=False, staged=None)


def _act(rank: Rank, commands: list[Command], before: Cycle) -> Rank:
    for command in commands:
        match command:
            case ReceivePlan(_, num_bytes):
                rank = rank._replace(held=num_bytes, running=True, staged=None)
            case StageBatch():
                rank = rank._replace(running=True, staged=None)
            case CommitBatch():
                rank = _commit(rank, command)
            case EndCycle(number, committed, _, _):
                ended = None if _stops(commands) else Ending(number, committed)
                rank = rank._replace(held=0, running=False, staged=None, ended=ended)
            case StopServing(reason):
                if not before.voted_to_commit:
                    raise Violation(f"a rank stopped serving without having voted for a commit: {reason}")
                rank = rank._replace(stopped=True)
    if rank.cycle.phase in (Phase.RECEIVING, Phase.MOVING) and not rank.held:
        raise Violation("a rank is in a cycle without a plan to work on")
    return rank


def _stops(commands: list[Command]) -> bool:
    return any(isinstance(c, StopServing) for c in commands)


def _commit(rank: Rank, command: CommitBatch) -> Rank:
    """Staged content to slots, maps to the device; the maps name what the plan held here says."""
    if rank.held == MOVES and rank.staged != Staged(command.cycle, command.batch, intact=True):
        raise Violation(f"{command} installs {rank.staged}: slots and maps part")
    if rank.held == STALE:
        raise Violation(f"{command} installs a plan that was made for another epoch")
    if rank.held == DISPATCH_ONLY and command.batch:
        raise Violation(f"{command} of a plan with one batch")
    return rank._replace(staged=None, installed=rank.held)


def shifted(rank: Rank, *, passes: int, rounds: int, cycles: int, epochs: int) -> Rank:
    """The rank with its counters lowered."""
    cycle = rank.cycle
    live = not rank.off
    moved = {"step": passes, "cycle": cycles, "epoch": epochs}
    return rank._replace(
        cycle=replace(
            cycle,
            cycle=cycle.cycle - cycles if live else 0,
            epoch=cycle.epoch - epochs,
            posted=cycle.posted and _lowered(cycle.posted, moved),
        ),
        begun=rank.begun - passes,
        ran=tuple(epoch - epochs for epoch in rank.ran),
        log=tuple(_lowered(vote, moved) for vote in rank.log),
        rounds=rank.rounds - rounds,
        staged=rank.staged and rank.staged._replace(cycle=rank.staged.cycle - cycles),
        ended=rank.ended and rank.ended._replace(cycle=rank.ended.cycle - cycles),
    )


def _lowered(vote: Vote, by: dict[str, int]) -> Vote:
    return replace(vote, **{name: getattr(vote, name) - amount for name, amount in by.items()})
