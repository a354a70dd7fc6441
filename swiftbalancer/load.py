"""Loads: from tokens per slot to tokens per expert and per rank, and how uneven they are."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from swiftbalancer.errors import InvalidLoad
from swiftbalancer.placement import Placement

FloatArray = NDArray[np.float64]


def checked_load(load: ArrayLike, *, name: str = "load") -> FloatArray:
    """`load` as float64; raises `InvalidLoad` if a value is NaN, infinite or negative."""
    array = np.asarray(load)
    if array.dtype.kind not in "iuf":
        raise InvalidLoad(f"{name} must be numbers, got {array.dtype}")
    values = array.astype(np.float64)
    if values.size and not np.isfinite(values).all():
        raise InvalidLoad(f"{name} has {int((~np.isfinite(values)).sum())} NaN or infinite values")
    if values.size and values.min() < 0:
        where = tuple(int(i) for i in np.unravel_index(int(values.argmin()), values.shape))
        raise InvalidLoad(f"{name}{list(where)} is {values.min()}: loads cannot be negative")
    return values


def expert_loads(slot_loads: ArrayLike, placement: Placement) -> FloatArray:
    """`[..., layers, slots]` tokens per slot -> `[..., layers, experts]` tokens per expert."""
    slots = np.asarray(slot_loads)
    layers, experts = placement.num_layers, placement.num_experts
    if slots.shape[-2:] != (layers, placement.topology.num_slots):
        raise InvalidLoad(
            f"slot loads have shape {slots.shape}, expected [..., {layers}, {placement.topology.num_slots}]"
        )
    of_expert = _expert_of_slots(placement)
    rows = [np.bincount(of_expert, row, layers * experts) for row in slots.reshape(-1, of_expert.size)]
    return np.array(rows, np.float64).reshape(*slots.shape[:-2], layers, experts)


@functools.lru_cache(maxsize=4)
def _expert_of_slots(placement: Placement) -> NDArray[np.int64]:
    """`[layers * slots]`, experts numbered through the layers."""
    starts = np.arange(placement.num_layers)[:, None] * placement.num_experts
    return (starts + placement.physical_to_logical_map).ravel()


def rank_loads(slot_loads: ArrayLike, placement: Placement) -> FloatArray:
    """`[..., layers, slots]` tokens per slot -> `[..., layers, ranks]` tokens per rank."""
    slots = np.asarray(slot_loads, np.float64)
    shape = (*slots.shape[:-1], placement.topology.num_ranks, placement.topology.slots_per_rank)
    total: FloatArray = slots.reshape(shape).sum(-1)
    return total


def imbalance(loads_per_rank: ArrayLike) -> FloatArray:
    """max / mean over the last axis (ranks); 1.0 is perfect, and the value of an idle layer."""
    loads = np.asarray(loads_per_rank, np.float64)
    mean = loads.mean(-1)
    ratio: FloatArray = np.divide(loads.max(-1), mean, out=np.ones_like(mean), where=mean > 0)
    return ratio


def balancedness(loads_per_rank: ArrayLike) -> FloatArray:
    """mean / max over the last axis (ranks), the figure vLLM and SGLang report; 1.0 is perfect."""
    result: FloatArray = 1.0 / imbalance(loads_per_rank)
    return result
