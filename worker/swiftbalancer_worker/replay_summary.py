"""The figures of a replay: what `swiftbalancer replay --json` prints."""

from __future__ import annotations

from typing import Any

import numpy as np

from swiftbalancer_worker.replay import PolicyRun, ReplayResult


def summary(result: ReplayResult) -> dict[str, Any]:
    """One object. Imbalances are max/mean rank load, averaged over layers and the steps after the first window."""
    return {
        "recording": recording_figures(result),
        "without": {"imbalance_live": mean_imbalance(result, result.without)},
        "policies": [policy_figures(result, run) for run in result.runs],
    }


def recording_figures(result: ReplayResult) -> dict[str, Any]:
    """What was replayed, and how."""
    steps, layers, experts = result.trace.shape
    settings = result.settings
    return {
        "name": result.trace.name,
        "model": result.trace.model,
        "steps": steps,
        "layers": layers,
        "experts": experts,
        "steps_per_entry": result.trace.steps_per_entry,
        "judged_from_step": result.judged.start,
        "ranks": settings.num_ranks,
        "nodes": settings.num_nodes,
        "redundant": settings.num_redundant,
        "window": settings.window,
        "refresh": settings.refresh,
        "budget": settings.budget,
        "tokens_per_activation": settings.tokens_per_activation,
        "dispatch": f"{settings.dispatch.kind}:{settings.dispatch.width}",
    }


def policy_figures(result: ReplayResult, run: PolicyRun) -> dict[str, Any]:
    """One policy's figures; times in ms, `moves_per_layer` the mean per plan."""
    judged = run.imbalance[result.judged]
    moves = sum(run.moves)
    plans = max(1, len(run.plan_ms))
    return {
        "name": run.name,
        "imbalance_live": float(judged.mean()),
        "imbalance_live_p95": float(np.quantile(judged.mean(1), 0.95)),
        "imbalance_worst_layer": float(judged.mean(0).max()),
        "time_live": time_of(result, run),
        "imbalance_bound": mean_imbalance(result, run.bound) if result.settings.bound else None,
        "moves_per_layer": moves / plans / result.trace.shape[1],
        "dispatch_updates": run.dispatch_updates,
        "plan_ms_p50": _quantile(run.plan_ms, 0.5),
        "plan_ms_p99": _quantile(run.plan_ms, 0.99),
        "refresh_ms_p50": _quantile(run.refresh_ms, 0.5),
        "bytes_moved": int(moves * result.settings.expert_bytes),
    }


def mean_imbalance(result: ReplayResult, per_step: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """The mean of `[steps, layers]` over layers and the judged steps."""
    return float(per_step[result.judged].mean())


def time_of(result: ReplayResult, run: PolicyRun) -> float:
    """The slowest ranks' time over that in contiguous blocks, all layers and judged steps together."""
    without = float(result.unbalanced.time[result.judged].sum())
    return float(run.time[result.judged].sum()) / without if without > 0 else 1.0


def _quantile(values: list[float], fraction: float) -> float | None:
    return float(np.quantile(values, fraction)) if values else None
