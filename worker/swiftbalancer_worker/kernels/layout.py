"""A layer's layout from scratch: replica counts, then experts dealt to ranks under several load scenarios."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit, jit_inlined, jit_inner


class Hand(NamedTuple):
    """A layout being dealt; arrays are updated in place.

    `place` `[ranks, slots]` int64, -1 where empty; `filled` `[ranks]` int64, slots in use; `held`
    `[ranks, experts]` bool; `load` `[scenarios, ranks]` float64; `speed` `[ranks]` float64, 0 if excluded.
    """

    place: NDArray[np.int64]
    filled: NDArray[np.int64]
    held: NDArray[np.bool_]
    load: NDArray[np.float64]
    speed: NDArray[np.float64]


@jit
def empty_hand(num_slots: int, weight: NDArray[np.float64], speed: NDArray[np.float64]) -> Hand:
    """Ranks of `num_slots` empty slots each."""
    scenarios, experts = weight.shape
    ranks = len(speed)
    place = np.full((ranks, num_slots), -1, np.int64)
    return Hand(
        place, np.zeros(ranks, np.int64), np.zeros((ranks, experts), np.bool_), np.zeros((scenarios, ranks)), speed
    )


@jit_inlined
def power(time: float) -> float:
    """`time` to the 8th: sums of it behave like a maximum, but still see every other rank."""
    square = time * time
    fourth = square * square
    return fourth * fourth


@jit_inner
def replica_counts(weight: NDArray[np.float64], num_slots: int, most: int) -> NDArray[np.int64]:
    """`[experts]` int64: slots handed one by one to the expert with most load per replica, `most` each at most."""
    experts = len(weight)
    count = np.ones(experts, np.int64)
    for _ in range(num_slots - experts):
        best = -1
        for e in range(experts):
            if count[e] < most and (best < 0 or weight[e] / count[e] > weight[best] / count[best]):
                best = e
        if best < 0:
            break
        count[best] += 1
    return count


@jit_inner
def worst_case(weight: NDArray[np.float64], deviations: float) -> NDArray[np.float64]:
    """`[experts]` float64, mean over scenarios plus `deviations` standard deviations."""
    scenarios, experts = weight.shape
    out = np.empty(experts)
    for e in range(experts):
        mean = 0.0
        for c in range(scenarios):
            mean += weight[c, e] / scenarios
        square = 0.0
        for c in range(scenarios):
            square += (weight[c, e] - mean) ** 2 / scenarios
        out[e] = mean + deviations * np.sqrt(square)
    return out


@jit
def deal(hand: Hand, weight: NDArray[np.float64], count: NDArray[np.int64]) -> None:
    """Fills the hand's empty slots: redundant replicas evenly over the ranks first, then one of each expert.

    A rank without any replicated expert cannot be relieved by dispatch, hence the order. Within each round the
    heaviest go first, each to the rank whose sum over scenarios of time^8 grows least.
    """
    part = weight / count
    order = np.argsort(-worst_case(part, 0.5), kind="mergesort")
    for redundant in (True, False):
        for expert in order:
            for _ in range(count[expert] - 1 if redundant else 1):
                rank = best_rank(hand, part, expert, redundant)
                if rank < 0:
                    rank = make_room(hand, part, expert)
                put(hand, part, expert, rank)


@jit_inlined
def put(hand: Hand, part: NDArray[np.float64], expert: int, rank: int) -> None:
    """Gives a rank a replica of an expert."""
    hand.place[rank, hand.filled[rank]] = expert
    hand.filled[rank] += 1
    hand.held[rank, expert] = True
    for c in range(len(part)):
        hand.load[c, rank] += part[c, expert]


@jit_inlined
def best_rank(hand: Hand, part: NDArray[np.float64], expert: int, evenly: bool) -> int:
    """The rank with room, without the expert, whose score grows least; `evenly`: among those filled least; or -1."""
    ranks, slots = hand.place.shape
    best = -1
    least = 0.0
    for r in range(ranks):
        if hand.speed[r] <= 0.0 or hand.filled[r] == slots or hand.held[r, expert]:
            continue
        if evenly and best >= 0 and hand.filled[r] > hand.filled[best]:
            continue
        score = 0.0
        for c in range(len(part)):
            before = hand.load[c, r] / hand.speed[r]
            after = (hand.load[c, r] + part[c, expert]) / hand.speed[r]
            score += power(after) - power(before)
        if best < 0 or score < least or (evenly and hand.filled[r] < hand.filled[best]):
            best, least = r, score
    return best


@jit_inner
def make_room(hand: Hand, part: NDArray[np.float64], expert: int) -> int:
    """Frees a slot for `expert` where every rank with room holds it: another rank hands one of its experts there."""
    ranks, slots = hand.place.shape
    for room in range(ranks):
        if hand.speed[room] <= 0.0 or hand.filled[room] == slots:
            continue
        for giver in range(ranks):
            if hand.speed[giver] <= 0.0 or hand.held[giver, expert]:
                continue
            for s in range(hand.filled[giver]):
                other = hand.place[giver, s]
                if not hand.held[room, other]:
                    take(hand, part, giver, s)
                    put(hand, part, other, room)
                    return giver
    return -1


@jit_inner
def take(hand: Hand, part: NDArray[np.float64], rank: int, slot: int) -> None:
    """Takes the expert of a slot away; the rank's last expert closes the gap."""
    expert = hand.place[rank, slot]
    last = hand.filled[rank] - 1
    hand.place[rank, slot] = hand.place[rank, last]
    hand.place[rank, last] = -1
    hand.filled[rank] = last
    hand.held[rank, expert] = False
    for c in range(len(part)):
        hand.load[c, rank] -= part[c, expert]
