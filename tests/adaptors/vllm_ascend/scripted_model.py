"""A MoE model as vllm-ascend's adaptor sees it: CPU tensors whose values tell which expert they belong to."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

QUANTISED = (
    ("w13_weight_list", (6, 4), torch.int8),
    ("w2_weight_list", (4, 3), torch.int8),
    ("w13_weight_scale_fp32_list", (6,), torch.float32),
    ("w2_weight_scale_list", (4,), torch.bfloat16),
)
PLAIN = (("w13_weight", (6, 4), torch.bfloat16), ("w2_weight", (4, 3), torch.bfloat16))
EARLY = (
    ("w2_weight_scale_fp32_list", (4,), torch.float32),
    ("w13_weight_offset", (8, 1), torch.bfloat16),
    ("w2_weight_offset", (8, 1), torch.bfloat16),
)
"""Bound beside the lists up to 0.14, in part as parameters `[slots, ...]`."""
Kind = tuple[str, tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Shape:
    """`slots` are those of one rank."""

    layers: int
    dense_layers: int
    experts: int
    ranks: int
    redundant: int
    kinds: tuple[Kind, ...]

    @property
    def slots(self) -> int:
        return (self.experts + self.redundant) // self.ranks


def kinds_of(adaptor_source: str, *, quantised: bool) -> tuple[Kind, ...]:
    """The expert weights that a release's adaptor knows, told from its source."""
    if not quantised:
        return PLAIN
    return QUANTISED + tuple(kind for kind in EARLY if f'"{kind[0]}"' in adaptor_source)


def pattern(layer: int, expert: int, kind: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What expert `expert` of `layer` holds in its weight `kind`, everywhere and always."""
    generator = torch.Generator().manual_seed(layer * 10_007 + expert * 101 + kind)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


class ScriptedExperts(torch.nn.Module):
    """The experts of one layer: weights, maps and counters under the names vllm-ascend gives them."""

    def __init__(self, shape: Shape, layer: int, maps: Any, *, rank: int, multi_stage: bool) -> None:
        super().__init__()
        self.global_expert_map, _, self.log2phy, _ = maps
        self.layer, self.local_num_experts, self.ep_rank = layer, shape.slots, rank
        self.top_k = 2
        self.multi_stage = multi_stage
        self.moe_load = torch.zeros((4, shape.slots) if multi_stage else shape.slots, dtype=torch.int64)
        self.own = [int(expert) for expert in torch.argsort(self._slot_of(rank, shape))[: shape.slots]]
        self.kinds = shape.kinds
        for number, (name, size, dtype) in enumerate(self.kinds):
            tensors = [pattern(layer, expert, number, size, dtype) for expert in self.own]
            setattr(
                self, name, tensors if name.endswith("_list") else torch.nn.Parameter(torch.stack(tensors), False)
            )

    def _slot_of(self, rank: int, shape: Shape) -> torch.Tensor:
        local: torch.Tensor = self.global_expert_map[rank]
        return torch.where(local < 0, shape.experts + 1, local)

    def get_log2phy_map(self) -> Any:
        return self.log2phy

    def clear_moe_load(self) -> None:
        self.moe_load.zero_()

    def count(self, expert_tokens: torch.Tensor, group_list_type: int) -> None:
        """Adds `[slots]` tokens that arrived, as vllm-ascend's layer does: per expert, or summed up so far."""
        if group_list_type == 0:
            expert_tokens = torch.cat([expert_tokens[:1], expert_tokens[1:] - expert_tokens[:-1]])
        if self.multi_stage:
            self.moe_load.index_add_(0, torch.tensor([0]), expert_tokens.view(1, -1))
        else:
            self.moe_load.add_(expert_tokens)

    def held(self, experts: int, *, lists_only: bool) -> list[int]:
        """The expert whose weights each slot holds, in every kind; -1 where they are not of one expert."""
        kinds = [k for k in enumerate(self.kinds) if k[1][0].endswith("_list") or not lists_only]
        return [self._held_by(slot, experts, kinds) for slot in range(self.local_num_experts)]

    def _held_by(self, slot: int, experts: int, kinds: list[tuple[int, Kind]]) -> int:
        for expert in range(experts):
            if all(
                torch.equal(getattr(self, name)[slot], pattern(self.layer, expert, number, size, dtype))
                for number, (name, size, dtype) in kinds
            ):
                return expert
        return -1


class ScriptedModel(torch.nn.Module):
    """Dense layers first, then MoE layers, as in DeepSeek V2/V3; without dense ones, as in Qwen3-MoE."""

    def __init__(self, shape: Shape, *, rank: int, maps: Any, multi_stage: bool) -> None:
        super().__init__()
        self.quant_config = None if shape.kinds == PLAIN else object()
        total = shape.dense_layers + shape.layers
        self.config = SimpleNamespace(
            num_hidden_layers=total,
            first_k_dense_replace=shape.dense_layers,
            model_type="deepseek_v3" if shape.dense_layers else "qwen3_moe",
        )
        blocks = [torch.nn.Module() for _ in range(total)]
        self.experts: list[ScriptedExperts] = []
        for number in range(shape.dense_layers, total):
            layer_maps = maps(number - shape.dense_layers)
            self.experts.append(ScriptedExperts(shape, number, layer_maps, rank=rank, multi_stage=multi_stage))
            block = torch.nn.Module()
            block.experts = self.experts[-1]
            blocks[number].mlp = block
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(blocks)


def initial_maps(shape: Shape, rank: int, *, expert_map_path: str | None, tp_size: int) -> Any:
    """A function of the MoE layer's number, giving what vllm-ascend's own `init_eplb_config` builds for it."""
    utils = importlib.import_module("vllm_ascend.eplb.core.eplb_utils")
    config = SimpleNamespace(
        dynamic_eplb=True,
        expert_map_path=expert_map_path,
        expert_map_record_path=None,
        num_redundant_experts=shape.redundant,
        init_redundancy_expert=shape.redundant,
    )
    moe = SimpleNamespace(num_experts=shape.experts, ep_size=shape.ranks, ep_rank=rank, supports_eplb=True)
    named = {"tp_size": tp_size} if "tp_size" in utils.init_eplb_config.__code__.co_varnames else {}
    return lambda layer: utils.init_eplb_config(config, layer, moe, **named)


def adaptor_of(model: ScriptedModel) -> Any:
    """vllm-ascend's own adaptor to the model, made as the release's runner makes it."""
    module = importlib.import_module("vllm_ascend.eplb.adaptor.vllm_adaptor")
    for layer in model.experts:
        layer.quant_type = getattr(module, "QuantType", SimpleNamespace(W8A8=None, NONE=None)).W8A8
        if hasattr(module.VllmEplbAdaptor, "register_layer"):
            module.VllmEplbAdaptor.register_layer(layer)
    if importlib.util.find_spec("vllm_ascend.eplb.utils") is not None:
        helpers = importlib.import_module("vllm_ascend.eplb.utils")
        needed = helpers.model_register.__code__.co_argcount
        helpers.model_register(*(model, SimpleNamespace(hf_text_config=model.config))[:needed])
    return module.VllmEplbAdaptor(model=model)
