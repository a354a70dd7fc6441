"""Makes a running balancer visible: metrics, event log and the reports that `swiftbalancer top` shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from swiftbalancer.config import MetricsConfig
from swiftbalancer.cycle import Phase
from swiftbalancer.errors import ConfigError
from swiftbalancer.eventlog import EventLog
from swiftbalancer.exporter import MetricsServer, register
from swiftbalancer.metrics import About, Metrics, PhaseView, WorkerView
from swiftbalancer.stats import Stats
from swiftbalancer.wire import Arrays, Hello, Outcome, Status, specs

if TYPE_CHECKING:
    from swiftbalancer.bulk import WindowLoads

REPORT_EVERY_S = 2.0
CLOSE_S = 5.0


class Watched(Protocol):
    """What of a balancer is watched: `swiftbalancer.balancer.Balancer`."""

    stats: Stats
    on_cycle: list[Callable[[Outcome], None]]
    on_window: list[Callable[[WindowLoads], None]]

    @property
    def phase(self) -> Phase: ...

    def rest(self) -> None: ...

    @property
    def progress_age_s(self) -> float: ...


class Line(Protocol):
    """The line to the worker: `swiftbalancer.link.WorkerLink`."""

    restarts: int

    @property
    def is_ready(self) -> bool: ...

    def send(self, message: Status, arrays: Arrays | None = None) -> bool: ...


def metrics_of(watched: Watched, line: Line, hello: Hello) -> Metrics:
    """Metrics that read the balancer and its line to the worker whenever somebody looks."""
    policy, mode = str(hello.config["policy"]["name"]), str(hello.config["mode"])
    return Metrics(
        watched.stats,
        About(engine=hello.engine, model=hello.model.name, policy=policy, mode=mode),
        phase=lambda: PhaseView(watched.phase.name.lower(), watched.progress_age_s),
        worker=lambda: WorkerView(up=line.is_ready, restarts=line.restarts),
    )


class Monitor:
    """Rank 0's eyes: hooks into the balancer's observers and owns exporter and event log."""

    def __init__(self, watched: Watched, line: Line, *, hello: Hello, config: MetricsConfig) -> None:
        """Raises `ConfigError` if the metrics port is taken or the event log cannot be written."""
        self.metrics = metrics = metrics_of(watched, line, hello)
        self._line = line
        self._rest = watched.rest
        self._engine = hello.engine
        self._reported_at = 0.0
        port, path, per_layer = config.port, config.event_log, config.per_layer
        self._server = None
        if port is not None:
            self._server = MetricsServer(metrics, port=port, host=config.host, per_layer=per_layer)
        try:
            self._log = None if path is None else EventLog(path, metrics)
        except ConfigError:
            if self._server is not None:
                self._server.close(CLOSE_S)
            raise
        if self._log is not None:
            self._log.start(hello)
        watched.on_cycle.append(self._cycle_ended)
        watched.on_window.append(self._window_landed)

    def export_to(self, registry: CollectorRegistry, *, per_layer: bool = False) -> Callable[[], None]:
        """Adds our metrics to the engine's own registry; the result removes them again."""
        return register(self.metrics, registry, per_layer=per_layer)

    def close(self, timeout_s: float) -> None:
        """Ends exporter and event log."""
        for part in (self._server, self._log):
            if part is not None:
                part.close(timeout_s)

    def _cycle_ended(self, outcome: Outcome) -> None:
        self.metrics.cycle_ended(outcome)
        if self._log is not None:
            self._log.cycle(outcome)

    def _window_landed(self, window: WindowLoads) -> None:
        loads = window.rank_loads
        self.metrics.window(loads)
        if self._log is not None:
            self._log.window(step=window.step, loads=window.expert_loads)
        now = time.monotonic()
        if now - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = now
            self._rest()
            self._report(window, loads.astype(np.float32))

    def _report(self, window: WindowLoads, loads: NDArray[np.float32]) -> None:
        metrics, arrays = self.metrics, {"rank_loads": loads}
        figures = metrics.snapshot(self._rest)
        status = Status(
            engine=self._engine,
            step=window.step,
            epoch=window.in_force.epoch,
            phase=metrics.phase().name,
            mode=metrics.about.mode,
            imbalance=figures["imbalance_mean"],
            metrics=figures,
            arrays=specs(arrays),
        )
        self._rest()
        self._line.send(status, arrays)
