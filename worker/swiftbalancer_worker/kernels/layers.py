"""The searches of `layout` and `repair`, run over all layers of a model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.candidates import Rules
from swiftbalancer_worker.kernels.compiler import jit
from swiftbalancer_worker.kernels.layout import deal, empty_hand, replica_counts, worst_case
from swiftbalancer_worker.kernels.repair import repair
from swiftbalancer_worker.kernels.search import Ground
from swiftbalancer_worker.kernels.water import new_layer


class Demand(NamedTuple):
    """Loads to plan for, scaled so that a perfect split gives every rank time 1.

    `weight` `[layers, scenarios, experts]` float64; `fixed` `[layers, experts]` float64, load a replica adds by
    being there; `speed` `[ranks]` float64, 0 for ranks that serve nothing; `uniform`: replicas share evenly.
    `node` `[ranks]` int64; `far`: price of a move between nodes, 1 within a node; `home` `[layers, experts]` int64,
    the node an expert has to stay on, or -1.
    """

    weight: NDArray[np.float64]
    fixed: NDArray[np.float64]
    speed: NDArray[np.float64]
    uniform: bool
    node: NDArray[np.int64]
    far: float
    home: NDArray[np.int64]


@jit
def repair_layers(place: NDArray[np.int64], demand: Demand, rules: Rules, most: int) -> None:
    """Repairs `place` `[layers, ranks, slots]` in place; `most` bounds an expert's replicas.

    A layer stays as it is if its needs do not fit the rules, or if nobody asked for it.
    """
    layers, scenarios, experts = demand.weight.shape
    ranks, slots = place.shape[1:]
    state = new_layer((ranks, slots, experts), scenarios, most, demand.speed, demand.uniform)
    for i in range(layers):
        if demand.weight[i].sum() <= 0.0:
            continue
        state.place[:] = place[i]
        state.weight[:] = demand.weight[i]
        state.fixed[:] = demand.fixed[i]
        if repair(state, Ground(demand.node, demand.far, demand.home[i]), rules) > 0:
            for r in range(ranks):
                if demand.speed[r] > 0.0:
                    place[i, r] = state.place[r]


@jit
def lay_out(place: NDArray[np.int64], demand: Demand) -> None:
    """Replaces `place` `[layers, ranks, slots]`, on ranks that serve, by a layout from scratch."""
    layers, ranks, slots = place.shape
    live = 0
    for r in range(ranks):
        live += 1 if demand.speed[r] > 0.0 else 0
    for i in range(layers):
        if demand.weight[i].sum() <= 0.0:
            continue
        count = replica_counts(worst_case(demand.weight[i], 0.5), live * slots, live)
        hand = empty_hand(slots, demand.weight[i], demand.speed)
        deal(hand, demand.weight[i], count)
        for r in range(ranks):
            if demand.speed[r] > 0.0:
                place[i, r] = hand.place[r]
