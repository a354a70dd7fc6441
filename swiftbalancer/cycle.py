"""The cycle as a pure function: how ranks go from a plan to changed weights and maps, together or not at all.

Every rank of the expert-parallel group runs one `Cycle`. Rounds (asynchronous all-gathers of one `Vote` per
rank, posted after step `s`, taken after step `s + lag`) give every rank the same votes at the same step, so all
ranks take the same branch. Between rounds, local events (a plan arrived, a batch is staged, something failed)
only change the next vote. `step(cycle, event) -> (cycle, commands)` decides; `swiftbalancer.balancer` acts.

    IDLE ──leader announces──▶ RECEIVING ──all hold the same valid plan──▶ MOVING ──all staged──▶ commit ─┐
     ▲                             │  (a plan without moves commits here)     │  ▲                         │
     └──────── any fault, drain or disagreement: the cycle is dropped ────────┘  └───── next batch ────────┘
     any phase ──a vote's outcome cannot be learnt──▶ OFF, and loudly if this rank had voted for a commit
     any phase ──a rank's background group is broken──▶ OFF, on all ranks after the same step
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from msgspec import Struct
from msgspec.structs import astuple, replace


class Phase(IntEnum):
    """Where the cycle is; part of every vote."""

    IDLE = 0
    RECEIVING = 1
    MOVING = 2
    OFF = 3


class Fault(IntEnum):
    """Why a rank votes no. The number travels in the vote, so peers can say what happened where."""

    NONE = 0
    BROADCAST_FAILED = 1
    PLAN_DAMAGED = 2
    PLAN_INVALID = 3
    TRANSFER_FAILED = 4
    TRANSFER_TIMEOUT = 5
    CHECKSUM = 6
    STAGING_FAILED = 7
    INTERNAL = 8
    GROUP_BROKEN = 9


class Vote(Struct, frozen=True, gc=False):
    """What one rank says in one round; eleven int64 on the wire.

    Votes and cycles are made on the forward path: a `Struct` takes a tenth of a dataclass's time.
    """

    step: int
    """Forward passes this rank has finished."""
    window: int
    """Sub-windows this rank has closed."""
    passes: int
    """Forward passes its device had counted when it closed the last one; -1 where it cannot count."""
    epoch: int
    cycle: int
    phase: int
    ready: int
    """RECEIVING: 1 with a valid plan. MOVING: 1 with the current batch staged."""
    digest: int
    fault: int
    announce: int
    """Leader, IDLE: bytes of the plan it wants to broadcast; else 0."""
    drain: int
    """1 while this rank wants no cycle in flight."""

    def to_list(self) -> list[int]:
        return list(astuple(self))

    @classmethod
    def from_list(cls, values: Sequence[int]) -> Vote:
        return cls(*values)


VOTE_SIZE = len(Vote.__struct_fields__)
LEADER = 0


# -- events ---------------------------------------------------------------------------------------------------


class Announced(Struct, frozen=True):
    """Leader only: a plan of `num_bytes` is ready to be broadcast. The next may follow once this one has been
    received or discarded."""

    num_bytes: int


class PlanChecked(Struct, frozen=True):
    """This rank received the plan of `cycle` and found it valid for the placement in force."""

    cycle: int
    digest: int
    num_batches: int
    has_moves: bool


class BatchStaged(Struct, frozen=True):
    """All this rank has to send and receive of a batch is complete and verified."""

    cycle: int
    batch: int


class Failed(Struct, frozen=True):
    """Something of `cycle` failed on this rank."""

    cycle: int
    fault: Fault


class GroupBroken(Struct, frozen=True):
    """This rank can gather loads and receive plans no more; no later cycle can succeed."""


class DrainWanted(Struct, frozen=True):
    """The engine wants no cycle in flight (weight reload, sleep, shutdown), or wants them again."""

    wanted: bool


class RoundTaken(Struct, frozen=True):
    """The votes of the round this rank last posted in, by rank; the same on every rank."""

    votes: tuple[Vote, ...]


class RoundLost(Struct, frozen=True):
    """The outcome of the round this rank last posted in cannot be learnt."""

    reason: str


Event = Announced | PlanChecked | BatchStaged | Failed | GroupBroken | DrainWanted | RoundTaken | RoundLost


# -- commands -------------------------------------------------------------------------------------------------


class ReceivePlan(Struct, frozen=True):
    """Take part in the broadcast of `num_bytes` from the leader."""

    cycle: int
    num_bytes: int


class StageBatch(Struct, frozen=True):
    """Begin the transfers of a batch into staging."""

    cycle: int
    batch: int


class CommitBatch(Struct, frozen=True):
    """Now, before the next forward pass: staging to slots, tables to the device."""

    cycle: int
    batch: int
    epoch: int
    """The epoch after this commit."""


class EndCycle(Struct, frozen=True):
    """The cycle is over; drop what is still in flight."""

    cycle: int
    committed: bool
    """Whether all of the plan is in force; batches committed before a drop stay in force."""
    reason: str
    transfer_in_flight: bool


class DiscardPlan(Struct, frozen=True):
    """Leader only: the announced plan was not taken up."""

    reason: str


class SwitchOff(Struct, frozen=True):
    """Balancing ends on this rank; serving goes on with the placement in force."""

    reason: str


class StopServing(Struct, frozen=True):
    """This rank cannot know which maps its peers use: the engine must not run another forward pass."""

    reason: str


Command = ReceivePlan | StageBatch | CommitBatch | EndCycle | DiscardPlan | SwitchOff | StopServing


# -- state ----------------------------------------------------------------------------------------------------


class Cycle(Struct, frozen=True):
    """One rank's view. `phase`, `cycle`, `epoch` and `batch` change only in rounds, hence alike on all ranks."""

    rank: int
    phase: Phase = Phase.IDLE
    cycle: int = 0
    epoch: int = 0
    batch: int = 0
    ready: bool = False
    digest: int = 0
    num_batches: int = 0
    has_moves: bool = False
    fault: Fault = Fault.NONE
    announce: int = 0
    drain: bool = False
    broken: bool = False
    """Whether this rank wants balancing to end, on all ranks at once."""
    posted: Vote | None = None
    """The vote whose outcome is outstanding."""

    @property
    def voted_to_commit(self) -> bool:
        """Whether peers may commit on the strength of the outstanding vote."""
        vote = self.posted
        if vote is None or vote.fault or vote.drain or not vote.ready:
            return False
        return vote.phase == Phase.MOVING or (vote.phase == Phase.RECEIVING and not self.has_moves)

    @property
    def drained(self) -> bool:
        """Whether no cycle is in flight, and none can begin before the drain is withdrawn."""
        if self.phase == Phase.OFF:
            return True
        return self.drain and self.phase == Phase.IDLE and (self.posted is None or bool(self.posted.drain))


Step = tuple[Cycle, list[Command]]


def post(cycle: Cycle, step: int, window: int, passes: int) -> Cycle:
    """The cycle with its vote of this moment outstanding, in `posted`."""
    assert cycle.posted is None, "a round is outstanding"
    assert cycle.phase != Phase.OFF, "balancing is off"
    vote = Vote(
        step=step,
        window=window,
        passes=passes,
        epoch=cycle.epoch,
        cycle=cycle.cycle,
        phase=int(cycle.phase),
        ready=int(cycle.ready),
        digest=cycle.digest,
        fault=int(Fault.GROUP_BROKEN if cycle.broken else cycle.fault),
        announce=cycle.announce if cycle.phase == Phase.IDLE else 0,
        drain=int(cycle.drain),
    )
    return replace(cycle, posted=vote)


def step(cycle: Cycle, event: Event) -> Step:
    """The next state and what to do about it. Stale events are ignored; impossible ones are our own bug."""
    if cycle.phase == Phase.OFF:
        return cycle, []
    match event:
        case RoundTaken(votes):
            assert cycle.posted is not None and votes[cycle.rank] == cycle.posted, "not the round posted in"
            over = replace(cycle, posted=None)
            return (over, []) if says_nothing(votes) else _round(over, votes)
        case RoundLost(reason):
            return _lost(cycle, reason)
        case Announced(num_bytes):
            return _announce(cycle, num_bytes)
        case DrainWanted(wanted):
            return replace(cycle, drain=wanted), []
        case GroupBroken():
            return replace(cycle, broken=True), []
    return _local(cycle, event), []


def says_nothing(votes: Sequence[Vote]) -> bool:
    """Whether a round of these votes changes nothing, but that it is not outstanding any more."""
    first = votes[0]
    if first.ready or first.fault or first.drain or first.announce:
        return False
    return votes.count(first) == len(votes)


def _announce(cycle: Cycle, num_bytes: int) -> Step:
    assert cycle.rank == LEADER and num_bytes > 0 and not cycle.announce, "one announcement at a time"
    if cycle.phase != Phase.IDLE:  # made for a placement that is about to change
        return cycle, [DiscardPlan("a cycle is in flight")]
    return replace(cycle, announce=num_bytes), []


def _local(cycle: Cycle, event: PlanChecked | BatchStaged | Failed) -> Cycle:
    if event.cycle != cycle.cycle or cycle.phase == Phase.IDLE:
        return cycle
    match event:
        case Failed(_, fault):
            return replace(cycle, fault=fault, ready=False) if cycle.fault == Fault.NONE else cycle
        case PlanChecked(_, digest, num_batches, has_moves):
            if cycle.phase != Phase.RECEIVING or cycle.fault or cycle.ready:
                return cycle
            return replace(cycle, ready=True, digest=digest, num_batches=num_batches, has_moves=has_moves)
        case BatchStaged(_, batch):
            if cycle.phase != Phase.MOVING or batch != cycle.batch or cycle.fault:
                return cycle
            return replace(cycle, ready=True)


def _round(cycle: Cycle, votes: tuple[Vote, ...]) -> Step:
    # Of hundreds of ranks nearly all vote alike, and equal votes mostly are one object: look at each but once.
    distinct = tuple({id(vote): vote for vote in votes}.values())
    drifted = not _in_step(distinct)
    if drifted and disagreement(distinct):
        return replace(cycle, phase=Phase.OFF), [StopServing(disagreement(votes))]
    if drifted or any(vote.fault or vote.drain for vote in distinct):
        ended = _ended_by(cycle, votes)
        if ended is not None:
            return ended
    if cycle.phase == Phase.IDLE:
        return _begin(cycle, votes[LEADER].announce)
    if not all(v.ready for v in distinct):
        return cycle, []
    if len({v.digest for v in distinct}) > 1:
        return _refuse(cycle, "ranks hold different plans")
    if cycle.phase == Phase.RECEIVING and cycle.has_moves:
        return _move(cycle, 0)
    return _commit(cycle)


def _in_step(votes: Sequence[Vote]) -> bool:
    """Whether there is neither a `disagreement` nor a `lockstep_fault`; by one look at each vote."""
    one = votes[0]
    return all(
        vote.epoch == one.epoch
        and vote.cycle == one.cycle
        and vote.phase == one.phase
        and vote.step == one.step
        and vote.window == one.window
        and vote.passes == one.passes
        for vote in votes
    )


def _begin(cycle: Cycle, num_bytes: int) -> Step:
    if not num_bytes:
        return cycle, []
    begun = replace(cycle, phase=Phase.RECEIVING, cycle=cycle.cycle + 1, announce=0, batch=0)
    return begun, [ReceivePlan(begun.cycle, num_bytes)]


def _move(cycle: Cycle, batch: int) -> Step:
    moving = replace(cycle, phase=Phase.MOVING, batch=batch, ready=False)
    return moving, [StageBatch(cycle.cycle, batch)]


def _commit(cycle: Cycle) -> Step:
    done = replace(cycle, epoch=cycle.epoch + 1)
    commit = CommitBatch(cycle.cycle, cycle.batch, done.epoch)
    if cycle.batch + 1 < cycle.num_batches:
        moving, begin = _move(done, cycle.batch + 1)
        return moving, [commit, *begin]
    return _idle(done), [commit, EndCycle(cycle.cycle, True, "", False)]


def _refuse(cycle: Cycle, reason: str) -> Step:
    """Drop whatever is going on; nothing more of it will be committed on any rank."""
    if cycle.phase != Phase.IDLE:
        moving = cycle.phase == Phase.MOVING
        return _idle(cycle), [EndCycle(cycle.cycle, False, reason, moving)]
    if cycle.announce:
        return replace(cycle, announce=0), [DiscardPlan(reason)]
    return cycle, []


def _idle(cycle: Cycle) -> Cycle:
    return replace(
        cycle,
        phase=Phase.IDLE,
        batch=0,
        ready=False,
        digest=0,
        num_batches=0,
        has_moves=False,
        fault=Fault.NONE,
    )


def _lost(cycle: Cycle, reason: str) -> Step:
    off, commands = _end_balancing(cycle, reason)
    if cycle.voted_to_commit:
        doubt = f"voted to commit epoch {cycle.epoch + 1} and cannot learn the outcome: {reason}"
        return off, [*commands[:-1], StopServing(doubt)]
    return off, commands


def _end_balancing(cycle: Cycle, reason: str) -> Step:
    """Nothing more will be committed on this rank."""
    end: list[Command] = []
    if cycle.phase != Phase.IDLE:
        end = [EndCycle(cycle.cycle, False, reason, cycle.phase == Phase.MOVING)]
    return replace(cycle, phase=Phase.OFF, posted=None), [*end, SwitchOff(reason)]


def disagreement(votes: Sequence[Vote]) -> str:
    """Non-empty if ranks are in different epochs, cycles or phases: a promise of the protocol is broken."""
    for name in ("epoch", "cycle", "phase"):
        values = [getattr(v, name) for v in votes]
        if len(set(values)) > 1:
            return f"ranks differ in {name}: {values}"
    return ""


def lockstep_fault(votes: Sequence[Vote]) -> str:
    """Non-empty, naming the rank, if ranks did not run the same number of forward passes."""
    for name in ("step", "window", "passes"):
        values = [getattr(v, name) for v in votes]
        if len(set(values)) > 1:
            usual = max(set(values), key=values.count)
            odd = next(rank for rank, value in enumerate(values) if value != usual)
            return f"rank {odd} is off: its {name} is {values[odd]}, of most ranks {usual}"
    return ""


def _ended_by(cycle: Cycle, votes: tuple[Vote, ...]) -> Step | None:
    """What becomes of the cycle if some rank does not want to go on, or must not."""
    broken = [rank for rank, vote in enumerate(votes) if vote.fault == Fault.GROUP_BROKEN]
    if broken:
        return _end_balancing(cycle, f"rank {broken[0]}: its group for loads and plans is broken")
    refusal = lockstep_fault(votes) or _objection(votes)
    return _refuse(cycle, refusal) if refusal else None


def _objection(votes: Sequence[Vote]) -> str:
    for rank, vote in enumerate(votes):
        if vote.fault:
            return f"rank {rank}: {Fault(vote.fault).name.lower()}"
    for rank, vote in enumerate(votes):
        if vote.drain:
            return f"rank {rank} asked for a drain"
    return ""
