"""The budgeted repair against the true optimum of small layers, found by a mixed-integer program (HiGHS)."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from swiftbalancer.dispatch import DispatchForm
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker.planner import PlanInput, PlanLimits, Planner
from swiftbalancer_worker.solver import slowest_over_ideal, solve, split

RANKS, SLOTS, EXPERTS = 5, 3, 12
EXACT = DispatchForm("exact")


def small_case(seed: int) -> tuple[Placement, NDArray[np.float64]]:
    """One settled layer, then loads that have drifted away from it."""
    rng = np.random.default_rng(seed)
    topology = Topology(RANKS, SLOTS)
    initial = Placement.initial(topology, EXPERTS, num_layers=1)
    old = rng.lognormal(0, 0.8, (1, 1, EXPERTS)) * 1e4
    limits = PlanLimits(max_moves_per_layer=None, staging_experts=SLOTS, gated=False)
    plan = Planner().plan(PlanInput(initial, old, EXACT, epoch=0, limits=limits)).plan
    return plan.target(initial), old * rng.lognormal(0, 1.0, old.shape)


def optimum(placement: Placement, load: NDArray[np.float64], budget: int) -> float:
    """The least possible largest rank load after at most `budget` moves."""
    optimize = pytest.importorskip("scipy.optimize")
    held = placement.replicas_on_ranks()[0] > 0
    cells = RANKS * EXPERTS
    size = 2 * cells + 1
    rows, low, high = [], [], []

    def constrain(terms: dict[int, float], least: float, most: float) -> None:
        row = np.zeros(size)
        for column, value in terms.items():
            row[column] = value
        rows.append(row)
        low.append(least)
        high.append(most)

    for rank in range(RANKS):
        mine = range(rank * EXPERTS, (rank + 1) * EXPERTS)
        constrain(dict.fromkeys(mine, 1.0), 0, SLOTS)
        constrain({**{cells + cell: 1.0 for cell in mine}, size - 1: -1.0}, -np.inf, 0)
        for expert, cell in enumerate(mine):
            constrain({cells + cell: 1.0, cell: -load[expert]}, -np.inf, 0)
    for expert in range(EXPERTS):
        constrain({cells + rank * EXPERTS + expert: 1.0 for rank in range(RANKS)}, load[expert], load[expert])
    new = np.nonzero(~held.ravel())[0]
    constrain({int(cell): 1.0 for cell in new}, 0, budget)
    cost = np.zeros(size)
    cost[-1] = 1.0
    answer = optimize.milp(
        cost,
        constraints=optimize.LinearConstraint(np.array(rows), low, high),
        integrality=np.r_[np.ones(cells), np.zeros(cells + 1)],
        bounds=optimize.Bounds(0, np.r_[np.ones(cells), np.full(cells + 1, np.inf)]),
        options={"time_limit": 20.0},
    )
    assert answer.status == 0
    return float(answer.fun)


@pytest.mark.parametrize(("budget", "mean_gap"), [(1, 0.02), (2, 0.04), (4, 0.05)])
def test_repair_comes_close_to_the_optimum(budget: int, mean_gap: float) -> None:
    gaps = []
    for seed in range(6):
        placement, loads = small_case(seed)
        limits = PlanLimits(
            max_moves_per_layer=budget, staging_experts=SLOTS, target_imbalance=1.0, gated=False, min_gain=0.0
        )
        plan = Planner().plan(PlanInput(placement, loads, EXACT, epoch=0, limits=limits)).plan
        plan.validate(placement)
        assert len(plan.moves) <= budget
        found = split(plan.target(placement), loads[0]).load.max()
        gaps.append(found / optimum(placement, loads[0, 0], budget) - 1)
    print(f"budget {budget}: mean gap {np.mean(gaps):.4f}, worst {np.max(gaps):.4f}")
    assert min(gaps) >= -1e-6
    assert np.mean(gaps) <= mean_gap


def test_actions_that_are_tried_out_serve_a_sudden_change_better() -> None:
    topology = Topology(64, 5)
    rng = np.random.default_rng(0)
    old = rng.lognormal(0, 0.8, (1, 40, 256)) * 1e4
    new = old * rng.lognormal(0, 0.5, old.shape)
    placement = Placement.initial(topology, 256, num_layers=40)
    anew = PlanLimits(max_moves_per_layer=None, staging_experts=5, gated=False)
    placement = Planner().plan(PlanInput(placement, old, EXACT, epoch=0, limits=anew)).plan.target(placement)
    found = {}
    for tried in (1, 4):
        given = PlanInput(placement, new, EXACT, epoch=0, limits=PlanLimits(staging_experts=5))
        plan = Planner("swift", {"tried": tried}).plan(given).plan
        assert np.bincount(plan.moves[:, 0]).max() <= 8
        target = plan.target(placement)
        found[tried] = float(slowest_over_ideal(target, split(target, new[0]).load).mean())
    assert found[4] < found[1] - 0.003


def test_without_a_budget_no_move_leaves_the_placement_and_its_best_split() -> None:
    placement, loads = small_case(1)
    held = solve(placement, loads[0], EXACT).rank_loads(loads[0]).max()
    assert held == pytest.approx(optimum(placement, loads[0, 0], 0), rel=1e-3)
