"""DeepSeek's EPLB: replicate the heaviest experts, pack the replicas, in two levels where there are nodes.

The algorithm is the one DeepSeek published with DeepSeek-V3 (github.com/deepseek-ai/EPLB); this is our own code
for it, vectorised over layers. It splits evenly, re-places every expert and does not know of the placement in
force; the planner then exchanges ranks and slots to save moves. An expert gets no more replicas on a
node than that has ranks; where it would lie twice on one rank, the second one changes places with the most similar
expert elsewhere, on its node if that can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.placement import Placement
from swiftbalancer_worker.forecast import Forecast
from swiftbalancer_worker.inputs import PlanInput
from swiftbalancer_worker.kernels.align import separate

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GreedyPolicy:
    """`num_groups`: expert groups that stay together on a node (hierarchical, if nodes divide them); 1: global."""

    num_groups: int = 1
    name: str = "greedy"
    gated: bool = True
    keeps_ranks: bool = False

    def place(self, given: PlanInput, forecast: Forecast) -> NDArray[np.int32]:  # noqa: ARG002
        """Places for the loads summed over the window."""
        topology = given.placement.topology
        served = np.nonzero(topology.speeds() > 0)[0]
        rows = given.placement.physical_to_logical_map.copy()
        whole = len(served) == topology.num_ranks
        nodes = topology.num_nodes if whole and self.num_groups % topology.num_nodes == 0 else 1
        per_rank = topology.slots_per_rank
        if not given.placement.num_experts <= len(served) * per_rank:
            return rows
        placed = hierarchical(
            given.loads.sum(0),
            num_slots=len(served) * per_rank,
            num_groups=self.num_groups if nodes > 1 else 1,
            num_nodes=nodes,
            num_ranks=len(served),
            distinct=True,
        )
        rows.reshape(len(rows), topology.num_ranks, per_rank)[:, served] = placed.reshape(
            len(rows), len(served), per_rank
        )
        counts = Placement(topology, given.placement.num_experts, rows).logical_replica_count()
        for place, load, count in zip(
            rows.reshape(len(rows), topology.num_ranks, per_rank), given.loads.sum(0), counts, strict=True
        ):
            weight, serves = load / np.maximum(count, 1), topology.speeds() > 0
            for here, up in zip(np.split(place, nodes), np.split(serves, nodes), strict=True):
                separate(here, weight, up)  # so that groups stay together
            separate(place, weight, serves)
        return rows


def pack(weight: FloatArray, num_packs: int) -> IntArray:
    """`[layers, items]` int64, the pack of each item: heaviest first to the lightest pack with room.

    Every pack gets `items / num_packs` items.
    """
    layers, items = weight.shape
    room = items // num_packs
    order = np.argsort(-weight, axis=1, kind="stable")
    out = np.empty((layers, items), np.int64)
    load = np.zeros((layers, num_packs))
    filled = np.zeros((layers, num_packs), np.int64)
    layer = np.arange(layers)
    for nth in range(items):
        item = order[:, nth]
        chosen = np.where(filled < room, load, np.inf).argmin(1)
        out[layer, item] = chosen
        load[layer, chosen] += weight[layer, item]
        filled[layer, chosen] += 1
    return out


def replicate(weight: FloatArray, num_replicas: int, *, most: int) -> IntArray:
    """`[layers, num_replicas]` int64, the item of each replica: all items once, then the heaviest per replica.

    No item gets more than `most` replicas, the ranks there are for them, as long as another can have them.
    """
    layers, items = weight.shape
    out = np.tile(np.arange(num_replicas) % items, (layers, 1))
    count = np.ones((layers, items))
    layer = np.arange(layers)
    for nth in range(items, num_replicas):
        heaviest = np.where(count < most, weight / count, -1.0 / count).argmax(1)
        out[:, nth] = heaviest
        count[layer, heaviest] += 1
    return out


def hierarchical(
    weight: FloatArray, *, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int, distinct: bool = False
) -> IntArray:
    """`[layers, num_slots]` int64: groups packed on nodes, experts replicated within, replicas packed on ranks.

    `distinct`: an expert gets no more replicas on a node than that has ranks; as published, it may.
    """
    layers, experts = weight.shape
    groups = pack(weight.reshape(layers, num_groups, -1).sum(-1), num_nodes)
    group_order = np.argsort(groups, axis=1, kind="stable")
    size = experts // num_groups
    node_experts = (group_order[:, :, None] * size + np.arange(size)).reshape(layers * num_nodes, -1)
    node_weight = np.take_along_axis(np.repeat(weight, num_nodes, 0), node_experts, 1)
    most = num_ranks // num_nodes if distinct else num_slots
    replicas = replicate(node_weight, num_slots // num_nodes, most=most)
    count = np.stack([np.bincount(row, minlength=node_weight.shape[1]) for row in replicas])
    per_replica = np.take_along_axis(node_weight / count, replicas, 1)
    packs = pack(per_replica, num_ranks // num_nodes)
    placed = np.take_along_axis(replicas, np.argsort(packs, axis=1, kind="stable"), 1)
    return np.take_along_axis(node_experts, placed, 1).reshape(layers, num_slots)
