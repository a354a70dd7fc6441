"""The worker's service: several engines at once, each met with a hello; planning in this process, one at a time.

Nothing a plan depends on is kept between requests. Whatever arrives, the answer is a plan, a reason for having
none, or a refusal; it is never the end of the service. Recording happens after the answer has gone out.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from swiftbalancer import config as configs
from swiftbalancer.config import Config
from swiftbalancer.errors import BalancerError, WireError
from swiftbalancer.wire import (
    HELLO_FIRST,
    PROTOCOL_VERSION,
    WORKER_FAILED,
    Arrays,
    Goodbye,
    Hello,
    Message,
    Outcome,
    PlanRequest,
    Refused,
    Status,
    Welcome,
    decode,
    encode,
)
from swiftbalancer_worker.answers import acknowledge, answer, check_size, plan_input
from swiftbalancer_worker.journal import Journal
from swiftbalancer_worker.peers import Engine, Peers
from swiftbalancer_worker.planner import Planner
from swiftbalancer_worker.status import EngineStatus, Publisher, View
from swiftbalancer_worker.warmup import warm_up

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """`policy` overrules the one engines ask for. `record` overrules their recording folder, which is ignored
    unless `engines_may_record`: an engine on another host must not choose where this one writes."""

    endpoint: str = ""
    policy: str | None = None
    record: Path | None = None
    engines_may_record: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class _Answered:
    """A request and its answer, to be recorded."""

    engine: Engine
    request: PlanRequest
    arrays: Arrays
    frames: list[bytes]


class Service:
    """What the worker answers, without its sockets."""

    def __init__(self, options: ServiceOptions | None = None) -> None:
        """Raises `UnknownPolicy` if there is no policy of the given name."""
        self._options = options or ServiceOptions()
        if self._options.policy is not None:
            Planner(self._options.policy)
        self.peers = Peers()
        self._to_record: list[_Answered] = []
        self._publisher = Publisher()
        self._refusals = 0
        self._warm: set[str] = set()

    def handle(self, peer: bytes, frames: list[bytes], *, now: float) -> list[bytes] | None:
        """The frames to send back to `peer`, or None; never raises for anything a peer sends."""
        if not self.peers.may_speak(peer, now):
            return None
        request = 0
        try:
            message, arrays = decode(frames)
            request = getattr(message, "request", 0)
            return self._dispatch(peer, message, arrays, now)
        except BalancerError as error:
            log.warning("refused engine=%s request=%d: %s", self.peers.name(peer), request, error)
            return self._refuse(request, str(error))
        except Exception as error:
            log.exception("failed engine=%s request=%d", self.peers.name(peer), request)
            return self._refuse(request, f"{WORKER_FAILED}: {type(error).__name__}: {str(error)[:500]}")

    def settle(self, now: float) -> None:
        """Records what was answered since the last call; to be called when the answers are out."""
        waiting, self._to_record = self._to_record, []
        for each in waiting:
            message, _ = decode(each.frames)
            each.engine.status.answered(each.request, message, now)
            if each.engine.journal is not None:
                each.engine.journal.request(each.request, each.arrays)
                each.engine.journal.answered(each.request, message)
        for engine in self.peers:
            if engine.journal is not None:
                engine.journal.idle()

    def view(self, now: float) -> View | None:
        """What `swiftbalancer top` shows, once a second; None in between."""
        if not self._publisher.due(now):
            return None
        engines = [engine.status.view(now) for engine in self.peers]
        return View(os.getpid(), self._options.endpoint, self._publisher.up_s(now), engines, self._refusals)

    def close(self) -> None:
        """Completes all recordings."""
        for engine in self.peers:
            if engine.journal is not None:
                engine.journal.close()

    def _dispatch(self, peer: bytes, message: Message, arrays: Arrays, now: float) -> list[bytes] | None:
        if isinstance(message, Hello):
            return self._welcome(peer, message, now)
        engine = self.peers.get(peer)
        if isinstance(message, Goodbye):
            self._farewell(peer)
            return None
        if engine is None:
            return self._refuse(message.request, HELLO_FIRST) if isinstance(message, PlanRequest) else None
        match message:
            case PlanRequest():
                return self._plan(engine, message, arrays)
            case Outcome():
                engine.status.ended(message, now)
                if engine.journal is not None:
                    engine.journal.outcome(message)
            case Status():
                engine.status.reported(message, arrays, now)
            case _:
                raise WireError(f"a {type(message).__name__} is what workers send, not engines")
        return None

    def _welcome(self, peer: bytes, hello: Hello, now: float) -> list[bytes]:
        if hello.protocol != PROTOCOL_VERSION:
            raise WireError(f"engine speaks protocol {hello.protocol}, this worker {PROTOCOL_VERSION}")
        check_size(hello)
        config = configs.from_dict(hello.config)
        planner = Planner(self._options.policy or config.policy.name, config.policy.options)
        if config.mode != "observe":
            self._warm_up(planner)
        status = EngineStatus(hello, planner.policy.name, heard_at=now)
        self.peers.add(peer, Engine(hello, config, planner, status, self._journal(hello, config)))
        log.info("engine=%s model=%s policy=%s", hello.engine, hello.model.name, planner.policy.name)
        return encode(Welcome(os.getpid(), planner.policy.name))

    def _warm_up(self, planner: Planner) -> None:
        """Once per policy; with numba installed the first time on a machine compiles, then its cache is used."""
        if planner.policy.name in self._warm:
            return
        started = time.perf_counter()
        warm_up(planner)
        log.info("planner warmed up policy=%s seconds=%.1f", planner.policy.name, time.perf_counter() - started)
        self._warm.add(planner.policy.name)

    def _journal(self, hello: Hello, config: Config) -> Journal | None:
        folder = self._options.record
        if folder is None and config.record.directory is not None and self._options.engines_may_record:
            folder = Path(config.record.directory)
        return None if folder is None else Journal(folder, hello, max_bytes=config.record.max_mib << 20)

    def _plan(self, engine: Engine, request: PlanRequest, arrays: Arrays) -> list[bytes]:
        given = plan_input(engine.hello, engine.config, request, arrays)
        frames = acknowledge(request, given) if request.observe_only else answer(engine.planner, request, given)
        self._to_record.append(_Answered(engine, request, arrays, frames))
        log.debug("planned engine=%s request=%d kind=%s", engine.hello.engine, request.request, request.kind)
        return frames

    def _farewell(self, peer: bytes) -> None:
        if self.peers.get(peer) is not None:
            log.info("engine=%s has left", self.peers.name(peer))
        self.peers.remove(peer)

    def _refuse(self, request: int, reason: str) -> list[bytes]:
        self._refusals += 1
        return encode(Refused(request, reason[:4096]))
