"""Trying an action out: what the slowest ranks gain once every expert, not only those touched, is split afresh.

An action relieves one rank; experts with replicas there then take load from other ranks, and so on. How far that goes
depends on who shares replicas with whom, which an estimate from the touched experts alone does not see.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.candidates import SWAP, Action
from swiftbalancer_worker.kernels.compiler import jit_inlined, jit_inner
from swiftbalancer_worker.kernels.layout import power
from swiftbalancer_worker.kernels.search import Search, attach, detach, slowest_rank
from swiftbalancer_worker.kernels.water import Layer, refill, settle_one

EFFORT = (5e-3, 5)
"""Of the solver: tolerance and most sweeps."""


@jit_inner
def new_stage(layer: Layer) -> Layer:
    """Room for one scenario of a layer."""
    experts, most = layer.host.shape
    return Layer(
        layer.place, np.zeros(experts, np.int64), np.zeros((experts, most), np.int64), np.zeros((1, experts, most)),
        np.zeros((1, len(layer.speed))), np.zeros((1, experts)), layer.fixed, layer.speed, layer.uniform,
    )  # fmt: skip


@jit_inner
def rehearse(layer: Layer, search: Search, stage: Layer, action: Action, scenario: int) -> float:
    """The score drop in a scenario, over the price, if an action is done and all experts are split afresh."""
    leaving = layer.place[action.rank, action.slot]
    several = several_with(layer, leaving, action.expert)
    set_up(layer, stage, several, scenario)
    detach(stage, leaving, action.rank)
    if action.kind == SWAP:
        hot = slowest_rank(layer, scenario)
        detach(stage, action.expert, hot)
        attach(stage, leaving, hot)
    attach(stage, action.expert, action.rank)
    touched = np.array([leaving, action.expert])
    refill(stage, 0, touched, 1.0, search.scratch)
    settle_one(stage, 0, several, EFFORT, search.scratch)
    return (score_of(layer, scenario) - score_of(stage, 0)) / action.price


@jit_inner
def set_up(layer: Layer, stage: Layer, several: NDArray[np.int64], scenario: int) -> None:
    """Copies what an action can change."""
    stage.weight[0] = layer.weight[scenario]
    stage.load[0] = layer.load[scenario]
    for e in several:
        stage.replicas[e] = layer.replicas[e]
        for k in range(layer.replicas[e]):
            stage.host[e, k] = layer.host[e, k]
            stage.share[0, e, k] = layer.share[scenario, e, k]


@jit_inner
def several_with(layer: Layer, leaving: int, coming: int) -> NDArray[np.int64]:
    """`[n]` int64, experts with several replicas, and the two that an action moves."""
    found = np.empty(len(layer.replicas), np.int64)
    size = 0
    for e in range(len(layer.replicas)):
        if layer.replicas[e] > 1 or e in (leaving, coming):
            found[size] = e
            size += 1
    return found[:size]


@jit_inlined
def score_of(layer: Layer, scenario: int) -> float:
    """Sum over serving ranks of time^8."""
    score = 0.0
    for r in range(len(layer.speed)):
        if layer.speed[r] > 0.0:
            score += power(layer.load[scenario, r] / layer.speed[r])
    return score
