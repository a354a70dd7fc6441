"""Water-filling: how an expert's tokens are split over its replicas so that ranks finish together.

For one expert, given what else its replicas' ranks carry, the split that minimises the sum of squared rank
times fills the least loaded ranks up to a common level. Repeating it over all replicated experts descends to
the minimum of the whole layer's sum of squares, whose largest rank time is the least possible one too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit_inlined, jit_inner

OVERSHOOT = 1.65
"""How far a refill goes beyond the level where many follow; between 1.5 and 1.75 the fewest sweeps are needed."""


class Layer(NamedTuple):
    """One MoE layer under several load scenarios; arrays are updated in place.

    `place` `[ranks, slots]` int64, the expert of each slot, -1 for a slot that holds nothing useful.
    `replicas` `[experts]` int64, replicas on ranks that serve; `host` `[experts, max_replicas]` int64, their ranks.
    `share` `[scenarios, experts, max_replicas]` float64, load each replica carries.
    `load` `[scenarios, ranks]` float64, load of each rank. `weight` `[scenarios, experts]` float64, load of each
    expert. `fixed` `[experts]` float64, load a replica adds by being there at all.
    `speed` `[ranks]` float64, 0 for a rank that serves nothing. `uniform`: replicas share evenly.
    """

    place: NDArray[np.int64]
    replicas: NDArray[np.int64]
    host: NDArray[np.int64]
    share: NDArray[np.float64]
    load: NDArray[np.float64]
    weight: NDArray[np.float64]
    fixed: NDArray[np.float64]
    speed: NDArray[np.float64]
    uniform: bool


class Scratch(NamedTuple):
    """Working memory for one expert, each `[max_replicas]` float64.

    `base`: what the ranks of its replicas carry without it; `pace`: their speed; `part`: its load on each.
    """

    base: NDArray[np.float64]
    pace: NDArray[np.float64]
    part: NDArray[np.float64]


@jit_inner
def new_scratch(size: int) -> Scratch:
    """Working memory for experts of up to `size` replicas."""
    return Scratch(np.empty(size), np.empty(size), np.empty(size))


@jit_inlined
def fill(num: int, weight: float, scratch: Scratch) -> None:
    """Splits `weight` over `num` ranks that carry `base` at speed `pace`; writes `part`.

    The common level starts as if every rank took part and falls as those above it drop out.
    """
    base, pace, part = scratch.base, scratch.pace, scratch.part
    carried, speed = weight, 0.0
    for k in range(num):
        part[k] = 1.0
        carried += base[k]
        speed += pace[k]
    left = num
    before = num + 1
    while left < before and left > 1:
        before = left
        for k in range(num):
            if part[k] > 0.0 and left > 1 and base[k] * speed > carried * pace[k]:
                part[k] = 0.0
                carried -= base[k]
                speed -= pace[k]
                left -= 1
    level = carried / speed
    for k in range(num):
        if part[k] > 0.0:
            part[k] = max(0.0, level * pace[k] - base[k])


@jit_inlined
def divide(layer: Layer, num: int, weight: float, scratch: Scratch) -> None:
    """Writes `scratch.part`: `weight` over `num` replicas as this layer's engine splits it."""
    if layer.uniform:
        for k in range(num):
            scratch.part[k] = weight / num
    else:
        fill(num, weight, scratch)


@jit_inlined
def refill(layer: Layer, scenario: int, experts: NDArray[np.int64], overshoot: float, scratch: Scratch) -> float:
    """Splits the load of some experts afresh, one after the other; returns the largest change of a share.

    With `overshoot` above 1, changes go so much further where no share would fall below zero (successive
    over-relaxation); the shares of an expert must add up to its load then. All is in one function: passing these
    arrays for every expert would take longer than the sums.
    """
    host, replicas, speed = layer.host, layer.replicas, layer.speed
    share, load, weight = layer.share[scenario], layer.load[scenario], layer.weight[scenario]
    base, part = scratch.base, scratch.part
    largest = 0.0
    for e in experts:
        num = replicas[e]
        carried, pace = weight[e], 0.0
        for k in range(num):
            base[k] = load[host[e, k]] - share[e, k]
            carried += base[k]
            pace += speed[host[e, k]]
        level = carried / pace
        before = np.inf
        while level < before:  # ranks above the level drop out, which lowers it
            before = level
            for k in range(num):
                own = speed[host[e, k]]
                if level * own < base[k] < np.inf:
                    carried -= base[k]
                    pace -= own
                    base[k] = np.inf
                    level = carried / pace
        step = overshoot
        for k in range(num):
            part[k] = max(0.0, level * speed[host[e, k]] - base[k]) - share[e, k]
            largest = max(largest, abs(part[k]))
            if share[e, k] + overshoot * part[k] < 0.0:
                step = 1.0
        for k in range(num):
            share[e, k] += step * part[k]
            load[host[e, k]] += step * part[k]
    return largest


@jit_inlined
def share_equally(layer: Layer, scenario: int, experts: NDArray[np.int64]) -> None:
    """`refill` for engines that split evenly."""
    share, load = layer.share[scenario], layer.load[scenario]
    for e in experts:
        for k in range(layer.replicas[e]):
            even = layer.weight[scenario, e] / layer.replicas[e]
            load[layer.host[e, k]] += even - share[e, k]
            share[e, k] = even


@jit_inlined
def locate(layer: Layer) -> None:
    """Fills `replicas` and `host` from `place`; a second replica on a rank becomes an empty slot."""
    ranks, slots = layer.place.shape
    layer.replicas[:] = 0
    for r in range(ranks):
        if layer.speed[r] <= 0.0:
            continue
        for s in range(slots):
            expert = layer.place[r, s]
            if expert < 0:
                continue
            num = layer.replicas[expert]
            if num > 0 and layer.host[expert, num - 1] == r:
                layer.place[r, s] = -1
            else:
                layer.host[expert, num] = r
                layer.replicas[expert] = num + 1


@jit_inlined
def spread_evenly(layer: Layer, scenario: int) -> None:
    """Starts a scenario with an even split of each expert over its replicas."""
    share, load, weight = layer.share[scenario], layer.load[scenario], layer.weight[scenario]
    load[:] = 0.0
    for e in range(len(weight)):
        num = layer.replicas[e]
        for k in range(num):
            share[e, k] = weight[e] / num
            load[layer.host[e, k]] += weight[e] / num + layer.fixed[e]


@jit_inlined
def spread_alike(layer: Layer, scenario: int, other: int) -> None:
    """Starts a scenario with the split that another one has, which is closer to the best than an even one."""
    share, load, weight = layer.share[scenario], layer.load[scenario], layer.weight[scenario]
    load[:] = 0.0
    for e in range(len(weight)):
        num, total = layer.replicas[e], layer.weight[other, e]
        for k in range(num):
            share[e, k] = weight[e] * (layer.share[other, e, k] / total if total > 0.0 else 1.0 / num)
            load[layer.host[e, k]] += share[e, k] + layer.fixed[e]


@jit_inner
def settle_one(
    layer: Layer, scenario: int, experts: NDArray[np.int64], effort: tuple[float, int], scratch: Scratch
) -> None:
    """Refills experts, at most `effort[1]` times, until no share changes by `effort[0]` of the mean rank time."""
    least = effort[0] * layer.load[scenario].sum() / max(layer.speed.sum(), 1e-300)
    for _ in range(effort[1]):
        if refill(layer, scenario, experts, OVERSHOOT, scratch) < least:
            break


@jit_inner
def settle(layer: Layer, effort: tuple[float, int], scratch: Scratch) -> None:
    """Refills all replicated experts of all scenarios; `effort` as in `settle_one`."""
    if layer.uniform:
        return
    several = np.nonzero(layer.replicas > 1)[0]
    for c in range(len(layer.load)):
        settle_one(layer, c, several, effort, scratch)


@jit_inner
def begin_split(layer: Layer, effort: tuple[float, int], scratch: Scratch) -> None:
    """Splits all scenarios of a located layer; `effort` as in `settle_one`."""
    several = np.nonzero(layer.replicas > 1)[0]
    for c in range(len(layer.load)):
        if c == 0 or layer.uniform:
            spread_evenly(layer, c)
        else:
            spread_alike(layer, c, 0)
        if not layer.uniform:
            settle_one(layer, c, several, effort, scratch)


@jit_inner
def allow_for_drift(layer: Layer, drift: NDArray[np.float64]) -> None:
    """Adds to each rank's load in scenario 0 the deviation that `drift` `[directions, experts]` gives it."""
    square, moved = np.zeros(len(layer.speed)), np.empty(len(layer.speed))
    for d in range(len(drift)):
        moved[:] = 0.0
        for e in range(len(layer.replicas)):
            if layer.weight[0, e] > 0.0:
                part = drift[d, e] / layer.weight[0, e]
                for k in range(layer.replicas[e]):
                    moved[layer.host[e, k]] += part * layer.share[0, e, k]
        square += moved * moved
    layer.load[0] += np.sqrt(square)


@jit_inner
def new_layer(
    shape: tuple[int, int, int], scenarios: int, most: int, speed: NDArray[np.float64], uniform: bool
) -> Layer:
    """Memory for layers of `shape` (ranks, slots, experts), to be filled one after the other."""
    ranks, slots, experts = shape
    return Layer(
        np.empty((ranks, slots), np.int64),
        np.zeros(experts, np.int64),
        np.zeros((experts, most), np.int64),
        np.zeros((scenarios, experts, most)),
        np.zeros((scenarios, ranks)),
        np.zeros((scenarios, experts)),
        np.zeros(experts),
        speed,
        uniform,
    )


@jit_inlined
def slowest(layer: Layer, scenario: int) -> float:
    """The largest time (load over speed) of a rank in one scenario."""
    longest = 0.0
    for r in range(layer.load.shape[1]):
        if layer.speed[r] > 0.0:
            longest = max(longest, layer.load[scenario, r] / layer.speed[r])
    return longest
