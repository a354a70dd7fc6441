"""What a report shows, as plain arrays: thinned out in time, ready to draw."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.replay import FloatArray, PolicyRun, ReplayResult, replay
from swiftbalancer_worker.replay_summary import summary
from swiftbalancer_worker.trace import Trace

MAX_COLUMNS = 400
BUDGETS = (0, 1, 2, 4, 8, 16)
SWEEP_STEPS = 256
WORST_LAYERS = 12


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """One line of the imbalance chart: `steps` and the mean over layers at each."""

    name: str
    steps: FloatArray
    imbalance: FloatArray


@dataclass(frozen=True, slots=True)
class TradeOff:
    """One point of the trade-off curve."""

    budget: int
    moves_per_layer: float
    imbalance: float


@dataclass(frozen=True, slots=True, eq=False)
class ReportData:
    """All a report needs. `columns` `[columns]`: steps. Of layer `layer`: `expert_before`, `expert_after`
    `[experts, columns]` load of each expert's busiest replica over the mean expert's, with one replica each and as
    balanced; `rank_before`, `rank_after` `[ranks, columns]` load over the mean rank's."""

    figures: dict[str, object]
    result: ReplayResult
    best: PolicyRun
    columns: FloatArray
    layer: int
    expert_before: FloatArray
    expert_after: FloatArray
    rank_before: FloatArray
    rank_after: FloatArray
    timelines: list[Timeline]
    swept: str
    """The policy of the trade-off curve: one that heeds the budget, if there is one."""
    trade_off: list[TradeOff]
    worst_layers: list[int]


def report_data(result: ReplayResult) -> ReportData:
    """Gathers and thins out; also replays some budgets over the first steps for the trade-off curve."""
    best = min(result.runs, key=lambda run: float(run.imbalance[result.judged].mean()))
    columns = _thin(np.arange(len(result.without), dtype=np.float64)[:, None])[:, 0]
    swept = "swift" if any(run.name == "swift" for run in result.runs) else best.name
    layer = result.unbalanced.focus
    per_layer = result.without[result.judged].mean(0)
    worst = [int(i) for i in np.argsort(-per_layer)[:WORST_LAYERS]]
    loads = layer_loads(result.trace, layer)
    return ReportData(
        figures=summary(result),
        result=result,
        best=best,
        columns=columns,
        layer=layer,
        expert_before=_over_mean(loads, loads),
        expert_after=_over_mean(best.busiest_copy, loads),
        rank_before=_thin(result.unbalanced.rank_share).T,
        rank_after=_thin(best.rank_share).T,
        timelines=_timelines(result, best),
        swept=swept,
        trade_off=_trade_off(result, swept),
        worst_layers=worst,
    )


def _timelines(result: ReplayResult, best: PolicyRun) -> list[Timeline]:
    named = [("without", result.without), *((run.name, run.imbalance) for run in result.runs)]
    if result.settings.bound:
        named.append((f"{best.name}, ideal split", best.bound))
    steps = np.arange(len(result.without), dtype=np.float64)[:, None]
    return [Timeline(name, _thin(steps)[:, 0], _thin(values.mean(1)[:, None])[:, 0]) for name, values in named]


def layer_loads(trace: Trace, layer: int) -> NDArray[np.float32]:
    """`[steps, experts]` tokens of one layer, holding no more of the trace than one step at a time."""
    out = np.empty((len(trace), trace.shape[2]), np.float32)
    for row, loads in zip(out, trace, strict=True):
        row[:] = loads[layer]
    return out


def _over_mean(values: NDArray[np.float32], loads: NDArray[np.float32]) -> FloatArray:
    """`[experts, columns]` of `[steps, experts]` values, over the mean of that step's loads."""
    mean = loads.mean(1, keepdims=True)
    return _thin(np.divide(values, mean, out=np.zeros_like(values), where=mean > 0).astype(np.float64)).T


def _trade_off(result: ReplayResult, policy: str) -> list[TradeOff]:
    trace = result.trace.head(min(len(result.trace), max(SWEEP_STEPS, 2 * result.settings.window)))
    points = []
    for budget in BUDGETS:
        swept = replay(trace, replace(result.settings, budget=budget, bound=False), policies=[policy])
        run = swept.runs[0]
        moves = sum(run.moves) / max(1, len(run.moves)) / trace.shape[1]
        points.append(TradeOff(budget, moves, float(run.imbalance[swept.judged].mean())))
    return points


def _thin(values: FloatArray) -> FloatArray:
    """`[steps, n]` with at most `MAX_COLUMNS` rows, by averaging neighbours."""
    if len(values) <= MAX_COLUMNS:
        return values
    edges = np.linspace(0, len(values), MAX_COLUMNS + 1).astype(np.int64)
    sums: FloatArray = np.add.reduceat(values, edges[:-1], axis=0)
    return sums / np.diff(edges)[:, None]
