"""What the planner expects of the next sub-window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.forecast import forecast

LAYERS, EXPERTS, TOKENS = 6, 64, 65536


def counts(rates: NDArray[np.float64], traffic: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """`[n, layers, experts]` Poisson counts of `rates` of that shape, sub-window `i` having `traffic[i]` tokens."""
    share = rates / rates.sum(2, keepdims=True)
    sampled: NDArray[np.float64] = np.random.default_rng(seed).poisson(share * traffic[:, None, None]).astype(float)
    return sampled


def popularity(num: int, seed: int) -> NDArray[np.float64]:
    """`[num, layers, experts]` unrelated lognormal rates."""
    return np.random.default_rng(seed).lognormal(0, 0.7, (num, LAYERS, EXPERTS))


def test_sub_windows_of_little_traffic_say_little() -> None:
    traffic = np.array([1, 0.02, 1, 1, 0.02, 1, 0, 0.02]) * TOKENS
    rates = np.repeat(popularity(1, 0), 8, 0)
    expected = forecast(counts(rates, traffic, 1))
    assert expected.weights[traffic < TOKENS].max() < 0.02
    found = expected.expected / expected.expected.sum(1, keepdims=True)
    wanted = rates[0] / rates[0].sum(1, keepdims=True)
    assert np.abs(found / wanted - 1).mean() < 0.03


def test_sampling_noise_makes_no_scenarios_and_drift_two() -> None:
    traffic = np.full(8, float(TOKENS))
    still = counts(np.repeat(popularity(1, 0), 8, 0), traffic, 1)
    assert len(forecast(still).scenarios) == 1
    first, last = popularity(2, 2)
    way = np.linspace(0, 1, 8)[:, None, None]
    assert len(forecast(counts((1 - way) * first + way * last, traffic, 3)).scenarios) == 3


def test_where_a_step_tells_little_of_the_next_all_that_were_seen_are_planned_for() -> None:
    traffic = np.full(8, float(TOKENS))
    common, own = popularity(1, 4), popularity(8, 5)
    expected = forecast(counts(common * own, traffic, 6))
    assert len(expected.scenarios) == 9
    assert expected.weights.max() < 0.3
