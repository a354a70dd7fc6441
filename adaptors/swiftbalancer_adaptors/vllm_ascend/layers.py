"""What `VllmEplbAdaptor` of vllm-ascend knows of a model, as the values swiftbalancer works on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer.border import ExpertTensor
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_adaptors.vllm_ascend.formats import Formats, plain

IntArray = NDArray[np.int32]


def layer_ids(adaptor: Any) -> list[int]:
    """The adaptor's own names of the MoE layers: up to 0.22 they count from the first dense layer."""
    return sorted(adaptor.expert_param_per_layer)


def moe_modules(adaptor: Any) -> list[Any]:
    """The modules that count and route, in the order of `layer_ids`."""
    registered = getattr(adaptor, "moe_layers", None)
    if registered is not None:
        return list(registered)
    return [adaptor.model.model.layers[layer].mlp.experts for layer in layer_ids(adaptor)]


def expert_weights(adaptor: Any, *, slots_per_rank: int, formats: Formats) -> list[list[ExpertTensor]]:
    """`[layers][kinds]`, each a list of `slots_per_rank` tensors: everything the expert kernels read."""
    layers: list[list[ExpertTensor]] = []
    for layer in layer_ids(adaptor):
        kinds = [_checked(kind, layer, slots_per_rank) for kind in _kinds(adaptor, layer, slots_per_rank)]
        layers.append([plain(kind, formats, where=f"MoE layer {layer}") for kind in kinds])
    return layers


def _kinds(adaptor: Any, layer: int, slots: int) -> list[list[torch.Tensor]]:
    """By name while the adaptor names them: before 0.15 its per-expert lists hold rows of expert 0 for some."""
    names = getattr(adaptor, "expert_weight_names", None)
    if names is None:
        return [list(kind) for kind in zip(*adaptor.expert_param_per_layer[layer], strict=True)]
    owners = [adaptor.param_dict[f"model.layers.{layer}.mlp.experts.{name}"] for name in names]
    return [[owner[slot].detach() for slot in range(min(slots, len(owner)))] for owner in owners]


def _checked(kind: list[torch.Tensor], layer: int, slots: int) -> list[torch.Tensor]:
    if len(kind) != slots:
        raise UnsupportedEngine(f"MoE layer {layer}: an expert weight has {len(kind)} slots, this rank holds {slots}")
    return kind


def placement_of(global_expert_map: torch.Tensor, *, num_nodes: int) -> Placement:
    """The placement in `[layers, ranks, experts]` int, an expert's local slot on each rank or -1.

    Raises `UnsupportedEngine` if ranks hold different numbers of slots or a slot holds nothing of its own.
    """
    local = global_expert_map.cpu().numpy()
    layers, ranks, experts = local.shape
    slots = int(local.max()) + 1
    table = np.full((layers, ranks, slots), -1, np.int32)
    layer, rank, expert = np.nonzero(local >= 0)
    table[layer, rank, local[layer, rank, expert]] = expert
    empty = np.argwhere(table < 0)
    if empty.size:
        raise UnsupportedEngine(
            f"MoE layer {empty[0][0]}: slot {empty[0][2]} of rank {empty[0][1]} holds no expert of its own; every "
            "rank needs the same number of slots and no expert twice (check num_redundant_experts, expert_map_path)"
        )
    topology = Topology(num_ranks=ranks, slots_per_rank=slots, num_nodes=num_nodes)
    return Placement.of(topology, experts, table.reshape(layers, -1))


def expert_maps(placement_rows: IntArray, *, rank: int, slots_per_rank: int, num_experts: int) -> torch.Tensor:
    """`[layers, experts]` int32, an expert's local slot on `rank` or -1: rows of the global expert map."""
    own = placement_rows[:, rank * slots_per_rank : (rank + 1) * slots_per_rank].astype(np.int64)
    maps = np.full((len(own), num_experts), -1, np.int32)
    np.put_along_axis(maps, own, np.arange(slots_per_rank, dtype=np.int32)[None, :], axis=1)
    return torch.from_numpy(maps)


def take_over_counters(modules: Sequence[Any], *, slots_per_rank: int) -> torch.Tensor:
    """`[layers, slots_per_rank]` int64 on the device, into which the modules count from now on.

    Each module's `moe_load` becomes a row of it. Modules add tokens that arrived, after dispatch, on the main
    stream. Call before graphs are captured, since they keep the address. Modules that would keep a history of
    passes (`multi_stage`) count plainly from here.
    """
    device = modules[0].moe_load.device
    counters = torch.zeros(len(modules), slots_per_rank, dtype=torch.int64, device=device)
    for row, module in zip(counters, modules, strict=True):
        module.moe_load = row
        if getattr(module, "multi_stage", False):
            module.multi_stage = False
    return counters


def top_k(module: Any) -> int:
    """Experts per token."""
    known = getattr(module, "top_k", None)
    return int(module.moe_config.experts_per_token if known is None else known)
