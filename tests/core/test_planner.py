"""What every plan must be, whatever the policy, the loads and the topology."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from swiftbalancer.dispatch import DispatchForm, slot_fractions
from swiftbalancer.errors import ConfigError, InvalidLoad, UnknownPolicy
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker.cost import CostModel
from swiftbalancer_worker.planner import PlanInput, PlanLimits, Planner, PlanResult
from swiftbalancer_worker.policies import known_policies
from swiftbalancer_worker.solver import slowest_over_ideal, solve

ROOT = Path(__file__).parents[2]
TRACES = Path(os.environ.get("SWIFTBALANCER_TRACES", ROOT.parent / "shared" / "traces"))
POLICIES = ["swift", "greedy", "random", "none"]
TABLE = DispatchForm("table", 16)


def skewed_loads(
    seed: int, *, windows: int = 8, layers: int = 3, experts: int = 32, drift: float = 0.2
) -> NDArray[np.float64]:
    """`[windows, layers, experts]` Poisson counts of lognormal rates that walk."""
    rng = np.random.default_rng(seed)
    log_rate = rng.normal(0, 1, (layers, experts)) + np.cumsum(rng.normal(0, drift, (windows, layers, experts)), 0)
    return rng.poisson(2000 * np.exp(log_rate)).astype(np.float64)


def first_placement(topology: Topology, experts: int, *, layers: int = 3) -> Placement:
    return Placement.initial(topology, experts, num_layers=layers)


def plan_of(
    placement: Placement, loads: NDArray[np.float64], *, policy: str = "swift", reads: float = 0.0, **limits: object
) -> PlanResult:
    """A plan, validated as the engine will; `reads`: tokens per activation."""
    bounds, cost = PlanLimits(**limits), CostModel(tokens_per_activation=reads)  # type: ignore[arg-type]
    result = Planner(policy).plan(PlanInput(placement, loads, TABLE, epoch=4, limits=bounds, cost=cost, seed=7))
    result.plan.validate(placement, staging_experts=bounds.staging_experts)
    assert result.plan.base_epoch == 4
    assert result.num_moves == len(result.plan.moves)
    return result


@settings(max_examples=80)
@given(
    seed=st.integers(0, 100_000),
    ranks=st.integers(1, 8),
    slots=st.integers(1, 6),
    spare=st.integers(0, 12),
    policy=st.sampled_from(POLICIES),
    budget=st.sampled_from([None, 0, 1, 3, 8]),
    staging=st.integers(1, 6),
    gated=st.booleans(),
    flaw=st.sampled_from(["", "zero", "one takes all", "one sub-window", "dead rank", "slow rank"]),
    kind=st.sampled_from(["table", "static", "uniform", "exact"]),
    reads=st.sampled_from([0.0, 0.0, 50.0, 1e5]),
)
def test_every_plan_is_valid_keeps_its_budget_and_repeats(  # noqa: PLR0913
    seed: int,
    ranks: int,
    slots: int,
    spare: int,
    policy: str,
    budget: int | None,
    staging: int,
    gated: bool,
    flaw: str,
    kind: str,
    reads: float,
) -> None:
    experts = max(1, ranks * slots - spare)
    dead = (ranks - 1,) if flaw == "dead rank" and ranks > 1 and experts <= (ranks - 1) * slots else ()
    speed = tuple([0.5] + [1.0] * (ranks - 1)) if flaw == "slow rank" else ()
    topology = Topology(ranks, slots, rank_speed=speed, excluded_ranks=dead)
    placement = first_placement(topology, experts, layers=2)
    loads = skewed_loads(seed, layers=2, experts=experts)
    if flaw == "zero":
        loads[:] = 0
    elif flaw == "one takes all":
        loads[:, :, 1:] = 0
    elif flaw == "one sub-window":
        loads = loads[:1]
    limits = PlanLimits(max_moves_per_layer=budget, staging_experts=staging, gated=gated)
    form, cost = DispatchForm(kind, 8), CostModel(tokens_per_activation=reads)  # type: ignore[arg-type]
    ask = PlanInput(placement, loads, form, epoch=1, limits=limits, cost=cost, seed=seed)
    if dead and (placement.replicas_on_ranks()[:, :-1].sum(1) == 0).any() and (policy == "none" or staging < slots):
        return  # nobody may serve what only the dead rank holds
    result = Planner(policy).plan(ask)
    result.plan.validate(placement, staging_experts=staging)
    again = Planner(policy).plan(ask)
    assert np.array_equal(result.plan.table, again.plan.table)
    assert np.array_equal(result.plan.moves, again.plan.moves)
    assert np.array_equal(result.plan.rows, again.plan.rows)
    if policy == "swift" and budget is not None and not dead:
        assert np.bincount(result.plan.moves[:, 0], minlength=2).max(initial=0) <= max(budget, _repeats(placement))


def _repeats(placement: Placement) -> int:
    """Slots of a layer that repeat an expert of their rank and must change first."""
    return int(np.maximum(placement.replicas_on_ranks() - 1, 0).sum((1, 2)).max())


def test_swift_balances_within_its_budget_step_by_step() -> None:
    placement = first_placement(Topology(8, 5), 32)
    loads = skewed_loads(1, drift=0.0)
    seen = []
    for _ in range(6):
        result = plan_of(placement, loads, max_moves_per_layer=4, staging_experts=2)
        seen.append(float(result.imbalance_before.mean()))
        placement = result.plan.target(placement)
    assert seen[-1] < 1.05 < seen[0] - 0.2
    assert result.num_moves == 0


def test_moves_come_from_the_same_node_where_it_holds_the_expert() -> None:
    placement = first_placement(Topology(8, 5, num_nodes=2), 32)
    result = plan_of(placement, skewed_loads(2), max_moves_per_layer=None, staging_experts=5)
    on_node = placement.replicas_on_ranks().reshape(3, 2, 4, 32).sum(2) > 0
    for layer, expert, source, target in result.plan.moves.tolist():
        node = target // 20
        assert source // 20 == node or not on_node[layer, node, expert]
    crossing = (result.plan.moves[:, 2] // 20 != result.plan.moves[:, 3] // 20).sum()
    assert result.cross_node_bytes == crossing * CostModel().expert_bytes > 0


def test_no_rank_uses_a_shared_link_twice_in_a_batch_unless_one_layer_needs_it() -> None:
    placement = first_placement(Topology(8, 5, num_nodes=4), 32, layers=12)
    result = plan_of(placement, skewed_loads(2, layers=12), max_moves_per_layer=2, staging_experts=4)
    plan = result.plan
    node = plan.moves[:, 2:] // 10
    for batch in range(plan.num_batches):
        crossing = (plan.move_batch == batch) & (node[:, 0] != node[:, 1])
        for side in (2, 3):
            uses = np.bincount(plan.moves[crossing, side] // 5, minlength=8)
            layers = len(np.unique(plan.moves[plan.move_batch == batch, 0]))
            assert uses.max(initial=0) <= 1 or layers == 1


def test_swift_alone_uses_no_link_between_nodes_twice_in_a_batch() -> None:
    crossing_in_all = 0
    for seed in range(8):
        placement = first_placement(Topology(8, 5, num_nodes=4), 32, layers=6)
        plan = plan_of(placement, skewed_loads(seed, layers=6), max_moves_per_layer=8, staging_experts=4).plan
        node = plan.moves[:, 2:] // 10
        for batch in range(plan.num_batches):
            crossing = (plan.move_batch == batch) & (node[:, 0] != node[:, 1])
            crossing_in_all += crossing.sum()
            for side in (2, 3):
                assert np.bincount(plan.moves[crossing, side] // 5, minlength=8).max(initial=0) <= 1
    assert crossing_in_all > 0


def test_dear_links_between_nodes_are_used_less() -> None:
    crossing = []
    for remote in (100e9, 5e9):
        bytes_over = 0.0
        for seed in range(4):
            placement = first_placement(Topology(8, 5, num_nodes=2), 32)
            cost = CostModel(bytes_per_s=100e9, remote_bytes_per_s=remote, inflation=0.0)
            given = PlanInput(placement, skewed_loads(seed), TABLE, epoch=0, cost=cost)
            bytes_over += Planner().plan(given).cross_node_bytes
        crossing.append(bytes_over)
    assert crossing[1] < crossing[0]


@pytest.mark.parametrize("budget", [None, 6])
def test_swift_keeps_expert_groups_on_their_nodes(budget: int | None) -> None:
    placement = first_placement(Topology(8, 5, num_nodes=2), 32)
    loads = skewed_loads(3)
    free = PlanLimits(max_moves_per_layer=None, staging_experts=5, gated=False)
    policy = Planner("swift", {"num_groups": 4})
    placement = policy.plan(PlanInput(placement, loads, TABLE, epoch=0, limits=free)).plan.target(placement)
    if budget is not None:
        limits = PlanLimits(max_moves_per_layer=budget, staging_experts=3, gated=False)
        later = policy.plan(PlanInput(placement, skewed_loads(4), TABLE, epoch=1, limits=limits))
        assert later.num_moves > 0
        placement = later.plan.target(placement)
    group = placement.physical_to_logical_map.reshape(3, 2, -1) // 8
    for layer in group:
        assert not set(layer[0].tolist()) & set(layer[1].tolist())


def test_sources_are_spread_over_the_holders() -> None:
    topology = Topology(8, 2)
    rows = np.array([[0, 1, 0, 2, 0, 3, 0, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
    placement = Placement.of(topology, 13, np.repeat(rows, 8, 0))
    loads = np.full((2, 8, 13), 10.0)
    loads[:, :, 0] = 4000.0
    result = plan_of(placement, loads, max_moves_per_layer=4, gated=False)
    hot = result.plan.moves[result.plan.moves[:, 1] == 0]
    assert len(hot) == 0 or np.bincount(hot[:, 2]).max() <= -(-len(hot) // 4) + 1


def test_experts_of_an_excluded_rank_find_a_place_and_the_rest_is_balanced() -> None:
    placement = first_placement(Topology(8, 6), 32)
    dead = Topology(8, 6, excluded_ranks=(2,))
    placement = Placement(dead, 32, placement.physical_to_logical_map)
    loads = skewed_loads(3, drift=0.0)
    for _ in range(4):
        result = plan_of(placement, loads, max_moves_per_layer=8, staging_experts=3)
        placement = result.plan.target(placement)
    placement.validate()
    assert float(result.imbalance_after.mean()) < 1.1
    assert not np.isin(result.plan.table // 6, [2]).any()


def test_a_slow_rank_gets_less() -> None:
    placement = first_placement(Topology(4, 10, rank_speed=(0.5, 1.0, 1.0, 1.0)), 32)
    loads = skewed_loads(4, drift=0.0)
    result = plan_of(placement, loads, max_moves_per_layer=None, staging_experts=10)
    target = result.plan.target(placement)
    per_rank = solve(target, loads.mean(0), DispatchForm("exact")).rank_loads(loads.mean(0))
    assert np.all(per_rank[:, 0] < 0.6 * per_rank[:, 1:].mean(1))


def test_stationary_noise_moves_nothing() -> None:
    placement = first_placement(Topology(8, 5), 32, layers=8)
    rate = np.exp(np.random.default_rng(5).normal(0, 0.7, (8, 32))) * 300
    rng = np.random.default_rng(6)
    settled = plan_of(
        placement, rng.poisson(rate, (8, 8, 32)).astype(float), max_moves_per_layer=None, staging_experts=5
    )
    placement = settled.plan.target(placement)
    moves = [plan_of(placement, rng.poisson(rate, (8, 8, 32)).astype(float)).num_moves for _ in range(10)]
    assert np.mean(moves) <= 0.1 * 8


def test_nearly_balanced_trace_moves_almost_nothing() -> None:
    trace = TRACES / "mixtral8x7b_domains.npy"
    if not trace.exists():
        pytest.skip(f"{trace} is not here")
    loads = np.load(trace).astype(float)
    placement = first_placement(Topology(4, 3), 8)
    settled = plan_of(placement, loads[:1], max_moves_per_layer=None, staging_experts=3)
    placement = settled.plan.target(placement)
    moves = 0
    for step in range(1, len(loads)):
        result = plan_of(placement, loads[: step + 1])
        moves += result.num_moves
        placement = result.plan.target(placement)
    assert moves <= 3


@pytest.mark.parametrize("scale", [10.0, 1e9])
def test_plans_do_not_depend_on_the_unit_of_loads(scale: float) -> None:
    placement = first_placement(Topology(8, 5), 32)
    loads = skewed_loads(1)
    wanted = plan_of(placement, loads, gated=False)
    found = Planner("swift").plan(PlanInput(placement, loads * scale, TABLE, epoch=4, limits=PlanLimits(gated=False)))
    assert abs(found.imbalance_after.mean() - wanted.imbalance_after.mean()) < 0.02


def test_a_transfer_that_costs_more_than_it_saves_is_refused() -> None:
    placement = first_placement(Topology(8, 5), 32)
    loads = skewed_loads(1, drift=0.0)
    cheap = PlanInput(placement, loads, TABLE, epoch=0, cost=CostModel(expert_bytes=1.0))
    dear = PlanInput(placement, loads, TABLE, epoch=0, cost=CostModel(expert_bytes=1e15))
    assert Planner().plan(cheap).num_moves > 0
    refused = Planner().plan(dear)
    assert refused.num_moves == 0
    assert refused.plan.kind == "dispatch"
    assert "saves" in refused.left_out[0]


def test_a_layer_too_large_for_the_staging_space_is_left_out_with_a_reason() -> None:
    placement = first_placement(Topology(4, 10), 32)
    result = Planner("greedy").plan(
        PlanInput(placement, skewed_loads(1), TABLE, epoch=0, limits=PlanLimits(staging_experts=1))
    )
    assert result.num_moves == 0
    assert set(result.left_out) == {0, 1, 2}
    assert "staging holds 1" in result.left_out[0]


def test_fresh_fractions_beat_those_in_force() -> None:
    placement = first_placement(Topology(8, 5), 32)
    loads = skewed_loads(8)
    planner = Planner("swift")
    settled = plan_of(placement, loads[:1], max_moves_per_layer=None, staging_experts=5)
    placement = settled.plan.target(placement)
    old = planner.refresh(PlanInput(placement, loads[:1], TABLE, epoch=0)).plan.table
    fresh = planner.refresh(PlanInput(placement, loads, TABLE, epoch=0, table=old))
    assert fresh.plan.kind == "dispatch"
    assert fresh.imbalance_after.mean() < fresh.imbalance_before.mean()


def test_uniform_engines_are_never_worse_off_than_with_greedy() -> None:
    form = DispatchForm("uniform", 8)
    for seed in range(6):
        placement = first_placement(Topology(8, 5), 32)
        loads = skewed_loads(seed, drift=0.0)
        limits = PlanLimits(max_moves_per_layer=None, staging_experts=5, gated=False)
        ask = PlanInput(placement, loads, form, epoch=0, limits=limits)
        total = loads.sum(0)
        found = []
        for name in ("swift", "greedy"):
            target = Planner(name).plan(ask).plan.target(placement)
            found.append(slowest_over_ideal(target, solve(target, total, form).rank_loads(total)).mean())
        assert found[0] <= found[1] + 1e-9


def even_imbalance_over_a_walk(policy: str, seed: int, limits: PlanLimits) -> float:
    """Mean imbalance of an even split in the window after each plan, from greedy's placement for the first window."""
    form = DispatchForm("uniform", 8)
    loads = skewed_loads(seed, windows=24, drift=0.1)
    placement = first_placement(Topology(8, 5), 32)
    free = PlanLimits(max_moves_per_layer=None, staging_experts=5, gated=False)
    found = []
    for now in range(0, 20, 4):
        ask = PlanInput(placement, loads[now : now + 4], form, epoch=0, limits=limits if now else free)
        placement = Planner(policy if now else "greedy").plan(ask).plan.target(placement)
        coming = loads[now + 4 : now + 8].sum(0)
        found.append(slowest_over_ideal(placement, solve(placement, coming, form).rank_loads(coming)).mean())
    return float(np.mean(found))


@pytest.mark.parametrize("staging", [2, 5])
def test_under_the_same_limits_uniform_engines_are_better_off_than_with_greedy(staging: int) -> None:
    """With room for two arrivals a rank, greedy's layers are left out; with room for all its slots they are not."""
    limits = PlanLimits(staging_experts=staging)
    for seed in range(6):
        swift, greedy = (even_imbalance_over_a_walk(name, seed, limits) for name in ("swift", "greedy"))
        assert swift < greedy


def test_on_average_uniform_engines_lose_nothing_to_a_greedy_without_limits_by_a_budget_of_eight() -> None:
    free = PlanLimits(max_moves_per_layer=None, staging_experts=5, gated=False)
    swift = np.mean([even_imbalance_over_a_walk("swift", seed, PlanLimits()) for seed in range(12)])
    greedy = np.mean([even_imbalance_over_a_walk("greedy", seed, free) for seed in range(12)])
    assert swift <= greedy


def test_bad_loads_are_refused_by_name() -> None:
    placement = first_placement(Topology(8, 5), 32)
    for bad in (np.nan, np.inf, -1.0):
        loads = skewed_loads(1)
        loads[0, 0, 0] = bad
        with pytest.raises(InvalidLoad):
            PlanInput(placement, loads, TABLE, epoch=0)
    with pytest.raises(InvalidLoad, match="expected"):
        PlanInput(placement, np.ones((2, 3, 31)), TABLE, epoch=0)


def test_unknown_policies_and_options_are_refused_with_what_is_known() -> None:
    with pytest.raises(UnknownPolicy, match="foreign, greedy, none, random, swift"):
        Planner("swfit")
    with pytest.raises(ConfigError, match="num_group"):
        Planner("greedy", {"num_group": 3})
    assert set(POLICIES) <= set(known_policies())


@pytest.mark.parametrize("field", ["max_moves_per_layer", "staging_experts", "target_imbalance", "hysteresis"])
def test_impossible_limits_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        PlanLimits(**{field: -1})  # type: ignore[arg-type]


PLAN_WITHOUT_COMPILER = """
import hashlib, sys
import numpy as np
sys.path[:0] = [{root!r}, {root!r} + "/worker", {root!r} + "/tests/core"]
from test_planner import first_placement, plan_of, skewed_loads
from swiftbalancer.topology import Topology
from swiftbalancer_worker.kernels.compiler import COMPILED
digest = hashlib.sha256()
for seed in range(3):
    placement = first_placement(Topology(8, 5, num_nodes=2), 32)
    for budget, reads in ((4, 0.0), (None, 0.0), (4, 1e4), (None, 1e4)):
        plan = plan_of(placement, skewed_loads(seed), reads=reads, max_moves_per_layer=budget, staging_experts=5).plan
        for array in (plan.rows, plan.moves, plan.table, plan.move_batch):
            digest.update(np.ascontiguousarray(array).tobytes())
print(COMPILED, digest.hexdigest())
"""


def test_plans_are_the_same_bit_for_bit_with_and_without_the_compiler() -> None:
    pytest.importorskip("numba")
    told = []
    for disabled in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", PLAN_WITHOUT_COMPILER.format(root=str(ROOT))],
            env={**os.environ, "NUMBA_DISABLE_JIT": disabled},
            capture_output=True,
            text=True,
            check=True,
        )
        told.append(done.stdout.split())
    assert [line[0] for line in told] == ["True", "False"]
    assert told[0][1] == told[1][1]


def refreshed(
    table: NDArray[np.int32], loads: NDArray[np.float64], placement: Placement, **limits: Any
) -> PlanResult:
    given = PlanInput(placement, loads, TABLE, epoch=0, limits=PlanLimits(**limits), table=table)
    return Planner().refresh(given)


def test_where_reads_of_weights_count_tables_are_renewed_to_read_less() -> None:
    """The ranks' tokens get less even by that, which is no reason to keep the tables in force."""
    placement = first_placement(Topology.for_experts(32, num_redundant=16, num_ranks=4), 32)
    loads = skewed_loads(3, drift=0.0)
    loads = loads / loads.sum() * len(loads) * 3 * 64.0 * 32  # 64 tokens a layer and step
    given = PlanInput(placement, loads, TABLE, epoch=0)
    even = Planner().refresh(given).plan.table
    counted = replace(given, table=even, cost=CostModel(tokens_per_activation=200.0))
    thrifty = Planner().refresh(counted)
    used = [slot_fractions(table, placement) > 0 for table in (even, thrifty.plan.table)]
    assert used[1].sum() < used[0].sum()
    assert thrifty.imbalance_after.mean() > thrifty.imbalance_before.mean()
    again = Planner().refresh(replace(counted, table=thrifty.plan.table))
    assert np.array_equal(again.plan.table, thrifty.plan.table)
    assert "stay" in again.reason


@pytest.mark.parametrize("budget", [12, None])
def test_where_reads_of_weights_count_no_rank_reads_more_than_its_part(budget: int | None) -> None:
    """Engines put redundant experts on the last ranks, so that the others begin with more experts of their own."""
    placement = first_placement(Topology.for_experts(64, num_redundant=16, num_ranks=8), 64)
    loads = np.full((4, 3, 64), 320.0)
    result = plan_of(placement, loads, reads=1e4, max_moves_per_layer=budget, staging_experts=10)
    target = result.plan.target(placement)
    read = (slot_fractions(result.plan.table, target) > 0).reshape(3, 8, 10).sum(2)
    assert read.tolist() == [[8] * 8] * 3
    assert np.bincount(result.plan.moves[:, 0]).max() <= (budget or 80)
    before = plan_of(placement, loads, reads=1e4, max_moves_per_layer=0).plan.table
    assert (slot_fractions(before, placement) > 0).reshape(3, 8, 10).sum(2).max() == 10


@pytest.mark.parametrize("seed", range(4))
def test_the_gate_sees_what_handing_over_saves(seed: int) -> None:
    """Were tokens split over all replicas, an expert that is handed over would be read on both ranks."""
    placement = first_placement(Topology.for_experts(64, num_redundant=16, num_ranks=8), 64)
    loads = np.random.default_rng(seed).gamma(2.0, 160.0, (4, 3, 64))
    result = plan_of(placement, loads, reads=1e4, max_moves_per_layer=12, staging_experts=10)
    assert len(result.plan.layers) == 3
    assert not result.left_out


@pytest.mark.parametrize("seed", range(6))
def test_repairing_and_handing_over_share_one_budget(seed: int) -> None:
    placement = first_placement(Topology.for_experts(32, num_redundant=16, num_ranks=8), 32)
    result = plan_of(placement, skewed_loads(seed), reads=300.0, max_moves_per_layer=3, staging_experts=6)
    assert 0 < np.bincount(result.plan.moves[:, 0]).max() <= 3


def test_where_reads_of_weights_count_a_layer_that_repeats_an_expert_is_repaired_first() -> None:
    rows = np.array([[0, 1, 2, 7, 8, 3, 3, 4, 5, 6, 7, 8, 0, 1, 2]], np.int32)
    placement = Placement(Topology(3, 5), 9, rows)  # rank 1 has most to read, whatever comes in the place of a 3
    loads = np.full((4, 1, 9), 320.0)
    result = plan_of(placement, loads, reads=1e4, max_moves_per_layer=1, staging_experts=3)
    assert (result.plan.target(placement).replicas_on_ranks() < 2).all()
    assert result.num_moves == 1


def test_a_dead_first_rank_reads_nothing_and_the_others_no_more_than_they_must() -> None:
    topology = Topology(4, 6, excluded_ranks=(0,))
    placement = Placement.of(topology, 12, [[0, 1, 2, 3, 4, 5, *range(12), 0, 1, 2, 3, 4, 5]] * 3)
    loads = np.full((4, 3, 12), 320.0)
    result = plan_of(placement, loads, reads=1e4, max_moves_per_layer=8, staging_experts=6)
    target = result.plan.target(placement)
    read = (slot_fractions(result.plan.table, target) > 0).reshape(3, 4, 6).sum(2)
    assert read.tolist() == [[0, 4, 4, 4]] * 3


def test_tables_are_renewed_when_it_pays() -> None:
    """Every renewal costs all ranks some milliseconds beside their steps."""
    placement = first_placement(Topology.for_experts(32, num_redundant=16, num_ranks=4), 32)
    loads = skewed_loads(3, drift=0.0)
    table = Planner().refresh(PlanInput(placement, loads, TABLE, epoch=0)).plan.table
    noisy = loads * np.random.default_rng(1).normal(1.0, 0.003, loads.shape)
    stays = refreshed(table, noisy, placement)
    assert np.array_equal(stays.plan.table, table)
    assert "stay" in stays.reason
    assert np.array_equal(stays.imbalance_before, stays.imbalance_after)
    assert not np.array_equal(refreshed(table, noisy, placement, min_refresh_gain=0.0).plan.table, table)
    assert not np.array_equal(refreshed(table, noisy, placement, gated=False).plan.table, table)
    shifted = refreshed(table, np.roll(loads, 5, axis=2), placement)
    assert (shifted.imbalance_before - shifted.imbalance_after).mean() > 0.002
    assert not np.array_equal(shifted.plan.table, table)
