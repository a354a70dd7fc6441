"""vllm-ascend's static routing maps: one replica of each expert for each rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer.placement import Placement
from swiftbalancer_adaptors.vllm_ascend.layers import expert_maps, layer_ids

IntArray = NDArray[np.int32]


def replicas_in_turn(placement: Placement, *, tp_size: int) -> IntArray:
    """`[layers, experts, ranks]` int32, the slot each rank sends an expert's tokens to at start.

    The rule of vllm-ascend's `generate_log2phy_map`: replicas in turn over ranks; from 0.23 on, with tensor
    parallelism, shifted so that the ranks of one group, which share a sequence, spread over replicas.
    """
    slots = placement.logical_to_physical_map()
    count = placement.logical_replica_count()[:, :, None]
    rank = np.arange(placement.topology.num_ranks)
    turn = rank[None, None, :]
    if tp_size > 1:
        expert = np.arange(placement.num_experts)
        turn = (rank % tp_size + rank // tp_size)[None, None, :] + expert[None, :, None]
    return np.take_along_axis(slots, turn % count, axis=2).astype(np.int32)


def table_in_force(placement: Placement, own: IntArray, *, rank: int, tp_size: int) -> IntArray:
    """`[layers, experts, ranks]` int32 of all ranks, told from `own` `[layers, experts]`, this rank's maps.

    Raises `UnsupportedEngine` if this rank's maps follow neither rule this release knows.
    """
    for rule in (tp_size, 1):
        table = replicas_in_turn(placement, tp_size=rule)
        if np.array_equal(table[:, :, rank], own):
            return table
    layer, expert = (int(i) for i in np.argwhere(table[:, :, rank] != own)[0])
    raise UnsupportedEngine(
        f"layer {layer}: vllm-ascend routes expert {expert} to slot {own[layer, expert]} on rank {rank}, "
        f"{table[layer, expert, rank]} expected; this vllm-ascend chooses replicas by a rule we do not know"
    )


def own_maps(adaptor: Any) -> list[torch.Tensor]:
    """The `[experts]` int32 map of each layer on the device, which the router reads. The engine owns them."""
    maps = [adaptor.log2phy_map_per_layer[layer] for layer in layer_ids(adaptor)]
    if any(layer_map is None for layer_map in maps):
        raise UnsupportedEngine("a MoE layer has no log2phy map: it was built without dynamic_eplb")
    return maps


@dataclass(frozen=True, slots=True, eq=False)
class PreparedMaps:
    """`routes` are rows on the device for the `targets`; `experts` `[n, experts]` the adaptor's host copies."""

    layers: list[int]
    targets: list[torch.Tensor]
    routes: torch.Tensor
    experts: torch.Tensor
    host: torch.Tensor


class Log2phyMaps:
    """Writes the maps of one rank in place: on the device what the router reads, on the host the adaptor's."""

    launches = None

    def __init__(self, adaptor: Any, device: DeviceLayer, placement: Placement, rank: int) -> None:
        self._adaptor = adaptor
        self._device = device
        self._placement = placement
        self._rank = rank
        self._ids = layer_ids(adaptor)
        self._maps = own_maps(adaptor)

    def prepare(self, update: MapUpdate) -> PreparedMaps:
        """Brings the new rows to the device on the current (side) stream. Runs on a background thread."""
        column = self._rank % update.table.shape[2]
        rows = torch.from_numpy(np.ascontiguousarray(update.table[:, :, column]))
        target = self._maps[0]
        host = self._device.pinned(rows.shape, target.dtype)
        host.copy_(rows)
        routes = torch.empty(rows.shape, dtype=target.dtype, device=target.device)
        self._device.copy(routes, host)
        return PreparedMaps(
            layers=[self._ids[layer] for layer in update.layers],
            targets=[self._maps[layer] for layer in update.layers],
            routes=routes,
            experts=self._expert_maps(update.physical_to_logical_map),
            host=host,
        )

    def commit(self, prepared: PreparedMaps) -> None:
        """One fused copy on the current stream, and small copies of host memory."""
        self._device.copy_all(prepared.targets, list(prepared.routes.unbind(0)))
        for layer, experts in zip(prepared.layers, prepared.experts, strict=True):
            self._adaptor.do_update_expert_map(layer, experts)

    def write(self, placement: Placement, table: IntArray) -> None:
        """Puts a whole table in force, on the current stream; between serving, not beside it."""
        layers = np.arange(placement.num_layers)
        update = MapUpdate(layers, placement.physical_to_logical_map, table, batch=0)
        self.commit(self.prepare(update))
        self._device.synchronize()

    def _expert_maps(self, rows: IntArray) -> torch.Tensor:
        return expert_maps(
            rows,
            rank=self._rank,
            slots_per_rank=self._placement.topology.slots_per_rank,
            num_experts=self._placement.num_experts,
        )
