"""The duck type of vllm-ascend's `VllmEplbAdaptor` (0.23 on), for machines without its source."""

from __future__ import annotations

from typing import Any

import torch

from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_adaptors.vllm_ascend.layers import expert_maps
from swiftbalancer_adaptors.vllm_ascend.log2phy import replicas_in_turn
from tests.adaptors.vllm_ascend.scripted_model import ScriptedModel, Shape


class PlainAdaptor:
    """Only what our updator may use."""

    def __init__(self, model: ScriptedModel) -> None:
        self.moe_layers = model.experts
        slots = range(model.experts[0].local_num_experts)
        names = [name for name, _, _ in model.experts[0].kinds]
        self.expert_param_per_layer = {
            number: [[getattr(layer, name)[slot] for name in names] for slot in slots]
            for number, layer in enumerate(model.experts)
        }
        self.log2phy_map_per_layer = {number: layer.log2phy for number, layer in enumerate(model.experts)}
        self.buffer_tensor_list: dict[str, Any] = {"a key": [torch.zeros(1)]}
        self.expert_map_per_layer_cpu: dict[int, torch.Tensor] = {}

    def get_global_expert_map(self) -> torch.Tensor:
        for number, layer in enumerate(self.moe_layers):
            self.expert_map_per_layer_cpu[number] = layer.global_expert_map[layer.ep_rank]
        return torch.stack([layer.global_expert_map for layer in self.moe_layers])

    def do_update_expert_map(self, layer: int, experts: torch.Tensor) -> None:
        self.expert_map_per_layer_cpu[layer].copy_(experts)


def plain_maps(shape: Shape, rank: int, *, tp_size: int) -> Any:
    """As `scripted_model.initial_maps`: experts in order, then the redundant ones."""
    topology = Topology.for_experts(shape.experts, num_redundant=shape.redundant, num_ranks=shape.ranks)
    placement = Placement.initial(topology, shape.experts, num_layers=1)
    rows = [
        expert_maps(
            placement.physical_to_logical_map,
            rank=each,
            slots_per_rank=topology.slots_per_rank,
            num_experts=shape.experts,
        )[0]
        for each in range(shape.ranks)
    ]
    own = torch.from_numpy(replicas_in_turn(placement, tp_size=tp_size)[0, :, rank].copy())
    return lambda _layer: (torch.stack(rows), rows[rank], own.clone(), shape.redundant)
