"""First plans nobody asked for, so that the first real one does not pay for imports and compilation.

`python -m swiftbalancer_worker.warmup` fills the cache of compiled kernels, for installers and images. Each kernel is
kept as soon as it is compiled: the next run goes on where an interrupted one ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from swiftbalancer.dispatch import DispatchForm, uniform_table
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker.compiling import compiling_is_told
from swiftbalancer_worker.cost import CostModel
from swiftbalancer_worker.inputs import PlanInput, PlanLimits
from swiftbalancer_worker.planner import Planner


def warm_up(planner: Planner) -> None:
    """Plans for tiny models whose experts must move, so that every kernel a real request can need has run.

    All forms of dispatch, whichever the engine has: one cache serves every engine of a machine.
    """
    for given in _inputs():
        planner.plan(given)
        planner.refresh(given)


def _inputs() -> Iterator[PlanInput]:
    topology = Topology.for_experts(8, num_redundant=4, num_ranks=2)
    placement = Placement.initial(topology, 8, num_layers=2)
    hot = np.array([[64.0, 32, 16, 8, 1, 1, 1, 1], [1.0, 1, 1, 1, 8, 16, 32, 64]])
    given = PlanInput(
        placement=placement,
        loads=np.stack([hot, hot + 1, hot, hot + 2]),
        dispatch=DispatchForm("table", 16),
        epoch=0,
        limits=PlanLimits(max_moves_per_layer=2, staging_experts=4, gated=False),
        table=uniform_table(placement, 16),
    )
    yield given
    yield replace(
        given, limits=replace(given.limits, max_moves_per_layer=None), cost=CostModel(tokens_per_activation=64.0)
    )
    excluding = Topology(num_ranks=3, slots_per_rank=6, excluded_ranks=(2,))
    yield replace(
        given,
        placement=Placement.initial(excluding, 8, num_layers=2),
        dispatch=DispatchForm("uniform", 16),
        table=None,
    )


if __name__ == "__main__":
    with compiling_is_told():
        warm_up(Planner("swift"))
