"""The dispatch solver: how each expert's tokens are split over its replicas, exactly and as tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.dispatch import DispatchForm, column_order, slot_fractions, uniform_table
from swiftbalancer.placement import Placement
from swiftbalancer_worker.cost import CostModel
from swiftbalancer_worker.kernels.concentrate import concentrate
from swiftbalancer_worker.kernels.dispatch import (
    FINE,
    ROUGH,
    Effort,
    Split,
    least_times,
    split_layers,
)
from swiftbalancer_worker.kernels.tables import Wanted, even_tables, exact_fractions, round_layers, solve_layers

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """A split of every expert's tokens over its slots.

    `fractions` `[layers, slots]` float64: the share of its expert's tokens each slot serves; 0 on ranks that
    serve nothing. `table` `[layers, experts, width]` int32 expresses it.
    """

    placement: Placement
    fractions: FloatArray
    table: NDArray[np.int32]

    @classmethod
    def of_table(cls, placement: Placement, table: NDArray[np.int32]) -> Dispatch:
        """The split a dispatch table makes."""
        return cls(placement, slot_fractions(table, placement), table)

    def rank_loads(self, loads: FloatArray) -> FloatArray:
        """`[..., layers, experts]` tokens -> `[..., layers, ranks]` tokens if they are split this way."""
        return loads_of_fractions(self.placement, self.fractions, loads)


def loads_of_fractions(placement: Placement, fractions: FloatArray, loads: FloatArray) -> FloatArray:
    """`[..., layers, experts]` tokens, split by `fractions` `[layers, slots]` -> `[..., layers, ranks]` tokens."""
    layers, experts = loads.shape[-2:]
    flat = np.arange(layers)[:, None] * experts + placement.physical_to_logical_map
    per_slot = loads.reshape(*loads.shape[:-2], -1).take(flat, -1) * fractions
    topology = placement.topology
    ranks: FloatArray = per_slot.reshape(*loads.shape[:-1], topology.num_ranks, topology.slots_per_rank).sum(-1)
    return ranks


def rank_times(placement: Placement, rank_loads: FloatArray) -> FloatArray:
    """`[..., ranks]` loads over speed, of the ranks that serve: what waits for what."""
    speed = placement.topology.speeds()
    times: FloatArray = rank_loads[..., speed > 0] / speed[speed > 0]
    return times


def slowest_over_ideal(placement: Placement, rank_loads: FloatArray) -> FloatArray:
    """`[..., ranks]` loads -> the slowest rank's time over that of a perfect split; 1.0 is perfect.

    With equal speeds and no excluded rank this is max/mean, the imbalance.
    """
    speed = placement.topology.speeds()
    ideal = rank_loads.sum(-1) / speed.sum()
    slowest = rank_times(placement, rank_loads).max(-1)
    ratio: FloatArray = np.divide(slowest, ideal, out=np.ones_like(ideal), where=ideal > 0)
    return ratio


def slowest_time(placement: Placement, fractions: FloatArray, loads: FloatArray, cost: CostModel) -> FloatArray:
    """`[layers]` float64, the slowest rank's time, in tokens of a rank of speed 1.

    For `loads` `[layers, experts]`, split by `fractions` `[layers, slots]`.
    """
    tokens = np.take_along_axis(loads, placement.physical_to_logical_map.astype(np.int64), 1) * fractions
    worth = cost.worth(tokens).reshape(len(loads), placement.topology.num_ranks, -1).sum(2)
    slowest: FloatArray = rank_times(placement, worth).max(1)
    return slowest


def ideal_time(placement: Placement, loads: FloatArray, cost: CostModel) -> FloatArray:
    """`[layers]` float64, every rank's time if each expert's weights were read once and all ranks took as long."""
    ideal: FloatArray = cost.worth(loads).sum(1) / placement.topology.speeds().sum()
    return ideal


def split(
    placement: Placement,
    loads: FloatArray,
    *,
    uniform: bool = False,
    tolerance: float = FINE,
    drift: FloatArray | None = None,
) -> Split:
    """The best split of `loads` `[layers, experts]` in real numbers; by default within 0.1 % of the optimum.

    With `drift` (of a `Forecast`), the best of loads plus one deviation of each rank's drift.
    """
    effort = Effort(most_replicas(placement), uniform, tolerance)
    drift = np.zeros((0, *loads.shape)) if drift is None else drift
    speed = placement.topology.speeds()
    return split_layers(_by_rank(placement), np.ascontiguousarray(loads), np.ascontiguousarray(drift), speed, effort)


def shortest_times(
    placement: Placement, loads: FloatArray, *, uniform: bool = False, tolerance: float = ROUGH
) -> FloatArray:
    """`[judges, layers]` float64, the slowest rank's time if `loads` `[judges, layers, experts]` are split best."""
    effort = Effort(most_replicas(placement), uniform, tolerance)
    return least_times(_by_rank(placement), np.ascontiguousarray(loads), placement.topology.speeds(), effort)


def most_replicas(placement: Placement) -> int:
    """The largest number of ranks that can host one expert."""
    return max(1, min(int(placement.logical_replica_count().max(initial=1)), placement.topology.num_ranks))


def solve(
    placement: Placement,
    loads: FloatArray,
    form: DispatchForm,
    *,
    cost: CostModel | None = None,
    drift: FloatArray | None = None,
) -> Dispatch:
    """The best dispatch of expected `loads` `[layers, experts]` of a sub-window that `form` can express.

    With `drift`, ranks whose load may change more than others' are left idler by one deviation of that change.
    With `cost`, layers whose slowest rank would save more by reading fewer weights than by carrying fewer tokens
    use one replica of each expert.
    """
    place, speed = _by_rank(placement), placement.topology.speeds()
    if form.kind == "uniform":
        exact = split(placement, loads, uniform=True)
        return Dispatch(placement, exact_fractions(exact, place), _uniform_table(placement, exact, form.width))
    order = column_order(placement.topology.num_ranks if form.kind == "static" else form.width)
    wanted = Wanted(np.ascontiguousarray(loads), place, speed, order, form.kind == "exact")
    if cost is not None and cost.tokens_per_activation > 0:
        found = round_layers(wanted, _cheaper(split(placement, loads, drift=drift), loads, speed, cost))
    else:
        drift = np.zeros((0, *loads.shape)) if drift is None else np.ascontiguousarray(drift)
        found = solve_layers(wanted, drift, Effort(most_replicas(placement), False, FINE))
    return Dispatch(placement, found.fractions, found.table)


def rank_costs(parts: Split, speed: FloatArray, cost: CostModel) -> FloatArray:
    """`[layers, ranks]` float64, tokens each rank serves plus what its activations are worth, over its speed."""
    layers, ranks = parts.load.shape
    worth = cost.worth(parts.share)
    layer = np.arange(layers)[:, None, None] * ranks
    used = np.arange(parts.host.shape[2]) < parts.replicas[:, :, None]
    total = np.bincount((layer + parts.host)[used], worth[used], layers * ranks).reshape(layers, ranks)
    return np.divide(total, speed, out=np.zeros_like(total), where=speed > 0)


def least_costs(
    placement: Placement, loads: FloatArray, cost: CostModel, *, uniform: bool = False, tolerance: float = FINE
) -> FloatArray:
    """`[layers]` float64, the slowest rank's time, in tokens, if `loads` `[layers, experts]` are served best."""
    speed = placement.topology.speeds()
    parts = split(placement, loads, uniform=uniform, tolerance=tolerance)
    if not uniform:
        parts = _cheaper(parts, loads, speed, cost)
    slowest: FloatArray = rank_costs(parts, speed, cost).max(1)
    return slowest


def _cheaper(spread: Split, loads: FloatArray, speed: FloatArray, cost: CostModel) -> Split:
    """Per layer the cheaper of `spread` and serving each expert from one replica.

    A replica left out entirely gets no column of a table, so its weights are not read.
    """
    fixed = cost.tokens_per_activation * cost.activations(loads)
    whole = concentrate(spread, np.ascontiguousarray(loads), fixed, speed)
    better = rank_costs(whole, speed, cost).max(1) < rank_costs(spread, speed, cost).max(1)
    pick = better[:, None, None]
    return Split(
        replicas=np.where(better[:, None], whole.replicas, spread.replicas),
        host=np.where(pick, whole.host, spread.host),
        share=np.where(pick, whole.share, spread.share),
        load=np.where(better[:, None], _token_loads(whole), spread.load),
    )


def _token_loads(parts: Split) -> FloatArray:
    """`[layers, ranks]` float64, tokens of each rank."""
    layers, ranks = parts.load.shape
    flat = np.arange(layers)[:, None, None] * ranks + parts.host
    total = np.bincount(flat.ravel(), parts.share.ravel(), layers * ranks)
    return np.asarray(total, np.float64).reshape(layers, ranks)


def _by_rank(placement: Placement) -> NDArray[np.int64]:
    """`[layers, ranks, slots]` int64, the expert of each slot."""
    shape = (placement.num_layers, placement.topology.num_ranks, placement.topology.slots_per_rank)
    return placement.physical_to_logical_map.reshape(shape).astype(np.int64)


def _uniform_table(placement: Placement, exact: Split, width: int) -> NDArray[np.int32]:
    if not placement.topology.excluded_ranks:
        return uniform_table(placement, width)
    return even_tables(exact, _by_rank(placement), column_order(width))
