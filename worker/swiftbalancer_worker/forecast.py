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


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """What to plan for, in tokens of one sub-window.

    `expected` `[layers, experts]`: for dispatch. `scenarios` `[n, layers, experts]`: for placements, which last
    longer; first the expected loads, then where they may go.
    `drift` `[directions, layers, experts]`: what one sub-window may add to the expected loads, one standard deviation
    in each of a few independent directions.
    `weights` `[sub_windows]`, sum 1: how much each sub-window seen says about the next one.
    `shares` `[sub_windows, layers, experts]`: the loads seen, scaled to each layer's mean traffic.
    """

    expected: FloatArray
    scenarios: FloatArray
    drift: FloatArray
    weights: FloatArray
    shares: FloatArray


def forecast(loads: FloatArray, *, stretch: float = 3.0, every: bool = False) -> Forecast:
    """From `loads` `[sub_windows, layers, experts]`, oldest first.

    The scenarios add `stretch` times what the first and the last sub-window had over the mean, in so far as it
    is drift and not sampling noise; with `every`, all sub-windows.
    """
    shares = level_traffic(loads)
    mean = shares.mean(0)
    scale = np.divide(1.0, np.sqrt(mean), out=np.zeros_like(mean), where=mean > 0)
    whitened = (shares * scale).reshape(len(shares), -1)
    gram, noise = whitened @ whitened.T, float((mean > 0).sum())
    weights = best_weights(gram, noise=noise)
    expected = np.maximum(combine(weights, shares), 0.0)
    chosen = range(len(shares)) if every else sorted({0, len(shares) - 1})
    stretched = stretch * drift_part(gram, noise)[chosen][:, None, None] * (shares[chosen] - mean)
    others = np.maximum(expected + stretched, 0.1 * expected)
    drift = combine(drift_directions(gram, noise), shares)
    return Forecast(expected, np.concatenate([expected[None], others]), drift, weights, shares)


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


def best_weights(gram: FloatArray, *, noise: float) -> FloatArray:
    """`[n]` float64: of several ways to combine past sub-windows, the one that predicted the last four best.

    `gram` `[n, n]`: products of sub-windows whose counts have variance 1; `noise`: the sum of these variances.
    """
    num = len(gram)
    if num == 1:
        return np.ones(1)
    trials = range(max(min(2, num - 1), num - 4), num)
    error = np.zeros(len(candidates(gram[:1, :1], noise)))
    for seen in trials:
        weights = candidates(gram[:seen, :seen], noise)
        residual = np.concatenate([-weights, np.ones((len(weights), 1))], 1)
        error += np.einsum("ki,ij,kj->k", residual, gram[: seen + 1, : seen + 1], residual)
    best: FloatArray = candidates(gram, noise)[int(error.argmin())]
    return best


def candidates(gram: FloatArray, noise: float) -> FloatArray:
    """`[candidates, n]` float64: denoised last sub-window, the last one, and means of the last 2, 4, 8 and all."""
    num = len(gram)
    rows = [denoiser(gram, noise)[-1]]
    for span in (1, 2, 4, 8, num):
        row = np.zeros(num)
        row[-min(span, num) :] = 1.0 / min(span, num)
        rows.append(row)
    return np.stack(rows)


def denoiser(gram: FloatArray, noise: float) -> FloatArray:
    """`[n, n]` float64, row `i` combines all sub-windows to sub-window `i` without its sampling noise.

    A Wiener filter: along each principal direction of the sub-windows the signal's part of the variance is
    kept. Common drift passes; what noise alone explains is averaged away. Rows sum to 1.
    """
    variance, direction = np.linalg.eigh(gram)
    kept = np.divide(np.maximum(variance - noise, 0.0), variance, out=np.zeros_like(variance), where=variance > 0)
    if not kept.any():
        return np.full_like(gram, 1.0 / len(gram))
    rows: FloatArray = (direction * kept) @ direction.T
    total = rows.sum(1, keepdims=True)
    even = np.full_like(rows, 1.0 / len(rows))  # for an idle sub-window, which nothing of the others explains
    return np.asarray(np.divide(rows, total, out=even, where=np.abs(total) > 1e-9), np.float64)


def drift_directions(gram: FloatArray, noise: float) -> FloatArray:
    """`[<= 4, n]` float64, combinations of sub-windows: the principal directions of the steps between them.

    Steps are taken without sampling noise; each direction is as long as one standard deviation of a step.
    """
    steps = np.diff(denoiser(gram, noise), axis=0) / np.sqrt(max(1, len(gram) - 1))
    variance, direction = np.linalg.eigh(steps @ gram @ steps.T)
    real = variance > 1e-9 * np.trace(gram)
    found: FloatArray = (direction.T @ steps)[real][-MOST_DIRECTIONS:]
    return found


def drift_part(gram: FloatArray, noise: float) -> FloatArray:
    """`[n]` float64 in 0..1: how much of each sub-window's distance from the mean is more than sampling noise."""
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    distance = np.maximum(np.diag(centred), 0.0)
    sampled = noise * (1.0 - 1.0 / len(gram))
    part = np.divide(np.maximum(distance - sampled, 0.0), distance, out=np.zeros_like(distance), where=distance > 0)
    return np.asarray(np.sqrt(part), np.float64)
