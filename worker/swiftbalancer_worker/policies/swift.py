"""The default policy: from the placement in force, the few moves that matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.forecast import Forecast
from swiftbalancer_worker.inputs import PlanInput
from swiftbalancer_worker.kernels.layers import Demand, lay_out, repair_layers
from swiftbalancer_worker.kernels.repair import Rules


@dataclass(frozen=True, slots=True)
class SwiftPolicy:
    """Budgeted repair; with no budget (`max_moves_per_layer` None) a robust layout from scratch, then repaired.

    `hot_experts`, `cold_ranks`: how many of each are considered in each step of the repair.
    """

    hot_experts: int = 3
    cold_ranks: int = 12
    name: str = "swift"
    gated: bool = True
    keeps_ranks: bool = True

    def place(self, given: PlanInput, forecast: Forecast) -> NDArray[np.int32]:
        """`[layers, slots]` int32, the placement in force with at most the budgeted moves per layer."""
        placement, limits = given.placement, given.limits
        topology = placement.topology
        shape = (placement.num_layers, topology.num_ranks, topology.slots_per_rank)
        place = placement.physical_to_logical_map.reshape(shape).astype(np.int64)
        live = int((topology.speeds() > 0).sum())
        if not placement.num_experts <= live * topology.slots_per_rank <= live * placement.num_experts:
            return placement.physical_to_logical_map
        demand = demand_of(given, forecast)
        budget = limits.max_moves_per_layer
        if budget is None:
            lay_out(place, demand)
        rules = Rules(
            budget=place[0].size if budget is None else budget,
            staging=topology.slots_per_rank if budget is None else limits.staging_experts,
            target=limits.target_imbalance,
            hot=self.hot_experts,
            cold=self.cold_ranks,
        )
        most = min(live, int(placement.logical_replica_count().max()) + rules.budget + 1)
        repair_layers(place, demand, rules, most)
        return place.reshape(placement.physical_to_logical_map.shape).astype(np.int32)


def demand_of(given: PlanInput, forecast: Forecast) -> Demand:
    """The forecast's scenarios, each scaled to a mean time of 1."""
    speed = given.placement.topology.speeds()
    total = forecast.scenarios.sum(-1, keepdims=True)
    weight = np.divide(
        forecast.scenarios * speed.sum(), total, out=np.zeros_like(forecast.scenarios), where=total > 0
    )
    return Demand(
        weight=np.ascontiguousarray(weight.transpose(1, 0, 2)),
        fixed=np.zeros(weight.shape[1:]),
        speed=speed,
        uniform=given.dispatch.kind == "uniform",
    )
