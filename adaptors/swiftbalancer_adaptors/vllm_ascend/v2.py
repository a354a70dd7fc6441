"""Model Runner V2 of vllm-ascend: vLLM's `EplbState`, with routing tables of its own beside vLLM's maps."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from typing_extensions import override

from swiftbalancer.border import ExpertTensor, MapUpdate
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import column_order
from swiftbalancer.placement import Placement
from swiftbalancer_adaptors.vllm.maps import VllmMaps
from swiftbalancer_adaptors.vllm.patching import Around, wrap
from swiftbalancer_adaptors.vllm_ascend.flag import on_ascend
from swiftbalancer_adaptors.vllm_ascend.formats import EngineFormats, Formats, plain
from swiftbalancer_adaptors.vllm_ascend.layers import overlooked

WORKER = "vllm_ascend.worker.worker"


def install(worker_hooks: Mapping[str, Around]) -> None:
    """Beside vLLM's hooks: keeps the counts, and puts `worker_hooks` on vllm-ascend's worker. Idempotent."""
    if not on_ascend():
        return
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    wrap(EplbState, "_should_record_current_step", should_record_current_step)
    wrap(WorkerWrapperBase, "init_device", partial(init_device, worker_hooks))


def init_device(worker_hooks: Mapping[str, Around], wrapper: Any, original: Any, *args: Any, **named: Any) -> Any:
    """vllm-ascend's worker class is loaded by now; it does not inherit from vLLM's."""
    worker = importlib.import_module(WORKER).NPUWorker
    for name, around in worker_hooks.items():
        wrap(worker, name, around)
    return original(wrapper, *args, **named)


def should_record_current_step(state: Any, original: Any, *args: Any, **named: Any) -> Any:
    """vllm-ascend zeroes the counters after every pass that vLLM's own schedule would not record."""
    from swiftbalancer_adaptors.vllm.attachment import attachment_of

    return attachment_of(state) is not None or original(state, *args, **named)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRoutes:
    """The routing tables `[rows, experts]` int32 that go with vLLM's maps of some layers."""

    targets: list[torch.Tensor]
    routes: list[torch.Tensor]


class AscendMaps(VllmMaps):
    """Writes vLLM's maps and vllm-ascend's routing tables, which its kernels read instead.

    Row `r` of a routing table names the slots for token `r` of a batch, modulo the rows. vllm-ascend deals replicas
    to rows in turn; here the rows walk through the columns of the dispatch table, each expert from another column
    on, in the order that gives every run of rows about the right shares.
    """

    def __init__(self, model_state: Any, device: DeviceLayer, tables: list[torch.Tensor], *, width: int) -> None:
        super().__init__(model_state, device, width=width)
        self.launches = None  # which routing tables change differs from commit to commit
        self._tables = tables
        self._columns = walk(tables[0].shape[0], tables[0].shape[1], width=width).to(tables[0].device)

    @override
    def prepare(self, update: MapUpdate) -> Any:
        _, tables = self._fill(update)
        targets = [self._tables[layer] for layer in update.layers]
        routes = [torch.empty_like(target) for target in targets]
        for out, table in zip(routes, tables, strict=True):
            self._device.launch(routes_into, out, table, self._columns)
        return PreparedRoutes(targets, routes)

    @override
    def commit(self, prepared: Any) -> None:
        super().commit(prepared)
        self._device.copy_all(prepared.targets, prepared.routes)

    @override
    def write(self, placement: Placement) -> None:
        super().write(placement)
        for target, table in zip(self._tables, self._state.logical_to_physical_map, strict=True):
            routes_into(target, table[:, : self.width], self._columns)

    @override
    def write_for_vllm(self, placement: Placement) -> None:
        from vllm_ascend.distributed.eplb_state import refresh_model_routing_tables

        super().write_for_vllm(placement)
        refresh_model_routing_tables(self._state)


def walk(num_rows: int, num_experts: int, *, width: int) -> torch.Tensor:
    """`[experts, rows]` int64, the column of the dispatch table that an expert uses in a row."""
    order = torch.from_numpy(column_order(width).copy())
    return order[(torch.arange(num_experts)[:, None] + torch.arange(num_rows)[None, :]) % width]


def routes_into(out: torch.Tensor, table: torch.Tensor, columns: torch.Tensor) -> None:
    """Fills `out` `[rows, experts]` int32 of one layer from its dispatch table `[experts, width]` and `walk`."""
    out.copy_(table.gather(1, columns).T)


def maps_of(model_state: Any, device: DeviceLayer, *, width: int) -> VllmMaps:
    """The maps of a model, with vllm-ascend's routing tables where it has them."""
    states = [getattr(layer, "eplb_state", None) for layer in model_state.model.moe_layers]
    tables = [getattr(state, "expert_replica_routing_table", None) for state in states]
    known = [table for table in tables if table is not None]
    if not known:
        return VllmMaps(model_state, device, width=width)
    assert len(known) == len(tables), "some MoE layers have a routing table and some have none"
    return AscendMaps(model_state, device, known, width=width)


def movable(
    expert_weights: Iterable[Sequence[ExpertTensor]], modules: Iterable[Any] = (), formats: Formats | None = None
) -> list[list[ExpertTensor]]:
    """vLLM's `expert_weights` `[layers][kinds]`, with private formats of an NPU made plain.

    `modules` are the MoE layers. Those of vllm-ascend also give what they hold beside what they named to vLLM: with
    its largest fused kernel, unquantised weights have copies by expert that it reads and does not name.
    """
    layers: list[list[ExpertTensor]] = []
    given = list(expert_weights)
    for layer, (kinds, module) in enumerate(zip(given, list(modules) or [None] * len(given), strict=True)):
        where = f"MoE layer {layer}"
        layers.append([_movable(kind, formats, where=where) for kind in [*kinds, *unnamed(module, kinds, where)]])
    return layers


def unnamed(module: Any, kinds: Sequence[ExpertTensor], where: str) -> list[list[torch.Tensor]]:
    """Expert weights that parts of vllm-ascend in a MoE layer hold beside `kinds`; none for other engines' layers."""
    parts = module.modules() if isinstance(module, torch.nn.Module) else ()
    by_slot = [[kind[slot] for slot in range(len(kind))] for kind in kinds]
    found = [
        overlooked(part, by_slot, len(kinds[0]), where=where)
        for part in parts
        if type(part).__module__.startswith("vllm_ascend.")
    ]
    return [kind for of_part in found for kind in of_part]


def _movable(kind: ExpertTensor, formats: Formats | None, *, where: str) -> ExpertTensor:
    formats = formats or EngineFormats(DeviceLayer.for_device(kind[0].device))
    if not formats.is_private(kind[0]):
        return kind
    return plain([kind[slot] for slot in range(len(kind))], formats, where=where)
