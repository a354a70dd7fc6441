"""The live view: what the worker knows of its engines, published once a second for whoever subscribes."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from swiftbalancer.load import imbalance
from swiftbalancer.wire import (
    Arrays,
    Hello,
    Message,
    NothingToDo,
    Outcome,
    PlanReply,
    PlanRequest,
    Refused,
    Status,
    num_moves,
)

VIEW_VERSION = 1
MAX_VIEW_BYTES = 16 << 20
HISTORY = 32
PUBLISH_EVERY_S = 1.0
LAYERS_SHOWN = 16


class PlanView(msgspec.Struct, frozen=True):
    """A plan, or why there was none. `age_s` seconds."""

    age_s: float
    request: int
    kind: str
    moves: int
    imbalance_now: float
    imbalance_predicted: float
    plan_ms: float
    reason: str = ""


class OutcomeView(msgspec.Struct, frozen=True):
    """How a cycle ended."""

    age_s: float
    request: int
    kind: str
    committed: bool
    reason: str
    step: int
    moves: int
    moved_mib: float
    imbalance: float
    steps: int


class PromiseView(msgspec.Struct, frozen=True):
    """What all placement plans since the hello promised: the answer of a run in `shadow` mode.

    `gain`: mean predicted drop of the imbalance, as a fraction; `moved_gib`: what their moves weigh.
    """

    plans: int = 0
    gain: float = 0.0
    moves: int = 0
    moved_gib: float = 0.0


class EngineView(msgspec.Struct, frozen=True):
    """One engine. `rank_share`: load of each rank over the mean rank's; `worst_layers`: `(layer, imbalance)`."""

    engine: str
    model: str
    policy: str
    num_layers: int
    num_experts: int
    num_ranks: int
    num_slots: int
    silent_s: float
    mode: str = ""
    phase: str = ""
    step: int = 0
    epoch: int = 0
    imbalance: float = 0.0
    rank_share: list[float] = []
    worst_layers: list[tuple[int, float]] = []
    metrics: dict[str, float] = {}
    plans: list[PlanView] = []
    outcomes: list[OutcomeView] = []
    imbalance_history: list[float] = []
    promise: PromiseView = PromiseView()


class View(msgspec.Struct, frozen=True):
    """All engines of one worker."""

    pid: int
    endpoint: str
    up_s: float
    engines: list[EngineView]
    refusals: int = 0
    version: int = VIEW_VERSION


@dataclass(slots=True)
class EngineStatus:
    """What has been heard of one engine, newest last. Times are monotonic seconds."""

    hello: Hello
    policy: str
    heard_at: float
    status: Status | None = None
    rank_loads: NDArray[np.float32] | None = None
    plans: deque[tuple[float, PlanView]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    outcomes: deque[tuple[float, OutcomeView]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    history: deque[float] = field(default_factory=lambda: deque(maxlen=120))
    promise: PromiseView = field(default_factory=PromiseView)

    def answered(self, request: PlanRequest, message: Message, now: float) -> None:
        """Notes what a request was answered with."""
        self.heard_at = now
        if request.observe_only:
            return
        if isinstance(message, PlanReply):
            moves = num_moves(message)
            self._note(now, message, request.request, message.kind, moves)
            if message.kind == "placement":
                self._promised(message, moves)
        elif isinstance(message, NothingToDo):
            self._note(now, message, request.request, "nothing", 0)
        elif isinstance(message, Refused):
            plan = PlanView(0.0, request.request, "refused", 0, 0.0, 0.0, 0.0, message.reason[:200])
            self.plans.append((now, plan))

    def _note(self, now: float, message: PlanReply | NothingToDo, request: int, kind: str, moves: int) -> None:
        reason = message.reason[:200] if isinstance(message, NothingToDo) else ""
        plan = PlanView(
            0.0,
            request,
            kind,
            moves,
            message.imbalance_now,
            message.imbalance_predicted,
            1e3 * message.plan_seconds,
            reason,
        )
        self.plans.append((now, plan))

    def _promised(self, plan: PlanReply, moves: int) -> None:
        before, number = self.promise, self.promise.plans + 1
        gain = 1 - plan.imbalance_predicted / plan.imbalance_now if plan.imbalance_now > 0 else 0.0
        self.promise = PromiseView(
            plans=number,
            gain=before.gain + (gain - before.gain) / number,
            moves=before.moves + moves,
            moved_gib=before.moved_gib + moves * self.hello.model.expert_bytes / 2**30,
        )

    def ended(self, outcome: Outcome, now: float) -> None:
        """Notes how a cycle ended."""
        self.heard_at = now
        view = OutcomeView(
            age_s=0.0,
            request=outcome.request,
            kind=outcome.kind,
            committed=outcome.committed,
            reason=outcome.reason[:200],
            step=outcome.step,
            moves=outcome.moves,
            moved_mib=outcome.moved_bytes / 2**20,
            imbalance=outcome.imbalance,
            steps=outcome.phase_steps.get("total", 0),
        )
        self.outcomes.append((now, view))

    def reported(self, status: Status, arrays: Arrays, now: float) -> None:
        """Notes a status report; one whose arrays do not fit the engine's ranks keeps the loads it had."""
        self.heard_at = now
        self.status = status
        self.history.append(status.imbalance)
        loads = arrays.get("rank_loads")
        if loads is not None and loads.ndim == 2 and loads.shape[1] == self.hello.topology.num_ranks and loads.size:
            self.rank_loads = np.asarray(loads, np.float32)

    def view(self, now: float) -> EngineView:
        """What to show."""
        hello, status = self.hello, self.status
        return EngineView(
            engine=hello.engine,
            model=hello.model.name,
            policy=self.policy,
            num_layers=hello.model.num_layers,
            num_experts=hello.model.num_experts,
            num_ranks=hello.topology.num_ranks,
            num_slots=hello.topology.num_slots,
            silent_s=now - self.heard_at,
            mode="" if status is None else status.mode,
            phase="" if status is None else status.phase,
            step=0 if status is None else status.step,
            epoch=0 if status is None else status.epoch,
            imbalance=0.0 if status is None else status.imbalance,
            rank_share=self._rank_share(),
            worst_layers=self._worst_layers(),
            metrics={} if status is None else status.metrics,
            plans=[msgspec.structs.replace(plan, age_s=now - at) for at, plan in self.plans],
            outcomes=[msgspec.structs.replace(outcome, age_s=now - at) for at, outcome in self.outcomes],
            imbalance_history=list(self.history),
            promise=self.promise,
        )

    def _rank_share(self) -> list[float]:
        if self.rank_loads is None:
            return []
        ranks = self.rank_loads.sum(0)
        mean = float(ranks.mean())
        return [float(value) / mean if mean > 0 else 1.0 for value in ranks]

    def _worst_layers(self) -> list[tuple[int, float]]:
        if self.rank_loads is None:
            return []
        layers = imbalance(self.rank_loads)
        return [(int(i), float(layers[i])) for i in np.argsort(-layers)[:LAYERS_SHOWN]]


class Publisher:
    """Decides when the view is due; the service asks it once per turn."""

    def __init__(self) -> None:
        self._last = -PUBLISH_EVERY_S
        self._started = time.monotonic()

    def due(self, now: float) -> bool:
        """Whether a second has passed since this last said yes."""
        if now - self._last < PUBLISH_EVERY_S:
            return False
        self._last = now
        return True

    def up_s(self, now: float) -> float:
        """Seconds since the worker started."""
        return now - self._started


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(View)


def encode_view(view: View) -> bytes:
    """One frame."""
    return _encoder.encode(view)


def decode_view(frame: bytes) -> View:
    """The view in a frame; raises `msgspec.DecodeError` for one that is not ours."""
    return _decoder.decode(frame)
