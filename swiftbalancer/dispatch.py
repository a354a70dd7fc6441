"""Dispatch tables: which slot serves a token, expressed as repeated entries.

Column `c` of a table row names the slot for tokens whose hash is `c` modulo the table's width. A slot in
more columns gets a larger share. Kernels that pick `map[expert, hash(token) % count]` run it unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.errors import ConfigError, InvalidPlan
from swiftbalancer.placement import Placement

DispatchKind = Literal["table", "static", "uniform", "exact"]
HASH_MULTIPLIER = 2654435769
"""Knuth's multiplicative constant (TAOCP vol. 3, 6.4); vLLM hashes token indices with it."""
ENTRIES_AT_ONCE = 1 << 16
"""Of a dispatch table that is checked, in some tenths of a millisecond, most of which is numpy's, without the
interpreter lock."""


def nothing() -> None:
    """For where something could be done, as between two pieces of work, and need not."""


@dataclass(frozen=True, slots=True)
class DispatchForm:
    """What an engine's kernels can do with several replicas of an expert.

    `table`: a table of `width` columns, tokens hashed over them. `static`: one fixed replica per expert and
    source rank (log2phy maps); the table has one column per rank. `uniform`: tokens split evenly, whatever we
    want. `exact`: real-valued fractions, the bound that offline comparisons use.
    """

    kind: DispatchKind = "table"
    width: int = 32

    def __post_init__(self) -> None:
        if self.kind not in ("table", "static", "uniform", "exact"):
            raise ConfigError(f"dispatch.form: unknown {self.kind!r}; known: table, static, uniform, exact")
        if not 1 <= self.width <= 1024:
            raise ConfigError(f"dispatch.width: {self.width} is outside 1..1024")


def default_width(num_ranks: int) -> int:
    """Columns of a dispatch table where nobody asks for a number: 32, and 64 for more than 32 ranks.

    With more ranks each carries less, and a column of a hot expert weighs more against it.
    """
    return 32 if num_ranks <= 32 else 64


def column_of(token: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """The column tokens of these batch positions use; `[n]` int64. The definition every kernel must match."""
    return ((token * HASH_MULTIPLIER) & 0xFFFFFFFF) % width


@functools.cache
def column_order(width: int) -> NDArray[np.int64]:
    """`[width]` int64, read-only: columns in the order in which the tokens 0, 1, 2, ... of a batch first reach them.

    Small batches reach only the first few; a table is filled in this order so that every prefix has about the
    right proportions.
    """
    seen = column_of(np.arange(64 * width), width)
    _, first = np.unique(seen, return_index=True)
    order = seen[np.sort(first)]
    missing = np.setdiff1d(np.arange(width), order)
    whole = np.concatenate([order, missing])
    whole.flags.writeable = False
    return whole


def uniform_table(placement: Placement, width: int) -> NDArray[np.int32]:
    """`[layers, experts, width]` int32, replicas of each expert in turn: the split engines start with."""
    slots = placement.logical_to_physical_map()
    count = np.maximum(placement.logical_replica_count(), 1)
    table = np.empty((*count.shape, width), np.int32)
    for nth, column in enumerate(column_order(width)):
        table[:, :, column] = np.take_along_axis(slots, (nth % count)[:, :, None], 2)[:, :, 0]
    return table


def log2phy(table: NDArray[np.int32], rank: int) -> NDArray[np.int32]:
    """`[layers, experts]` int32, the static map of one rank: its column of the table."""
    column: NDArray[np.int32] = table[:, :, rank % table.shape[2]]
    return column


def check_table(table: NDArray[np.int32], placement: Placement, *, between: Callable[[], None] = nothing) -> None:
    """Raises `InvalidPlan` unless every entry is a slot that holds the row's expert, on a rank that serves.

    `between` is called between some layers and the next.
    """
    layers, experts = placement.num_layers, placement.num_experts
    if table.ndim != 3 or table.shape[:2] != (layers, experts):
        raise InvalidPlan(f"dispatch table has shape {table.shape}, expected [{layers}, {experts}, width]")
    if table.size and (table.min() < 0 or table.max() >= placement.topology.num_slots):
        raise InvalidPlan(f"dispatch table names a slot outside 0..{placement.topology.num_slots - 1}")
    own = np.arange(experts, dtype=placement.physical_to_logical_map.dtype)[:, None]
    held = placement.physical_to_logical_map.ravel()
    starts = np.arange(layers)[:, None, None] * placement.topology.num_slots
    at_once = max(ENTRIES_AT_ONCE // max(table[:1].size, 1), 1)
    for first in range(0, layers, at_once):
        if first:
            between()
        rows = table[first : first + at_once]
        found = held.take(rows + starts[first : first + at_once])
        if (found != own).any():
            layer, expert, column = (int(i) for i in np.argwhere(found != own)[0])
            raise InvalidPlan(
                f"layer {first + layer}: dispatch of expert {expert} names slot {rows[layer, expert, column]}, which "
                f"holds expert {found[layer, expert, column]}"
            )
    excluded = placement.topology.excluded_ranks
    if excluded and np.isin(table // placement.topology.slots_per_rank, excluded).any():
        raise InvalidPlan(f"dispatch table sends tokens to an excluded rank ({list(excluded)})")


def slot_fractions(table: NDArray[np.int32], placement: Placement) -> NDArray[np.float64]:
    """`[layers, slots]` float64, the share of its expert's tokens each slot gets from the table."""
    layers, num_slots = placement.num_layers, placement.topology.num_slots
    flat = np.arange(layers)[:, None, None] * num_slots + table
    hits = np.bincount(flat.ravel(), minlength=layers * num_slots).reshape(layers, num_slots)
    fractions: NDArray[np.float64] = hits / table.shape[2]
    return fractions
