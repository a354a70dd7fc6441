"""What `VllmEplbAdaptor` of vllm-ascend knows of a model, as the values swiftbalancer works on."""

from __future__ import annotations

import re
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
WEIGHT_NAME = re.compile(r"(^|_)w(1|2|3|13)(_|$)")
"""All that belongs to an expert's products is named so: `w13_weight_scale`, `fused_w2_scale_list`."""


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
    """`[layers][kinds]`, each a list of `slots_per_rank` tensors: everything the expert kernels read.

    What the adaptor names, and what it does not name although the layer holds it under a name of expert weights:
    in some releases its list is short of scales and biases that kernels read. Raises `UnsupportedEngine` for a
    tensor that cannot be told apart by slot.
    """
    layers: list[list[ExpertTensor]] = []
    for layer, module in zip(layer_ids(adaptor), moe_modules(adaptor), strict=True):
        kinds = [_checked(kind, layer, slots_per_rank) for kind in _kinds(adaptor, layer, slots_per_rank)]
        kinds += overlooked(module, kinds, slots_per_rank, where=f"MoE layer {layer}")
        layers.append([plain(kind, formats, where=f"MoE layer {layer}") for kind in kinds])
    return layers


def overlooked(
    module: Any, kinds: Sequence[list[torch.Tensor]], slots_per_rank: int, *, where: str
) -> list[list[torch.Tensor]]:
    """Expert weights the module holds beside `kinds`, by slot, in the order of their names."""
    known = {kind[0].data_ptr() for kind in kinds}
    held = {**vars(module), **getattr(module, "_parameters", {}), **getattr(module, "_buffers", {})}
    found = [
        by_slot(held[name], slots_per_rank, where=f"{where}: {name}")
        for name in sorted(held)
        if WEIGHT_NAME.search(name) and _numbers_in(held[name])
    ]
    return [kind for kind in found if kind[0].data_ptr() not in known]


def by_slot(weight: torch.Tensor | Sequence[torch.Tensor], slots: int, *, where: str) -> list[torch.Tensor]:
    """`slots` views of a weight: of a list, of `[slots, ...]`, or of all slots' numbers flat, one after another."""
    if len(weight) == slots and all(isinstance(part, torch.Tensor) for part in weight):
        return [part.detach() for part in weight]
    if isinstance(weight, torch.Tensor) and weight.dim() == 1 and len(weight) % slots == 0:
        return list(weight.detach().view(slots, -1).unbind(0))
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else f"a list of {len(weight)}"
    raise UnsupportedEngine(
        f"{where} ({shape}) has no part of its own for each of the {slots} slots, so it could not move with an "
        "expert; swiftbalancer does not know this quantisation's layout: drop the swiftbalancer flag, or another "
        "quantisation"
    )


def _numbers_in(value: Any) -> int:
    """How many numbers a tensor or a list of tensors holds; 0 for anything else, and for placeholders."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    return sum(_numbers_in(part) for part in value) if isinstance(value, list | tuple) else 0


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
