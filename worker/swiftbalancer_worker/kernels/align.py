"""Turning a wanted layout into one that is valid and moves as little as possible."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit, jit_inlined


@jit_inlined
def holds(row: NDArray[np.int32], expert: int) -> bool:
    """Whether a rank's slots include the expert."""
    for other in row:  # noqa: SIM110 (compiled)
        if other == expert:
            return True
    return False


@jit
def separate(place: NDArray[np.int32], weight: NDArray[np.float64], serves: NDArray[np.bool_]) -> None:
    """Exchanges second replicas on one rank with experts of nearest `weight` `[experts]` on other ranks, in place."""
    ranks, slots = place.shape
    for r in range(ranks):
        for s in range(slots):
            expert = place[r, s]
            if not serves[r] or not holds(place[r, :s], expert):
                continue
            best_rank, best_slot, least = -1, -1, np.inf
            for other in range(ranks):
                if not serves[other] or holds(place[other], expert):
                    continue
                for t in range(slots):
                    gap = abs(weight[place[other, t]] - weight[expert])
                    if gap < least and not holds(place[r], place[other, t]):
                        best_rank, best_slot, least = other, t, gap
            if best_rank >= 0:
                place[r, s] = place[best_rank, best_slot]
                place[best_rank, best_slot] = expert


@jit
def keep_slots(wanted: NDArray[np.int32], current: NDArray[np.int32]) -> None:
    """Reorders each rank's `wanted` `[ranks, slots]` experts, in place, so that those it has stay in their slots."""
    ranks, slots = wanted.shape
    for r in range(ranks):
        row = wanted[r].copy()
        taken = np.zeros(slots, np.bool_)
        for s in range(slots):
            wanted[r, s] = -1
            for t in range(slots):
                if not taken[t] and row[t] == current[r, s]:
                    wanted[r, s] = row[t]
                    taken[t] = True
                    break
        rest = 0
        for s in range(slots):
            if wanted[r, s] >= 0:
                continue
            while taken[rest]:
                rest += 1
            wanted[r, s] = row[rest]
            taken[rest] = True


@jit
def match_ranks(wanted: NDArray[np.int32], current: NDArray[np.int32], kind: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[ranks]` int64: which wanted rank's experts each rank should take so that many stay where they are.

    Ranks exchange only within their `kind` `[ranks]`. Greedy: the pair with most experts in common first.
    """
    ranks = len(kind)
    common = np.zeros((ranks, ranks), np.int64)
    for r in range(ranks):
        for other in range(ranks):
            if kind[r] == kind[other]:
                for expert in wanted[other]:
                    if holds(current[r], expert):
                        common[r, other] += 1
            else:
                common[r, other] = -1
    chosen = np.full(ranks, -1, np.int64)
    for _ in range(ranks):
        best, best_other = -1, -1
        for r in range(ranks):
            for other in range(ranks):
                if (
                    chosen[r] < 0
                    and common[r, other] >= 0
                    and (best < 0 or common[r, other] > common[best, best_other])
                ):
                    best, best_other = r, other
        chosen[best] = best_other
        common[:, best_other] = -1
    return chosen
