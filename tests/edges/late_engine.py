"""A whole balancer on devices whose work lands late: recorder, maps, transport and commits, two ranks as threads.

The engine does nothing but launch: each pass adds one token to every slot's counter and compares every slot's
weights with the map, both when the device gets there. A missing wait anywhere shows as a slot that holds another
expert than its map says, a checksum that does not match, or a window whose counts are not the passes since it began.

A `DroppingLayer` leaves out the waits of some places, so that a test can ask of each whether it is needed.
"""

from __future__ import annotations

import ctypes
import linecache
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import torch
from torch._C._distributed_c10d import TCPStore
from typing_extensions import override

from swiftbalancer import wire
from swiftbalancer.attach import beside_commit
from swiftbalancer.balancer import Balancer, Parts
from swiftbalancer.border import MapUpdate, ModelBinding
from swiftbalancer.bulk import WindowLoads
from swiftbalancer.config import Config, from_dict, to_dict
from swiftbalancer.device import DeviceLayer, Event, Stream
from swiftbalancer.dispatch import DispatchForm, nothing, uniform_table
from swiftbalancer.groups import GroupFactory
from swiftbalancer.lane import BACKLOG
from swiftbalancer.leader import Leader, RequestForm
from swiftbalancer.mailbox import Reply
from swiftbalancer.maps import TableMaps
from swiftbalancer.pacer import Pacer
from swiftbalancer.placement import Placement
from swiftbalancer.recorder import LoadRecorder
from swiftbalancer.stats import Stats
from swiftbalancer.steptimes import StepTimes
from swiftbalancer.throttle import Throttle
from swiftbalancer.topology import Topology
from swiftbalancer.transport import ExpertWeights, TransferLimits, Transport, Workplace
from swiftbalancer.transport.copy_engine import CopyEngineCarrier
from swiftbalancer.transport.p2p import HostStagedCarrier
from swiftbalancer.transport.seam import Carrier
from swiftbalancer.transport.staging import entry_stride
from swiftbalancer_worker.answers import answer, plan_input
from swiftbalancer_worker.planner import Planner
from tests.edges.ranks import run_ranks
from tests.edges.scripted_device import ScriptedEvent, ScriptedLayer, ScriptedStream
from tests.edges.transport_case import LocalPeerMemory

TOPOLOGY = Topology(num_ranks=2, slots_per_rank=3)
EXPERTS, LAYERS, WIDTH = 4, 2, 4
DEADLINE_S = 20.0
SITES_BELOW = ("scripted_device", "late_engine")
PASS_THROUGH = ("_settle", "synchronize")
"""Functions that wait for their callers, who are the place then."""


class DroppingLayer(ScriptedLayer):
    """Notes where in the product waits are asked for, and leaves out those whose place begins with one of `drop`."""

    def __init__(self, seed: int, *, drop: Collection[str] = (), hurry: float = 0.2) -> None:
        self.places: set[str] = set()
        self.drop = drop
        super().__init__(seed, hurry=hurry)

    def is_dropped(self) -> bool:
        place = _place(sys._getframe(1))
        self.places.add(place)
        return place.startswith(tuple(self.drop))

    @override
    def event(self, *, timing: bool = False) -> Event:
        return DroppingEvent(self)

    @override
    def side_stream(self) -> ScriptedStream:
        stream = DroppingStream(self)
        with self._lock:
            self._streams.append(stream)
        return stream

    @override
    def wait(self, stream: Stream, event: Event) -> None:
        if not self.is_dropped():
            super().wait(stream, event)

    @override
    def synchronize(self) -> None:
        if not self.is_dropped():
            super().synchronize()


class DroppingEvent(ScriptedEvent):
    """An event whose waits may be left out."""

    def synchronize(self) -> None:
        assert isinstance(self.layer, DroppingLayer)
        if not self.layer.is_dropped():
            super().synchronize()


class DroppingStream(ScriptedStream):
    """A stream whose waits may be left out."""

    def synchronize(self) -> None:
        assert isinstance(self.layer, DroppingLayer)
        if not self.layer.is_dropped():
            event = ScriptedEvent(self.layer)
            self.layer.record(event, self)
            event.synchronize()


def _place(frame: FrameType | None) -> str:
    """`module.function: line` of the product that asked."""
    while frame is not None:
        code = frame.f_code
        module = Path(code.co_filename).stem
        if module not in SITES_BELOW and code.co_name not in PASS_THROUGH:
            return f"{module}.{code.co_name}: {linecache.getline(code.co_filename, frame.f_lineno).strip()}"
        frame = frame.f_back
    raise AssertionError("nobody asked")


class LatePeerMemory(LocalPeerMemory):
    """Pushes in the order of the current stream. Freed memory is another's at once, but stays memory: without a wait
    a push may come later than that."""

    everything: ClassVar[list[torch.Tensor]] = []

    def __init__(self, layer: DeviceLayer) -> None:
        super().__init__()
        self._layer = layer

    @override
    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.everything.append(super().allocate(num_bytes))
        return self.own

    @override
    def push(self, address: int, source: int, num_bytes: int) -> None:
        self._layer.launch(ctypes.memmove, address, source, num_bytes)

    @override
    def free(self) -> None:
        super().free()
        self.own.fill_(0x5A)


class ReusingMaps:
    """A sink with one buffer on the device, written anew with each update, as engines' sinks may."""

    launches = None

    def __init__(self, layer: DeviceLayer, table: torch.Tensor, rows: torch.Tensor) -> None:
        self._layer = layer
        self._targets = [table, rows]
        self._staged = [torch.zeros_like(table), torch.zeros_like(rows)]

    def prepare(self, update: MapUpdate) -> list[int]:
        for staged, values in zip(self._staged, (update.table, update.physical_to_logical_map), strict=True):
            self._layer.copy(staged[: len(values)], torch.from_numpy(values.copy()))
        layers: list[int] = update.layers.tolist()
        return layers

    def commit(self, prepared: list[int]) -> None:
        for target, staged in zip(self._targets, self._staged, strict=True):
            for row, layer in enumerate(prepared):
                self._layer.copy(target[layer], staged[row])


class InlineLink:
    """A worker without a process: plans while it is asked."""

    restarts = 0

    def __init__(self, hello: wire.Hello, config: Config) -> None:
        self._hello, self._config = hello, config
        self._planner = Planner(config.policy.name)
        self._reply: Reply | None = None
        self._on_answer: Callable[[], None] = nothing

    def tell(self, on_answer: Callable[[], None]) -> None:
        self._on_answer = on_answer

    def request(self, message: wire.PlanRequest, arrays: wire.Arrays) -> bool:
        given = plan_input(self._hello, self._config, message, arrays)
        frames = answer(self._planner, message, given)
        reply, found = wire.decode(frames)
        assert isinstance(reply, wire.PlanReply | wire.NothingToDo)
        self._reply = Reply(frames, reply, found)
        self._on_answer()
        return True

    def poll(self) -> Reply | None:
        reply, self._reply = self._reply, None
        return reply

    def send(self, message: Any, arrays: Any = None) -> bool:  # noqa: ARG002 - the link's signature
        return True

    def wait_ready(self, timeout_s: float) -> wire.Welcome:  # noqa: ARG002
        return wire.Welcome(0, self._planner.policy.name)

    def close(self, timeout_s: float) -> None:
        """There is nothing to end."""


@dataclass
class Seen:
    """What went wrong on a rank, and how much was done."""

    wrong_slots: int = 0
    wrong_windows: list[str] = field(default_factory=list)
    failed: bool = False
    """Whether a cycle was dropped for a checksum."""
    committed: int = 0
    moved: int = 0
    places: set[str] = field(default_factory=set)

    @property
    def is_wrong(self) -> bool:
        return bool(self.wrong_slots or self.wrong_windows or self.failed)


class LateEngine:
    """One rank: slots whose numbers tell their expert, a map, and counters, all written by its device alone."""

    def __init__(self, rank: int, layer: ScriptedLayer, sub_window_steps: int, *, reuses: bool) -> None:
        self.rank, self.layer, self.sub_window_steps = rank, layer, sub_window_steps
        self.placement = Placement.initial(TOPOLOGY, EXPERTS, num_layers=LAYERS)
        first = rank * TOPOLOGY.slots_per_rank
        self.own = slice(first, first + TOPOLOGY.slots_per_rank)
        rows = torch.from_numpy(self.placement.physical_to_logical_map.copy())
        self.map = rows
        self.table = torch.from_numpy(uniform_table(self.placement, WIDTH).copy())
        self.maps = (ReusingMaps if reuses else TableMaps)(layer, self.table, rows)
        self.weights = [[self._values(layer, rows)] for layer in range(LAYERS)]
        self.counters = torch.zeros(LAYERS, TOPOLOGY.slots_per_rank, dtype=torch.int64)
        self.seen = Seen()
        self.began = np.zeros(LAYERS, np.int64)
        """The step after which each layer's counters were last zeroed."""
        self.expected: dict[int, list[int]] = {}

    def binding(self) -> ModelBinding:
        return ModelBinding(
            name="late",
            placement=self.placement,
            top_k=1,
            weights=self.weights,
            counters=self.counters,
            counts="local",
            maps=self.maps,
            dispatch=DispatchForm("table", WIDTH),
            per_rank_dispatch=False,
        )

    def forward(self) -> None:
        """Only launches."""
        self.layer.launch(self._look)
        self.layer.launch(self._count)

    def _values(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """`[slots_per_rank, 64]` int32, what the experts in these slots hold."""
        return (rows[layer, self.own, None] * 1000 + layer * 100 + torch.arange(64) % 7).to(torch.int32)

    def _look(self) -> None:
        for layer, (held,) in enumerate(self.weights):
            self.seen.wrong_slots += int((held != self._values(layer, self.map)).any(1).sum())
            routed = self.map[layer].long()[self.table[layer].long()]
            self.seen.wrong_slots += int((routed != torch.arange(EXPERTS)[:, None]).sum())

    def _count(self) -> None:
        self.counters += 1

    def step_done(self, step: int, ended: range, before: Placement, after: Placement) -> None:
        """Notes what the window that `ended`, if any, must have counted; a commit after a pass follows the pass's own
        window."""
        for window in ended:
            assert 0 <= step - (window + 1) * self.sub_window_steps <= 1, "a step later if a round was taken"
            self.expected[window] = (step - self.began).tolist()
            self.began[:] = step
        changed = (before.physical_to_logical_map != after.physical_to_logical_map).any(1)
        self.began[changed] = step

    def check(self, windows: deque[WindowLoads]) -> None:
        """Every slot of a layer must have counted the passes since the layer's counters began."""
        while windows:
            window = windows.popleft()
            wanted = np.repeat(np.array(self.expected[window.window])[:, None], TOPOLOGY.num_slots, axis=1)
            if not (window.slots == wanted).all():
                self.seen.wrong_windows.append(f"{window.window}: {window.slots.tolist()}, not {wanted[:, 0]}")


@dataclass(frozen=True)
class Story:
    """What ranks do: `pushes` by the copy engines' carrier, or send and receive by way of the host."""

    pushes: bool
    sub_window_steps: int
    """Windows make the device catch up. With few of them commits wait long in the stream."""
    verify: bool = True
    steps: int = 20_000
    until_moved: int = 16
    """Ends once so many experts have moved, after `steps` at the latest, or when something is wrong."""

    def config(self) -> Config:
        return from_dict(
            {
                "policy": {"name": "random", "max_moves_per_layer": 2, "min_gain": 0.0},
                "window": {
                    "sub_window_steps": self.sub_window_steps,
                    "sub_windows": 1,
                    "refresh_sub_windows": 1,
                    "replan_sub_windows": 1,
                },
                "agreement": {"idle_round_steps": 1, "deadline_s": DEADLINE_S},
                "transport": {"max_step_inflation": 1.0},
                "breaker": {"max_failures": 1000},
            }
        )


def balancer_of(engine: LateEngine, store: TCPStore, story: Story) -> Balancer:
    """As `attach` builds it, on the scripted device and with a worker in place."""
    layer, rank, binding, config = engine.layer, engine.rank, engine.binding(), story.config()
    groups = GroupFactory(store, rank=rank, size=TOPOLOGY.num_ranks)
    weights = ExpertWeights(binding.weights, slots_per_rank=TOPOLOGY.slots_per_rank)
    votes, bulk = (groups.create(name, timeout_s=DEADLINE_S) for name in ("votes", "bulk"))
    # Room for one expert: a plan takes two batches, and the second begins with the commit of the first.
    limits = TransferLimits(entry_stride(weights), DEADLINE_S, chunk_bytes=128, verify=story.verify)
    recorder = LoadRecorder(layer, binding.counters, binding.passes)
    committed = layer.event()
    beside = beside_commit(recorder, binding.maps, partial(layer.record, committed))
    place = Workplace(weights, layer, groups, limits, beside_commit=beside)
    transport = Transport(place, partial(_carrier, place, pushes=story.pushes), name="late")
    transport.connect(DEADLINE_S)
    stats, expert_bytes = Stats(), weights.payload_bytes(0)
    times = StepTimes(stats, Pacer(1.0), Throttle(1.0))
    model = wire.ModelSpec(name="late", num_layers=LAYERS, num_experts=EXPERTS, top_k=1, expert_bytes=expert_bytes)
    link = InlineLink(wire.Hello(engine="late", model=model, topology=TOPOLOGY, config=to_dict(config)), config)
    form = RequestForm(dispatch=binding.dispatch, staging_experts=transport.staging_experts)
    leader = Leader(config, link, form, stats) if rank == 0 else None
    parts = Parts(rank, layer, committed, votes, bulk, recorder, times, transport, expert_bytes, leader)
    return Balancer(config, binding, parts, stats)


def _carrier(place: Workplace, *, pushes: bool) -> Carrier:
    if pushes:
        return CopyEngineCarrier(place.layer, place.groups, lambda: LatePeerMemory(place.layer))
    return HostStagedCarrier(place.layer, place.limits.chunk_bytes)


class Stage:
    """Two ranks that step together and stop together."""

    def __init__(self, story: Story, seed: int, drop: Collection[str]) -> None:
        self.story, self.seed, self.drop = story, seed, drop
        self._meet, self._stop = threading.Barrier(TOPOLOGY.num_ranks), threading.Event()
        self._engines: list[LateEngine] = []
        self._first_error: Exception | None = None

    def play(self, rank: int, store: TCPStore) -> Seen:
        try:
            return self._play(rank, store)
        except threading.BrokenBarrierError:
            raise self._first_error or TimeoutError("the other rank does not come") from None
        except Exception as error:
            self._first_error = error
            self._meet.abort()
            raise

    def _play(self, rank: int, store: TCPStore) -> Seen:
        layer = DroppingLayer(self.seed * 10 + rank, drop=self.drop, hurry=0.05 * (self.seed % 4))
        engine = LateEngine(rank, layer, self.story.sub_window_steps, reuses=self.seed % 2 == 0)
        self._engines.append(engine)
        balancer = balancer_of(engine, store, self.story)
        self._serve(engine, balancer)
        balancer.drain()
        balancer.close()
        engine.forward()
        ScriptedLayer.synchronize(layer)
        stats, seen = balancer.stats, engine.seen
        seen.committed, seen.moved, seen.places = stats.cycles_committed, stats.experts_moved, layer.places
        return seen

    def _serve(self, engine: LateEngine, balancer: Balancer) -> None:
        windows: deque[WindowLoads] = deque()
        balancer.on_window.append(windows.append)
        for step in range(1, self.story.steps + 1):
            before, window, rounds = balancer.in_force.placement, balancer._window, balancer.stats.rounds
            begins = balancer._to_stage is not None
            engine.forward()
            balancer.after_forward()
            if begins:
                begun = balancer._to_stage is None
                assert begun == (balancer._window == window), "a batch begins unless a sub-window ends"
                assert balancer.stats.rounds == rounds, "no vote is posted then"
            engine.step_done(step, range(window, balancer._window), before, balancer.in_force.placement)
            engine.check(windows)
            engine.seen.failed = any("checksum" in reason for reason in balancer.stats.drop_reasons)
            while balancer._bulk.lane._jobs.qsize() > BACKLOG:  # steps take longer than this, on any engine
                time.sleep(0.0005)
            self._meet.wait(DEADLINE_S)
            if engine.rank == 0 and (self._went_wrong() or balancer.stats.experts_moved >= self.story.until_moved):
                self._stop.set()
            self._meet.wait(DEADLINE_S)
            if self._stop.is_set():
                break

    def _went_wrong(self) -> bool:
        return any(engine.seen.is_wrong for engine in self._engines)


def run(story: Story, seed: int, drop: Collection[str] = ()) -> list[Seen]:
    """What both ranks saw; `drop` are beginnings of places whose waits are left out."""
    story.config()  # msgspec must not meet a type for the first time in two threads at once: 0.22 was seen to crash
    return list(run_ranks(TOPOLOGY.num_ranks, Stage(story, seed, drop).play))
