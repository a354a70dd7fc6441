"""Who talks to the worker: engines that have said hello, and how much each peer may say."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from swiftbalancer.config import Config
from swiftbalancer.wire import Hello
from swiftbalancer_worker.journal import Journal
from swiftbalancer_worker.planner import Planner
from swiftbalancer_worker.status import EngineStatus

log = logging.getLogger(__name__)
MAX_ENGINES = 64
MAX_PEERS = 256
MESSAGES_PER_S = 100.0
BURST = 400.0


@dataclass(slots=True)
class Engine:
    """An engine that has said hello."""

    hello: Hello
    config: Config
    planner: Planner
    status: EngineStatus
    journal: Journal | None = None


@dataclass(slots=True)
class _Allowance:
    """A token bucket: how many messages a peer may still send. `at`: monotonic seconds of its last one."""

    at: float
    left: float = BURST
    exceeded: bool = False

    def take(self, now: float) -> bool:
        self.left = min(BURST, self.left + (now - self.at) * MESSAGES_PER_S)
        self.at = now
        if self.left < 1.0:
            return False
        self.left -= 1.0
        self.exceeded = False
        return True


class Peers:
    """Engines by the address of their connection; the one heard of least recently goes when there are too many."""

    def __init__(self) -> None:
        self._engines: dict[bytes, Engine] = {}
        self._allowances: dict[bytes, _Allowance] = {}

    def __iter__(self) -> Iterator[Engine]:
        return iter(list(self._engines.values()))

    def __len__(self) -> int:
        return len(self._engines)

    def get(self, peer: bytes) -> Engine | None:
        """The engine at `peer`, if it has said hello."""
        return self._engines.get(peer)

    def name(self, peer: bytes) -> str:
        """Its name, or its address."""
        engine = self._engines.get(peer)
        return peer.hex() if engine is None else engine.hello.engine

    def may_speak(self, peer: bytes, now: float) -> bool:
        """Whether one more message of `peer` is within the rate; the first one beyond it is logged."""
        if peer not in self._allowances and len(self._allowances) >= MAX_PEERS:
            strangers = [p for p in self._allowances if p not in self._engines]
            del self._allowances[min(strangers, key=lambda p: self._allowances[p].at)]
        allowance = self._allowances.setdefault(peer, _Allowance(at=now))
        if allowance.take(now):
            return True
        if not allowance.exceeded:
            log.warning("engine=%s sends more than %.0f messages/s: ignored", self.name(peer), MESSAGES_PER_S)
            allowance.exceeded = True
        return False

    def add(self, peer: bytes, engine: Engine) -> None:
        """Takes an engine in. A second hello of it replaces the first, from a new connection too: it opens one when
        an answer was late, and does not take leave on the old one."""
        for known in [p for p, old in self._engines.items() if p == peer or old.hello.engine == engine.hello.engine]:
            self.remove(known)
        while len(self._engines) >= MAX_ENGINES:
            self.remove(min(self._engines, key=lambda p: self._engines[p].status.heard_at))
        self._engines[peer] = engine

    def remove(self, peer: bytes) -> None:
        """Forgets an engine and completes its recording."""
        engine = self._engines.pop(peer, None)
        if engine is not None and engine.journal is not None:
            engine.journal.close()
