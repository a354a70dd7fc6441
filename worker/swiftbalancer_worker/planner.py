"""The planner: runs a policy, keeps only the layers that pay, and turns the rest into moves and tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.placement import Placement
from swiftbalancer.plan import Plan
from swiftbalancer_worker.cost import CostModel
from swiftbalancer_worker.forecast import Forecast, forecast
from swiftbalancer_worker.gate import Verdict, judge
from swiftbalancer_worker.inputs import PlanInput, PlanLimits
from swiftbalancer_worker.policies import policy_named
from swiftbalancer_worker.schedule import Schedule, align, schedule
from swiftbalancer_worker.solver import (
    Dispatch,
    ideal_time,
    shortest_times,
    slowest_over_ideal,
    slowest_time,
    solve,
)

__all__ = ["CostModel", "PlanInput", "PlanLimits", "PlanResult", "Planner"]

EVEN_STRENGTH = 0.4
"""Of the scenarios for an engine that splits evenly. Where dispatch follows the loads, a placement has to leave room
for it; an even split stays as it is, and what would prepare it for strong drift unbalances it now."""


@dataclass(frozen=True, slots=True, eq=False)
class PlanResult:
    """A plan and what it is expected to do.

    `plan` is of kind `placement` if experts move, else `dispatch`. `imbalance_before`, `imbalance_after`
    `[layers]` float64: predicted slowest rank over ideal, both with the best dispatch the engine can do.
    `reason`: why so many or so few layers move. `left_out`: layers that were to change and do not, and why.
    """

    plan: Plan
    imbalance_before: NDArray[np.float64]
    imbalance_after: NDArray[np.float64]
    reason: str
    left_out: Mapping[int, str]
    num_moves: int = 0
    num_bytes: float = 0.0
    cross_node_bytes: float = 0.0
    plan_ms: float = 0.0


class Planner:
    """Plans by one policy; keeps nothing between calls."""

    def __init__(self, policy_name: str = "swift", options: Mapping[str, Any] | None = None) -> None:
        """Raises `UnknownPolicy` or `ConfigError`."""
        self.policy = policy_named(policy_name, options)

    def plan(self, given: PlanInput) -> PlanResult:
        """A placement plan, or a dispatch plan if no layer is worth moving."""
        started = time.perf_counter()
        strength = EVEN_STRENGTH if given.dispatch.kind == "uniform" else 1.0
        expected = forecast(given.loads, every=given.limits.max_moves_per_layer is None, strength=strength)
        rows = self.policy.place(given, expected)
        rows = align(given.placement, rows, loads=expected.expected, keeps_ranks=self.policy.keeps_ranks)
        verdict = judge(given, expected, rows, gated=self.policy.gated and given.limits.gated)
        if not len(verdict.layers):
            return self._dispatch_result(given, expected, started, verdict)
        target = given.placement.with_layers(verdict.layers, rows[verdict.layers])
        moves = schedule(
            given.placement, rows[verdict.layers], verdict.layers, staging_experts=given.limits.staging_experts
        )
        dispatch = solve(target, expected.expected, given.dispatch, cost=given.cost, drift=expected.drift)
        plan = _placement_plan(given, target, moves, dispatch)
        return PlanResult(
            plan=plan,
            imbalance_before=_best_imbalance(given, expected.expected),
            imbalance_after=slowest_over_ideal(target, dispatch.rank_loads(expected.expected)),
            reason=_reason(given, verdict),
            left_out=verdict.left_out,
            num_moves=len(plan.moves),
            num_bytes=len(plan.moves) * given.cost.expert_bytes,
            cross_node_bytes=int(moves.cross_node.sum()) * given.cost.expert_bytes,
            plan_ms=(time.perf_counter() - started) * 1e3,
        )

    def refresh(self, given: PlanInput) -> PlanResult:
        """A plan that renews the dispatch tables and moves nothing; the tables in force if they are good enough."""
        started = time.perf_counter()
        return self._dispatch_result(given, forecast(given.loads, scenarios=False), started, None)

    def refresh_dispatch(self, given: PlanInput) -> Dispatch:
        """The dispatch a refresh would set, with its fractions; for offline comparisons."""
        seen = forecast(given.loads, scenarios=False)
        return solve(given.placement, seen.expected, given.dispatch, cost=given.cost, drift=seen.drift)

    def _dispatch_result(
        self, given: PlanInput, expected: Forecast, started: float, verdict: Verdict | None
    ) -> PlanResult:
        loads = expected.expected
        best = solve(given.placement, loads, given.dispatch, cost=given.cost, drift=expected.drift)
        now = best if given.table is None else Dispatch.of_table(given.placement, given.table)
        before, after = (slowest_over_ideal(given.placement, each.rank_loads(loads)) for each in (now, best))
        table, reason = best.table, _reason(given, verdict) if verdict else "dispatch refresh"
        if given.limits.gated and now is not best and now.table.shape == table.shape:
            gain = _gain(given, loads, now, best)
            if gain < given.limits.min_refresh_gain:
                table, after = now.table, before  # renewing it costs every rank some host time
                reason = f"{reason}: the tables in force stay, others would gain {max(gain, 0.0):.4f}"
        return PlanResult(
            plan=Plan.dispatch_only(given.placement, base_epoch=given.epoch, table=table),
            imbalance_before=before,
            imbalance_after=after,
            reason=reason,
            left_out=verdict.left_out if verdict else {},
            plan_ms=(time.perf_counter() - started) * 1e3,
        )


def _gain(given: PlanInput, loads: NDArray[np.float64], old: Dispatch, new: Dispatch) -> float:
    """How much less than with `old` the slowest rank needs with `new`, over the ideal time, mean over layers."""
    was, will_be = (slowest_time(given.placement, each.fractions, loads, given.cost) for each in (old, new))
    ideal = ideal_time(given.placement, loads, given.cost)
    return float(np.divide(was - will_be, ideal, out=np.zeros_like(ideal), where=ideal > 0).mean())


def _best_imbalance(given: PlanInput, loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[layers]` float64, predicted imbalance of the placement in force with the best dispatch the engine can do."""
    times = shortest_times(given.placement, loads[None], uniform=given.dispatch.kind == "uniform")[0]
    ideal = loads.sum(1) / given.placement.topology.speeds().sum()
    best: NDArray[np.float64] = np.divide(times, ideal, out=np.ones_like(times), where=ideal > 0)
    return best


def _reason(given: PlanInput, verdict: Verdict) -> str:
    num = len(verdict.layers)
    text = f"{num} of {given.placement.num_layers} layers change"
    if not verdict.left_out:
        return text if num else "no layer needs a change"
    layer, why = next(iter(verdict.left_out.items()))
    return f"{text}, {len(verdict.left_out)} left out (layer {layer}: {why})"


def _placement_plan(given: PlanInput, target: Placement, moves: Schedule, dispatch: Dispatch) -> Plan:
    return Plan(
        kind="placement",
        base_epoch=given.epoch,
        base_digest=given.placement.digest(),
        layers=moves.layers,
        rows=target.physical_to_logical_map[moves.layers],
        moves=moves.moves,
        layer_batch=moves.layer_batch,
        move_batch=moves.move_batch,
        table=dispatch.table,
    )
