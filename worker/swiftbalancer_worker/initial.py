"""The placement an engine should start with, from a whole recording."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swiftbalancer.placement import Placement
from swiftbalancer_worker.inputs import PlanInput, PlanLimits
from swiftbalancer_worker.planner import Planner
from swiftbalancer_worker.replay import MAX_SUB_WINDOWS, FloatArray, ReplaySettings, topology_of, unbalanced
from swiftbalancer_worker.solver import slowest_over_ideal, solve
from swiftbalancer_worker.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class InitialPlacement:
    """A placement, and the imbalance of the recording's total loads before and after, mean over layers."""

    placement: Placement
    imbalance_before: float
    imbalance_after: float


def initial_placement(trace: Trace, settings: ReplaySettings, *, policy: str) -> InitialPlacement:
    """The policy's placement for all of `trace`, moved to without a budget; raises as `replay` does."""
    topology = topology_of(trace, settings)
    _, layers, experts = trace.shape
    loads = totals(trace, MAX_SUB_WINDOWS)
    start = Placement.initial(topology, experts, num_layers=layers)
    result = Planner(policy, settings.options).plan(
        PlanInput(
            placement=start,
            loads=loads,
            dispatch=settings.dispatch,
            epoch=0,
            limits=PlanLimits(max_moves_per_layer=None, staging_experts=topology.slots_per_rank, gated=False),
        )
    )
    target = result.plan.target(start)
    target.validate(allow_same_rank_replicas=True)
    total = loads.sum(0)
    ranks = solve(target, total, settings.dispatch).rank_loads(total)
    before = unbalanced(Trace(trace.name, [total[None]]), settings.num_ranks).imbalance
    return InitialPlacement(target, float(before.mean()), float(slowest_over_ideal(target, ranks).mean()))


def totals(trace: Trace, most: int) -> FloatArray:
    """`[n, layers, experts]`, the trace added up into at most `most` stretches of time, without loading it."""
    steps = len(trace)
    out = np.zeros((min(most, steps), *trace.shape[1:]))
    for step, loads in enumerate(trace):
        out[step * len(out) // steps] += loads
    return out
