"""The default policy: from the placement in force, the few moves that matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.placement import Placement
from swiftbalancer_worker.forecast import Forecast
from swiftbalancer_worker.inputs import PlanInput
from swiftbalancer_worker.kernels.candidates import Rules
from swiftbalancer_worker.kernels.handover import hand_over
from swiftbalancer_worker.kernels.layers import Demand, lay_out, repair_layers
from swiftbalancer_worker.policies.greedy import GreedyPolicy
from swiftbalancer_worker.solver import least_costs, rank_times, split

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SwiftPolicy:
    """Budgeted repair; with no budget (`max_moves_per_layer` None) a robust layout from scratch, then repaired.

    `hot_experts`, `cold_ranks`: how many of each are considered in each step of the repair; `tried`: how many actions
    are tried out. `num_groups`: expert groups whose replicas stay together on a node (for group-limited routing),
    where nodes divide them; 1: no groups.
    """

    hot_experts: int = 6
    cold_ranks: int = 24
    tried: int = 4
    num_groups: int = 1
    name: str = "swift"
    gated: bool = True
    keeps_ranks: bool = True

    def place(self, given: PlanInput, forecast: Forecast) -> IntArray:
        """`[layers, slots]` int32, the placement in force with at most the budgeted moves per layer."""
        placement, limits = given.placement, given.limits
        topology = placement.topology
        live = int((topology.speeds() > 0).sum())
        if not placement.num_experts <= live * topology.slots_per_rank <= live * placement.num_experts:
            return placement.physical_to_logical_map
        demand = demand_of(given, forecast, homes(placement, self.num_groups))
        if limits.max_moves_per_layer is None:
            return self._from_scratch(given, forecast, demand)
        rules = Rules(
            budget=limits.max_moves_per_layer,
            staging=limits.staging_experts,
            target=limits.target_imbalance,
            hot=self.hot_experts,
            cold=self.cold_ranks,
            tried=self.tried,
        )
        rows = repaired(placement, placement.physical_to_logical_map, demand, rules)
        return self._for_reads(given, forecast, demand, rules, rows)

    def _from_scratch(self, given: PlanInput, forecast: Forecast, demand: Demand) -> IntArray:
        """A robust layout, repaired without a budget; for an even split DeepSeek's instead where that is better."""
        placement = given.placement
        slots = placement.topology.slots_per_rank
        rules = Rules(placement.topology.num_slots, slots, 1.0, self.hot_experts, self.cold_ranks, self.tried)
        if demand.home.max(initial=-1) >= 0:
            grouped = GreedyPolicy(self.num_groups).place(given, forecast)
            kept = Placement(placement.topology, placement.num_experts, grouped)
            return repaired(placement, grouped, demand._replace(home=homes(kept, self.num_groups)), rules)
        dealt = by_rank(placement, placement.physical_to_logical_map)
        lay_out(dealt, demand)
        rows = repaired(placement, dealt, demand, rules)
        if not demand.uniform:
            return self._for_reads(given, forecast, demand, rules, rows)
        greedy = GreedyPolicy().place(given, forecast)
        options = [rows, repaired(placement, greedy, demand, rules), greedy]
        best = np.argmin([_even_times(placement, option, given.loads.sum(0)) for option in options], axis=0)
        return np.asarray(np.stack(options)[best, np.arange(len(rows))], np.int32)

    def _for_reads(
        self, given: PlanInput, forecast: Forecast, demand: Demand, rules: Rules, rows: IntArray
    ) -> IntArray:
        """`rows`; where reads of weights count, per layer whichever reads less, those or others.

        The others are the placement in force, or with no budget `rows`, after some experts were handed over.
        """
        placement, cost, expected = given.placement, given.cost, forecast.expected
        if cost.tokens_per_activation == 0 or demand.uniform:
            return rows
        start = rows if given.limits.max_moves_per_layer is None else placement.physical_to_logical_map
        place = by_rank(placement, start)
        hand_over(place, cost.worth(expected), demand, rules)
        handed = place.reshape(len(place), -1).astype(np.int32)
        repaired_one, handed_one = (
            Placement(placement.topology, placement.num_experts, option) for option in (rows, handed)
        )
        better = least_costs(handed_one, expected, cost) < least_costs(repaired_one, expected, cost)
        # A layer that repeats an expert on a rank needs the repair first, which uses the budget.
        better &= handed_one.replicas_on_ranks().max((1, 2)) < 2
        return np.where(better[:, None], handed, rows)


def homes(placement: Placement, num_groups: int) -> NDArray[np.int64]:
    """`[layers, experts]` int64: the node with most replicas of each expert's group; -1 if groups may be split."""
    topology, experts = placement.topology, placement.num_experts
    everywhere = topology.num_nodes == 1 or num_groups % topology.num_nodes or experts % num_groups
    if num_groups <= 1 or everywhere or topology.excluded_ranks:
        return np.full((placement.num_layers, experts), -1)
    size = experts // num_groups
    group = placement.physical_to_logical_map.reshape(placement.num_layers, topology.num_nodes, -1) // size
    count = np.stack([(group == g).sum(2) for g in range(num_groups)], axis=2)
    return np.repeat(count.argmax(1), size, axis=1)


def by_rank(placement: Placement, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """`[layers, ranks, slots]` int64, a copy of `rows` of experts per slot."""
    topology = placement.topology
    return rows.reshape(-1, topology.num_ranks, topology.slots_per_rank).astype(np.int64)


def repaired(placement: Placement, rows: NDArray[np.integer[Any]], demand: Demand, rules: Rules) -> IntArray:
    """`[layers, slots]` int32, `rows` after a repair."""
    place = by_rank(placement, rows)
    flat = place.reshape(len(place), -1).astype(np.int32)
    count = Placement(placement.topology, placement.num_experts, flat).logical_replica_count()
    live = int((demand.speed > 0).sum())
    repair_layers(place, demand, rules, min(live, int(count.max()) + rules.budget + 1))
    return place.reshape(len(place), -1).astype(np.int32)


def _even_times(placement: Placement, rows: IntArray, loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[layers]` float64, the slowest rank's time if `loads` `[layers, experts]` are split evenly."""
    new = Placement(placement.topology, placement.num_experts, rows)
    slowest: NDArray[np.float64] = rank_times(new, split(new, loads, uniform=True).load).max(1)
    return slowest


def demand_of(given: PlanInput, forecast: Forecast, home: NDArray[np.int64]) -> Demand:
    """The forecast's scenarios, each scaled to a mean time of 1, activated weights included."""
    placement, cost = given.placement, given.cost
    speed = placement.topology.speeds()
    loads = forecast.scenarios
    replicas = np.maximum(placement.logical_replica_count(), 1)
    fixed = cost.tokens_per_activation * cost.activations(loads[0] / replicas)
    total = loads.sum(-1, keepdims=True) + (fixed * replicas).sum(-1)[None, :, None]
    scale = np.divide(speed.sum(), total, out=np.zeros_like(total), where=total > 0)
    return Demand(
        weight=np.ascontiguousarray((loads * scale).transpose(1, 0, 2)),
        fixed=fixed * scale[0],
        speed=speed,
        uniform=given.dispatch.kind == "uniform",
        node=np.arange(len(speed)) // placement.topology.ranks_per_node,
        far=max(1.01, cost.bytes_per_s / cost.remote_bytes_per_s),
        home=home,
    )
