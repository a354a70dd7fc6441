"""The gate: which layers of a wanted placement are worth moving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.forecast import Forecast
from swiftbalancer_worker.inputs import PlanInput
from swiftbalancer_worker.schedule import received_per_rank
from swiftbalancer_worker.solver import slowest_over_ideal, solve

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """`layers` `[n]` int64 to change, largest gain first; `before` `[layers]` predicted imbalance as it is."""

    layers: NDArray[np.int64]
    before: FloatArray
    left_out: Mapping[int, str]
    reason: str


def judge(given: PlanInput, expected: Forecast, rows: NDArray[np.int32], *, gated: bool) -> Verdict:
    """Keeps the layers that fit the staging space, stay valid and (if `gated`) save more than they cost."""
    base = given.placement
    target = base.with_layers(np.arange(base.num_layers), rows)
    changed = received_per_rank(base, rows).any(1)
    before = solve(base, expected.expected, given.dispatch).rank_loads(given.loads)
    after = solve(target, expected.expected, given.dispatch).rank_loads(given.loads)
    gain = (slowest_over_ideal(base, before) - slowest_over_ideal(target, after)).mean(0)
    left_out: dict[int, str] = {}
    receives = received_per_rank(base, rows).max(1)
    invalid = (target.replicas_on_ranks() > 1).any((1, 2))
    for layer in np.nonzero(changed)[0]:
        if invalid[layer]:
            left_out[int(layer)] = "a rank would hold an expert twice"
        elif receives[layer] > given.limits.staging_experts:
            left_out[int(layer)] = (
                f"a rank would receive {receives[layer]} experts; staging holds {given.limits.staging_experts}"
            )
        elif gated and gain[layer] <= given.limits.min_gain:
            left_out[int(layer)] = f"gain {gain[layer]:.4f} is too small"
    layers = np.array([i for i in np.nonzero(changed)[0] if int(i) not in left_out], np.int64)
    layers = layers[np.argsort(-gain[layers], kind="stable")]
    reason = f"{len(layers)} of {base.num_layers} layers change, {len(left_out)} left out"
    return Verdict(layers, slowest_over_ideal(base, before.mean(0)), left_out, reason)
