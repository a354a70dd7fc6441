"""Which expert each slot holds, and the maps engines read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from swiftbalancer.errors import InvalidPlan
from swiftbalancer.topology import Topology

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """An immutable `physical_to_logical_map` with the topology it is for.

    `physical_to_logical_map` is `[layers, slots]` int32, the logical expert each slot holds. Every expert
    has at least one slot; no rank holds an expert twice. Check with `validate` where data comes from outside.
    """

    topology: Topology
    num_experts: int
    physical_to_logical_map: IntArray

    @classmethod
    def of(cls, topology: Topology, num_experts: int, physical_to_logical_map: ArrayLike) -> Placement:
        """A validated placement; raises `InvalidPlan` naming the layer, expert and rank at fault."""
        raw = np.asarray(physical_to_logical_map)
        if raw.dtype.kind not in "iu":
            raise InvalidPlan(f"physical_to_logical_map must be integers, got {raw.dtype}")
        placement = cls(topology, num_experts, _frozen(raw.astype(np.int32)))
        placement.validate()
        return placement

    @classmethod
    def initial(cls, topology: Topology, num_experts: int, *, num_layers: int) -> Placement:
        """Experts in order, then redundant slot `i` holds expert `i % experts` (what vLLM and SGLang start with).

        The order is vLLM's exactly, so an expert may start twice on one rank; such a slot is no relief, and
        the first plan replaces it.
        """
        if topology.num_slots < num_experts:
            raise InvalidPlan(f"{topology.num_slots} slots cannot hold {num_experts} experts")
        row = np.arange(topology.num_slots, dtype=np.int32) % num_experts
        return cls(topology, num_experts, _frozen(np.tile(row, (num_layers, 1))))

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical_map.shape[0])

    def validate(self, *, allow_same_rank_replicas: bool = False) -> None:
        """Raises `InvalidPlan` unless every expert has a slot and (by default) no rank holds one twice."""
        table = self.physical_to_logical_map
        if table.ndim != 2 or table.shape[1] != self.topology.num_slots:
            raise InvalidPlan(
                f"placement has shape {table.shape}, expected [layers, {self.topology.num_slots}] for "
                f"{self.topology.num_ranks} ranks x {self.topology.slots_per_rank} slots"
            )
        if table.size and (table.min() < 0 or table.max() >= self.num_experts):
            raise InvalidPlan(f"placement names an expert outside 0..{self.num_experts - 1}")
        self._check_served()
        if not allow_same_rank_replicas:
            self._check_repeats()

    def _check_served(self) -> None:
        held, excluded = self.physical_to_logical_map, self.topology.excluded_ranks
        if excluded:
            held = held[:, ~np.isin(self.topology.slot_ranks(), list(excluded))]
        rows = held + np.arange(self.num_layers)[:, None] * self.num_experts
        count = np.bincount(rows.ravel(), minlength=self.num_layers * self.num_experts)
        if count.size and not count.all():
            layer, expert = divmod(int(np.argmin(count)), self.num_experts)
            raise InvalidPlan(f"layer {layer}: expert {expert} has no slot on a rank that serves")

    def _check_repeats(self) -> None:
        held = self.physical_to_logical_map + self.topology.slot_ranks() * self.num_experts
        held.sort(axis=1)
        repeats = held[:, 1:] == held[:, :-1]
        if repeats.any():
            layer, nth = (int(i[0]) for i in np.nonzero(repeats))
            rank, expert = divmod(int(held[layer, nth]), self.num_experts)
            raise InvalidPlan(f"layer {layer}: expert {expert} is twice on rank {rank}")

    def replicas_on_ranks(self) -> NDArray[np.int64]:
        """`[layers, ranks, experts]` int64, how many slots of a rank hold an expert."""
        layers, ranks = self.num_layers, self.topology.num_ranks
        row = np.arange(layers)[:, None] * ranks + self.topology.slot_ranks()[None, :]
        flat = row * self.num_experts + self.physical_to_logical_map
        count = np.bincount(flat.ravel(), minlength=layers * ranks * self.num_experts)
        return count.reshape(layers, ranks, self.num_experts)

    def logical_replica_count(self) -> NDArray[np.int64]:
        """`[layers, experts]` int64, slots per expert."""
        layers = self.num_layers
        flat = np.arange(layers)[:, None] * self.num_experts + self.physical_to_logical_map
        return np.bincount(flat.ravel(), minlength=layers * self.num_experts).reshape(layers, self.num_experts)

    def logical_to_physical_map(self, *, max_replicas: int | None = None) -> NDArray[np.int64]:
        """`[layers, experts, max_replicas]` int64, slots of each expert in ascending order, -1 padded."""
        count = self.logical_replica_count()
        width = int(count.max()) if max_replicas is None else max_replicas
        if count.size and count.max() > width:
            raise InvalidPlan(f"an expert has {count.max()} replicas, more than the map's width {width}")
        out = np.full((self.num_layers, self.num_experts, width), -1, np.int64)
        slots = np.argsort(self.physical_to_logical_map, axis=1, kind="stable")
        experts = np.take_along_axis(self.physical_to_logical_map, slots, 1)
        first = np.concatenate([np.zeros((self.num_layers, 1), np.int64), np.cumsum(count, 1)[:, :-1]], 1)
        nth = np.arange(slots.shape[1])[None, :] - np.take_along_axis(first, experts.astype(np.int64), 1)
        out[np.arange(self.num_layers)[:, None], experts, nth] = slots
        return out

    def with_layers(self, layers: ArrayLike, rows: ArrayLike) -> Placement:
        """This placement with `rows` `[n, slots]` in place of `layers` `[n]`; not validated."""
        table = self.physical_to_logical_map.copy()
        table[np.asarray(layers, np.int64)] = rows
        return Placement(self.topology, self.num_experts, _frozen(table))

    def digest(self) -> int:
        """62-bit fingerprint of topology and content, equal on every rank that holds the same placement."""
        head = f"{self.topology.num_ranks}/{self.topology.slots_per_rank}/{self.num_experts}/{self.num_layers}"
        state = xxhash.xxh3_64(head.encode())
        state.update(np.ascontiguousarray(self.physical_to_logical_map, "<i4").data)
        return state.intdigest() >> 2


def _frozen(table: IntArray) -> IntArray:
    table = np.ascontiguousarray(table)
    table.flags.writeable = False
    return table
