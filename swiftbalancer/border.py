"""What an engine gives the balancer, and what it gets: the whole border between the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.dispatch import DispatchForm
from swiftbalancer.placement import Placement

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

Counts = Literal["global", "local"]


class ExpertTensor(Protocol):
    """One kind of weight of one layer, indexable by local slot: a tensor `[slots_per_rank, ...]` or a list."""

    def __getitem__(self, local_slot: int) -> torch.Tensor: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class MapUpdate:
    """New maps of some layers, on the host.

    `layers` `[n]` int64; `physical_to_logical_map` `[n, slots]` int32; `table` `[n, experts, width]` int32, the
    dispatch table this rank is to use (already rotated for it where each rank dispatches its own tokens). They may be
    read-only.
    """

    layers: NDArray[np.int64]
    physical_to_logical_map: NDArray[np.int32]
    table: NDArray[np.int32]
    batch: int


class MapSink(Protocol):
    """How an engine's maps are written, in place, at fixed addresses."""

    @property
    def launches(self) -> Callable[[], None] | None:
        """All that `commit` does, if that is the same launches each time, whatever was prepared; else None.

        They are recorded together with the copies of weights, which then stand for `commit`.
        """

    def prepare(self, update: MapUpdate) -> Any:
        """On a background thread: bring the maps to the device on the current stream, a side stream of ours.

        It is called again only once that is done, and that stream has waited for the last commit, so that one buffer
        is enough. The result goes to `commit`, or is forgotten.
        """

    def commit(self, prepared: Any) -> None:
        """On the main thread between two forward passes: enqueue the writes on the current stream; never wait.

        All that `prepare` launched has run.
        """


@dataclass(frozen=True, slots=True, eq=False)
class ModelBinding:
    """One model's MoE layers as the balancer sees them. The engine owns every tensor and keeps its address."""

    name: str
    placement: Placement
    """In force at attach, the same on every rank."""
    top_k: int
    weights: Sequence[Sequence[ExpertTensor]]
    """`[layers][kinds]`: everything the expert kernels read."""
    counters: torch.Tensor
    """int32 or int64 on the device: tokens dispatched since the balancer last zeroed it. `[layers, slots]` for
    `counts="global"` (tokens to any slot), `[layers, slots_per_rank]` for `"local"` (tokens that arrived here)."""
    counts: Counts
    maps: MapSink
    dispatch: DispatchForm
    """The best form the engine's kernels can do."""
    per_rank_dispatch: bool
    """Whether each rank routes its own tokens, so that tables may differ between ranks. False where all ranks
    route the same tokens (tensor parallel without data parallel) and must choose the same slot."""
    passes: torch.Tensor | None = None
    """`[1]` int64 on the device, incremented by the forward pass itself; None where the engine has none."""
    current_table: NDArray[np.int32] | None = None
    """`[layers, experts, width]` int32, the table in force at attach; None: replicas in turn."""


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """The expert-parallel group: who we are in it, and a store to build our own process groups on."""

    rank: int
    size: int
    store: Store
    """Reached by exactly these ranks under `prefix`."""
    device: torch.device
    prefix: str = "swiftbalancer"
    hostnames: tuple[str, ...] = field(default=())
