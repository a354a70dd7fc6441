"""Other projects' placement code, loaded from files the user has, to be compared with ours.

Nothing of theirs is copied: a folder or file is given, and its modules are imported as they are. What they import
only to log or to read a flag is replaced by an empty stand-in.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scripts.load_streams import Shape

Rows = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class Peer(Protocol):
    """A placement policy of another project."""

    def __call__(self, window: FloatArray, rows: Rows) -> Rows:
        """`window` `[sub_windows, layers, experts]`, `rows` `[layers, slots]` in force -> `[layers, slots]`."""
        ...


def vllm_default(folder: Path, shape: Shape, num_groups: int) -> Peer:
    """vLLM's default policy; `folder` is its `vllm/distributed/eplb/policy`."""
    import torch

    rebalance = _module(folder, "default").DefaultEplbPolicy.rebalance_experts
    nodes = shape.nodes if num_groups > 1 else 1

    def plan(window: FloatArray, rows: Rows) -> Rows:
        weight = torch.from_numpy(window.sum(0))
        return np.asarray(rebalance(weight, shape.slots, num_groups, nodes, shape.ranks, torch.from_numpy(rows)))

    return plan


def sglang(folder: Path, shape: Shape, name: str) -> Peer:
    """SGLang's `deepseek` or `deepseek_vec`; `folder` is its `sglang/srt/eplb/eplb_algorithms`."""
    import torch

    _stand_in("sglang.srt.utils", get_bool_env_var=lambda *_: False)
    rebalance = _module(folder, name).rebalance_experts
    per_rank = shape.slots // shape.ranks

    def plan(window: FloatArray, rows: Rows) -> Rows:  # noqa: ARG001
        loads = torch.from_numpy(window)
        if name == "deepseek":
            return np.asarray(rebalance(loads.sum(0), shape.slots, 1, 1, shape.ranks, False)[0])
        return np.asarray(rebalance(loads, shape.slots, per_rank, 1, 1, False)[0])

    return plan


def deepseek(file: Path, shape: Shape) -> Peer:
    """DeepSeek's original; `file` is its `eplb.py`."""
    import torch

    rebalance = _module(file.parent, file.stem).rebalance_experts

    def plan(window: FloatArray, rows: Rows) -> Rows:  # noqa: ARG001
        return np.asarray(rebalance(torch.from_numpy(window.sum(0)), shape.slots, 1, 1, shape.ranks)[0])

    return plan


def ascend(folder: Path, shape: Shape, name: str) -> Peer:
    """vllm-ascend's `swift` or `flashlb`; `folder` is its `vllm_ascend/eplb/core/policy`."""
    import torch

    _stand_in("torch_npu")
    _stand_in("vllm.logger", logger=logging.getLogger("peer"))
    _stand_in("vllm_ascend.distributed.parallel_state", get_dynamic_eplb_group=_no_group)
    torch.npu = ModuleType("torch.npu")  # type: ignore[attr-defined]
    torch.npu.device_count = lambda: shape.ranks // shape.nodes  # type: ignore[attr-defined]
    if name == "swift":
        policy = _module(folder, "policy_swift_balancer").SwiftBalanceEplb()
    else:
        policy = _module(folder, "policy_flashlb").FlashLB()

    def plan(window: FloatArray, rows: Rows) -> Rows:
        table = rows.reshape(len(rows), shape.ranks, -1)
        per_slot = np.stack([_slot_loads(step, rows).reshape(table.shape) for step in window])
        work = per_slot.sum(0) if name == "swift" else per_slot
        answer = policy.rebalance_experts(torch.from_numpy(table), torch.from_numpy(work))
        return np.asarray(answer[2]).reshape(rows.shape)

    return plan


def _no_group() -> None:
    raise RuntimeError("no process group here")


def _slot_loads(loads: FloatArray, rows: Rows) -> FloatArray:
    """`[layers, slots]` tokens of each slot with an even split; whole numbers, as engines count them."""
    count = np.stack([np.bincount(row, minlength=loads.shape[1]) for row in rows])
    return np.asarray(np.rint(np.take_along_axis(loads / count, rows, 1)), np.float64)


def _module(folder: Path, name: str) -> Any:
    """A module of a folder, imported as part of a package so that its relative imports work."""
    package = "peer_" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    if package not in sys.modules:
        made = ModuleType(package)
        made.__path__ = [str(folder.resolve())]
        sys.modules[package] = made
    return importlib.import_module(f"{package}.{name}")


def _stand_in(name: str, **attributes: object) -> None:
    """Makes `import name` work where the real module is not installed."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        partial = ".".join(parts[:end])
        if partial not in sys.modules:
            sys.modules[partial] = ModuleType(partial)
            sys.modules[partial].__path__ = []
            sys.modules[partial].__spec__ = importlib.util.spec_from_loader(partial, None)
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)
