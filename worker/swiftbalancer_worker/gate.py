"""The gate: which layers of a wanted placement are worth moving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.placement import Placement
from swiftbalancer_worker.forecast import Forecast
from swiftbalancer_worker.inputs import PlanInput
from swiftbalancer_worker.kernels.dispatch import ROUGH
from swiftbalancer_worker.schedule import received_per_rank
from swiftbalancer_worker.solver import ideal_time, least_costs, shortest_times

FloatArray = NDArray[np.float64]
MOST_JUDGES = 2
"""Sub-windows a gain is judged on besides the scenarios."""


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """`layers` `[n]` int64 to change, largest gain first; `left_out`: the others that were to, and why."""

    layers: NDArray[np.int64]
    left_out: Mapping[int, str]


@dataclass(frozen=True, slots=True, eq=False)
class Gain:
    """Of each changed layer `[n]` float64: predicted drop of imbalance, its standard error, and seconds saved."""

    mean: FloatArray
    error: FloatArray
    saved_s: FloatArray


def judge(given: PlanInput, expected: Forecast, rows: NDArray[np.int32], *, gated: bool) -> Verdict:
    """Keeps the layers that fit the staging space, stay valid and (if `gated`) save more than they cost."""
    base, limits = given.placement, given.limits
    receives = received_per_rank(base, rows).max(1)
    changed = np.nonzero(receives)[0]
    if not len(changed):
        return Verdict(changed, {})
    old = Placement(base.topology, base.num_experts, base.physical_to_logical_map[changed])
    new = Placement(base.topology, base.num_experts, rows[changed])
    gain = predicted_gain(given, expected, changed, (old, new))
    twice = _repeats(new)
    healing = _breaks_rules(old)
    cost_s = transfer_cost_s(given, old, rows[changed])
    left_out: dict[int, str] = {}
    for i, layer in enumerate(changed.tolist()):
        if twice[i]:
            left_out[layer] = "a rank would hold an expert twice"
        elif receives[layer] > limits.staging_experts:
            left_out[layer] = (
                f"a rank would receive {receives[layer]} experts, staging holds {limits.staging_experts}"
            )
        elif gated and not healing[i] and gain.mean[i] <= limits.min_gain:
            left_out[layer] = f"gain {gain.mean[i]:.4f} is not above {limits.min_gain}"
        elif gated and not healing[i] and gain.mean[i] <= limits.hysteresis * gain.error[i]:
            left_out[layer] = f"gain {gain.mean[i]:.4f} is within its error {gain.error[i]:.4f}"
        elif gated and not healing[i] and gain.saved_s[i] <= limits.pay_back * cost_s[i]:
            left_out[layer] = f"saves {gain.saved_s[i]:.2e} s, costs {cost_s[i]:.2e} s"
    order = np.argsort(-gain.mean, kind="stable")
    kept = [layer for layer in changed[order].tolist() if layer not in left_out]
    return Verdict(np.array(kept, np.int64), left_out)


def predicted_gain(
    given: PlanInput, expected: Forecast, changed: NDArray[np.int64], places: tuple[Placement, Placement]
) -> Gain:
    """What the change of `changed` layers from the first to the second of `places` gains.

    Both get the best dispatch for the loads they are judged on, as the dispatch loop will give them: the gain is
    the mean over the first and the last scenario; its error comes from the sub-windows that say most about the
    next one.
    """
    old, new = places
    judges = np.argsort(-expected.weights, kind="stable")[:MOST_JUDGES]
    judges = judges[expected.weights[judges] > 0]
    weight = expected.weights[judges] / expected.weights[judges].sum()
    scenarios = expected.scenarios[[0, -1]]
    loads = np.concatenate([scenarios, expected.levelled.shares(judges)])[:, changed]
    drop = times(given, old, loads) - times(given, new, loads)
    ideal = np.maximum(ideal_time(old, loads[0], given.cost) * given.cost.seconds_per_token, 1e-300)
    ratio = drop / ideal
    seen = ratio[len(scenarios) :]
    spread = np.sqrt((weight[:, None] * (seen - weight @ seen) ** 2).sum(0))
    error = spread * np.sqrt((weight**2).sum())
    sub_windows = len(given.loads) * given.cost.windows_until_replan
    return Gain(
        mean=ratio[: len(scenarios)].mean(0), error=error, saved_s=drop[: len(scenarios)].mean(0) * sub_windows
    )


def times(given: PlanInput, placement: Placement, loads: FloatArray) -> FloatArray:
    """`[judges, n]` float64, seconds the slowest rank needs for `loads` `[judges, n, experts]` of a sub-window."""
    uniform = given.dispatch.kind == "uniform"
    if given.cost.tokens_per_activation <= 0:
        return shortest_times(placement, loads, uniform=uniform) * given.cost.seconds_per_token
    found = [least_costs(placement, load, given.cost, uniform=uniform, tolerance=ROUGH) for load in loads]
    return np.stack(found) * given.cost.seconds_per_token


def transfer_cost_s(given: PlanInput, old: Placement, rows: NDArray[np.int32]) -> FloatArray:
    """`[n]` float64, serving time each layer's transfer would cost; senders as far as their nearest holder."""
    topology, cost = old.topology, given.cost
    layer, slot = np.nonzero(rows != old.physical_to_logical_map)
    rank = slot // topology.slots_per_rank
    of_node = old.physical_to_logical_map.reshape(len(rows), topology.num_nodes, -1)
    near = np.equal(of_node[layer, rank // topology.ranks_per_node], rows[layer, slot][:, None]).any(1)
    out = np.zeros((len(rows), topology.num_ranks))
    seconds = np.where(near, cost.expert_bytes / cost.bytes_per_s, cost.expert_bytes / cost.remote_bytes_per_s)
    np.add.at(out, (layer, rank), seconds)
    lost: FloatArray = cost.inflation * out.max(1)
    return lost


def _breaks_rules(old: Placement) -> NDArray[np.bool_]:
    """`[n]` bool, layers that must change: an expert is served by nobody, or held twice by a rank."""
    topology, layers = old.topology, old.num_layers
    held = old.physical_to_logical_map.reshape(layers, topology.num_ranks, -1)[:, topology.speeds() > 0]
    flat = np.arange(layers)[:, None] * old.num_experts + held.reshape(layers, -1)
    count = np.bincount(flat.ravel(), minlength=layers * old.num_experts).reshape(layers, -1)
    return np.equal(count, 0).any(1) | _repeats(old)


def _repeats(placement: Placement) -> NDArray[np.bool_]:
    """`[n]` bool, layers in which a rank holds an expert twice."""
    topology = placement.topology
    held = np.sort(placement.physical_to_logical_map.reshape(placement.num_layers, topology.num_ranks, -1), axis=2)
    return np.asarray(np.equal(held[:, :, 1:], held[:, :, :-1]).any((1, 2)), np.bool_)
