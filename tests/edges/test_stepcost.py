"""What our threads cost is told from steps of an engine that vary by more than that, and only once it is known."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from swiftbalancer import stepcost as module
from swiftbalancer.stepcost import Cost, StepCost

STEP_S = 0.01
USED_S = 0.0002


def informed() -> StepCost:
    """Told of restful steps until it knows how much they differ."""
    cost = StepCost()
    for _ in range(module.RESTFUL + module.SPREADS):
        cost.restful(STEP_S)
    return cost


def steps_until_verdict(cost: StepCost, *, longer_s: float) -> int:
    """Steps with work of ours, each `longer_s` longer than a restful one before it."""
    for steps in count(1):
        cost.restful(STEP_S)
        if cost.beside(STEP_S + longer_s, USED_S):
            return steps
    raise AssertionError


def verdicts(longer: float, *, noise: float, seed: int, steps: int = 6000) -> list[Cost]:
    """Of an engine that waits for `longer` of what our threads compute, and is slower by itself now and then."""
    rng = np.random.default_rng(seed)
    cost, slow = StepCost(), 1.0
    found: list[Cost | None] = []
    for number in range(steps):
        if number % 150 == 0:
            slow = rng.choice([1.0, 1.1, 1.4])
        step_s = slow * STEP_S * rng.normal(1.0, noise) + (0.1 if number % 40 == 0 else 0.0)
        if number % 100 < 60 and number % 3 == 0:
            used_s = rng.uniform(0.5, 1.5) * USED_S
            found.append(cost.beside(step_s + longer * used_s, used_s))
        else:
            cost.restful(step_s)
    return [verdict for verdict in found if verdict is not None]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.002, 0.01, 0.02, 0.04])
@pytest.mark.parametrize(("longer", "cost"), [(0.0, Cost.FREE), (0.9, Cost.DEAR)])
def test_what_it_says_is_so_however_much_steps_vary(noise: float, longer: float, cost: Cost, seed: int) -> None:
    found = verdicts(longer, noise=noise, seed=seed)
    assert set(found) <= {cost}
    if noise <= 0.02:  # at 0.04 a step's standard deviation is twice the work, and thousands of steps may be too few
        assert found


def test_before_it_is_known_how_much_steps_vary_it_says_nothing() -> None:
    cost = StepCost()
    for _ in range(module.RESTFUL + module.SPREADS - 1):
        cost.restful(STEP_S)
    assert not any(cost.beside(STEP_S + USED_S, USED_S) for _ in range(10 * module.RECENT))
    cost.restful(STEP_S)
    assert steps_until_verdict(cost, longer_s=USED_S) > 1


def test_one_step_decides_nothing_however_long() -> None:
    cost = informed()
    assert cost.beside(100 * STEP_S, USED_S) is None
    assert 0.0 < cost._evidence < module.ENOUGH[Cost.DEAR] / 2


def test_steps_that_follow_each_other_are_worth_less_since_they_are_compared_with_the_same() -> None:
    cost = informed()
    cost.beside(STEP_S + USED_S, USED_S)
    first = cost._evidence
    for _ in range(module.RECENT - 1):
        cost.beside(STEP_S + USED_S, USED_S)
    assert first < cost._evidence < first / module.SHARED


def test_steps_are_compared_with_recent_ones() -> None:
    cost = informed()
    for _ in range(module.RECENT):
        cost.others(1)
    cost.beside(STEP_S + USED_S, USED_S)
    for _ in range(module.RESTFUL - 1):
        cost.restful(STEP_S)
        cost.beside(STEP_S + USED_S, USED_S)
    assert cost._evidence == 0.0, "with what should they be compared?"
    cost.restful(STEP_S)
    cost.beside(STEP_S + USED_S, USED_S)
    assert cost._evidence > 0.0


def test_after_a_verdict_it_starts_anew() -> None:
    cost = informed()
    took = [steps_until_verdict(cost, longer_s=longer_s) for longer_s in (USED_S, USED_S, 0.0)]
    assert took[0] == took[1] > 1
