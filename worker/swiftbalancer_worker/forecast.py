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


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """`expected` `[layers, experts]` tokens of the next sub-window; `scenarios` `[n, layers, experts]`, what else
    may come (the expected loads first)."""

    expected: FloatArray
    scenarios: FloatArray


def forecast(loads: FloatArray, *, stretch: float = 3.0) -> Forecast:
    """From `loads` `[sub_windows, layers, experts]`, oldest first.

    The scenarios add `stretch` times what the first and the last sub-window had over the mean.
    """
    shares = level_traffic(loads)
    mean = shares.mean(0)
    expected = smoothed(shares, mean)
    others = [np.maximum(expected + stretch * (shares[i] - mean), 0.1 * expected) for i in (0, -1)]
    return Forecast(expected, np.stack([expected, *others]))


def level_traffic(loads: FloatArray) -> FloatArray:
    """`loads` with every sub-window of a layer scaled to the layer's mean traffic."""
    if len(loads) == 1:
        return loads
    total = loads.sum(2, keepdims=True)
    scale = np.divide(total.mean(0), total, out=np.zeros_like(total), where=total > 0)
    return loads * scale


def smoothed(shares: FloatArray, mean: FloatArray) -> FloatArray:
    """`[layers, experts]` float64, the combination of sub-windows that would have predicted best so far."""
    num = len(shares)
    if num == 1:
        return shares[0]
    whitened = np.divide(shares, np.sqrt(mean), out=np.zeros_like(shares), where=mean > 0).reshape(num, -1)
    weights = best_weights(whitened @ whitened.T, noise=float((mean > 0).sum()))
    return np.maximum(np.tensordot(weights, shares, 1), 0.0)


def best_weights(gram: FloatArray, *, noise: float) -> FloatArray:
    """`[n]` float64: of several ways to combine past sub-windows, the one that predicted the later half best.

    `gram` `[n, n]`: products of sub-windows whose counts have variance 1; `noise`: the sum of these variances.
    """
    num = len(gram)
    trials = range(max(2, num // 2), num)
    error = np.zeros(len(candidates(gram[:1, :1], noise)))
    for seen in trials:
        weights = candidates(gram[:seen, :seen], noise)
        residual = np.concatenate([-weights, np.ones((len(weights), 1))], 1)
        error += np.einsum("ki,ij,kj->k", residual, gram[: seen + 1, : seen + 1], residual)
    return candidates(gram, noise)[int(error.argmin())]


def candidates(gram: FloatArray, noise: float) -> FloatArray:
    """`[candidates, n]` float64: denoised last sub-window, the last one, and means of the last 2, 4, 8 and all."""
    num = len(gram)
    rows = [denoised_last(gram, noise)]
    for span in (1, 2, 4, 8, num):
        row = np.zeros(num)
        row[-min(span, num) :] = 1.0 / min(span, num)
        rows.append(row)
    return np.stack(rows)


def denoised_last(gram: FloatArray, noise: float) -> FloatArray:
    """`[n]` float64, weights that give the last sub-window without its sampling noise (a Wiener filter).

    Along each principal direction of the sub-windows the signal's part of the variance is kept: common drift
    passes, what only noise explains is averaged away.
    """
    variance, direction = np.linalg.eigh(gram)
    kept = np.divide(np.maximum(variance - noise, 0.0), variance, out=np.zeros_like(variance), where=variance > 0)
    if not kept.any():
        return np.full(len(gram), 1.0 / len(gram))
    weights: FloatArray = (direction * kept) @ direction[-1]
    return weights / weights.sum()
