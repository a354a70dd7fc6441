"""From vLLM's state of one MoE model to the binding swiftbalancer works on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from swiftbalancer.border import ExpertTensor, GroupInfo, ModelBinding
from swiftbalancer.config import Config
from swiftbalancer.dispatch import DispatchForm
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_adaptors.vllm.beside import CHANGE, check_products, check_staying, staying
from swiftbalancer_adaptors.vllm.maps import VllmMaps
from swiftbalancer_adaptors.vllm_ascend.v2 import movable, unnamed


def initial_placement(model_state: Any, config: Config) -> Placement:
    """What vLLM's weight loader fills: experts in order, then redundant slot `i` holds expert `i % experts`."""
    model = model_state.model
    size = ep_group().world_size
    topology = Topology(
        num_ranks=size,
        slots_per_rank=model.num_physical_experts // size,
        num_nodes=config.num_nodes or num_nodes(),
    )
    return Placement.initial(topology, model.num_logical_experts, num_layers=model.num_moe_layers)


def bind(model_state: Any, *, name: str, placement: Placement, maps: VllmMaps) -> ModelBinding:
    """The binding of a model whose maps hold `placement` with replicas in turn."""
    model = model_state.model
    return ModelBinding(
        name=name,
        placement=placement,
        top_k=top_k(model),
        weights=movable(model.expert_weights, model.moe_layers),
        counters=model_state.expert_load_pass,
        counts="global",
        maps=maps,
        dispatch=DispatchForm("table", maps.width),
        per_rank_dispatch=routes_own_tokens(model),
    )


def check_layout(model_state: Any, device: torch.device) -> None:
    """Raises `UnsupportedEngine` unless every expert tensor is one contiguous row per local slot, on `device`."""
    model = model_state.model
    slots = model.num_local_physical_experts
    if model.num_physical_experts != slots * ep_group().world_size:
        raise UnsupportedEngine(
            f"{model.num_physical_experts} slots are not {slots} on each of {ep_group().world_size} ranks"
        )
    for layer, (module, tensors) in enumerate(zip(model.moe_layers, model.expert_weights, strict=True)):
        where = f"{model_state.model_name}: MoE layer {layer}"
        for kind, tensor in enumerate(tensors):
            if len(tensor) != slots or not tensor[0].is_contiguous():
                raise UnsupportedEngine(
                    f"{where}, expert tensor {kind} has shape "
                    f"{tuple(tensor.shape)} and strides {tensor.stride()}, not one contiguous row for each of "
                    f"{slots} slots; use another --quantization or MoE backend, or drop the swiftbalancer flag"
                )
            if tensor.device.type != device.type:
                raise UnsupportedEngine(
                    f"{where}, expert tensor {kind} is in memory of {tensor.device.type}, not of {device.type}: "
                    "swiftbalancer does not move offloaded experts; drop the option that offloads weights, or ours"
                )
        if not tensors:
            raise UnsupportedEngine(f"{where}: vLLM names no tensor of an expert; {CHANGE}")
        check_products(module, _moving(module, tensors, where), where=where)


def check_what_stays(model_state: Any) -> None:
    """Raises `UnsupportedEngine`, on every rank alike, if kernels read by slot what does not move and differs.

    After a forward pass; every rank must call it.
    """
    model = model_state.model
    layers = enumerate(zip(model.moe_layers, model.expert_weights, strict=True))
    own = [staying(module, _moving(module, tensors, f"MoE layer {layer}")) for layer, (module, tensors) in layers]
    every: list[Any] = [None] * ep_group().world_size
    torch.distributed.all_gather_object(every, own, group=ep_group().cpu_group)
    check_staying(every, model=model_state.model_name)


def _moving(module: Any, tensors: Iterable[ExpertTensor], where: str) -> list[ExpertTensor]:
    """All that goes along with an expert: what vLLM names of a layer, and what vllm-ascend does not name."""
    named = list(tensors)
    return [*named, *unnamed(module, named, where)]


def top_k(model: Any) -> int:
    """Experts per token, from the first MoE layer or its router."""
    layer = next(iter(model.moe_layers))
    return int(getattr(getattr(layer, "router", layer), "top_k", 1))


def routes_own_tokens(model: Any) -> bool:
    """Whether each rank routes tokens no other rank routes.

    Tensor-parallel ranks see the same tokens, and so do data-parallel ranks whose kernels gather the tokens of
    all ranks before the router. There, all ranks must choose the same slot.
    """
    from vllm.distributed.parallel_state import get_dp_group, get_tp_group

    if get_dp_group().world_size == 1 or get_tp_group().world_size > 1:
        return False
    return all(_gathers_later(layer) for layer in model.moe_layers)


def _gathers_later(layer: Any) -> bool:
    """Whether tokens of other ranks come after the router; in fused kernels over symmetric memory they always do."""
    if hasattr(layer, "get_symm_buffer"):
        return True
    return getattr(layer, "do_naive_dispatch_combine", True) is False


def ep_group() -> Any:
    """vLLM's group of the ranks that share the experts of this pipeline stage."""
    from vllm.distributed.parallel_state import get_eplb_group

    return get_eplb_group()


def num_nodes() -> int:
    """Hosts the group is spread over, where its ranks divide evenly over them; else 1. Every rank must call it."""
    from vllm.distributed.parallel_state import in_the_same_node_as

    group = ep_group()
    on_first = sum(in_the_same_node_as(group.cpu_group, source_rank=0))
    return group.world_size // on_first if group.world_size % on_first == 0 else 1


def group_info(device: torch.device, *, name: str) -> GroupInfo:
    """Who this rank is, with the default store of torch. `name` is used once, the same on every rank."""
    from torch.distributed.distributed_c10d import _get_default_store

    group = ep_group()
    return GroupInfo(
        rank=group.rank_in_group,
        size=group.world_size,
        store=_get_default_store(),
        device=device,
        prefix=f"swiftbalancer/{'-'.join(str(rank) for rank in group.ranks)}/{name}",
    )
