"""Dispatch of all layers: fractions by water-filling, and tables that express them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit, jit_inner
from swiftbalancer_worker.kernels.water import (
    Layer,
    Scratch,
    allow_for_drift,
    begin_split,
    locate,
    new_layer,
    new_scratch,
    settle,
    slowest,
)

MOST_SWEEPS = 200
FINE, ROUGH = 3e-4, 2e-3
"""Tolerances: for tables, and for comparing placements."""


class Split(NamedTuple):
    """Who serves each expert's tokens, and how many of them.

    `replicas` `[layers, experts]` int64; `host` `[layers, experts, max_replicas]` int64, ranks;
    `share` same shape float64, load of each replica; `load` `[layers, ranks]` float64, with the margin for drift.
    """

    replicas: NDArray[np.int64]
    host: NDArray[np.int64]
    share: NDArray[np.float64]
    load: NDArray[np.float64]


class Effort(NamedTuple):
    """`most`: bound of an expert's replicas on serving ranks; `uniform`: replicas share evenly; `tolerance`: change
    of a share, over the mean rank time, that ends the solver."""

    most: int
    uniform: bool
    tolerance: float


@jit
def split_layers(
    place: NDArray[np.int64],
    weight: NDArray[np.float64],
    drift: NDArray[np.float64],
    speed: NDArray[np.float64],
    effort: Effort,
) -> Split:
    """Splits `weight` `[layers, experts]` over the replicas of `place` `[layers, ranks, slots]`.

    With tolerance `FINE` the largest rank time is within 0.1 % of the least possible. With `drift` `[directions,
    layers, experts]`, ranks that it may load more are left that much idler, and `load` includes this margin.
    """
    most = effort.most
    layers, ranks, _ = place.shape
    experts = weight.shape[1]
    out = Split(
        np.zeros((layers, experts), np.int64),
        np.zeros((layers, experts, most), np.int64),
        np.zeros((layers, experts, most)),
        np.zeros((layers, ranks)),
    )
    scratch = new_scratch(most)
    for i in range(layers):
        layer = Layer(
            place[i].copy(), out.replicas[i], out.host[i], out.share[i : i + 1], out.load[i : i + 1],
            weight[i : i + 1], np.zeros(experts), speed, effort.uniform,
        )  # fmt: skip
        split_layer(layer, drift[:, i], effort, scratch)
    return out


@jit_inner
def split_layer(layer: Layer, drift: NDArray[np.float64], effort: Effort, scratch: Scratch) -> None:
    """Splits a layer of one scenario; `drift` `[directions, experts]`."""
    locate(layer)
    first = max(ROUGH, effort.tolerance) if len(drift) > 0 else effort.tolerance
    begin_split(layer, (first, MOST_SWEEPS), scratch)
    if len(drift) > 0 and not effort.uniform:
        allow_for_drift(layer, drift)
        settle(layer, (effort.tolerance, MOST_SWEEPS), scratch)


@jit
def least_times(
    place: NDArray[np.int64], weight: NDArray[np.float64], speed: NDArray[np.float64], effort: Effort
) -> NDArray[np.float64]:
    """`[judges, layers]` float64, the slowest rank's time for `weight` `[judges, layers, experts]`, best split."""
    judges, layers, experts = weight.shape
    ranks, slots = place.shape[1:]
    layer = new_layer((ranks, slots, experts), judges, effort.most, speed, effort.uniform)
    scratch = new_scratch(effort.most)
    out = np.empty((judges, layers))
    for i in range(layers):
        layer.place[:] = place[i]
        layer.weight[:] = weight[:, i]
        locate(layer)
        begin_split(layer, (effort.tolerance, MOST_SWEEPS), scratch)
        for c in range(judges):
            out[c, i] = slowest(layer, c)
    return out
