"""The dispatch solver against a linear program, and its tables against the fractions they express."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from swiftbalancer.dispatch import DispatchForm, check_table, column_order, slot_fractions
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker.cost import CostModel
from swiftbalancer_worker.kernels.concentrate import concentrate
from swiftbalancer_worker.kernels.dispatch import Split
from swiftbalancer_worker.solver import rank_costs, slowest_over_ideal, solve, split

EXACT = DispatchForm("exact")


def random_case(
    seed: int, *, ranks: int, slots: int, experts: int, layers: int = 2, skew: float = 1.5
) -> tuple[Placement, NDArray[np.float64]]:
    """A random valid placement and skewed loads."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(layers):
        row = np.full((ranks, slots), -1)
        row.ravel()[rng.permutation(ranks * slots)[:experts]] = rng.permutation(experts)
        for r in range(ranks):
            free = np.nonzero(row[r] < 0)[0]
            row[r, free] = rng.choice(np.setdiff1d(np.arange(experts), row[r]), len(free), replace=False)
        rows.append(row.ravel())
    placement = Placement.of(Topology(num_ranks=ranks, slots_per_rank=slots), experts, np.array(rows))
    return placement, rng.lognormal(0.0, skew, (layers, experts)) * 1000


def lp_optimum(placement: Placement, load: NDArray[np.float64], layer: int) -> float:
    """The least possible largest rank load of one layer, by HiGHS."""
    optimize = pytest.importorskip("scipy.optimize")
    row = placement.physical_to_logical_map[layer]
    ranks, slots = placement.topology.num_ranks, len(row)
    limit = np.zeros((ranks, slots + 1))
    limit[placement.topology.slot_ranks(), np.arange(slots)] = 1.0
    limit[:, -1] = -1.0
    served = np.zeros((placement.num_experts, slots + 1))
    served[row, np.arange(slots)] = 1.0
    cost = np.zeros(slots + 1)
    cost[-1] = 1.0
    answer = optimize.linprog(cost, limit, np.zeros(ranks), served, load, method="highs")
    assert answer.status == 0
    return float(answer.fun)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("ranks", "slots", "experts"), [(4, 3, 8), (8, 6, 32), (16, 9, 128), (32, 5, 128)])
def test_split_is_within_a_thousandth_of_the_linear_program(seed: int, ranks: int, slots: int, experts: int) -> None:
    placement, loads = random_case(seed, ranks=ranks, slots=slots, experts=experts)
    largest = split(placement, loads).load.max(1)
    for layer in range(placement.num_layers):
        best = lp_optimum(placement, loads[layer], layer)
        assert best * (1 - 1e-9) <= largest[layer] <= best * 1.001


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.integers(1, 8),
    slots=st.integers(1, 6),
    width=st.sampled_from([1, 3, 4, 16, 64]),
    kind=st.sampled_from(["table", "static", "uniform", "exact"]),
)
def test_every_token_is_served_once_whatever_the_form(
    seed: int, ranks: int, slots: int, width: int, kind: str
) -> None:
    experts = int(np.random.default_rng(seed).integers(slots, ranks * slots + 1))
    placement, loads = random_case(seed, ranks=ranks, slots=slots, experts=experts)
    dispatch = solve(placement, loads, DispatchForm(kind, width))  # type: ignore[arg-type]
    check_table(dispatch.table, placement)
    assert np.allclose(dispatch.rank_loads(loads).sum(1), loads.sum(1))
    if kind in ("table", "static"):
        assert np.allclose(slot_fractions(dispatch.table, placement), dispatch.fractions)


def test_wider_tables_come_closer_to_the_exact_fractions() -> None:
    placement, loads = random_case(3, ranks=16, slots=9, experts=96, layers=12, skew=0.3)
    exact = slowest_over_ideal(placement, solve(placement, loads, EXACT).rank_loads(loads)).mean()
    widths = (4, 16, 64)
    rounded = [
        slowest_over_ideal(placement, solve(placement, loads, DispatchForm("table", w)).rank_loads(loads)).mean()
        for w in widths
    ]
    assert rounded[0] > rounded[1] > rounded[2] >= exact * 0.999
    assert rounded[2] <= exact + 0.02


def test_every_prefix_of_a_batch_sees_about_the_right_proportions() -> None:
    placement, loads = random_case(5, ranks=4, slots=6, experts=8)
    table = solve(placement, loads, DispatchForm("table", 32)).table
    whole = slot_fractions(table, placement)
    prefix = table[:, :, column_order(32)[:16]]
    assert np.abs(slot_fractions(prefix, placement) - whole).max() <= 1.01 / 16


def test_faster_ranks_carry_more_and_excluded_ranks_nothing() -> None:
    topology = Topology(4, 2, rank_speed=(2.0, 1.0, 1.0, 1.0), excluded_ranks=(3,))
    placement = Placement.of(topology, 2, [[0, 1, 0, 1, 0, 1, 0, 1]])
    dispatch = solve(placement, np.array([[60.0, 40.0]]), EXACT)
    assert np.allclose(dispatch.rank_loads(np.array([[60.0, 40.0]])), [[50, 25, 25, 0]], rtol=1e-3)
    check_table(solve(placement, np.array([[60.0, 40.0]]), DispatchForm("uniform", 8)).table, placement)


@pytest.mark.parametrize("kind", ["table", "static", "uniform", "exact"])
def test_layers_without_load_are_split_evenly(kind: str) -> None:
    placement, loads = random_case(1, ranks=4, slots=4, experts=8)
    dispatch = solve(placement, np.zeros_like(loads), DispatchForm(kind, 12))  # type: ignore[arg-type]
    check_table(dispatch.table, placement)
    even = 1 / placement.logical_replica_count()[0, placement.physical_to_logical_map[0]]
    tolerance = 1e-9 if kind in ("uniform", "exact") else 0.26
    assert np.abs(dispatch.fractions[0] - even).max() <= tolerance


def test_decode_reads_fewer_weights_where_that_is_cheaper() -> None:
    placement, loads = random_case(2, ranks=8, slots=6, experts=32, layers=4, skew=0.4)
    loads = loads / loads.sum(1, keepdims=True) * 6400.0
    cost = CostModel(steps_per_sub_window=4.0, tokens_per_activation=100.0)
    spread = solve(placement, loads, EXACT)
    thrifty = solve(placement, loads, EXACT, cost=cost)
    assert (thrifty.fractions > 0).sum() < (spread.fractions > 0).sum()
    speed = placement.topology.speeds()
    assert rank_costs(split(placement, loads), speed, cost).max(1).mean() > _cost(
        thrifty.fractions, loads, placement, cost
    )


def test_ranks_that_drift_may_load_more_are_left_idler() -> None:
    topology = Topology(2, 2)
    placement = Placement.of(topology, 3, [[0, 1, 0, 2]])
    loads = np.array([[40.0, 30.0, 30.0]])
    drift = np.array([[[0.0, 8.0, 0.0]]])
    calm, wary = solve(placement, loads, EXACT), solve(placement, loads, EXACT, drift=drift)
    assert np.allclose(calm.rank_loads(loads), [[50, 50]], rtol=1e-3)
    assert np.allclose(wary.rank_loads(loads), [[46, 54]], rtol=1e-3)
    uniform = solve(placement, loads, DispatchForm("uniform", 8), drift=drift)
    assert np.allclose(uniform.rank_loads(loads), [[50, 50]])


def test_decode_hands_experts_on_until_no_rank_reads_more_than_its_part() -> None:
    topology = Topology(4, 2)
    placement = Placement.of(topology, 4, [[0, 1, 1, 2, 2, 3, 3, 0]])
    loads = np.array([[4.0, 3.0, 2.0, 1.0]])
    cost = CostModel(steps_per_sub_window=1.0, tokens_per_activation=1e6)
    dispatch = solve(placement, loads, EXACT, cost=cost)
    used = (dispatch.fractions > 0).reshape(4, 2).sum(1)
    assert used.tolist() == [1, 1, 1, 1]


def test_decode_finds_a_chain_where_no_single_step_helps() -> None:
    now = Split(
        replicas=np.array([[1, 2, 2, 1]]),
        host=np.array([[[0, 0], [0, 1], [1, 2], [2, 0]]]),
        share=np.zeros((1, 4, 2)),
        load=np.zeros((1, 3)),
    )
    weight = np.array([[1.0, 6.0, 5.0, 4.0]])
    found = concentrate(now, weight, np.zeros((1, 4)), np.ones(3))
    assert found.host[0, :, 0].tolist() == [0, 0, 1, 2]
    assert found.load.tolist() == [[7.0, 5.0, 4.0]]


def _cost(fractions: NDArray[np.float64], loads: NDArray[np.float64], placement: Placement, cost: CostModel) -> float:
    tokens = np.take_along_axis(loads, placement.physical_to_logical_map.astype(np.int64), 1) * fractions
    worth = tokens + cost.tokens_per_activation * cost.activations(tokens)
    ranks = worth.reshape(len(loads), placement.topology.num_ranks, -1).sum(2)
    return float(ranks.max(1).mean())
