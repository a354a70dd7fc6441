"""Random valid placements: a control for comparisons, and moves in plenty for tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.forecast import Forecast
from swiftbalancer_worker.inputs import PlanInput
from swiftbalancer_worker.kernels.layout import deal, empty_hand


@dataclass(frozen=True, slots=True)
class RandomPolicy:
    """Places every layer anew for made-up loads; the same for the same seed and epoch."""

    name: str = "random"
    gated: bool = False
    keeps_ranks: bool = True

    def place(self, given: PlanInput, forecast: Forecast) -> NDArray[np.int32]:  # noqa: ARG002
        """Random replica counts, each expert on random ranks without repeating one."""
        rng = np.random.default_rng([given.seed, given.epoch])
        placement = given.placement
        speed = placement.topology.speeds()
        slots = placement.topology.slots_per_rank
        live = int((speed > 0).sum())
        rows = placement.physical_to_logical_map.reshape(-1, placement.topology.num_ranks, slots).copy()
        if not placement.num_experts <= live * slots <= live * placement.num_experts:
            return placement.physical_to_logical_map
        for row in rows:
            count = _random_counts(rng, placement.num_experts, num_slots=live * slots, most=live)
            weight = rng.random((1, placement.num_experts)) * count
            hand = empty_hand(slots, weight, (speed > 0).astype(np.float64))
            deal(hand, weight, count)
            row[speed > 0] = hand.place[speed > 0]
        return rows.reshape(placement.physical_to_logical_map.shape)


def _random_counts(rng: np.random.Generator, num_experts: int, *, num_slots: int, most: int) -> NDArray[np.int64]:
    """`[experts]` int64, at least 1 and at most `most` each, `num_slots` in all."""
    count = np.ones(num_experts, np.int64)
    for _ in range(num_slots - num_experts):
        count[rng.choice(np.nonzero(count < most)[0])] += 1
    return count
