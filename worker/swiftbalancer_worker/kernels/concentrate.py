"""Decode with few tokens: every expert served by one of its replicas, so that few weights are read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit, jit_inlined, jit_inner
from swiftbalancer_worker.kernels.dispatch import Split


class Choice(NamedTuple):
    """One layer, every expert on one rank. `place` `[experts]` int64, which replica serves.

    `replicas` `[experts]`, `host` `[experts, max_replicas]` int64 as in `Split`; `price` `[experts]` float64, its
    tokens and what reading its weights is worth; `load` `[ranks]` float64; `speed` `[ranks]` float64.
    """

    place: NDArray[np.int64]
    replicas: NDArray[np.int64]
    host: NDArray[np.int64]
    price: NDArray[np.float64]
    load: NDArray[np.float64]
    speed: NDArray[np.float64]


class Path(NamedTuple):
    """A search for a way off a rank. `rank` `[ranks]` int64: ranks in the order found, -1 padded.

    `expert`, `source` `[ranks]` int64: which expert would come to a rank, and from where; -1 where not found.
    """

    rank: NDArray[np.int64]
    expert: NDArray[np.int64]
    source: NDArray[np.int64]


@jit
def concentrate(
    split: Split, weight: NDArray[np.float64], fixed: NDArray[np.float64], speed: NDArray[np.float64]
) -> Split:
    """The split that wakes the fewest replicas: every expert served by one of its ranks.

    Heaviest first, each by the rank that then needs least time; `fixed` `[layers, experts]` is what using a
    replica at all adds to its rank (minimum expert token routing, METRO, arXiv 2512.09277). Then the slowest rank
    hands an expert on, to a rank that may hand on another, until none of these chains helps.
    """
    layers = len(split.load)
    out = Split(
        np.minimum(split.replicas, 1), split.host.copy(), np.zeros_like(split.share), np.zeros_like(split.load)
    )
    for i in range(layers):
        choice = Choice(
            np.zeros(weight.shape[1], np.int64), split.replicas[i], split.host[i], weight[i] + fixed[i], out.load[i],
            speed,
        )  # fmt: skip
        choose_each(choice)
        hand_on(choice)
        for e in range(len(choice.place)):
            if choice.replicas[e] > 0:
                out.host[i, e, 0] = choice.host[e, choice.place[e]]
                out.share[i, e, 0] = weight[i, e]
    return out


@jit_inner
def choose_each(choice: Choice) -> None:
    """Experts with one replica first, then the others, heaviest first, each where the time is then least."""
    for several in (False, True):
        for e in np.argsort(-choice.price, kind="mergesort"):
            if choice.replicas[e] == 0 or (choice.replicas[e] > 1) != several:
                continue
            best = 0
            for k in range(1, choice.replicas[e]):
                if time_with(choice, e, k) < time_with(choice, e, best):
                    best = k
            choice.place[e] = best
            choice.load[choice.host[e, best]] += choice.price[e]


@jit_inlined
def time_with(choice: Choice, expert: int, replica: int) -> float:
    """The time of a replica's rank if the expert is added to it."""
    rank = choice.host[expert, replica]
    return float((choice.load[rank] + choice.price[expert]) / choice.speed[rank])


@jit_inner
def hand_on(choice: Choice) -> None:
    """Serves experts from other replicas as long as that makes the slowest rank faster."""
    several = np.nonzero(choice.replicas > 1)[0]
    for _ in range(len(choice.load)):
        if not relieve(choice, several):
            break


@jit_inner
def relieve(choice: Choice, several: NDArray[np.int64]) -> bool:
    """Takes an expert off the slowest rank by the shortest chain that leaves every rank faster; False if none is."""
    hot = slowest(choice)
    limit = choice.load[hot] / choice.speed[hot] * (1.0 - 1e-9)
    ranks = len(choice.load)
    path = Path(np.full(ranks, -1), np.full(ranks, -1), np.full(ranks, -1))
    end = search_chain(choice, several, path, (hot, limit))
    if end < 0:
        return False
    while end != hot:
        expert = path.expert[end]
        choice.load[path.source[end]] -= choice.price[expert]
        choice.load[end] += choice.price[expert]
        for k in range(choice.replicas[expert]):
            if choice.host[expert, k] == end:
                choice.place[expert] = k
        end = path.source[end]
    return True


@jit_inlined
def slowest(choice: Choice) -> int:
    """The serving rank that needs most time."""
    hot = int(choice.speed.argmax())
    for r in range(len(choice.load)):
        if choice.load[r] * choice.speed[hot] > choice.load[hot] * choice.speed[r]:
            hot = r
    return hot


@jit_inlined
def search_chain(choice: Choice, several: NDArray[np.int64], path: Path, start: tuple[int, float]) -> int:
    """The rank at which a chain from rank `start[0]` ends, all times below `start[1]`; -1 if there is none.

    Breadth first: a rank that would take an expert hands on one of its own.
    """
    hot, limit = start
    path.rank[0] = hot
    size = 1
    for head in range(len(path.rank)):
        if head == size:
            break
        rank = path.rank[head]
        gets = choice.price[path.expert[rank]] if rank != hot else 0.0
        for e in several:
            fits = (choice.load[rank] + gets - choice.price[e]) < limit * choice.speed[rank]
            if choice.host[e, choice.place[e]] != rank or not fits:
                continue
            for k in range(choice.replicas[e]):
                other = choice.host[e, k]
                if other == hot or path.source[other] >= 0:
                    continue
                path.rank[size], path.expert[other], path.source[other] = other, e, rank
                size += 1
                if choice.load[other] + choice.price[e] < limit * choice.speed[other]:
                    return int(other)
    return -1
