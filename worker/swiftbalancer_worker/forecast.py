"""What the next sub-window will ask for, judging by those seen, and what else it may.

A count is a rate plus sampling noise, and rates drift together: a shift between domains moves many experts of
all layers at once. So the weights with which past sub-windows predict the next one are learned from all layers
and experts together, from the `[n, n]` products between sub-windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
MOST_DIRECTIONS = 4
TRIALS = 8
"""Past sub-windows on which ways to predict the next one are compared."""
DENOISED, LAST = 0, 1


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """What to plan for, in tokens of one sub-window.

    `expected` `[layers, experts]`: for dispatch. `scenarios` `[n, layers, experts]`: for placements, which last
    longer; first the expected loads, then where they may go.
    `drift` `[directions, layers, experts]`: how far one sub-window may miss the expected loads, one standard
    deviation in each of a few independent directions.
    `weights` `[sub_windows]`, sum 1: how much each sub-window seen says about the next one.
    `shares` `[sub_windows, layers, experts]`: the loads seen, scaled to each layer's mean traffic.
    """

    expected: FloatArray
    scenarios: FloatArray
    drift: FloatArray
    weights: FloatArray
    shares: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Sub-windows scaled to the same traffic, counts divided by the root of their mean.

    `gram` `[n, n]`: products between sub-windows; `traffic` `[n]`: tokens of each over their mean; `noise`: the
    variance that sampling gives a sub-window of mean traffic, one with more has so much less.
    """

    gram: FloatArray
    traffic: FloatArray
    noise: float

    def first(self, num: int) -> Seen:
        """The first `num` sub-windows alone."""
        return Seen(self.gram[:num, :num], self.traffic[:num], self.noise)


def forecast(loads: FloatArray, *, every: bool = False, scenarios: bool = True) -> Forecast:
    """From `loads` `[sub_windows, layers, experts]`, oldest first.

    The scenarios add three times what the first and the last sub-window had over the mean, in so far as it is drift
    and not sampling noise. Where many sub-windows together predict the next one best, it may resemble any of them:
    then twice what each had. With `every`, three times what each had. Without `scenarios`, which dispatch does not
    need, there are only the expected loads.
    """
    shares, traffic = level_traffic(loads), relative_traffic(loads)
    mean = combine(pooled(traffic), shares)
    scale = np.divide(1.0, np.sqrt(mean), out=np.zeros_like(mean), where=mean > 0)
    whitened = (shares * scale).reshape(len(shares), -1)
    seen = Seen(whitened @ whitened.T, traffic, noise=float((mean > 0).sum()))
    nth = best_candidate(seen)
    weights = candidates(seen)[nth]
    expected = np.maximum(combine(weights, shares), 0.0)
    drift = combine(drift_directions(seen, nth), shares)
    demands = expected[None]
    if scenarios:
        scattered = 1.0 / np.square(weights).sum() > len(weights) / 3
        part = drift_part(seen)
        if not every and not scattered:
            part[1:-1] = 0.0
        stretch = (2.0 if scattered and not every else 3.0) * part
        demands = np.concatenate([demands, stretched(expected, shares, mean, stretch)])
    return Forecast(expected, demands, drift, weights, shares)


def stretched(expected: FloatArray, shares: FloatArray, mean: FloatArray, stretch: FloatArray) -> FloatArray:
    """`[k, layers, experts]`: the expected loads and `stretch` `[sub_windows]` times what each had over the mean.

    Of the sub-windows whose stretch is not 0.
    """
    chosen = np.nonzero(stretch)[0]
    most = np.maximum(expected, 2.0 * shares.max(0))  # the last sub-window may have been a burst
    added = stretch[chosen][:, None, None] * (shares[chosen] - mean)
    return np.clip(expected + added, 0.1 * expected, most)


def combine(weights: FloatArray, shares: FloatArray) -> FloatArray:
    """`[..., n]` weights of `[n, layers, experts]` loads -> `[..., layers, experts]`."""
    combined: FloatArray = weights @ shares.reshape(len(shares), -1)
    return combined.reshape(*weights.shape[:-1], *shares.shape[1:])


def level_traffic(loads: FloatArray) -> FloatArray:
    """`loads` with every sub-window of a layer scaled to the layer's mean traffic."""
    if len(loads) == 1:
        return loads
    total = loads.sum(2, keepdims=True)
    scale = np.divide(total.mean(0), total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(loads * scale, np.float64)


def relative_traffic(loads: FloatArray) -> FloatArray:
    """`[sub_windows]` float64, the tokens of each over their mean; 1 where there are none at all."""
    total = loads.sum((1, 2))
    if total.sum() <= 0:
        return np.ones(len(loads))
    return np.asarray(total / total.mean(), np.float64)


def pooled(traffic: FloatArray) -> FloatArray:
    """`[n]` float64, sum 1: weights that make of levelled sub-windows the mean of their tokens; even if idle."""
    total = traffic.sum()
    return traffic / total if total > 0 else np.full(len(traffic), 1.0 / len(traffic))


def best_candidate(seen: Seen) -> int:
    """Which of the `candidates` predicted the last sub-windows best."""
    num = len(seen.gram)
    error = np.zeros(len(candidates(seen.first(1))))
    for nth in range(max(min(2, num - 1), num - TRIALS), num):
        weights = candidates(seen.first(nth)) if nth else np.zeros((len(error), 0))
        missed = np.concatenate([-weights, np.ones((len(weights), 1))], 1)
        error += seen.traffic[nth] * np.einsum("ki,ij,kj->k", missed, seen.gram[: nth + 1, : nth + 1], missed)
    return int(error.argmin())


def candidates(seen: Seen) -> FloatArray:
    """`[candidates, n]` float64: denoised last sub-window, the last one, and means of the last 2, 4, 8 and all."""
    num = len(seen.gram)
    rows = [denoiser(seen)[-1]]
    for span in (1, 2, 4, 8, num):
        row = np.zeros(num)
        row[-min(span, num) :] = pooled(seen.traffic[-min(span, num) :])
        rows.append(row)
    return np.stack(rows)


def denoiser(seen: Seen) -> FloatArray:
    """`[n, n]` float64, row `i` combines all sub-windows to sub-window `i` without its sampling noise.

    A Wiener filter: along each principal direction of the sub-windows, weighed so that all are equally noisy, the
    signal's part of the variance is kept. Common drift passes; what noise alone explains is averaged away. Rows sum
    to 1.
    """
    weight = np.sqrt(seen.traffic)
    variance, direction = np.linalg.eigh(seen.gram * weight[:, None] * weight)
    signal = np.maximum(variance - seen.noise, 0.0)
    kept = np.divide(signal, variance, out=np.zeros_like(variance), where=variance > 0)
    even = np.broadcast_to(pooled(seen.traffic), seen.gram.shape)  # for an idle sub-window
    if not kept.any():
        return even
    rows: FloatArray = (direction * kept) @ direction.T * weight
    total = rows.sum(1, keepdims=True)
    return np.asarray(np.divide(rows, total, out=even.copy(), where=np.abs(total) > 1e-9), np.float64)


def drift_directions(seen: Seen, nth: int) -> FloatArray:
    """`[<= 4, n]` float64, combinations of sub-windows: the principal directions of what candidate `nth` misses.

    For the last sub-window these are the steps between sub-windows, for a mean their distances from it, without
    sampling noise; each direction is as long as one standard deviation.
    """
    num = len(seen.gram)
    clean = denoiser(seen)
    if nth in (DENOISED, LAST):
        missed = np.diff(clean, axis=0) / np.sqrt(max(1, num - 1))
    else:
        missed = (clean - pooled(seen.traffic)) / np.sqrt(num)
    variance, direction = np.linalg.eigh(missed @ seen.gram @ missed.T)
    real = variance > 1e-9 * np.trace(seen.gram)
    found: FloatArray = (direction.T @ missed)[real][-MOST_DIRECTIONS:]
    return found


def drift_part(seen: Seen) -> FloatArray:
    """`[n]` float64 in 0..1: how much of each sub-window's distance from the mean is more than sampling noise.

    0 within two standard deviations of what noise alone gives.
    """
    mean = pooled(seen.traffic)
    to_mean = seen.gram @ mean
    distance = np.maximum(np.diag(seen.gram) - 2.0 * to_mean + mean @ to_mean, 0.0)
    busy = np.maximum(seen.traffic, 1e-12)
    sampled = seen.noise * np.maximum(1.0 / busy - 1.0 / busy.sum(), 0.0)
    drifted = np.where(
        distance > sampled * (1.0 + 2.0 * np.sqrt(2.0 / max(seen.noise, 1.0))), distance - sampled, 0.0
    )
    part = np.divide(drifted, distance, out=np.zeros_like(distance), where=drifted > 0)
    return np.asarray(np.sqrt(part), np.float64)
