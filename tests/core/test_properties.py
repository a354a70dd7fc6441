"""What holds of every topology, placement, table, plan and load, not only of the examples we thought of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swiftbalancer.dispatch import check_table, column_of, column_order, log2phy, slot_fractions, uniform_table
from swiftbalancer.errors import InvalidLoad, InvalidPlan, TopologyError
from swiftbalancer.load import balancedness, checked_load, expert_loads, imbalance, rank_loads
from swiftbalancer.placement import Placement
from swiftbalancer.plan import Plan
from swiftbalancer.topology import LARGEST, Topology
from tests.core.strategies import placements, plans, topologies

pytestmark = pytest.mark.timeout(120)
numbers = st.integers(-3, 12)


@given(numbers, numbers, numbers, st.lists(numbers, max_size=3))
def test_a_topology_is_consistent_or_refused(ranks: int, slots: int, nodes: int, excluded: list[int]) -> None:
    try:
        topology = Topology(ranks, slots, nodes, excluded_ranks=tuple(excluded))
    except TopologyError:
        return
    assert topology.slot_ranks().tolist() == [topology.rank_of(s) for s in range(topology.num_slots)]
    assert topology.ranks_per_node * topology.num_nodes == ranks
    assert {topology.node_of(r) for r in range(ranks)} == set(range(nodes))
    assert (topology.speeds() == 0).sum() == len(set(excluded)) < ranks


@given(st.integers(-1, 20), st.integers(-1, 20), st.integers(-1, 9))
def test_experts_divide_over_ranks_or_the_error_says_what_would(experts: int, redundant: int, ranks: int) -> None:
    try:
        topology = Topology.for_experts(experts, num_redundant=redundant, num_ranks=ranks)
    except TopologyError as error:
        if experts >= 1 and redundant >= 0 and ranks >= 1:
            fitting = int(str(error).rsplit("; ", 1)[1].split()[0])
            assert fitting > redundant
            Topology.for_experts(experts, num_redundant=fitting, num_ranks=ranks)
        return
    assert topology.num_slots == experts + redundant


@pytest.mark.parametrize("sizes", [(LARGEST + 1, 1, 1), (1, LARGEST + 1, 1), (2**11, 2**11, 1), (2**62, 1, 2**62)])
def test_a_topology_beyond_all_machines_is_refused_before_it_allocates(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(TopologyError, match="at most"):
        Topology(*sizes)


@pytest.mark.parametrize("speed", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_impossible_speed_is_refused_wherever_it_stands(speed: float) -> None:
    for speeds in ((speed, 1.0), (1.0, speed)):
        with pytest.raises(TopologyError, match="rank_speed"):
            Topology(2, 1, rank_speed=speeds)


@given(placements())
def test_the_maps_of_a_placement_say_the_same(placement: Placement) -> None:
    slots_of = placement.logical_to_physical_map()
    count = placement.logical_replica_count()
    assert (count.sum(1) == placement.topology.num_slots).all() and (count >= 1).all()
    for layer in range(placement.num_layers):
        for expert in range(placement.num_experts):
            slots = slots_of[layer, expert][slots_of[layer, expert] >= 0]
            expected = np.nonzero(placement.physical_to_logical_map[layer] == expert)[0]
            assert slots.tolist() == expected.tolist() and len(slots) == count[layer, expert]


@given(placements(), st.data())
def test_any_single_wrong_entry_is_found_or_leaves_a_valid_placement(
    placement: Placement, data: st.DataObject
) -> None:
    table = placement.physical_to_logical_map.copy()
    layer = data.draw(st.integers(0, table.shape[0] - 1))
    slot = data.draw(st.integers(0, table.shape[1] - 1))
    table[layer, slot] = data.draw(st.integers(-2, placement.num_experts + 1))
    per_rank = table.reshape(table.shape[0], placement.topology.num_ranks, -1)
    valid = all(set(row) == set(range(placement.num_experts)) for row in table.tolist()) and all(
        len(set(r)) == len(r) for ranks in per_rank.tolist() for r in ranks
    )
    try:
        changed = Placement.of(placement.topology, placement.num_experts, table)
    except InvalidPlan:
        assert not valid
        return
    assert valid
    assert (changed.digest() == placement.digest()) == np.array_equal(table, placement.physical_to_logical_map)


@given(topologies(), st.integers(1, 12), st.integers(0, 3))
def test_the_initial_placement_serves_every_expert(topology: Topology, experts: int, layers: int) -> None:
    if experts > topology.num_slots:
        with pytest.raises(InvalidPlan):
            Placement.initial(topology, experts, num_layers=layers)
        return
    start = Placement.initial(topology, experts, num_layers=layers)
    start.validate(allow_same_rank_replicas=True)
    assert start.digest() == Placement.initial(topology, experts, num_layers=layers).digest()


@given(placements(), st.integers(1, 24))
def test_a_uniform_table_is_valid_and_as_even_as_its_width_allows(placement: Placement, width: int) -> None:
    table = uniform_table(placement, width)
    check_table(table, placement)
    columns = slot_fractions(table, placement) * width
    of_expert = np.maximum(placement.logical_replica_count(), 1)
    share = width / np.take_along_axis(of_expert, placement.physical_to_logical_map.astype(np.int64), 1)
    assert (np.abs(columns - share) < 1).all()
    assert np.allclose(columns.sum(1), width * placement.num_experts)


@given(placements(), st.integers(1, 8), st.data())
def test_a_table_entry_that_names_a_foreign_slot_is_refused(
    placement: Placement, width: int, data: st.DataObject
) -> None:
    table = uniform_table(placement, width)
    where = tuple(data.draw(st.integers(0, n - 1)) for n in table.shape)
    table[where] = data.draw(st.integers(-2, placement.topology.num_slots + 1))
    slot, expert = int(table[where]), where[1]
    own = 0 <= slot < placement.topology.num_slots and placement.physical_to_logical_map[where[0], slot] == expert
    if own:
        check_table(table, placement)
        return
    with pytest.raises(InvalidPlan):
        check_table(table, placement)


@given(st.integers(1, 300))
def test_columns_are_reached_in_the_order_the_hash_reaches_them(width: int) -> None:
    order = column_order(width)
    assert sorted(order.tolist()) == list(range(width))
    seen = list(dict.fromkeys(column_of(np.arange(64 * width), width).tolist()))
    assert order.tolist()[: len(seen)] == seen


@given(placements(), st.integers(1, 6), st.integers(0, 20))
def test_a_static_map_sends_each_expert_to_one_of_its_slots(placement: Placement, width: int, rank: int) -> None:
    column = log2phy(uniform_table(placement, width), rank)
    held = np.take_along_axis(placement.physical_to_logical_map, column.astype(np.int64), 1)
    assert (held == np.arange(placement.num_experts)).all()


@given(plans())
def test_a_valid_plan_passes_and_its_batches_add_up(case: tuple[Placement, Plan]) -> None:
    base, plan = case
    plan.validate(base)
    target = plan.target(base)
    covered = np.concatenate([plan.batch_layers(b) for b in range(plan.num_batches)])
    assert sorted(covered.tolist()) == list(range(base.num_layers))
    state = base.physical_to_logical_map.copy()
    for batch in range(plan.num_batches):
        before = state.copy()
        for layer, expert, source, to in plan.batch_moves(batch):
            assert before[layer, source] == expert, "a source is read as it was before the batch"
            state[layer, to] = expert
    assert np.array_equal(state, target.physical_to_logical_map)


@given(plans(), st.data())
def test_a_plan_with_any_number_changed_is_refused_or_still_right(
    case: tuple[Placement, Plan], data: st.DataObject
) -> None:
    base, plan = case
    name = data.draw(st.sampled_from(["layers", "rows", "moves", "layer_batch", "move_batch", "table"]))
    array = getattr(plan, name).copy()
    if not array.size:
        return
    extreme = st.sampled_from([-(2**31), -1, 0, 1, 2**31 - 1])
    array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(st.one_of(extreme, st.integers(-2, 30)))
    changed = _with(plan, name, array)
    try:
        changed.validate(base, staging_experts=64)
    except InvalidPlan:
        return
    changed.target(base).validate()
    check_table(changed.table, changed.target(base))
    state = base.physical_to_logical_map.copy()
    for layer, expert, source, to in changed.moves:
        assert base.physical_to_logical_map[layer, source] == expert
        state[layer, to] = expert
    assert np.array_equal(state, changed.target(base).physical_to_logical_map)
    assert changed.num_batches <= max(len(changed.layers), 1)


@given(plans(), st.data())
def test_a_plan_with_foreign_shapes_is_refused(case: tuple[Placement, Plan], data: st.DataObject) -> None:
    base, plan = case
    name = data.draw(st.sampled_from(["layers", "rows", "moves", "layer_batch", "move_batch", "table"]))
    array = getattr(plan, name)
    grown = np.concatenate([array, np.zeros((1, *array.shape[1:]), np.int32)])
    with pytest.raises(InvalidPlan):
        _with(plan, name, grown).validate(base)


@given(plans(), plans())
def test_a_plan_for_another_placement_is_refused(case: tuple[Placement, Plan], other: tuple[Placement, Plan]) -> None:
    base, plan = other[0], case[1]
    if base.digest() == case[0].digest():
        plan.validate(base)
        return
    with pytest.raises(InvalidPlan, match="another placement"):
        plan.validate(base)


def test_a_plan_cannot_ask_for_two_billion_empty_batches() -> None:
    base = Placement.of(Topology(2, 2), 3, [[0, 1, 2, 0], [0, 1, 2, 0]])
    rows = np.asarray([[1, 0, 2, 0]] * 2, np.int32)
    moves = np.asarray([[n, e, s, t] for n in (0, 1) for e, s, t in ((1, 1, 0), (0, 0, 1))], np.int32)
    batch = np.asarray([0, 2**31 - 1], np.int32)
    plan = Plan(
        kind="placement",
        base_epoch=0,
        base_digest=base.digest(),
        layers=np.arange(2, dtype=np.int32),
        rows=rows,
        moves=moves,
        layer_batch=batch,
        move_batch=np.repeat(batch, 2),
        table=uniform_table(base.with_layers([0, 1], rows), 2),
    )
    with pytest.raises(InvalidPlan, match="2147483648 batches for 2 layers"):
        plan.validate(base, staging_experts=2)
    one_by_one = replace(plan, layer_batch=np.arange(2, dtype=np.int32), move_batch=np.repeat(np.arange(2), 2))
    one_by_one.validate(base, staging_experts=2)
    with pytest.raises(InvalidPlan, match="staging holds 1"):
        one_by_one.validate(base, staging_experts=1)


@given(placements(), st.data())
def test_loads_keep_every_token(placement: Placement, data: st.DataObject) -> None:
    shape = (2, placement.num_layers, placement.topology.num_slots)
    seed = data.draw(st.integers(0, 2**32 - 1))
    slots = np.random.default_rng(seed).integers(0, 1000, shape)
    experts, ranks = expert_loads(slots, placement), rank_loads(slots, placement)
    assert np.array_equal(experts.sum(-1), slots.sum(-1)) and np.array_equal(ranks.sum(-1), slots.sum(-1))
    for expert in range(placement.num_experts):
        holds = placement.physical_to_logical_map == expert
        assert np.array_equal(experts[..., expert], (slots * holds).sum(-1))


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=8))
def test_imbalance_is_at_least_one_and_the_inverse_of_balancedness(loads: list[float]) -> None:
    ratio = float(imbalance(loads))
    assert 1 - 1e-12 <= ratio <= len(loads) * (1 + 1e-12)
    assert float(balancedness(loads)) == pytest.approx(1 / ratio)
    assert float(imbalance([2.0] * len(loads))) == 1.0


@given(st.lists(st.one_of(st.floats(), st.integers(-5, 5)), max_size=6))
def test_a_load_is_numbers_from_zero_up_or_refused(values: list[float]) -> None:
    good = all(v >= 0 and np.isfinite(v) for v in values)
    try:
        checked = checked_load(np.asarray(values, np.float64))
    except InvalidLoad:
        assert not good
        return
    assert good and checked.tolist() == [float(v) for v in values]


def _with(plan: Plan, name: str, array: Any) -> Plan:
    return replace(plan, **{name: array})
