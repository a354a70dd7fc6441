"""Water-filling: how an expert's tokens are split over its replicas so that ranks finish together.

For one expert, given what else its replicas' ranks carry, the split that minimises the sum of squared rank
times fills the least loaded ranks up to a common level. Repeating it over all replicated experts descends to
the minimum of the whole layer's sum of squares, whose largest rank time is the least possible one too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.kernels.compiler import jit


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
    """Working memory of `fill`, each `[max_replicas]`: `base`, `pace`, `part` float64 and `order` int64."""

    base: NDArray[np.float64]
    pace: NDArray[np.float64]
    part: NDArray[np.float64]
    order: NDArray[np.int64]


@jit
def new_scratch(size: int) -> Scratch:
    """Working memory for experts of up to `size` replicas."""
    return Scratch(np.empty(size), np.empty(size), np.empty(size), np.empty(size, np.int64))


@jit
def fill(num: int, weight: float, scratch: Scratch) -> None:
    """Splits `weight` over `num` ranks that carry `base` at speed `pace`; writes `part`.

    The level reached is the lowest at which the ranks below it take everything.
    """
    base, pace, part, order = scratch
    for i in range(num):
        key = base[i] / pace[i]
        j = i
        while j > 0 and base[order[j - 1]] / pace[order[j - 1]] > key:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i
    carried = weight
    speed = 0.0
    level = 0.0
    for i in range(num):
        k = order[i]
        carried += base[k]
        speed += pace[k]
        level = carried / speed
        if i + 1 == num or level * pace[order[i + 1]] <= base[order[i + 1]]:
            break
    for i in range(num):
        part[i] = max(0.0, level * pace[i] - base[i])


@jit
def refill(layer: Layer, scenario: int, expert: int, scratch: Scratch) -> float:
    """Splits one expert's load afresh in one scenario; returns the largest change of a share."""
    num = layer.replicas[expert]
    host, share, load = layer.host[expert], layer.share[scenario, expert], layer.load[scenario]
    weight = layer.weight[scenario, expert]
    if layer.uniform:
        for k in range(num):
            scratch.part[k] = weight / num
    else:
        for k in range(num):
            scratch.base[k] = load[host[k]] - share[k]
            scratch.pace[k] = layer.speed[host[k]]
        fill(num, weight, scratch)
    largest = 0.0
    for k in range(num):
        change = scratch.part[k] - share[k]
        largest = max(largest, abs(change))
        load[host[k]] += change
        share[k] = scratch.part[k]
    return largest


@jit
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


@jit
def spread_evenly(layer: Layer) -> None:
    """Starts every scenario with an even split of each expert over its replicas."""
    layer.load[:] = 0.0
    scenarios, experts = layer.weight.shape
    for c in range(scenarios):
        for e in range(experts):
            num = layer.replicas[e]
            for k in range(num):
                layer.share[c, e, k] = layer.weight[c, e] / num
                layer.load[c, layer.host[e, k]] += layer.weight[c, e] / num + layer.fixed[e]


@jit
def settle(layer: Layer, tolerance: float, sweeps: int, scratch: Scratch) -> None:
    """Refills all replicated experts of all scenarios until no share changes by more than `tolerance`."""
    scenarios, experts = layer.weight.shape
    for c in range(scenarios):
        for _ in range(sweeps):
            largest = 0.0
            for e in range(experts):
                if layer.replicas[e] > 1:
                    largest = max(largest, refill(layer, c, e, scratch))
            if largest < tolerance or layer.uniform:
                break


@jit
def slowest(layer: Layer, scenario: int) -> float:
    """The largest time (load over speed) of a rank in one scenario."""
    longest = 0.0
    for r in range(layer.load.shape[1]):
        if layer.speed[r] > 0.0:
            longest = max(longest, layer.load[scenario, r] / layer.speed[r])
    return longest
