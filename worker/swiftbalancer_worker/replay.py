"""Replays recorded loads through the real planner as if live: always planned from the past, judged on what came."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.dispatch import DispatchForm, slot_fractions, uniform_table
from swiftbalancer.errors import ConfigError, RecordingError
from swiftbalancer.load import imbalance
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker.cost import CostModel
from swiftbalancer_worker.forecast import forecast
from swiftbalancer_worker.inputs import PlanInput, PlanLimits
from swiftbalancer_worker.planner import Planner, PlanResult
from swiftbalancer_worker.solver import loads_of_fractions, slowest_over_ideal, slowest_time, solve
from swiftbalancer_worker.trace import Trace
from swiftbalancer_worker.warmup import warm_up

FloatArray = NDArray[np.float64]
MAX_SUB_WINDOWS = 64
ASSUMED_EXPERT_MIB = 44.0
"""Of one expert of one layer where nobody says: DeepSeek-V3 in FP8."""


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """How to replay. `window` and `refresh` are in recorded steps; `refresh` 0 renews tables with placements only."""

    num_ranks: int
    num_redundant: int = 0
    num_nodes: int = 1
    window: int = 8
    refresh: int = 1
    budget: int | None = 8
    """Experts that may move per layer and plan; None: no limit."""
    dispatch: DispatchForm = field(default_factory=DispatchForm)
    expert_bytes: float = ASSUMED_EXPERT_MIB * 2**20
    options: Mapping[str, Any] = field(default_factory=dict)
    pay_back: float = 0.0
    """Moves must save this multiple of what their transfer costs; 0: cost does not count. What moves save depends on
    how many tokens the recording holds, so other than 0 needs one of real traffic, not a sample."""
    min_refresh_gain: float = 0.002
    tokens_per_activation: float = 0.0
    """Tokens that take as long as reading one expert's weights; see `CostModel`."""
    bound: bool = True
    """Also solve the split that fits each judged step, the best any dispatch could do."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.refresh < 0:
            raise ConfigError(f"window={self.window}, refresh={self.refresh}: need >= 1 and >= 0 steps")

    def cost_of(self, trace: Trace) -> CostModel:
        """What tokens, reads and moves cost with the steps of `trace`."""
        return CostModel(
            tokens_per_activation=self.tokens_per_activation,
            expert_bytes=self.expert_bytes,
            steps_per_sub_window=float(trace.steps_per_entry),
        )


@dataclass(slots=True, eq=False)
class PolicyRun:
    """What one policy did, per recorded step and per plan.

    `imbalance` `[steps, layers]`, `bound` `[steps, layers]`: slowest rank over ideal. `time` `[steps, layers]`: the
    slowest rank's time by the cost model, in tokens. `rank_share`
    `[steps, ranks]`: each rank's load over the mean rank's, `busiest_copy` `[steps, experts]` float32: the tokens of
    each expert's busiest replica, both in the layer in focus. `moves` per plan, `plan_ms`, `refresh_ms` per call.
    """

    name: str
    imbalance: FloatArray
    bound: FloatArray
    time: FloatArray
    rank_share: FloatArray
    busiest_copy: NDArray[np.float32]
    moves: list[int] = field(default_factory=list)
    plan_steps: list[int] = field(default_factory=list)
    plan_ms: list[float] = field(default_factory=list)
    refresh_ms: list[float] = field(default_factory=list)
    dispatch_updates: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Unbalanced:
    """Experts in contiguous blocks. `imbalance`, `time` `[steps, layers]` as in `PolicyRun`; `rank_share`
    `[steps, ranks]`: each rank's load over the mean rank's in `focus`, the least even layer."""

    imbalance: FloatArray
    time: FloatArray
    focus: int
    rank_share: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class ReplayResult:
    """All policies on one trace, and what contiguous blocks of experts without redundant ones would have done."""

    trace: Trace
    settings: ReplaySettings
    unbalanced: Unbalanced
    runs: list[PolicyRun]

    @property
    def without(self) -> FloatArray:
        """`[steps, layers]` imbalance without balancing."""
        return self.unbalanced.imbalance

    @property
    def judged(self) -> slice:
        """The steps that count: those after the first window."""
        return slice(self.settings.window, None)


Progress = Callable[[str, int], None]


def replay(
    trace: Trace, settings: ReplaySettings, *, policies: list[str], progress: Progress | None = None
) -> ReplayResult:
    """Every policy over the whole trace. `progress(policy, step)` is called after each step.

    Raises `TopologyError` if experts do not divide over ranks, `UnknownPolicy`, `InvalidLoad` for bad loads,
    `RecordingError` if the trace has less than two steps, and `ConfigError` if none come after the first window.
    """
    planners = {name: Planner(name, settings.options) for name in policies}
    topology = topology_of(trace, settings)
    check_length(trace, settings.window)
    without = unbalanced(trace, settings.num_ranks, settings.cost_of(trace))
    for planner in planners.values():  # last, since the first time on a machine takes minutes
        warm_up(planner)
    runs = []
    for name, planner in planners.items():
        one = _Replay(
            trace, settings, planner, Placement.initial(topology, trace.shape[2], num_layers=trace.shape[1])
        )
        runs.append(one.run(name, without.focus, progress))
    return ReplayResult(trace, settings, without, runs)


def check_length(trace: Trace, window: int) -> None:
    """Raises if no step would be left to judge after the first placement plan."""
    steps = len(trace)
    if steps < 2:
        raise RecordingError(
            f"{trace.name}: {steps} recorded step; a replay plans from what has passed and judges on what comes "
            "next, so it needs 2 at least"
        )
    if window >= steps:
        raise ConfigError(
            f"--window: {trace.name} has {steps} recorded steps and the first plan comes after {window}, so none are "
            f"left to judge it on; give --window {max(1, steps // 4)}, or a longer recording"
        )


def topology_of(trace: Trace, settings: ReplaySettings) -> Topology:
    """Ranks, nodes and slots to replay on; raises `TopologyError` if they do not fit."""
    return Topology.for_experts(
        trace.shape[2],
        num_redundant=settings.num_redundant,
        num_ranks=settings.num_ranks,
        num_nodes=settings.num_nodes,
    )


def unbalanced(trace: Trace, num_ranks: int, cost: CostModel | None = None) -> Unbalanced:
    """What the trace does to contiguous blocks of experts; the blocks differ by one where they do not divide."""
    rank_of = np.arange(trace.shape[2]) * num_ranks // trace.shape[2]
    member = (rank_of[:, None] == np.arange(num_ranks)).astype(np.float64)
    rows = np.stack([imbalance(loads @ member) for loads in trace])
    cost = cost or CostModel()
    time = np.stack([(cost.worth(loads) @ member).max(-1) for loads in trace])
    focus = int(rows.mean(0).argmax())
    return Unbalanced(rows, time, focus, np.stack([rank_share(loads[focus] @ member) for loads in trace]))


def rank_share(ranks: FloatArray) -> FloatArray:
    """`[ranks]` tokens over their mean; ones for an idle layer."""
    mean = float(ranks.mean())
    return ranks / mean if mean > 0 else np.ones_like(ranks)


class _Replay:
    """One policy on its way through a trace."""

    def __init__(self, trace: Trace, settings: ReplaySettings, planner: Planner, placement: Placement) -> None:
        self._trace, self._settings, self._planner = trace, settings, planner
        self._cost = settings.cost_of(trace)
        steps, layers, experts = trace.shape
        self._placement = placement
        self._table = uniform_table(self._placement, settings.dispatch.width)
        self._fractions = slot_fractions(self._table, self._placement)
        self._epoch = 0
        self._run = PolicyRun(
            name="",
            imbalance=np.ones((steps, layers)),
            bound=np.ones((steps, layers)),
            time=np.zeros((steps, layers)),
            rank_share=np.ones((steps, settings.num_ranks)),
            busiest_copy=np.zeros((steps, experts), np.float32),
        )
        self._focus = 0

    def run(self, name: str, focus: int, progress: Progress | None) -> PolicyRun:
        self._run.name, self._focus = name, focus
        settings = self._settings
        for step, loads in enumerate(self._trace):
            self._judge(step, loads)
            if (step + 1) % settings.window == 0:
                self._plan(step)
            elif settings.refresh and (step + 1) % settings.refresh == 0:
                self._refresh(step)
            if progress is not None:
                progress(name, step)
        return self._run

    def _judge(self, step: int, loads: FloatArray) -> None:
        ranks = loads_of_fractions(self._placement, self._fractions, loads)
        self._run.imbalance[step] = slowest_over_ideal(self._placement, ranks)
        self._run.time[step] = slowest_time(self._placement, self._fractions, loads, self._cost)
        self._run.rank_share[step] = rank_share(ranks[self._focus])
        expert_of = self._placement.physical_to_logical_map[self._focus]
        per_slot = loads[self._focus][expert_of] * self._fractions[self._focus]
        np.maximum.at(self._run.busiest_copy[step], expert_of, per_slot.astype(np.float32))
        if self._settings.bound:
            best = solve(self._placement, loads, DispatchForm("exact"))  # for tokens, which `bound` is about
            self._run.bound[step] = slowest_over_ideal(self._placement, best.rank_loads(loads))

    def _plan(self, step: int) -> None:
        given = self._input(step)
        result = self._planner.plan(given)
        self._run.plan_ms.append(result.plan_ms)
        self._run.plan_steps.append(step)
        self._run.moves.append(len(result.plan.moves))
        self._placement = result.plan.target(self._placement)
        self._adopt(result, given)

    def _refresh(self, step: int) -> None:
        given = self._input(step)
        result = self._planner.refresh(given)
        self._run.refresh_ms.append(result.plan_ms)
        self._adopt(result, given)

    def _adopt(self, result: PlanResult, given: PlanInput) -> None:
        changed = bool(result.plan.layers.size) or not np.array_equal(result.plan.table, self._table)
        self._run.dispatch_updates += changed
        self._epoch += changed
        self._table = result.plan.table
        if given.dispatch.kind == "exact":
            expected = forecast(given.loads, scenarios=False).expected
            self._fractions = solve(self._placement, expected, given.dispatch, cost=given.cost).fractions
        else:
            self._fractions = slot_fractions(self._table, self._placement)

    def _input(self, step: int) -> PlanInput:
        settings = self._settings
        loads = self._trace.between(max(0, step + 1 - settings.window), step + 1)
        return PlanInput(
            placement=self._placement,
            loads=fold(loads, MAX_SUB_WINDOWS),
            dispatch=settings.dispatch,
            epoch=self._epoch,
            limits=PlanLimits(
                max_moves_per_layer=settings.budget,
                staging_experts=self._placement.topology.slots_per_rank,
                min_refresh_gain=settings.min_refresh_gain,
                pay_back=settings.pay_back,
            ),
            cost=self._cost,
            table=self._table,
        )


def fold(loads: FloatArray, most: int) -> FloatArray:
    """`[n, layers, experts]` with at most `most` entries, by adding up neighbours."""
    if len(loads) <= most:
        return loads
    edges = np.linspace(0, len(loads), most + 1).astype(np.int64)
    return np.add.reduceat(loads, edges[:-1], axis=0)
