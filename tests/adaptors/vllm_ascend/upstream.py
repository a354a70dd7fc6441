"""Lets the `eplb` package of a vllm-ascend source run on a CPU, without vLLM, torch_npu or CANN.

Only what surrounds it is replaced (loggers, process groups, configuration); its own code is untouched.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


class QuantType(enum.Enum):
    """As early releases define it, in a module that needs torch_npu."""

    NONE = 0
    W8A8 = 1
    W4A8 = 2
    MXFP8 = 3
    W4A16 = 4
    MXFP4 = 5


class GlooGroup:
    """The little of vLLM's `GroupCoordinator` that the eplb package uses, over torch's world group."""

    def __init__(self) -> None:
        self.rank_in_group = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.ranks = list(range(self.world_size))
        self.device_group = dist.group.WORLD

    def all_gather(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(value.contiguous()) for _ in self.ranks]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts, dim=dim)


def prepare(root: Path) -> None:
    """Makes `vllm_ascend.eplb` of `root` importable in this process. Call once, after torch's world group exists."""
    group = GlooGroup()
    log = logging.getLogger("vllm")
    log.warning_once = log.info_once = log.debug  # type: ignore[attr-defined]
    _module("vllm.envs")
    _module("vllm.logger", logger=log)
    _module("vllm.distributed", get_ep_group=lambda: group)
    _module("vllm.distributed.parallel_state", get_pp_group=lambda: SimpleNamespace(rank_in_group=0))
    _module("vllm.v1.utils", record_function_or_nullcontext=lambda _name: contextlib.nullcontext())
    _module("vllm.model_executor.layers.fused_moe.layer", determine_expert_map=None)
    _module("vllm.model_executor.layers.fused_moe.expert_map_manager", determine_expert_map=None)
    _module("torch_npu")
    for name in ("", "quantization", "quantization.methods", "distributed"):
        _package(root, f"vllm_ascend.{name}".rstrip("."))
    ascend_config = SimpleNamespace(enable_fused_mc2=0)
    _module("vllm_ascend.ascend_config", get_ascend_config=lambda: ascend_config)
    _module("vllm_ascend.envs", VLLM_ASCEND_ENABLE_FUSED_MC2=0, DYNAMIC_EPLB="true")
    _module("vllm_ascend.utils", vllm_version_is=lambda _version: True)
    _module("vllm_ascend.distributed.parallel_state", get_dynamic_eplb_group=lambda: group)
    _quant_type(root)
    torch.Tensor.npu = lambda tensor: tensor  # type: ignore[attr-defined]
    torch.npu = SimpleNamespace(device_count=dist.get_world_size)  # type: ignore[attr-defined]


def _quant_type(root: Path) -> None:
    """The enum's module where it is one of its own; before that, an enum of the same names."""
    known: Any = QuantType
    if (root / "vllm_ascend/quantization/quant_type.py").is_file():
        known = importlib.import_module("vllm_ascend.quantization.quant_type").QuantType
    _module("vllm_ascend.quantization.methods.base", QuantType=known)


def _module(name: str, **values: Any) -> ModuleType:
    """A module made of `values`, with its parents."""
    parent, _, leaf = name.rpartition(".")
    if parent and parent not in sys.modules:
        _module(parent).__path__ = []
    module = sys.modules.get(name) or ModuleType(name)
    module.__dict__.update(values)
    sys.modules[name] = module
    if parent:
        setattr(sys.modules[parent], leaf, module)
    return module


def _package(root: Path, name: str) -> None:
    """A package whose modules come from the source, but whose `__init__` does not run."""
    module = _module(name)
    module.__path__ = [str(root / name.replace(".", "/"))]
