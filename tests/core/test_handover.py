"""Handing experts over: what it may never do, whatever that would gain, and what it prefers."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker.kernels.candidates import Rules
from swiftbalancer_worker.kernels.concentrate import Choice
from swiftbalancer_worker.kernels.handover import drop_host, hand_over
from swiftbalancer_worker.kernels.layers import Demand


def handed(
    placement: Placement,
    price: NDArray[np.float64],
    *,
    budget: int = 8,
    staging: int = 8,
    home: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """`[layers, ranks, slots]`, a placement after experts of `price` `[layers, experts]` were handed over."""
    topology, layers, experts = placement.topology, placement.num_layers, placement.num_experts
    place = placement.physical_to_logical_map.reshape(layers, topology.num_ranks, -1).astype(np.int64)
    demand = Demand(
        weight=np.zeros((layers, 1, experts)),
        fixed=np.zeros((layers, experts)),
        speed=topology.speeds(),
        uniform=False,
        node=np.arange(topology.num_ranks) // topology.ranks_per_node,
        far=4.0,
        home=np.full((layers, experts), -1) if home is None else home,
    )
    hand_over(place, price, demand, Rules(budget, staging, 1.0, 6, 24, 4))
    return place


@settings(max_examples=150)
@given(
    seed=st.integers(0, 100_000),
    nodes=st.integers(1, 2),
    slots=st.integers(1, 5),
    spare=st.integers(0, 8),
    budget=st.integers(0, 7),
    staging=st.integers(1, 3),
    flaw=st.sampled_from(["", "groups", "dead rank", "groups, dead rank"]),
)
def test_no_expert_is_lost_and_no_rule_broken(
    seed: int, nodes: int, slots: int, spare: int, budget: int, staging: int, flaw: str
) -> None:
    rng = np.random.default_rng(seed)
    dead = "dead rank" in flaw
    ranks = 3 * nodes
    live = ranks - dead
    experts = max(1, live * slots - spare)
    topology = Topology(ranks, slots, num_nodes=nodes, excluded_ranks=(0,) if dead else ())
    rows = np.empty((2, ranks, slots), np.int64)
    for layer in rows:
        dealt = np.concatenate([rng.permutation(experts), rng.integers(0, experts, live * slots - experts)])
        layer[ranks - live :] = dealt.reshape(live, slots)
        layer[: ranks - live] = rng.integers(0, experts, slots)
    placement = Placement(topology, experts, rows.reshape(2, -1).astype(np.int32))
    home = rng.integers(0, nodes, (2, experts)) if "groups" in flaw else np.full((2, experts), -1)
    found = handed(placement, rng.gamma(0.5, 1.0, (2, experts)), budget=budget, staging=staging, home=home)
    for old, new, at in zip(rows, found, home, strict=True):
        serving = slice(ranks - live, None)
        assert set(new[serving].ravel()) == set(range(experts))
        assert np.array_equal(new[: ranks - live], old[: ranks - live])
        assert (new != old).sum() <= budget
        for rank in range(ranks):
            fresh = [expert for expert in new[rank] if expert not in old[rank]]
            assert len(fresh) <= staging
            assert len(set(fresh)) == len(fresh)
            assert all(at[expert] in (-1, rank // 3) for expert in fresh)


def test_of_ranks_as_idle_that_of_the_same_node_gets_the_expert() -> None:
    """Rank 3 serves three experts, the others one or as much, and all have a slot to spare."""
    placement = Placement.of(Topology(4, 3, num_nodes=2), 8, [[6, 4, 5, 3, 4, 5, 7, 4, 5, 0, 1, 2]])
    price = np.array([[1.0, 1.0, 1.0, 1.0, 0.01, 0.01, 0.9, 1.0]])
    changed = handed(placement, price, budget=1)[0] != placement.physical_to_logical_map.reshape(4, 3)
    assert changed.sum(1).tolist() == [0, 0, 1, 0]


def test_without_redundant_experts_two_change_places() -> None:
    placement = Placement.of(Topology(2, 2), 4, [[0, 1, 2, 3]])
    price = np.array([[4.0, 3.0, 2.0, 1.0]])
    assert sorted(price[0, row].sum() for row in handed(placement, price)[0]) == [5.0, 5.0]
    assert np.array_equal(handed(placement, price, budget=1)[0].ravel(), [0, 1, 2, 3])


def test_a_host_that_is_dropped_leaves_the_expert_where_it_is_served() -> None:
    choice = Choice(
        place=np.array([1]),
        replicas=np.array([2]),
        host=np.array([[3, 5]]),
        price=np.ones(1),
        load=np.zeros(6),
        speed=np.ones(6),
    )
    getattr(drop_host, "py_func", drop_host)(choice, 0, 3)
    assert (choice.replicas[0], choice.place[0], choice.host[0, 0]) == (1, 0, 5)
