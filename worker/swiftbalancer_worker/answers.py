"""From a plan request to its answer, without sockets: what the planner gets and what the engine is told."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.config import Config
from swiftbalancer.dispatch import DispatchForm, check_table, uniform_table
from swiftbalancer.errors import ConfigError, WireError
from swiftbalancer.load import checked_load
from swiftbalancer.placement import Placement
from swiftbalancer.wire import (
    MAX_SUB_WINDOWS,
    Arrays,
    Hello,
    NothingToDo,
    PlanReply,
    PlanRequest,
    encode,
    plan_arrays,
    specs,
)
from swiftbalancer_worker.cost import CostModel
from swiftbalancer_worker.forecast import forecast
from swiftbalancer_worker.inputs import PlanInput, PlanLimits
from swiftbalancer_worker.planner import Planner, PlanResult
from swiftbalancer_worker.solver import Dispatch, slowest_over_ideal

Number = TypeVar("Number", np.int32, np.float32)
MAX_CELLS = 1 << 28
"""Bound of layers x ranks x experts, and of layers x experts x columns; DeepSeek-V3 on 320 ranks has 5 million."""


def check_size(hello: Hello) -> None:
    """Raises `ConfigError` if planning for this engine would need absurd amounts of memory."""
    model, topology = hello.model, hello.topology
    cells = model.num_layers * topology.num_ranks * model.num_experts
    if cells > MAX_CELLS or model.num_layers * topology.num_slots > MAX_CELLS:
        raise ConfigError(
            f"{model.num_layers} layers x {topology.num_ranks} ranks x {model.num_experts} experts, "
            f"{topology.num_slots} slots: beyond the bound of {MAX_CELLS} cells"
        )


def plan_input(hello: Hello, config: Config, request: PlanRequest, arrays: Arrays) -> PlanInput:
    """What the planner needs; raises `WireError`, `InvalidPlan` or `InvalidLoad` if the request makes no sense."""
    model = hello.model
    width = request.dispatch_width
    if model.num_layers * model.num_experts * width > MAX_CELLS:
        raise WireError(f"dispatch_width {width} is too large for {model.num_layers} x {model.num_experts} experts")
    placement = _placement(hello, _array(arrays, "placement", np.int32))
    loads = _array(arrays, "loads", np.float32)
    if loads.ndim != 3 or not 1 <= loads.shape[0] <= MAX_SUB_WINDOWS:
        raise WireError(f"loads have shape {loads.shape}, expected [1..{MAX_SUB_WINDOWS}, layers, experts]")
    for name, numbers in (("epochs", request.window_epochs), ("steps", request.window_steps)):
        if numbers and len(numbers) != len(loads):
            raise WireError(f"{len(numbers)} {name} for {len(loads)} sub-windows")
    checked_load(loads, name="loads")  # those before the last ones are only recorded
    loads = loads[-config.window.sub_windows :]
    table = _array(arrays, "table", np.int32) if "table" in arrays else None
    if table is not None:
        check_table(table, placement)
    return PlanInput(
        placement=placement,
        loads=loads.astype(np.float64),
        dispatch=DispatchForm(request.dispatch_kind, width),  # type: ignore[arg-type]  # it checks the name itself
        epoch=request.epoch,
        limits=_limits(config, request),
        cost=_cost(hello, config, request, loads),
        table=table,
        seed=config.seed,
    )


def answer(planner: Planner, request: PlanRequest, given: PlanInput) -> list[bytes]:
    """The frames of a `PlanReply`, or of `NothingToDo` where the plan would change nothing."""
    result = planner.plan(given) if request.kind == "placement" else planner.refresh(given)
    before, after = imbalance_if_nothing_changes(given), float(result.imbalance_after.mean())
    seconds = result.plan_ms / 1e3
    if _changes_nothing(result, given):
        reason = result.reason[:4096] or "the tables in force are the best ones"
        return encode(NothingToDo(request.request, reason, before, after, seconds))
    arrays = plan_arrays(result.plan)
    reply = PlanReply(
        request=request.request,
        kind=result.plan.kind,
        base_epoch=result.plan.base_epoch,
        base_digest=result.plan.base_digest,
        imbalance_now=before,
        imbalance_predicted=after,
        plan_seconds=seconds,
        cross_node_bytes=int(result.cross_node_bytes),
        arrays=specs(arrays),
    )
    return encode(reply, arrays)


def acknowledge(request: PlanRequest, given: PlanInput) -> list[bytes]:
    """The frames that answer a request for no plan; `given` shows that it makes sense and may be recorded."""
    uneven = imbalance_if_nothing_changes(given)
    return encode(NothingToDo(request.request, "no plan was asked for", uneven, uneven, 0.0))


def imbalance_if_nothing_changes(given: PlanInput) -> float:
    """Predicted for the coming loads with placement and table in force, mean over layers.

    Planners compare placements by the best dispatch of each; engines want to know what all of a plan changes.
    """
    table = given.table if given.table is not None else uniform_table(given.placement, given.dispatch.width)
    ranks = Dispatch.of_table(given.placement, table).rank_loads(forecast(given.loads, scenarios=False).expected)
    return float(slowest_over_ideal(given.placement, ranks).mean())


def _changes_nothing(result: PlanResult, given: PlanInput) -> bool:
    return (
        result.plan.kind == "dispatch" and given.table is not None and np.array_equal(result.plan.table, given.table)
    )


def _placement(hello: Hello, table: NDArray[np.int32]) -> Placement:
    """The placement in force. An engine may start with an expert twice on a rank, so that is allowed here."""
    if table.ndim != 2 or table.shape[0] != hello.model.num_layers:
        raise WireError(f"placement has shape {table.shape}, expected [{hello.model.num_layers}, slots]")
    placement = Placement(hello.topology, hello.model.num_experts, table)
    placement.validate(allow_same_rank_replicas=True)
    return placement


def _limits(config: Config, request: PlanRequest) -> PlanLimits:
    return PlanLimits(
        max_moves_per_layer=config.policy.max_moves_per_layer,
        staging_experts=request.staging_experts,
        target_imbalance=config.policy.target_imbalance,
        min_refresh_gain=config.policy.min_refresh_gain,
        pay_back=config.policy.min_gain,
    )


def _cost(hello: Hello, config: Config, request: PlanRequest, loads: NDArray[np.float32]) -> CostModel:
    """The default costs with what the engine has measured in their place.

    The whole step is put down to the MoE layers; attention is not known here, so the gain is an upper bound.
    """
    model, measured = hello.model, request.measured
    default = CostModel(
        tokens_per_activation=config.policy.tokens_per_activation,
        steps_per_sub_window=float(request.steps_per_sub_window),
    )
    rank_steps = len(loads) * default.steps_per_sub_window * hello.topology.num_ranks
    work = float(default.worth(loads.astype(np.float64)).sum()) / rank_steps
    measurable = measured.seconds_per_step > 0 and work > 0
    rate = measured.transfer_bytes_per_s
    return replace(
        default,
        seconds_per_token=measured.seconds_per_step / work if measurable else default.seconds_per_token,
        expert_bytes=float(max(1, model.expert_bytes)),
        bytes_per_s=rate if rate > 0 else default.bytes_per_s,
        remote_bytes_per_s=min(rate, default.remote_bytes_per_s) if rate > 0 else default.remote_bytes_per_s,
        inflation=measured.step_inflation if measured.step_inflation > 0 else default.inflation,
        windows_until_replan=max(1, config.window.replan_sub_windows) / len(loads),
    )


def _array(arrays: Arrays, name: str, dtype: type[Number]) -> NDArray[Number]:
    array = arrays.get(name)
    if array is None or array.dtype != dtype:
        raise WireError(f"array {name!r} is missing or not {np.dtype(dtype)}")
    return array
