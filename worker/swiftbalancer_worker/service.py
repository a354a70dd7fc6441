"""The worker's service: several engines at once, each met with a hello; planning in this process, one at a time.

Nothing is kept between requests but who the engines are. Whatever arrives, the answer is a plan, a reason for
having none, or a refusal; it is never the end of the service.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from swiftbalancer import config as configs
from swiftbalancer.config import Config
from swiftbalancer.errors import BalancerError, WireError
from swiftbalancer.wire import (
    HELLO_FIRST,
    MAX_FRAMES,
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
from swiftbalancer_worker.answers import answer, check_size, plan_input
from swiftbalancer_worker.listen import Listener
from swiftbalancer_worker.planner import Planner
from swiftbalancer_worker.process import Lifeline
from swiftbalancer_worker.warmup import warm_up

log = logging.getLogger(__name__)
MAX_ENGINES = 64
MESSAGES_PER_S = 100.0
BURST = 400.0
CHECK_EVERY_MS = 1000


@dataclass(slots=True)
class Allowance:
    """A token bucket: how many messages a peer may still send now."""

    left: float = BURST
    at: float = field(default_factory=time.monotonic)

    def take(self, now: float) -> bool:
        """Whether one more message is within the rate."""
        self.left = min(BURST, self.left + (now - self.at) * MESSAGES_PER_S)
        self.at = now
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True


@dataclass(slots=True)
class Engine:
    """An engine that has said hello."""

    hello: Hello
    config: Config
    planner: Planner


class Service:
    """What the worker answers, without its sockets."""

    def __init__(self, *, policy: str | None = None) -> None:
        """`policy` overrules the one engines ask for; raises `UnknownPolicy` if there is none of that name."""
        if policy is not None:
            Planner(policy)
        self._policy = policy
        self._engines: dict[bytes, Engine] = {}
        self._allowances: dict[bytes, Allowance] = {}

    @property
    def engines(self) -> list[str]:
        """Names of the engines served now."""
        return [engine.hello.engine for engine in self._engines.values()]

    def handle(self, peer: bytes, frames: list[bytes], *, now: float) -> list[bytes] | None:
        """The frames to send back to `peer`, or None; never raises for anything a peer sends."""
        allowance = self._allowance(peer, now)
        if not allowance.take(now):
            log.warning(
                "engine %s sends more than %.0f messages a second: ignored", self._name(peer), MESSAGES_PER_S
            )
            return None
        request = 0
        try:
            message, arrays = decode(frames)
            request = getattr(message, "request", 0)
            return self._dispatch(peer, message, arrays)
        except BalancerError as error:
            log.warning("refused engine=%s request=%d: %s", self._name(peer), request, error)
            return _refusal(request, str(error))
        except Exception as error:
            log.exception("failed engine=%s request=%d", self._name(peer), request)
            return _refusal(request, f"{WORKER_FAILED}: {type(error).__name__}: {str(error)[:500]}")

    def _dispatch(self, peer: bytes, message: Message, arrays: Arrays) -> list[bytes] | None:
        if isinstance(message, Hello):
            return self._welcome(peer, message)
        engine = self._engines.get(peer)
        if isinstance(message, Goodbye):
            self._forget(peer)
            return None
        if engine is None:
            return _refusal(message.request, HELLO_FIRST) if isinstance(message, PlanRequest) else None
        if isinstance(message, PlanRequest):
            return self._plan(engine, message, arrays)
        if not isinstance(message, Outcome | Status):
            raise WireError(f"a {type(message).__name__} is what workers send, not engines")
        return None

    def _welcome(self, peer: bytes, hello: Hello) -> list[bytes]:
        if hello.protocol != PROTOCOL_VERSION:
            raise WireError(
                f"engine speaks protocol {hello.protocol}, this worker {PROTOCOL_VERSION}: update the older"
            )
        check_size(hello)
        config = configs.from_dict(hello.config)
        planner = Planner(self._policy or config.policy.name, config.policy.options)
        warm_up(planner)
        self._make_room()
        self._engines[peer] = Engine(hello, config, planner)
        log.info("engine=%s model=%s policy=%s", hello.engine, hello.model.name, planner.policy.name)
        return encode(Welcome(os.getpid(), planner.policy.name))

    def _plan(self, engine: Engine, request: PlanRequest, arrays: Arrays) -> list[bytes]:
        given = plan_input(engine.hello, engine.config, request, arrays)
        frames = answer(engine.planner, request, given)
        log.debug("planned engine=%s request=%d kind=%s", engine.hello.engine, request.request, request.kind)
        return frames

    def _forget(self, peer: bytes) -> None:
        engine = self._engines.pop(peer, None)
        self._allowances.pop(peer, None)
        if engine is not None:
            log.info("engine=%s has left", engine.hello.engine)

    def _make_room(self) -> None:
        """Forgets the engine heard of least recently when there are too many; it may say hello again."""
        while len(self._engines) >= MAX_ENGINES:
            self._forget(min(self._engines, key=lambda peer: self._allowances[peer].at))

    def _allowance(self, peer: bytes, now: float) -> Allowance:
        if peer not in self._allowances and len(self._allowances) >= 4 * MAX_ENGINES:
            strangers = [p for p in self._allowances if p not in self._engines]
            del self._allowances[min(strangers, key=lambda p: self._allowances[p].at)]
        return self._allowances.setdefault(peer, Allowance(at=now))

    def _name(self, peer: bytes) -> str:
        engine = self._engines.get(peer)
        return peer.hex() if engine is None else engine.hello.engine


def serve(service: Service, listener: Listener, lifeline: Lifeline, *, idle: Callable[[], None]) -> None:
    """Answers until the lifeline says to end; calls `idle` when no message is waiting."""
    poller = zmq.Poller()
    poller.register(listener.requests, zmq.POLLIN)
    for fd in lifeline.fds:
        poller.register(fd, zmq.POLLIN)
    while True:
        ready = dict(poller.poll(CHECK_EVERY_MS))
        lifeline.check([fd for fd in ready if isinstance(fd, int)])
        if not lifeline.wanted:
            return
        received = listener.receive(MAX_FRAMES + 2) if listener.requests in ready else None
        if received is None:
            idle()
            continue
        reply = service.handle(received[0], received[1:], now=time.monotonic())
        if reply is not None:
            listener.reply(received[0], reply)


def _refusal(request: int, reason: str) -> list[bytes]:
    return encode(Refused(request, reason[:4096]))
