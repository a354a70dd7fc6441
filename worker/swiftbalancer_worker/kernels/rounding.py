"""Rounding fractions to whole columns of dispatch tables."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit_inlined, jit_inner
from swiftbalancer_worker.kernels.layout import power
from swiftbalancer_worker.kernels.water import Scratch, fill, new_scratch


class Rounding(NamedTuple):
    """A layer's split on its way to whole columns.

    `replicas` `[experts]`, `host` `[experts, max_replicas]` int64; `share` same shape, `load` `[ranks]` float64:
    as in `Split`, then of the columns. `columns` `[experts, max_replicas]` int64, of `width` per expert, so far.
    """

    replicas: NDArray[np.int64]
    host: NDArray[np.int64]
    share: NDArray[np.float64]
    load: NDArray[np.float64]
    columns: NDArray[np.int64]
    speed: NDArray[np.float64]
    width: int


@jit_inner
def round_layer(state: Rounding, weight: NDArray[np.float64]) -> None:
    """Gives each replica of an expert its columns; `weight` `[experts]`, what was split.

    One expert after the other, heaviest first, places its columns where the others leave room, three times
    over: rounding errors then cancel over the experts of a rank instead of adding up. Chains of two columns
    then relieve the slowest rank.
    """
    scratch = new_scratch(state.host.shape[1])
    for e in range(len(weight)):
        if weight[e] <= 0.0 or state.replicas[e] == 1:
            share_evenly(state.columns[e], state.replicas[e], state.width)
    several = np.nonzero((state.replicas > 1) & (weight > 0.0))[0]
    order = several[np.argsort(-weight[several], kind="mergesort")]
    for _ in range(3):
        for e in order:
            round_expert(state, e, weight[e], scratch)
    relieve_slowest(state, weight, seats_of(state, several))


@jit_inlined
def share_evenly(columns: NDArray[np.int64], num: int, width: int) -> None:
    """Gives `num` replicas equally many `columns`: for experts nobody asked for, and those with one replica."""
    for k in range(num):
        columns[k] = width // num + (1 if k < width % num else 0)


@jit_inlined
def round_expert(state: Rounding, expert: int, weight: float, scratch: Scratch) -> None:
    """Gives each replica its columns: whole parts of the ideal split, then the rest one by one to the idlest."""
    num = state.replicas[expert]
    host, share, columns = state.host[expert], state.share[expert], state.columns[expert]
    unit = weight / state.width
    for k in range(num):
        scratch.base[k] = state.load[host[k]] - share[k]
        scratch.pace[k] = state.speed[host[k]]
    fill(num, weight, scratch)
    left = state.width
    for k in range(num):
        columns[k] = min(left, int(scratch.part[k] / unit))
        left -= columns[k]
    for _ in range(left):
        best = 0
        for k in range(num):
            if time_after(scratch, columns, k, unit) < time_after(scratch, columns, best, unit):
                best = k
        columns[best] += 1
    for k in range(num):
        share[k] = columns[k] * unit
        state.load[host[k]] = scratch.base[k] + share[k]


@jit_inlined
def time_after(scratch: Scratch, columns: NDArray[np.int64], replica: int, unit: float) -> float:
    """A rank's time half a column after this replica's present ones: the slope of its squared time."""
    return float((scratch.base[replica] + (columns[replica] + 0.5) * unit) / scratch.pace[replica])


class Shift(NamedTuple):
    """One column of `expert` goes from its replica `giver` to its replica `taker`."""

    expert: int
    giver: int
    taker: int


class Chain(NamedTuple):
    """Two shifts, or one if `then.expert` is -1, that lower the layer's score by `gain`."""

    first: Shift
    then: Shift
    gain: float


class Seats(NamedTuple):
    """The experts with several replicas that each rank serves: seats `first[rank]` to `first[rank + 1]`.

    `first` `[ranks + 1]`, `expert`, `replica` `[seats]` int64: which of the expert's replicas it is.
    """

    first: NDArray[np.int64]
    expert: NDArray[np.int64]
    replica: NDArray[np.int64]


@jit_inner
def seats_of(state: Rounding, several: NDArray[np.int64]) -> Seats:
    """The seats of the experts `several`, of each rank in their order."""
    ranks = len(state.speed)
    first = np.zeros(ranks + 1, np.int64)
    for e in several:
        for k in range(state.replicas[e]):
            first[state.host[e, k] + 1] += 1
    for r in range(ranks):
        first[r + 1] += first[r]
    seats = Seats(first, np.empty(first[ranks], np.int64), np.empty(first[ranks], np.int64))
    taken = first[:ranks].copy()
    for e in several:
        for k in range(state.replicas[e]):
            nth = taken[state.host[e, k]]
            seats.expert[nth], seats.replica[nth] = e, k
            taken[state.host[e, k]] = nth + 1
    return seats


@jit_inlined
def relieve_slowest(state: Rounding, weight: NDArray[np.float64], seats: Seats) -> None:
    """Moves columns off the slowest rank while that lowers the sum over ranks of time^8.

    A column is a coarse unit; passing one on to the next rank, or taking a smaller one in return, is finer.
    """
    ideal = state.load.sum() / max(state.speed.sum(), 1e-300)
    for _ in range(len(state.speed)):
        chain = best_chain(state, weight, seats, ideal)
        if chain.gain <= 1e-6:
            break
        shift_column(state, weight, chain.first)
        if chain.then.expert >= 0:
            shift_column(state, weight, chain.then)


@jit_inlined
def shift_column(state: Rounding, weight: NDArray[np.float64], shift: Shift) -> None:
    """Does a shift."""
    unit = weight[shift.expert] / state.width
    state.columns[shift.expert, shift.giver] -= 1
    state.columns[shift.expert, shift.taker] += 1
    state.load[state.host[shift.expert, shift.giver]] -= unit
    state.load[state.host[shift.expert, shift.taker]] += unit


@jit_inner
def best_chain(state: Rounding, weight: NDArray[np.float64], seats: Seats, ideal: float) -> Chain:
    """The chain from the slowest rank with the largest gain; gain 0 if there is none."""
    hot = slowest_rank(state)
    nothing = Shift(-1, 0, 0)
    best = Chain(nothing, nothing, 0.0)
    for nth in range(seats.first[hot], seats.first[hot + 1]):
        e, giver = seats.expert[nth], seats.replica[nth]
        if state.columns[e, giver] == 0:
            continue
        unit = weight[e] / state.width
        for taker in range(state.replicas[e]):
            rank = state.host[e, taker]
            if rank == hot:
                continue
            first = Shift(e, giver, taker)
            relief = drop(state, hot, -unit, ideal)
            gain = relief + drop(state, rank, unit, ideal)
            if gain > best.gain:
                best = Chain(first, nothing, gain)
            best = best_second(state, weight, seats, Start(first, hot, rank, unit, ideal, best))
    return best


class Start(NamedTuple):
    """A first shift of `unit` from rank `hot` to `rank`, and the `best` chain so far."""

    first: Shift
    hot: int
    rank: int
    unit: float
    ideal: float
    best: Chain


@jit_inlined
def best_second(state: Rounding, weight: NDArray[np.float64], seats: Seats, start: Start) -> Chain:
    """`start.best`, or the chain in which the rank that took a column passes one of another expert on."""
    best, ideal = start.best, start.ideal
    for nth in range(seats.first[start.rank], seats.first[start.rank + 1]):
        e, giver = seats.expert[nth], seats.replica[nth]
        if e == start.first.expert or state.columns[e, giver] == 0:
            continue
        unit = weight[e] / state.width
        middle = drop(state, start.rank, start.unit - unit, ideal)
        for taker in range(state.replicas[e]):
            rank = state.host[e, taker]
            if rank == start.rank:
                continue
            if rank == start.hot:
                gain = middle + drop(state, rank, unit - start.unit, ideal)
            else:
                gain = middle + drop(state, rank, unit, ideal) + drop(state, start.hot, -start.unit, ideal)
            if gain > best.gain:
                best = Chain(start.first, Shift(e, giver, taker), gain)
    return best


@jit_inlined
def drop(state: Rounding, rank: int, extra: float, ideal: float) -> float:
    """How far a rank's time^8 falls if it carries `extra` more."""
    scale = 1.0 / (ideal * state.speed[rank])
    return power(state.load[rank] * scale) - power((state.load[rank] + extra) * scale)


@jit_inlined
def slowest_rank(state: Rounding) -> int:
    """The rank with the longest time."""
    worst = -1
    for r in range(len(state.speed)):
        if state.speed[r] > 0.0 and (
            worst < 0 or state.load[r] / state.speed[r] > state.load[worst] / state.speed[worst]
        ):
            worst = r
    return worst
