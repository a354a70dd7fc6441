"""Other projects' policies in ours, and ours in their place.

vLLM, SGLang and DeepSeek call a planner as `rebalance_experts(weight, num_replicas, num_groups, num_nodes,
num_ranks[, old_map])`. `call_rebalance` runs any such function on numpy arrays; `rebalance_experts`,
`rebalance_experts_with_maps` and `SwiftEplbPolicy` are ours under that signature. They accept and return torch
tensors or numpy arrays.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from swiftbalancer.dispatch import DispatchForm
from swiftbalancer.errors import InvalidPlan
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology


def call_rebalance(
    function: Callable[..., Any],
    weight: NDArray[np.float64],
    *,
    topology: Topology,
    num_groups: int = 1,
    old_map: NDArray[np.int32] | None = None,
) -> NDArray[np.int32]:
    """`[layers, slots]` int32, the `physical_to_logical_map` a policy answers for `weight` `[layers, experts]`.

    `function` may return that map alone or a tuple that starts with it; it gets `old_map` if it takes a sixth
    argument. Tensors go in if torch is installed. Raises `InvalidPlan` if the answer has another shape.
    """
    arguments = [_tensor(weight), topology.num_slots, num_groups, topology.num_nodes, topology.num_ranks]
    if old_map is not None and len(inspect.signature(function).parameters) > len(arguments):
        arguments.append(_tensor(old_map.astype(np.int64)))
    answer = function(*arguments)
    first = answer[0] if isinstance(answer, tuple) else answer
    rows = np.asarray(first).astype(np.int32)
    if rows.shape != (len(weight), topology.num_slots):
        raise InvalidPlan(f"the policy answered {rows.shape}, expected ({len(weight)}, {topology.num_slots})")
    return rows


def rebalance_experts(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_ranks: int,
    old_global_expert_indices: Any = None,
) -> Any:
    """`[layers, num_replicas]` int64, the default policy's map for an engine that splits tokens evenly.

    Without an old map the layout is from scratch. With one, ranks keep what they hold where the new layout allows.
    `num_groups` is accepted for the signature's sake: `swift` does not keep groups on nodes.
    """
    del num_groups
    loads = np.asarray(weight, np.float64)
    topology = Topology(num_ranks, num_replicas // num_ranks, num_nodes=num_nodes)
    old = _old_placement(old_global_expert_indices, loads, topology)
    return _like(weight, _planned(loads, old))


def rebalance_experts_with_maps(
    weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
) -> tuple[Any, Any, Any]:
    """What DeepSeek answers: `physical_to_logical_map`, `logical_to_physical_map` (-1 padded), replica counts."""
    rows = rebalance_experts(np.asarray(weight, np.float64), num_replicas, num_groups, num_nodes, num_ranks)
    topology = Topology(num_ranks, num_replicas // num_ranks, num_nodes=num_nodes)
    placed = Placement(topology, np.asarray(weight).shape[1], rows.astype(np.int32))
    maps = (rows, placed.logical_to_physical_map(), placed.logical_replica_count())
    return (_like(weight, maps[0]), _like(weight, maps[1]), _like(weight, maps[2]))


class SwiftEplbPolicy:
    """`swift` as a policy class of vLLM: one class method, one map."""

    rebalance_experts = staticmethod(rebalance_experts)


def _planned(loads: NDArray[np.float64], old: Placement) -> NDArray[np.int64]:
    from swiftbalancer_worker.planner import PlanInput, PlanLimits, Planner

    limits = PlanLimits(max_moves_per_layer=None, staging_experts=old.topology.slots_per_rank, gated=False)
    result = Planner("swift").plan(PlanInput(old, loads[None], DispatchForm("uniform"), epoch=0, limits=limits))
    return result.plan.target(old).physical_to_logical_map.astype(np.int64)


def _old_placement(old_map: Any, loads: NDArray[np.float64], topology: Topology) -> Placement:
    if old_map is None:
        return Placement.initial(topology, loads.shape[1], num_layers=len(loads))
    return Placement(topology, loads.shape[1], np.asarray(old_map).astype(np.int32))


def _tensor(values: ArrayLike) -> Any:
    """A torch tensor if torch is installed, else the array itself."""
    try:
        import torch
    except ImportError:
        return np.asarray(values)
    return torch.from_numpy(np.ascontiguousarray(values))


def _like(example: Any, values: NDArray[np.int64]) -> Any:
    """`values` as a tensor if `example` is one."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(example, torch.Tensor):
        return torch.from_numpy(np.ascontiguousarray(values))
    return values
