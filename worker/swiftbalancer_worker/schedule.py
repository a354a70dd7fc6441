"""From a wanted placement to moves: what stays where, who sends, and what travels together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.placement import Placement
from swiftbalancer_worker.kernels.align import keep_slots, match_ranks, separate
from swiftbalancer_worker.kernels.batches import choose_sources, first_fit

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """`layers` `[n]`, `layer_batch` `[n]`, `moves` `[m, 4]`, `move_batch` `[m]`, all int32, as in `Plan`.

    `cross_node` `[m]` bool: moves between nodes.
    """

    layers: IntArray
    layer_batch: IntArray
    moves: IntArray
    move_batch: IntArray
    cross_node: NDArray[np.bool_]


def align(base: Placement, wanted: IntArray, *, loads: NDArray[np.float64], keeps_ranks: bool) -> IntArray:
    """`[layers, slots]` int32: `wanted`, valid and with as much as possible where it is in `base`.

    No rank holds an expert twice afterwards; ranks of equal speed on a node are exchanged if `keeps_ranks` is
    False. `loads` `[layers, experts]` tells which experts can stand in for each other.
    """
    topology = base.topology
    shape = (base.num_layers, topology.num_ranks, topology.slots_per_rank)
    rows = np.ascontiguousarray(wanted, np.int32).reshape(shape).copy()
    current = base.physical_to_logical_map.reshape(shape)
    serves = topology.speeds() > 0
    kind = _interchangeable(base)
    for layer in np.nonzero((rows != current).any((1, 2)))[0]:
        count = np.bincount(rows[layer].ravel(), minlength=base.num_experts)
        separate(rows[layer], loads[layer] / np.maximum(count, 1), serves)
        if not keeps_ranks:
            rows[layer] = rows[layer][match_ranks(rows[layer], current[layer], kind)]
        keep_slots(rows[layer], current[layer])
    return rows.reshape(base.physical_to_logical_map.shape)


def schedule(base: Placement, rows: IntArray, layers: NDArray[np.int64], *, staging_experts: int) -> Schedule:
    """The moves that turn `layers` `[n]` of `base`, most urgent first, into `rows` `[n, slots]`, in batches.

    Every layer must fit a batch of its own (`received_per_rank` at most `staging_experts`).
    """
    topology = base.topology
    moves = moves_between(base, rows, layers)
    node = np.arange(topology.num_ranks) // topology.ranks_per_node
    place = base.physical_to_logical_map.reshape(-1, topology.num_ranks, topology.slots_per_rank)
    choose_sources(moves, place, node, topology.speeds() > 0)
    source, target = moves[:, 2] // topology.slots_per_rank, moves[:, 3] // topology.slots_per_rank
    cross_node = node[source] != node[target]
    nth = np.repeat(np.arange(len(layers)), _moves_per_layer(base, rows, layers))
    size = len(layers) * topology.num_ranks
    shape = (len(layers), topology.num_ranks)
    receives = np.bincount(nth * topology.num_ranks + target, minlength=size).reshape(shape)
    sends = np.bincount((nth * topology.num_ranks + source)[cross_node], minlength=size).reshape(shape)
    arrives = np.bincount((nth * topology.num_ranks + target)[cross_node], minlength=size).reshape(shape)
    batch = first_fit(receives, np.concatenate([sends, arrives], 1), staging_experts, 1)
    layer_order = np.argsort(batch, kind="stable")
    move_order = np.argsort(batch[nth], kind="stable")
    return Schedule(
        layers=layers[layer_order].astype(np.int32),
        layer_batch=batch[layer_order].astype(np.int32),
        moves=moves[move_order],
        move_batch=batch[nth][move_order].astype(np.int32),
        cross_node=cross_node[move_order],
    )


def moves_between(base: Placement, rows: IntArray, layers: NDArray[np.int64]) -> IntArray:
    """`[m, 4]` int32 (layer, expert, -1, target slot) of every slot of `layers` whose expert changes.

    Within a layer, experts with few replicas come first: they have the least choice of senders.
    """
    nth, slot = np.nonzero(rows != base.physical_to_logical_map[layers])
    held = base.logical_replica_count()[layers[nth], rows[nth, slot]]
    order = np.lexsort((slot, held, nth))
    nth, slot = nth[order], slot[order]
    expert = rows[nth, slot]
    return np.stack([layers[nth], expert, np.full(len(nth), -1), slot], 1).astype(np.int32)


def received_per_rank(base: Placement, rows: IntArray) -> NDArray[np.int64]:
    """`[layers, ranks]` int64, slots of each rank whose expert changes; `rows` `[layers, slots]` for all layers."""
    changed = rows != base.physical_to_logical_map
    received: NDArray[np.int64] = changed.reshape(base.num_layers, base.topology.num_ranks, -1).sum(2)
    return received


def _moves_per_layer(base: Placement, rows: IntArray, layers: NDArray[np.int64]) -> NDArray[np.int64]:
    count: NDArray[np.int64] = (rows != base.physical_to_logical_map[layers]).sum(1)
    return count


def _interchangeable(base: Placement) -> NDArray[np.int64]:
    """`[ranks]` int64, equal for ranks on one node with equal speed (excluded ranks have speed 0)."""
    speed = base.topology.speeds()
    node = np.arange(base.topology.num_ranks) // base.topology.ranks_per_node
    _, of_speed = np.unique(speed, return_inverse=True)
    kind: NDArray[np.int64] = of_speed.astype(np.int64) * base.topology.num_nodes + node
    kind[speed == 0] = -1 - np.arange(base.topology.num_ranks)[speed == 0]
    return kind
