"""Where ranks sit: nodes, slots per rank, speeds, and ranks that take no experts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.errors import TopologyError

LARGEST = 1 << 20
"""Bound of ranks and of slots per layer, so that a topology from outside cannot make us allocate without end."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The expert-parallel group one model is served on.

    `slots_per_rank` is the number of physical experts (slots) each rank holds in every MoE layer;
    slot `s` lives on rank `s // slots_per_rank`. `nodes` are equal blocks of consecutive ranks.
    """

    num_ranks: int
    slots_per_rank: int
    num_nodes: int = 1
    rank_speed: tuple[float, ...] = ()
    """Relative speed of each rank, 1.0 is nominal; empty means all equal."""
    excluded_ranks: tuple[int, ...] = ()
    """Ranks whose slots may serve nothing; their experts must live elsewhere."""

    def __post_init__(self) -> None:
        sizes = (self.num_ranks, self.slots_per_rank, self.num_nodes)
        if min(sizes) < 1 or max(sizes) > LARGEST or self.num_slots > LARGEST:
            raise TopologyError(
                f"ranks={self.num_ranks}, slots_per_rank={self.slots_per_rank}, nodes={self.num_nodes}: "
                f"each must be at least 1, and all slots together at most {LARGEST}"
            )
        if self.num_ranks % self.num_nodes:
            raise TopologyError(f"{self.num_ranks} ranks do not divide over {self.num_nodes} nodes")
        if self.rank_speed and (len(self.rank_speed) != self.num_ranks or not _positive(self.rank_speed)):
            raise TopologyError(f"rank_speed needs {self.num_ranks} values above 0, got {self.rank_speed}")
        if any(not 0 <= r < self.num_ranks for r in self.excluded_ranks):
            raise TopologyError(f"excluded ranks {self.excluded_ranks} are not all in 0..{self.num_ranks - 1}")
        if len(set(self.excluded_ranks)) >= self.num_ranks:
            raise TopologyError("every rank is excluded: nothing is left to serve")

    @classmethod
    def for_experts(cls, num_experts: int, *, num_redundant: int, num_ranks: int, num_nodes: int = 1) -> Topology:
        """The topology of `num_experts` + `num_redundant` slots over `num_ranks`; they must divide evenly."""
        num_slots = num_experts + num_redundant
        if num_experts < 1 or num_redundant < 0:
            raise TopologyError(f"experts={num_experts}, redundant={num_redundant}: need >= 1 and >= 0")
        if num_ranks < 1:
            raise TopologyError(f"ranks={num_ranks}: need >= 1")
        if num_slots % num_ranks:
            raise TopologyError(
                f"{num_experts} experts + {num_redundant} redundant = {num_slots} slots do not divide over "
                f"{num_ranks} ranks; {num_redundant + -num_slots % num_ranks} redundant experts would"
            )
        return cls(num_ranks=num_ranks, slots_per_rank=num_slots // num_ranks, num_nodes=num_nodes)

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.slots_per_rank

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    def rank_of(self, slot: int) -> int:
        return slot // self.slots_per_rank

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def slot_ranks(self) -> NDArray[np.int64]:
        """`[slots]` int64, the rank of each slot."""
        return np.arange(self.num_slots) // self.slots_per_rank

    def speeds(self) -> NDArray[np.float64]:
        """`[ranks]` float64, relative speed; 0 for an excluded rank."""
        speed = np.ones(self.num_ranks) if not self.rank_speed else np.asarray(self.rank_speed, float)
        speed[list(self.excluded_ranks)] = 0.0
        return speed


def _positive(values: tuple[float, ...]) -> bool:
    return all(0 < value < math.inf for value in values)
