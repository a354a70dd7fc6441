"""Routing tables of Model Runner V2, read by vllm-ascend's own routing function where its source is there."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import slot_fractions, uniform_table
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_adaptors.vllm.maps import VllmMaps
from swiftbalancer_adaptors.vllm_ascend import v2
from tests.adaptors.vllm_ascend.sources import Source, each_source
from tests.edges.scripted_device import ScriptedLayer

LAYERS, EXPERTS, SLOTS, WIDTH, ROWS = 2, 6, 8, 16, 1024


class ReversedFormats:
    """A private format: bytes that only an alias shows in order."""

    def __init__(self) -> None:
        self.aliased = 0

    def is_private(self, tensor: torch.Tensor) -> bool:
        return tensor.dtype == torch.int8

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        self.aliased += 1
        return tensor.view(torch.uint8)


def model_state(*, with_tables: bool = True) -> Any:
    """The tensors of vLLM's state of a model, and layers with vllm-ascend's state."""
    tables = [torch.full((ROWS, EXPERTS), -1, dtype=torch.int32) if with_tables else None for _ in range(LAYERS)]
    layers = [SimpleNamespace(eplb_state=SimpleNamespace(expert_replica_routing_table=table)) for table in tables]
    return SimpleNamespace(
        physical_to_logical_map=torch.zeros(LAYERS, SLOTS, dtype=torch.int64),
        logical_to_physical_map=torch.full((LAYERS, EXPERTS, 1024), -1, dtype=torch.int64),
        logical_replica_count=torch.zeros(LAYERS, EXPERTS, dtype=torch.int64),
        model=SimpleNamespace(moe_layers=layers),
    )


def tables_of(state: Any) -> list[torch.Tensor]:
    return [layer.eplb_state.expert_replica_routing_table for layer in state.model.moe_layers]


@pytest.fixture
def placement() -> Placement:
    return Placement.initial(Topology(num_ranks=2, slots_per_rank=SLOTS // 2), EXPERTS, num_layers=LAYERS)


def maps_of(state: Any) -> VllmMaps:
    return v2.maps_of(state, DeviceLayer.for_device("cpu"), width=WIDTH)


def test_without_routing_tables_the_maps_are_vllms() -> None:
    assert type(maps_of(model_state(with_tables=False))) is VllmMaps


def test_the_first_write_fills_the_routing_tables_in_place(placement: Placement) -> None:
    state = model_state()
    addresses = [table.data_ptr() for table in tables_of(state)]
    maps_of(state).write(placement)
    assert [table.data_ptr() for table in tables_of(state)] == addresses
    for layer, table in enumerate(tables_of(state)):
        held = placement.physical_to_logical_map[layer][table.numpy()]
        assert (held == np.arange(EXPERTS)).all()


def test_a_commit_routes_its_layers_by_the_shares_of_the_table_and_no_other_layer(placement: Placement) -> None:
    state = model_state()
    maps = maps_of(state)
    maps.write(placement)
    untouched = tables_of(state)[0].clone()
    table = uniform_table(placement, WIDTH)
    table[1, 0, : WIDTH - 2] = 0
    table[1, 0, WIDTH - 2 :] = 6
    update = MapUpdate(np.array([1]), placement.physical_to_logical_map[1:], table[1:], batch=0)
    maps.commit(maps.prepare(update))
    assert torch.equal(tables_of(state)[0], untouched)
    shares = slot_fractions(table, placement)[1]
    routed = tables_of(state)[1].numpy()
    for expert in range(EXPERTS):
        slots, rows = np.unique(routed[:, expert], return_counts=True)
        assert np.allclose(rows / ROWS, shares[slots])


WAITS = ("behind the last commit", "until the rows are there")
"""What the border promises a sink: its `prepare` begins, and its `commit` comes, no earlier."""


class Turns:
    """Updates one after another on a late device, each committed at once; the device looks at what is in force."""

    def __init__(self, seed: int, left_out: str = "") -> None:
        self.layer = ScriptedLayer(seed, hurry=0.1 * (seed % 4))
        self.left_out = left_out
        self.with_tables = seed % 2 == 0
        self.state = model_state(with_tables=self.with_tables)
        self.placement = Placement.initial(Topology(2, SLOTS // 2), EXPERTS, num_layers=LAYERS)
        self.wrong = 0
        self._side, self._committed, self._there = self.layer.side_stream(), self.layer.event(), self.layer.event()

    def play(self, num_updates: int) -> int:
        """How many of the looks, each right after its commit, saw something else than the update."""
        maps = v2.maps_of(self.state, self.layer, width=WIDTH)
        maps.write(self.placement)
        rng = np.random.default_rng(0)
        for _ in range(num_updates):
            slot = int(rng.integers(0, SLOTS))
            table = np.full((1, EXPERTS, WIDTH), slot, np.int32)
            rows = np.full((1, SLOTS), slot % EXPERTS, np.int32)
            self._turn(maps, MapUpdate(np.array([1]), rows, table, batch=0))
            self.layer.launch(self._look, slot)
        self.layer.synchronize()
        return self.wrong

    def _turn(self, maps: VllmMaps, update: MapUpdate) -> None:
        """As the bulk lane prepares, and the balancer commits."""
        with self.layer.on(self._side):
            if self.left_out != WAITS[0]:
                self.layer.wait(self._side, self._committed)
            prepared = maps.prepare(update)
            self.layer.record(self._there)
        if self.left_out != WAITS[1]:
            self._there.synchronize()
        maps.commit(prepared)
        self.layer.record(self._committed)

    def _look(self, slot: int) -> None:
        routed = tables_of(self.state)[1] if self.with_tables else torch.tensor(slot)
        live, rows = self.state.logical_to_physical_map[1, :, :WIDTH], self.state.physical_to_logical_map[1]
        self.wrong += int(not ((routed == slot).all() and (live == slot).all() and (rows == slot % EXPERTS).all()))


def test_on_a_late_device_every_commit_writes_its_own_update() -> None:
    assert [Turns(seed).play(30) for seed in range(8)] == [0] * 8


@pytest.mark.parametrize("wait", WAITS)
def test_leaving_out_a_wait_shows_in_the_maps(wait: str) -> None:
    assert any(Turns(seed, wait).play(30) for seed in range(8))


def test_every_short_run_of_rows_has_about_the_shares_of_the_table() -> None:
    columns = v2.walk(ROWS, EXPERTS, width=WIDTH).numpy()
    for expert in range(EXPERTS):
        first = {len(set(columns[expert, start : start + WIDTH])) for start in range(0, ROWS, WIDTH)}
        assert first == {WIDTH}
    assert len({int(columns[expert, 0]) for expert in range(EXPERTS)}) == EXPERTS


@pytest.mark.parametrize("source", each_source(v2=True))
def test_their_routing_sends_tokens_where_our_tables_say(source: Source, placement: Placement) -> None:
    route = source.function("ops.fused_moe.eplb", "map_to_physical", torch=torch, **_constant(source))
    state = model_state()
    maps_of(state).write(placement)
    experts = torch.from_numpy(np.random.default_rng(0).integers(0, EXPERTS, (2500, 2)))
    for layer, table in enumerate(tables_of(state)):
        slots = route(experts, table)
        held = torch.from_numpy(placement.physical_to_logical_map[layer].astype(np.int64))[slots]
        assert torch.equal(held, experts)
        assert torch.equal(slots[:ROWS, 0], table.gather(1, experts[:ROWS, :1])[:, 0].to(slots.dtype))


@pytest.mark.parametrize("source", each_source(v2=True))
def test_handed_back_the_tables_are_theirs(
    source: Source, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = source.function(
        "ops.fused_moe.eplb", "build_expert_replica_routing_table", torch=torch, **_constant(source)
    )
    state = model_state()

    def refresh(refreshed: Any) -> None:
        for layer, table in enumerate(tables_of(refreshed)):
            table.copy_(build(refreshed.logical_to_physical_map[layer], refreshed.logical_replica_count[layer], 0))

    module = SimpleNamespace(refresh_model_routing_tables=refresh)
    monkeypatch.setitem(sys.modules, "vllm_ascend.distributed.eplb_state", module)
    maps_of(state).write_for_vllm(placement)
    assert all(int(table.min()) >= 0 for table in tables_of(state))


def _constant(source: Source) -> dict[str, int]:
    assert f"EXPERT_REPLICA_ROUTING_TABLE_NUM_ROWS = {ROWS}" in source.text("ops.fused_moe.eplb")
    return {"EXPERT_REPLICA_ROUTING_TABLE_NUM_ROWS": ROWS}


def test_counters_are_recorded_in_every_pass_while_attached() -> None:
    state = SimpleNamespace(_swiftbalancer_attachment=object())
    assert v2.should_record_current_step(state, lambda _state, **_named: False, log_stats=False)
    assert not v2.should_record_current_step(SimpleNamespace(), lambda _state, **_named: False, log_stats=False)


def test_weights_of_a_private_format_are_moved_by_their_aliases() -> None:
    formats = ReversedFormats()
    quantised = [torch.arange(6, dtype=torch.int8) for _ in range(3)]
    stacked = torch.zeros(3, 4)
    ((moved, plain),) = v2.movable([[quantised, stacked]], formats=formats)
    assert formats.aliased == 3
    assert plain is stacked
    moved[1].fill_(7)
    assert quantised[1].tolist() == [7] * 6


class Layer(torch.nn.Module):
    """A MoE layer with copies of its weights by slot, and its engine's name for the first kind alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = torch.nn.Parameter(torch.zeros(3, 4), requires_grad=False)
        self.w13_weight_list = [torch.zeros(4) for _ in range(3)]


def test_copies_of_weights_that_vllm_ascend_does_not_name_to_vllm_move_too() -> None:
    theirs = type("AscendRoutedExperts", (Layer,), {"__module__": "vllm_ascend.ops.fused_moe.routed_experts"})()
    ((named, copies),) = v2.movable([[theirs.w13_weight.view(3, -1)]], [torch.nn.Sequential(theirs)])
    assert named[0].data_ptr() == theirs.w13_weight.data_ptr()
    assert [copies[slot].data_ptr() for slot in range(3)] == [copy.data_ptr() for copy in theirs.w13_weight_list]
    ours = Layer()
    ((only,),) = v2.movable([[ours.w13_weight]], [ours])
    assert only is ours.w13_weight


class State:
    """As much of vLLM's `EplbState` as is wrapped."""

    def _should_record_current_step(self, log_stats: bool = False) -> bool:
        return log_stats


class Wrapper:
    """As much of vLLM's `WorkerWrapperBase` as is wrapped."""

    def init_device(self) -> str:
        return "ready"


class Worker:
    """As much of `NPUWorker` as is wrapped: it does not inherit from vLLM's worker."""

    def sleep(self, level: int = 1) -> str:
        return f"asleep {level}"


def test_vllms_worker_hooks_reach_the_ascend_worker_before_its_runner_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, wrapper, worker = (type(c.__name__, (c,), {}) for c in (State, Wrapper, Worker))
    modules = {
        "vllm.distributed.eplb.eplb_state": SimpleNamespace(EplbState=state),
        "vllm.v1.worker.worker_base": SimpleNamespace(WorkerWrapperBase=wrapper),
        v2.WORKER: SimpleNamespace(NPUWorker=worker),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    seen: list[int] = []

    def sleep(asked: Worker, original: Any, level: int = 1) -> Any:
        seen.append(level)
        return original(asked, level)

    hooks = {"sleep": sleep}
    v2.install(hooks)
    assert wrapper().init_device() == "ready"
    assert worker().sleep(2) == "asleep 2"
    assert not seen, "without vllm-ascend nothing is hooked"
    monkeypatch.setattr(v2, "on_ascend", lambda: True)
    v2.install(hooks)
    v2.install(hooks)
    assert wrapper().init_device() == "ready"
    assert worker().sleep(2) == "asleep 2"
    assert seen == [2]
    attached = state()
    attached._swiftbalancer_attachment = object()
    assert attached._should_record_current_step()
    assert not state()._should_record_current_step()
