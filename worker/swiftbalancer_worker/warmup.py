"""A first plan nobody asked for, so that the first real one does not pay for imports and compilation.

`python -m swiftbalancer_worker.warmup` fills the cache of compiled kernels, for installers and images.
"""

from __future__ import annotations

import numpy as np

from swiftbalancer.dispatch import DispatchForm, uniform_table
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker.inputs import PlanInput, PlanLimits
from swiftbalancer_worker.planner import Planner


def warm_up(planner: Planner) -> None:
    """Plans once for a tiny model, with moves and with a refresh, on the code paths real requests take."""
    topology = Topology.for_experts(8, num_redundant=4, num_ranks=2)
    placement = Placement.initial(topology, 8, num_layers=2)
    loads = np.stack([np.linspace(1.0, 9.0, 16).reshape(2, 8), np.linspace(2.0, 9.0, 16).reshape(2, 8)])
    given = PlanInput(
        placement=placement,
        loads=loads,
        dispatch=DispatchForm("table", 16),
        epoch=0,
        limits=PlanLimits(max_moves_per_layer=2, staging_experts=4),
        table=uniform_table(placement, 16),
    )
    planner.plan(given)
    planner.refresh(given)


if __name__ == "__main__":
    warm_up(Planner("swift"))
