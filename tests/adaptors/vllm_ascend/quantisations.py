"""vllm-ascend's own quantisation methods, run on a CPU: what a layer holds once its weights are loaded.

A module of a release is executed without its imports. A name it lacks is looked for among the release's other
quantisation modules; what is not there either (torch_npu, vLLM, configuration) is a stand-in that gives tensors
back as they are.
"""

from __future__ import annotations

import ast
import builtins
import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.adaptors.vllm_ascend import upstream
from tests.adaptors.vllm_ascend.sources import Source

SLOTS, INTERMEDIATE, HIDDEN = 4, 64, 128
LOADING = ("get_", "process_weights", "restore_", "__init__", "create_")
"""Methods that run before serving or describe weights; all others may be part of a pass."""
SETTINGS = {
    "dynamic_eplb": True,
    "use_expert_weight_list": True,
    "quant_method": "",
    "group_size": 32,
    "is_per_channel_weight": True,
    "new_quant_version": True,
    "tp_size": 1,
    "num_bits": 4,
    "pack_factor": 8,
    "transpose_weight": True,
    "use_weight_packed": False,
    "moe": SimpleNamespace(has_bias=True),
}
"""What a method's `__init__` takes from the configuration."""


class Anything:
    """In the place of what is not there. Called, it gives back the first tensor or class it got."""

    def __call__(self, *args: Any, **_named: Any) -> Any:
        return next((arg for arg in args if isinstance(arg, torch.Tensor | type)), self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __mro_entries__(self, _bases: Any) -> tuple[type, ...]:
        return ()

    def __instancecheck__(self, _instance: Any) -> bool:
        return False

    def __bool__(self) -> bool:
        return False

    def __getitem__(self, _index: Any) -> Any:
        return self

    def __setitem__(self, _index: Any, _value: Any) -> None:
        """Nothing is kept."""

    def __or__(self, _other: Any) -> Any:
        return self

    __ror__ = __or__


class UnquantizedFusedMoEMethod(SimpleNamespace):
    """vLLM's, as far as vllm-ascend's builds on it."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing on a CPU."""

    def _maybe_pad_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Release:
    """A release's quantisation modules with fused MC2 set to `fused`."""

    def __init__(self, source: Source, *, fused: int, mega: bool = False) -> None:
        self.source = source
        self._loaded: dict[str, dict[str, Any]] = {}
        self._homes: dict[str, str] = {}
        for module in [*modules_in(source, "quantization"), *modules_in(source, "ops/fused_moe")]:
            for node in source.tree(module).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    self._homes.setdefault(node.name, module)
        self._homes = {name: home for name, home in self._homes.items() if not name.startswith("get_ascend")}
        config = SimpleNamespace(enable_fused_mc2=fused, eplb_config=SimpleNamespace(dynamic_eplb=True))
        self.given: dict[str, Any] = {
            "torch": torch,
            "np": np,
            "get_ascend_config": lambda: config,
            "envs_ascend": SimpleNamespace(VLLM_ASCEND_ENABLE_FUSED_MC2=fused),
            "replace_parameter": lambda layer, name, data: setattr(layer, name, torch.nn.Parameter(data, False)),
            "getattr_static": getattr,
            "UnquantizedFusedMoEMethod": type("Unquantized", (UnquantizedFusedMoEMethod,), {}),
            "dist": SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 2),
            "_MEGA_MOE_SUPPORTED": mega,
        }
        if not source.text("quantization.quant_type") and "QuantType" not in self._homes:
            self.given["QuantType"] = upstream.QuantType

    def names(self, module: str) -> dict[str, Any]:
        """The module, executed without its imports."""
        if module not in self._loaded:
            keep = [node for node in self.source.tree(module).body if _matters(node)]
            names = self._loaded[module] = {"__name__": module, **_standard(), **self.given}
            own = {getattr(node, "name", "") for node in keep}
            used = {node.id for part in keep for node in ast.walk(part) if isinstance(node, ast.Name)}
            for name in used - own - names.keys() - set(dir(builtins)):
                names[name] = self._from_elsewhere(name)
            future = ast.parse("from __future__ import annotations").body
            exec(compile(ast.Module([*future, *keep], []), f"{self.source.name}/{module}", "exec"), names)
            names.update(self.given)
        return self._loaded[module]

    def _from_elsewhere(self, name: str) -> Any:
        home = self._homes.get(name)
        return Anything() if home is None else self.names(home).get(name, Anything())

    def methods(self) -> Iterator[Method]:
        """Every quantisation of MoE layers, and none; without those for 310P, which run another adaptor's layers."""
        for name, module in sorted(self._homes.items()):
            if "w13_weight" not in self.source.text(module) and "MoE" not in name and "Moe" not in name:
                continue
            found = self.names(module).get(name)
            if isinstance(found, type) and _is_moe_method(found):
                yield Method(name, found)


@dataclass(frozen=True)
class Method:
    """One quantisation method of MoE layers."""

    name: str
    made: Any
    """The class."""

    @property
    def is_plain(self) -> bool:
        """Whether it is the method of unquantised weights."""
        return not hasattr(self.made, "get_weight")

    def layer(self, **settings: Any) -> torch.nn.Module:
        """A layer of `SLOTS` experts whose weights this method has prepared for serving."""
        method = self.made.__new__(self.made)
        for name, value in {**SETTINGS, **settings}.items():
            if not hasattr(self.made, name):
                setattr(method, name, value)
        layer = torch.nn.Module()
        for name, tensor in self._weights(method).items():
            layer.register_parameter(name, torch.nn.Parameter(_filled(tensor), requires_grad=False))
        method.process_weights_after_loading(layer)
        return layer

    def _weights(self, method: Any) -> dict[str, torch.Tensor]:
        if self.is_plain:
            return {
                "w13_weight": torch.empty(SLOTS, 2 * INTERMEDIATE, HIDDEN, dtype=torch.bfloat16),
                "w2_weight": torch.empty(SLOTS, HIDDEN, INTERMEDIATE, dtype=torch.bfloat16),
                "w13_bias": torch.empty(SLOTS, 2 * INTERMEDIATE, dtype=torch.bfloat16),
                "w2_bias": torch.empty(SLOTS, HIDDEN, dtype=torch.bfloat16),
            }
        sizes = (SLOTS, INTERMEDIATE, HIDDEN, torch.bfloat16)
        return {**method.get_weight(*sizes), **method.get_dynamic_quant_param(*sizes)}

    def reads(self) -> set[str]:
        """Attributes of the layer that its methods touch in a pass, whether there or not."""
        found: set[str] = set()
        for cls in self.made.__mro__:
            for name, function in vars(cls).items():
                if callable(function) and not name.startswith(LOADING) and hasattr(function, "__code__"):
                    found |= _names_of(function.__code__)
        return found


def adaptor_of(release: Release, method: Method, layer: torch.nn.Module) -> Any:
    """The release's own adaptor to a model of this one layer; raises what it raises where it refuses."""
    quant_type = getattr(method.made, "quant_type", None)
    names = release.names("eplb.adaptor.vllm_adaptor")
    if quant_type is None or isinstance(
        quant_type, Anything
    ):  # of the unquantised method, or before there were types
        kinds = names.get("QuantType", upstream.QuantType)
        quant_type = kinds.NONE if method.is_plain else getattr(kinds, "W8A8", None)
    for name, value in {"quant_type": quant_type, "local_num_experts": SLOTS, "ep_rank": 0}.items():
        object.__setattr__(layer, name, value)
    object.__setattr__(layer, "get_log2phy_map", lambda: None)
    model = SimpleNamespace(
        config=SimpleNamespace(num_hidden_layers=1, first_k_dense_replace=0),
        quant_config=None if method.is_plain else object(),
        model=SimpleNamespace(layers=[SimpleNamespace(mlp=SimpleNamespace(experts=layer))]),
        get_log2phy_map=lambda _layer: None,
        named_parameters=lambda: [(f"model.layers.0.mlp.experts.{n}", p) for n, p in layer.named_parameters()],
    )
    adaptor = names["VllmEplbAdaptor"]
    if hasattr(adaptor, "register_layer"):
        adaptor._registered_moe_layers = [layer]
    return adaptor(model=model)


def modules_in(source: Source, folder: str) -> list[str]:
    paths = sorted((source.root / "vllm_ascend" / folder).rglob("*.py"))
    inside = source.root / "vllm_ascend"
    return [".".join(path.relative_to(inside).with_suffix("").parts) for path in paths if path.stem != "__init__"]


def _matters(node: ast.stmt) -> bool:
    """Functions, constants, and the classes of methods and their kinds; not what surrounds them in a module."""
    if isinstance(node, ast.ClassDef):
        return bool(re.search("Method|Scheme|QuantType|VllmEplbAdaptor", node.name))
    return isinstance(node, ast.FunctionDef | ast.Assign | ast.AnnAssign)


def _is_moe_method(found: type) -> bool:
    return hasattr(found, "process_weights_after_loading") and any("w13_weight" in name for name in _all_names(found))


def _all_names(found: type) -> set[str]:
    functions = [f for cls in found.__mro__ for f in vars(cls).values() if hasattr(f, "__code__")]
    return {name for function in functions for name in _names_of(function.__code__)}


def _names_of(code: Any) -> set[str]:
    """Attribute names and strings a function and those inside it use."""
    found = {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}
    for inner in code.co_consts:
        if hasattr(inner, "co_names"):
            found |= _names_of(inner)
    return found


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    """Some finite numbers, so that what is computed of them is finite, too."""
    return torch.ones(tensor.shape, dtype=torch.float32).to(tensor.dtype)


def _standard() -> dict[str, Any]:
    """What modules import from the standard library to define classes with."""
    return {"Enum": enum.Enum, "ABC": object, "Any": Any}
