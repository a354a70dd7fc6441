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
SPANS = (1, 2, 4, 8)
"""Sub-windows whose means are candidates, besides that of all."""


@dataclass(frozen=True, slots=True, eq=False)
class Levelled:
    """Sub-windows in which every layer has its mean traffic: `loads` `[n, layers, experts]` by `scale` `[n, layers]`.

    Not multiplied out, as most need only sums of them.
    """

    loads: FloatArray
    scale: FloatArray

    @classmethod
    def of(cls, loads: FloatArray, tokens: FloatArray) -> Levelled:
        """`loads` of which sub-windows and layers have `tokens` `[n, layers]`."""
        return cls(loads, np.divide(tokens.mean(0), tokens, out=np.zeros_like(tokens), where=tokens > 0))

    def shares(self, chosen: NDArray[np.int64]) -> FloatArray:
        """`[k, layers, experts]`: the `chosen` `[k]` sub-windows."""
        shares: FloatArray = self.loads[chosen] * self.scale[chosen][:, :, None]
        return shares

    def combined(self, weights: FloatArray) -> FloatArray:
        """`[k, n]` weights of the sub-windows -> `[k, layers, experts]`."""
        out = np.empty((len(weights), *self.loads.shape[1:]))
        of_layer = weights * self.scale.T[:, None, :]
        np.matmul(of_layer, self.loads.transpose(1, 0, 2), out=out.transpose(1, 0, 2))
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """What to plan for, in tokens of one sub-window.

    `expected` `[layers, experts]`: for dispatch. `scenarios` `[n, layers, experts]`: for placements, which last
    longer; first the expected loads, then where they may go.
    `drift` `[directions, layers, experts]`: how far one sub-window may miss the expected loads, one standard
    deviation in each of a few independent directions.
    `weights` `[sub_windows]`, sum 1: how much each sub-window seen says about the next one.
    `levelled`: the sub-windows seen.
    """

    expected: FloatArray
    scenarios: FloatArray
    drift: FloatArray
    weights: FloatArray
    levelled: Levelled


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Sub-windows scaled to the same traffic, counts divided by the root of their mean.

    `gram` `[n, n]`: products between sub-windows; `traffic` `[n]`: tokens of each over their mean; `noise`: the
    variance that sampling gives a sub-window of mean traffic, one with more has so much less.
    """

    gram: FloatArray
    traffic: FloatArray
    noise: float


def forecast(loads: FloatArray, *, every: bool = False, scenarios: bool = True, strength: float = 1.0) -> Forecast:
    """From `loads` `[sub_windows, layers, experts]`, oldest first.

    The scenarios add three times what the first and the last sub-window had over the mean, in so far as it is drift
    and not sampling noise. Where many sub-windows together predict the next one best, it may resemble any of them:
    then twice what each had. With `every`, three times what each had. All this times `strength`. Without `scenarios`,
    which dispatch does not need, there are only the expected loads.
    """
    tokens = loads.sum(2)
    levelled, traffic = Levelled.of(loads, tokens), relative_traffic(tokens.sum(1))
    mean = levelled.combined(pooled(traffic)[None])[0]
    seen = Seen(products(levelled, mean), traffic, noise=float((mean > 0).sum()))
    known = histories(len(loads))
    clean = denoisers(seen, known)
    tried = candidates(seen, known, clean)
    nth = best_candidate(seen, tried[:-1])
    weights = tried[-1, nth]
    found = levelled.combined(np.concatenate([weights[None], drift_directions(seen, clean[-1], nth)]))
    expected = np.maximum(found[0], 0.0, out=found[0])
    demands = expected[None]
    if scenarios:
        scattered = 1.0 / np.square(weights).sum() > len(weights) / 3
        part = drift_part(seen)
        if not every and not scattered:
            part[1:-1] = 0.0
        stretch = (2.0 if scattered and not every else 3.0) * strength * part
        demands = np.concatenate([demands, stretched(expected, levelled, mean, stretch)])
    return Forecast(expected, demands, found[1:], weights, levelled)


def stretched(expected: FloatArray, levelled: Levelled, mean: FloatArray, stretch: FloatArray) -> FloatArray:
    """`[k, layers, experts]`: the expected loads and `stretch` `[sub_windows]` times what each had over the mean.

    Of the sub-windows whose stretch is not 0.
    """
    most = expected.copy()  # the last sub-window may have been a burst
    for loads, scale in zip(levelled.loads, 2.0 * levelled.scale, strict=True):
        np.maximum(most, loads * scale[:, None], out=most)
    chosen = np.nonzero(stretch)[0]
    added = levelled.shares(chosen)
    added -= mean
    added *= stretch[chosen][:, None, None]
    added += expected
    return np.clip(added, 0.1 * expected, most, out=added)


def products(levelled: Levelled, mean: FloatArray) -> FloatArray:
    """`[n, n]`: products between sub-windows whose loads are divided by the root of `mean` `[layers, experts]`."""
    root = np.divide(1.0, np.sqrt(mean), out=np.zeros_like(mean), where=mean > 0)
    even = (levelled.loads * root).transpose(1, 0, 2)
    gram: FloatArray = np.einsum("lij,il,jl->ij", even @ even.transpose(0, 2, 1), levelled.scale, levelled.scale)
    return gram


def relative_traffic(tokens: FloatArray) -> FloatArray:
    """`[sub_windows]` float64, `tokens` of each over their mean; 1 where there are none at all."""
    if tokens.sum() <= 0:
        return np.ones(len(tokens))
    return np.asarray(tokens / tokens.mean(), np.float64)


def pooled(traffic: FloatArray, among: NDArray[np.bool_] | bool = True) -> FloatArray:
    """`[..., n]` float64, sum 1: weights that make of levelled sub-windows the mean of their tokens; even if idle.

    `among` `[..., n]`: of these sub-windows only, of all by default.
    """
    among = np.broadcast_to(among, np.broadcast_shapes(traffic.shape, np.shape(among)))
    part = np.where(among, traffic, 0.0)
    total = part.sum(-1, keepdims=True)
    part = np.where(total > 0, part, among)
    return np.asarray(part / part.sum(-1, keepdims=True), np.float64)


def histories(num: int) -> NDArray[np.bool_]:
    """`[trials + 1, n]` bool: the sub-windows before each of the last `TRIALS`; in the last row all `num`."""
    first = max(1, min(2, num - 1), num - TRIALS)
    return np.less(np.arange(num), np.arange(first, num + 1)[:, None])


def best_candidate(seen: Seen, tried: FloatArray) -> int:
    """Which of the candidates `tried` `[trials, candidates, n]` predicted the sub-windows after them best.

    The first of those that did equally well: means of more sub-windows than there were are the same.
    """
    trials, _, num = tried.shape
    missed = -tried
    missed[np.arange(trials), :, np.arange(num - trials, num)] += 1.0
    squares = ((missed @ seen.gram) * missed).sum(2)
    error = seen.traffic[num - trials :] @ squares
    return int(np.argmax(error <= error.min() * (1.0 + 1e-9)))


def candidates(seen: Seen, known: NDArray[np.bool_], clean: FloatArray) -> FloatArray:
    """`[histories, candidates, n]` float64, weights of the sub-windows `known` `[histories, n]`.

    The last one denoised (from `denoisers`), the last one, and means of the last 2, 4, 8 and all.
    """
    num = known.sum(1)
    last = clean[np.arange(len(num)), num - 1]
    span = np.minimum(np.array([*SPANS, len(seen.gram)])[:, None, None], num[:, None])
    among = known & (np.arange(len(seen.gram)) >= num[:, None] - span)
    return np.stack([last, *pooled(seen.traffic, among)], 1)


def denoisers(seen: Seen, known: NDArray[np.bool_]) -> FloatArray:
    """`[histories, n, n]` float64, row `i` combines sub-windows `known` `[histories, n]` to `i` without its noise.

    A Wiener filter: along each principal direction of the sub-windows, weighed so that all are equally noisy, the
    signal's part of the variance is kept. Common drift passes; what noise alone explains is averaged away. Rows sum
    to 1. All histories are solved at once, the sub-windows after them as if they had been idle.
    """
    weight = np.where(known, np.sqrt(seen.traffic), 0.0)
    variance, direction = np.linalg.eigh(seen.gram * weight[:, :, None] * weight[:, None, :])
    signal = np.maximum(variance - seen.noise, 0.0)
    kept = np.divide(signal, variance, out=np.zeros_like(variance), where=variance > 0)
    rows: FloatArray = (direction * kept[:, None, :]) @ direction.transpose(0, 2, 1) * weight[:, None, :]
    total = rows.sum(2, keepdims=True)
    even = pooled(seen.traffic, known)[:, None, :]  # for an idle sub-window
    some = np.abs(total) > 1e-9
    return np.where(some, rows / np.where(some, total, 1.0), even)


def drift_directions(seen: Seen, clean: FloatArray, nth: int) -> FloatArray:
    """`[<= 4, n]` float64, combinations of sub-windows: the principal directions of what candidate `nth` misses.

    For the last sub-window these are the steps between sub-windows, for a mean their distances from it, without
    sampling noise (`clean` `[n, n]`, from `denoisers`); each direction is as long as one standard deviation.
    """
    num = len(seen.gram)
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
