"""A plan that was broadcast: what each rank makes sure of, what one checks for all, and what its batches leave."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given

from swiftbalancer import sealed
from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import DispatchForm, uniform_table
from swiftbalancer.errors import InvalidPlan
from swiftbalancer.incoming import IncomingPlan, InForce, Preparer, check_block, prepare_batch
from swiftbalancer.placement import Placement
from swiftbalancer.plan import Plan
from tests.core.strategies import plan_reply, plans

Case = tuple[Placement, Plan]


def received(base: Placement, plan: Plan, *, whole: bool) -> IncomingPlan:
    in_force = InForce(epoch=0, placement=base, table=uniform_table(base, max(plan.table.shape[2], 1)))
    block = sealed.pack(plan_reply(plan))
    return check_block(block, cycle=7, in_force=in_force, staging_experts=64, whole=whole)


@given(plans())
def test_who_checks_and_who_does_not_have_the_same(case: Case) -> None:
    checked, taken = (received(*case, whole=whole) for whole in (True, False))
    assert (checked.digest, checked.plan.num_batches) == (taken.digest, taken.plan.num_batches)
    assert all(np.array_equal(a, b) for a, b in zip(checked.moves, taken.moves, strict=True))


@given(plans())
def test_a_plan_that_misroutes_is_refused_by_who_checks(case: Case) -> None:
    base, plan = case
    assume(base.num_experts > 1)
    table = plan.table.copy()
    table[0, 0] = np.flatnonzero(plan.target(base).physical_to_logical_map[0] != 0)[0]
    with pytest.raises(InvalidPlan, match="expert 0 names slot"):
        received(base, replace(plan, table=table), whole=True)
    received(base, replace(plan, table=table), whole=False)


@given(plans())
def test_every_rank_refuses_what_is_not_for_it_or_would_keep_it_busy(case: Case) -> None:
    base, plan = case
    with pytest.raises(InvalidPlan, match="another placement"):
        received(base, replace(plan, base_digest=plan.base_digest ^ 1), whole=False)
    with pytest.raises(InvalidPlan, match="for epoch 1"):
        received(base, replace(plan, base_epoch=1), whole=False)
    with pytest.raises(InvalidPlan, match="dispatch table of shape"):
        received(base, replace(plan, table=plan.table[:, :, :0]), whole=False)
    if plan.layers.size:
        batches = np.full_like(plan.layer_batch, 2**31 - 1)
        with pytest.raises(InvalidPlan, match="2147483648 batches"):
            received(base, replace(plan, layer_batch=batches), whole=False)


class Sink:
    """Keeps the updates it is given."""

    launches = None

    def __init__(self) -> None:
        self.updates: list[MapUpdate] = []

    def prepare(self, update: MapUpdate) -> None:
        self.updates.append(update)


@given(plans())
def test_each_batch_changes_its_layers_and_the_last_leaves_the_plan(case: Case) -> None:
    base, plan = case
    sink, forgotten = Sink(), list[list[int]]()
    width = plan.table.shape[2]
    binding: Any = SimpleNamespace(maps=sink, dispatch=DispatchForm("table", width), per_rank_dispatch=False)
    recorder: Any = SimpleNamespace(prepare_to_forget=lambda layers: forgotten.append(layers.tolist()))
    by = Preparer(0, binding, DeviceLayer.for_device("cpu"), recorder)
    incoming = received(base, plan, whole=True)
    before = InForce(epoch=0, placement=base, table=uniform_table(base, width))
    for batch in range(plan.num_batches):
        after = prepare_batch(incoming, batch, base=before, by=by).after
        update, own = sink.updates[-1], plan.batch_layers(batch)
        others = np.setdiff1d(np.arange(base.num_layers), own)
        assert update.layers.tolist() == own.tolist()
        assert np.array_equal(update.table, plan.table[own])
        assert np.array_equal(update.physical_to_logical_map, after.placement.physical_to_logical_map[own])
        assert np.array_equal(after.table[own], plan.table[own])
        assert np.array_equal(after.table[others], before.table[others])
        assert forgotten[-1] == plan.layers[plan.layer_batch == batch].tolist()
        assert after.epoch == before.epoch + 1
        before = after
    assert np.array_equal(before.placement.physical_to_logical_map, plan.target(base).physical_to_logical_map)
    assert np.array_equal(before.table, plan.table)


@given(plans())
def test_batches_that_move_nothing_are_refused(case: Case) -> None:
    """Where nothing moves, the whole plan is one commit of maps."""
    base, _ = case
    assume(base.num_layers > 1)
    layers = np.arange(base.num_layers, dtype=np.int32)
    still = Plan(
        kind="placement",
        base_epoch=0,
        base_digest=base.digest(),
        layers=layers,
        rows=base.physical_to_logical_map,
        layer_batch=layers,
        moves=np.empty((0, 4), np.int32),
        move_batch=np.empty(0, np.int32),
        table=uniform_table(base, 8),
    )
    with pytest.raises(InvalidPlan, match="batches and moves nothing"):
        received(base, still, whole=True)
