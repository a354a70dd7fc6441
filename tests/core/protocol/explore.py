"""Explicit-state breadth-first search over everything a group of ranks can do, and the invariants it checks.

States are equal up to a common shift of all counters and an exchange of the ranks that do not lead, so runs of any
length, through any number of cycles, end in finitely many states. Ranks are interned: a state is a tuple of small
integers, and whatever concerns one rank alone is computed once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.cycle import Phase, Vote
from tests.core.protocol.edges import Edges
from tests.core.protocol.ranks import (
    Move,
    Rank,
    Settings,
    Violation,
    due,
    local_moves,
    loses,
    passes_on,
    posts,
    shifted,
    started,
    takes,
)

State = tuple[int, ...]
AdvanceKey = tuple[int, int, "tuple[Vote, ...] | None", bool, bool]
"""Rank, its position, the votes of its round if complete, whether it takes it, whether it can never complete."""


@dataclass(frozen=True)
class Explored:
    """What a search found."""

    num_states: int
    num_transitions: int
    num_commits: int
    """Transitions in which a rank completes a cycle."""
    num_stopped: int
    """States in which a rank has stopped serving, in doubt about an outcome."""


@dataclass(frozen=True, slots=True)
class Step:
    """A `Move` with its rank interned."""

    healthy: bool
    commits: bool
    rank: int


@dataclass
class Search:
    """One exploration. `run` raises `Violation` with the shortest way to the first broken invariant."""

    settings: Settings
    _ranks: list[Rank] = field(default_factory=list)
    _number_of: dict[Rank, int] = field(default_factory=dict)
    _advanced: dict[AdvanceKey, list[Step]] = field(default_factory=dict)
    _quiets: dict[int, Step] = field(default_factory=dict)
    _canonical: dict[State, State] = field(default_factory=dict)
    _index: dict[State, int] = field(default_factory=dict)
    _states: list[State] = field(default_factory=list)
    _parents: array[int] = field(default_factory=lambda: array("l"))
    _edges: Edges = field(default_factory=Edges)
    _num_transitions: int = 0

    def run(self) -> Explored:
        """Visits every reachable state, then checks that each has a way out."""
        first = tuple(self._number(started(rank=min(i, 1))) for i in range(self.settings.num_ranks))
        self._visit(first, parent=-1)
        for here, state in enumerate(self._states):  # grows while it is walked
            self._expand(here, state)
        self._check_exits()
        return Explored(
            num_states=len(self._states),
            num_transitions=self._num_transitions,
            num_commits=int(self._edges.commits().sum()),
            num_stopped=sum(any(self._ranks[n].stopped for n in state) for state in self._states),
        )

    # -- the search ---------------------------------------------------------------------------------------

    def _expand(self, here: int, state: State) -> None:
        try:
            for position, step in self._steps(state):
                after = (*state[:position], step.rank, *state[position + 1 :])
                there = self._visit(self._canonicalise(after), parent=here)
                self._num_transitions += 1
                if step.healthy:
                    self._edges.add(here, there, commits=step.commits)
        except (Violation, AssertionError) as error:
            raise Violation(f"{error}\n{self._way_to(here)}") from None

    def _visit(self, state: State, *, parent: int) -> int:
        there = self._index.get(state)
        if there is None:
            there = self._index[state] = len(self._states)
            self._states.append(state)
            self._parents.append(parent)
        return there

    def _steps(self, state: State) -> Iterator[tuple[int, Step]]:
        """What each rank may do next: go on with whatever of its own has ended in the meantime."""
        for position, number in enumerate(state):
            rank = self._ranks[number]
            peers = [self._ranks[n] for i, n in enumerate(state) if i != position]
            if rank.stopped or any(p.begun < rank.begun - self.settings.run_ahead for p in peers):
                continue
            votes = _round_of(rank, position, peers)
            for step in self._advances(number, position, votes, peers):
                _check_passes(self._ranks[step.rank], peers)
                yield position, step

    def _advances(
        self, number: int, position: int, votes: tuple[Vote, ...] | None, peers: list[Rank]
    ) -> Iterable[Step]:
        rank = self._ranks[number]
        taking = due(rank, self.settings, complete=votes is not None)
        if not taking and not posts(rank, self.settings):
            return [self._quiet(number)]
        hopeless = taking and any((p.off or p.stopped) and p.rounds < rank.rounds for p in peers)
        key = (number, position, votes, taking, hopeless)
        if key not in self._advanced:
            heard = self._heard(number, position)
            self._advanced[key] = [s for n, healthy in heard for s in self._ends(n, healthy, key)]
        return self._advanced[key]

    def _ends(self, number: int, healthy: bool, key: AdvanceKey) -> Iterator[Step]:
        """The ways a pass can end on a rank that has heard of its own events."""
        _, _, votes, taking, hopeless = key
        rank = self._ranks[number]
        if not taking:
            moves = [Move(True, False, passes_on(rank, self.settings))]
        elif votes is None:
            moves = [loses(rank, self.settings, forced=hopeless)]
        else:
            moves = [takes(rank, votes, self.settings), loses(rank, self.settings, forced=False)]
        for move in moves:
            yield Step(healthy and move.healthy, move.commits, self._number(move.rank))

    def _quiet(self, number: int) -> Step:
        if number not in self._quiets:
            self._quiets[number] = Step(True, False, self._number(passes_on(self._ranks[number], self.settings)))
        return self._quiets[number]

    def _heard(self, number: int, position: int) -> list[tuple[int, bool]]:
        """The rank after any run of its own events, and whether one without faults leads there."""
        may_drain = position >= self.settings.num_ranks - self.settings.draining_ranks
        seen: dict[int, bool] = {number: True}
        queue = [number]
        for here in queue:
            for move in local_moves(self._ranks[here], leader=position == 0, may_drain=may_drain):
                there, healthy = self._number(move.rank), move.healthy and seen[here]
                if there not in seen or (healthy and not seen[there]):
                    seen[there] = healthy
                    queue.append(there)
        return list(seen.items())

    # -- states as values ---------------------------------------------------------------------------------

    def _number(self, rank: Rank) -> int:
        number = self._number_of.get(rank)
        if number is None:
            number = self._number_of[rank] = len(self._ranks)
            self._ranks.append(rank)
        return number

    def _canonicalise(self, state: State) -> State:
        known = self._canonical.get(state)
        if known is None:
            ranks = _canonical([self._ranks[n] for n in state])
            numbers = [self._number(r) for r in ranks]
            split = self.settings.num_ranks - self.settings.draining_ranks
            known = (numbers[0], *sorted(numbers[1:split]), *sorted(numbers[max(split, 1) :]))
            self._canonical[state] = known
        return known

    # -- what must hold of the whole graph ----------------------------------------------------------------

    def _check_exits(self) -> None:
        """Every state has a way on, every cycle an end, and every group that still balances a cycle ahead."""
        stopped, settled, balancing = (np.zeros(len(self._states), bool) for _ in range(3))
        for i, state in enumerate(self._states):
            ranks = [self._ranks[n] for n in state]
            stopped[i] = any(r.stopped for r in ranks)
            settled[i] = stopped[i] or all(r.cycle.phase in (Phase.IDLE, Phase.OFF) for r in ranks)
            balancing[i] = not any(r.stopped or r.off or r.cycle.broken for r in ranks)
        self._demand(self._edges.have_exit(len(self._states)) | stopped, "a state without an exit")
        self._demand(self._edges.can_reach(settled), "a cycle that cannot end")
        succeeding = self._edges.can_reach(self._edges.commit_sources(len(self._states)))
        self._demand(succeeding | ~balancing, "no cycle can succeed after the faults have stopped")

    def _demand(self, holds: NDArray[np.bool_], what: str) -> None:
        if not holds.all():
            raise Violation(f"{what}\n{self._way_to(int(np.argmin(holds)))}")

    def _way_to(self, there: int) -> str:
        """The shortest run that leads to a state, one line per rank and state."""
        states = []
        while there >= 0:
            states.append(self._states[there])
            there = self._parents[there]
        lines = []
        for n, state in enumerate(reversed(states)):
            lines += [f"{n:3d} rank {i}: {_told(self._ranks[number])}" for i, number in enumerate(state)]
        return "\n".join(lines)


def _round_of(rank: Rank, position: int, peers: list[Rank]) -> tuple[Vote, ...] | None:
    """All votes of the round this rank has outstanding, itself first if it leads, else second; None: incomplete."""
    if rank.cycle.posted is None or any(p.rounds < rank.rounds for p in peers):
        return None
    votes = [p.log[rank.rounds - p.rounds - 1] for p in peers]
    return (rank.cycle.posted, *votes) if position == 0 else (votes[0], rank.cycle.posted, *votes[1:])


def _canonical(ranks: list[Rank]) -> list[Rank]:
    """The ranks with everything forgotten that no later event can tell apart."""
    _check_agreement(ranks)
    live = [r for r in ranks if not r.off and not r.stopped]
    passes, rounds = min(r.begun for r in ranks), min(r.rounds for r in ranks)
    waiting = min((r.rounds for r in live), default=0)
    cycles = min((r.cycle.cycle for r in live), default=0)
    epochs = min(r.cycle.epoch for r in ranks)
    same_end = len({r.ended for r in ranks}) == 1
    same_epoch = len({r.cycle.epoch for r in ranks}) == 1
    out = []
    for rank in ranks:
        kept = max(rank.rounds - waiting + 1, 1) if live else 0
        trimmed = rank._replace(
            ran=rank.ran[len(rank.ran) - (rank.begun - passes) :],
            log=rank.log[len(rank.log) - min(kept, len(rank.log)) :],
            ended=None if same_end else rank.ended,
            installed=0 if same_epoch else rank.installed,
        )
        out.append(shifted(trimmed, passes=passes, rounds=rounds, cycles=cycles, epochs=epochs))
    return out


def _check_passes(rank: Rank, peers: list[Rank]) -> None:
    """No two ranks run a forward pass with different maps; `rank` has just begun one."""
    for peer in peers:
        behind = peer.begun - rank.begun
        if behind < 0 or rank.stopped:
            continue
        if behind == 0:
            theirs = peer.ran[-1] if peer.ran else peer.cycle.epoch
        else:
            theirs = peer.ran[-1 - behind]
        if theirs != rank.ran[-1]:
            raise Violation(f"a pass runs with the maps of epoch {rank.ran[-1]} on one rank, {theirs} on another")


def _check_agreement(ranks: list[Rank]) -> None:
    """Ranks of one epoch have installed the same plan; a cycle ends alike wherever it has ended."""
    if len({(r.cycle.epoch, r.installed) for r in ranks}) > len({r.cycle.epoch for r in ranks}):
        raise Violation(f"ranks of one epoch have installed plans {[r.installed for r in ranks]}")
    ends = {r.ended for r in ranks if r.ended}
    if len(ends) > len({e.cycle for e in ends}):
        raise Violation(f"a cycle ended differently: {[r.ended for r in ranks]}")


def _told(rank: Rank) -> str:
    cycle = rank.cycle
    flags = [n for n in ("ready", "drain", "announce") if getattr(cycle, n)]
    return (
        f"pass {rank.begun} epoch {cycle.epoch} {cycle.phase.name} cycle {cycle.cycle} batch {cycle.batch} "
        f"{' '.join(flags)} {cycle.fault.name if cycle.fault else ''} round {rank.rounds} staged {rank.staged} "
        f"{'STOPPED' if rank.stopped else ''}"
    )
