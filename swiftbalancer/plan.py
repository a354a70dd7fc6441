"""A plan: the moves, in batches, and the dispatch tables that go with them; checked before use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.dispatch import check_table, nothing
from swiftbalancer.errors import InvalidPlan
from swiftbalancer.placement import Placement

PlanKind = Literal["placement", "dispatch"]
MOVE_COLUMNS = ("layer", "expert", "source_slot", "target_slot")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What to change. Layers not named keep their placement; every layer gets new dispatch tables.

    `layers` `[n]` int32: layers whose placement changes, in the order of the batches.
    `rows` `[n, slots]` int32: their new `physical_to_logical_map` rows.
    `moves` `[m, 4]` int32: layer, expert, source slot, target slot; in the order of the batches. The source
    slot holds the expert in the placement before the plan. Target and source may be on one rank.
    `layer_batch` `[n]`, `move_batch` `[m]` int32: the batch of each, ascending from 0; a layer is in one batch.
    `table` `[layers, experts, width]` int32: dispatch after the whole plan.
    """

    kind: PlanKind
    base_epoch: int
    base_digest: int
    layers: NDArray[np.int32]
    rows: NDArray[np.int32]
    moves: NDArray[np.int32]
    layer_batch: NDArray[np.int32]
    move_batch: NDArray[np.int32]
    table: NDArray[np.int32]

    @classmethod
    def dispatch_only(cls, base: Placement, *, base_epoch: int, table: NDArray[np.int32]) -> Plan:
        """A plan that moves nothing and renews the dispatch tables."""
        none = np.zeros(0, np.int32)
        return cls(
            kind="dispatch",
            base_epoch=base_epoch,
            base_digest=base.digest(),
            layers=none,
            rows=np.zeros((0, base.topology.num_slots), np.int32),
            moves=np.zeros((0, 4), np.int32),
            layer_batch=none,
            move_batch=none,
            table=table,
        )

    @property
    def num_batches(self) -> int:
        """At least 1: the last batch also commits the tables of the layers that do not move."""
        return int(self.layer_batch.max()) + 1 if self.layer_batch.size else 1

    def batch_layers(self, batch: int) -> NDArray[np.int64]:
        """The layers whose maps batch `batch` commits; the last one adds every layer without moves."""
        own: NDArray[np.int64] = self.layers[self.layer_batch == batch].astype(np.int64)
        if batch != self.num_batches - 1:
            return own
        still = np.ones(self.table.shape[0], bool)
        still[self.layers] = False
        return np.concatenate([own, np.flatnonzero(still)])

    def batch_moves(self, batch: int) -> NDArray[np.int32]:
        """`[k, 4]` int32, the moves of one batch."""
        moves: NDArray[np.int32] = self.moves[self.move_batch == batch]
        return moves

    def target(self, base: Placement) -> Placement:
        """The placement after the whole plan."""
        return base.with_layers(self.layers, self.rows)

    def validate(
        self, base: Placement, *, staging_experts: int | None = None, between: Callable[[], None] = nothing
    ) -> None:
        """Raises `InvalidPlan` unless the plan applies to `base` and leaves a valid placement and tables.

        With `staging_experts`, also checks that no rank receives more experts than that in one batch. `between` is
        called between pieces of the work.
        """
        self.check_base(base)
        self._check_shapes(base)
        target = self.target(base)
        between()
        moved_layers = Placement(base.topology, base.num_experts, self.rows)
        moved_layers.validate()
        between()
        check_table(self.table, target, between=between)
        between()
        self._check_moves(base, target)
        if staging_experts is not None:
            self._check_staging(base, staging_experts)

    def check_base(self, base: Placement) -> None:
        """Raises `InvalidPlan` unless the plan was made for `base`, and has no more batches than layers."""
        if self.base_digest != base.digest():
            raise InvalidPlan("the plan is for another placement than the one in force")
        if self.num_batches > max(len(self.layers), 1):
            raise InvalidPlan(f"{self.num_batches} batches for {len(self.layers)} layers")

    def _check_shapes(self, base: Placement) -> None:
        num = len(self.layers)
        if self.rows.shape != (num, base.topology.num_slots) or self.layer_batch.shape != (num,):
            raise InvalidPlan(f"{num} layers come with rows {self.rows.shape}, batches {self.layer_batch.shape}")
        if self.moves.shape != (len(self.move_batch), 4):
            raise InvalidPlan(f"moves have shape {self.moves.shape}, batches {self.move_batch.shape}")
        if num and not 0 <= self.layers.min() <= self.layers.max() < base.num_layers:
            raise InvalidPlan(f"layers {self.layers.tolist()} leave 0..{base.num_layers - 1}")
        if num and np.bincount(self.layers).max() > 1:
            raise InvalidPlan(f"layers {self.layers.tolist()} repeat")
        steps = self.layer_batch[1:] - self.layer_batch[:-1]
        if num and (self.layer_batch[0] != 0 or ((steps != 0) & (steps != 1)).any()):
            raise InvalidPlan("the layers' batches do not count up from 0 without gaps")
        batches = self.move_batch
        if len(batches) and (batches[0] < 0 or (batches[1:] < batches[:-1]).any()):
            raise InvalidPlan("the moves' batches are not in ascending order from 0")
        if self.kind == "dispatch" and (num or len(self.moves)):
            raise InvalidPlan("a dispatch plan must not move experts")

    def _check_moves(self, base: Placement, target: Placement) -> None:
        layer, expert, source, to = self.moves.T.astype(np.int64)
        num_slots = base.topology.num_slots
        for slots, name in ((source, "source"), (to, "target")):
            if slots.size and not 0 <= slots.min() <= slots.max() < num_slots:
                raise InvalidPlan(f"a {name} slot is outside 0..{num_slots - 1}")
        self._check_batches(base, layer)
        before, after = base.physical_to_logical_map, target.physical_to_logical_map
        wrong = before[layer, source] != expert
        if wrong.any():
            i = wrong.argmax()
            raise InvalidPlan(f"layer {layer[i]}: slot {source[i]} does not hold expert {expert[i]}")
        places = layer * num_slots + to
        places.sort()
        wanted = (before != after).ravel().nonzero()[0]
        if len(places) != len(wanted) or (places != wanted).any():
            raise InvalidPlan(f"{len(layer)} moves do not match the {len(wanted)} slots that change")
        wrong = after[layer, to] != expert
        if wrong.any():
            i = wrong.argmax()
            raise InvalidPlan(f"layer {layer[i]}: slot {to[i]} is to hold another expert than {expert[i]}")

    def _check_batches(self, base: Placement, layer: NDArray[np.int64]) -> None:
        """`layer` is that of each move."""
        if not layer.size:
            if self.num_batches > 1:
                raise InvalidPlan(f"the plan has {self.num_batches} batches and moves nothing")
            return
        batch_of = np.full(base.num_layers, -1)
        batch_of[self.layers] = self.layer_batch
        if layer.min() < 0 or layer.max() >= base.num_layers or (batch_of[layer] < 0).any():
            raise InvalidPlan("a move names a layer the plan does not change")
        if (batch_of[layer] != self.move_batch).any():
            raise InvalidPlan("a layer's moves are not all in its batch")

    def _check_staging(self, base: Placement, staging_experts: int) -> None:
        rank = self.moves[:, 3] // base.topology.slots_per_rank
        key = self.move_batch.astype(np.int64) * base.topology.num_ranks + rank
        if key.size and np.bincount(key).max() > staging_experts:
            raise InvalidPlan(
                f"a rank would receive {np.bincount(key).max()} experts in one batch; staging holds {staging_experts}"
            )
