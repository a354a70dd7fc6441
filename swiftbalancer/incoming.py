"""The plan of the cycle in flight on one rank: received, checked, and made ready batch by batch.

Everything here runs on the bulk lane, off the forward path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer import sealed, wire
from swiftbalancer.border import MapUpdate, ModelBinding
from swiftbalancer.cycle import LEADER
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import column_order, nothing
from swiftbalancer.errors import InvalidPlan, WireError
from swiftbalancer.groups import Group
from swiftbalancer.placement import Placement
from swiftbalancer.plan import Plan
from swiftbalancer.recorder import LoadRecorder

Block = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class InForce:
    """What the forward passes use: the placement, the unrotated dispatch table, and their epoch."""

    epoch: int
    placement: Placement
    table: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class ReadyBatch:
    """Maps of one batch, on the device, and what is in force once they are committed; `num_moves` experts change
    slots."""

    after: InForce
    maps: Any
    num_moves: int


@dataclass(slots=True, eq=False)
class IncomingPlan:
    """A checked plan and the batches made ready so far."""

    cycle: int
    plan: Plan
    header: wire.PlanReply
    digest: int
    moves: tuple[NDArray[np.int32], ...]
    """`[k, 4]` of each batch; see `Plan.moves`."""
    batches: dict[int, ReadyBatch] = field(default_factory=dict)


def receive_block(group: Group, *, num_bytes: int, block: Block | None, deadline_s: float) -> Block:
    """The leader's block of bytes on every rank; the leader passes `block`. Blocks the lane until it is there."""
    if block is None:
        block = np.empty(num_bytes, np.uint8)
    group.wait(group.broadcast(torch.from_numpy(block), LEADER), deadline_s)
    return block


def check_block(
    block: Block,
    *,
    cycle: int,
    in_force: InForce,
    staging_experts: int,
    whole: bool = True,
    rest: Callable[[], None] = nothing,
) -> IncomingPlan:
    """The plan in a broadcast block; raises `WireError` if damaged, `InvalidPlan` if not for this placement.

    Where all ranks have the same block, as their votes tell, and the same placement, which each makes sure of, it is
    enough that one of them checks the `whole` plan.
    """
    frames = sealed.unpack(block)
    rest()
    message, arrays = wire.decode(frames)
    if not isinstance(message, wire.PlanReply):
        raise WireError(f"expected a plan, got {type(message).__name__}")
    plan = wire.plan_of(message, arrays)
    if plan.base_epoch != in_force.epoch:
        raise InvalidPlan(f"the plan is for epoch {plan.base_epoch}, in force is {in_force.epoch}")
    if plan.table.shape != in_force.table.shape:
        raise InvalidPlan(f"dispatch table of shape {plan.table.shape}; the engine's is {in_force.table.shape}")
    rest()
    if whole:
        plan.validate(in_force.placement, staging_experts=staging_experts, between=rest)
    else:
        plan.check_base(in_force.placement)
    rest()
    moves = tuple(plan.batch_moves(batch) for batch in range(plan.num_batches))
    return IncomingPlan(cycle=cycle, plan=plan, header=message, digest=sealed.seal(block), moves=moves)


@dataclass(frozen=True, slots=True, eq=False)
class Preparer:
    """What batches of one rank are prepared with."""

    rank: int
    binding: ModelBinding
    layer: DeviceLayer
    recorder: LoadRecorder
    rest: Callable[[], None] = nothing


def prepare_batch(incoming: IncomingPlan, batch: int, *, base: InForce, by: Preparer) -> ReadyBatch:
    """Hands the batch's maps to the engine's sink, on the current (side) stream.

    `base` is in force when the batch will be committed.
    """
    plan = incoming.plan
    layers = plan.batch_layers(batch)
    own = plan.layer_batch == batch
    moved = plan.layers[own]
    placement = base.placement.with_layers(moved, plan.rows[own])
    by.rest()
    rows = table = plan.table
    if plan.layers.size:
        rows = table[layers]
    if len(layers) < len(table):
        table = base.table.copy()
        table[layers] = rows
    by.rest()
    by.recorder.prepare_to_forget(moved)
    by.rest()
    if by.binding.per_rank_dispatch and by.binding.dispatch.kind == "table":
        rows = rotated(rows, by.rank, placement.topology.num_ranks)
    update = MapUpdate(
        layers=layers,
        physical_to_logical_map=placement.physical_to_logical_map[layers],
        table=rows,
        batch=batch,
    )
    maps = by.binding.maps.prepare(update)
    after = InForce(epoch=base.epoch + 1, placement=placement, table=table)
    return ReadyBatch(after=after, maps=maps, num_moves=len(incoming.moves[batch]))


def rotated(table: NDArray[np.int32], rank: int, num_ranks: int) -> NDArray[np.int32]:
    """The table with its columns turned by the rank's share of a full turn, in the order tokens reach them.

    Small batches reach only the first columns; without this every rank would send them to the same replicas.
    """
    width = table.shape[2]
    order = column_order(width)
    columns = np.empty_like(order)
    columns[order] = np.roll(order, -(rank * width // num_ranks))
    return np.take(table, columns, axis=2)
