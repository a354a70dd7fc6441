"""`Metrics` for Prometheus, through the official client: a collector that reads them when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Thread
from wsgiref.simple_server import WSGIServer

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from swiftbalancer.errors import ConfigError
from swiftbalancer.metrics import Metrics, Timer

PREFIX = "swiftbalancer_"
PHASES = ("idle", "receiving", "moving", "off")
HOST_EDGES_S = (1e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 1e-2, 0.1, 1.0)
PLAN_EDGES_S = (1e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CYCLE_EDGES_S = (1e-2, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class BalancerCollector(Collector):
    """Turns one `Metrics` into metric families at every scrape; no state of its own."""

    def __init__(self, metrics: Metrics, *, per_layer: bool = False) -> None:
        """`per_layer` adds one series per layer and per rank."""
        self._metrics, self._per_layer = metrics, per_layer

    def collect(self) -> Iterator[Metric]:
        """All families, in the order of `docs/metrics.md`."""
        yield from self._gauges()
        yield from self._phase()
        yield from self._counters()
        yield from self._timers()
        if self._per_layer:
            yield from self._details()

    def _gauges(self) -> Iterator[Metric]:
        metrics = self._metrics
        info = _gauge("info", "Constant 1; what is balanced and how.", ["engine", "policy", "mode"])
        info.add_metric([metrics.engine, metrics.policy, metrics.mode], 1)
        yield info
        layers = metrics.layer_imbalance if metrics.layer_imbalance.size else np.ones(1)
        spread = _gauge(
            "imbalance", "max/mean rank load of the last sub-window, over layers; 1 is perfect.", ["stat"]
        )
        for stat, value in (
            ("mean", layers.mean()),
            ("p95", np.quantile(layers, 0.95)),
            ("max", layers.max()),
        ):
            spread.add_metric([stat], float(value))
        yield spread
        even = _gauge(
            "balancedness", "mean/max rank load of the last sub-window, over layers; 1 is perfect.", ["stat"]
        )
        for stat, value in (("mean", (1 / layers).mean()), ("min", (1 / layers).min())):
            even.add_metric([stat], float(value))
        yield even
        if metrics.imbalance_predicted >= 0:
            yield _value(
                "imbalance_unchanged",
                "Predicted imbalance if the last plan were not applied.",
                metrics.imbalance_now,
            )
            yield _value(
                "imbalance_predicted", "Predicted imbalance with the last plan.", metrics.imbalance_predicted
            )
        yield _value("worker_up", "1 if the worker answers.", float(metrics.worker_up))
        yield _value("balancing", "1 unless balancing has switched itself off.", float(metrics.balancing))
        yield _value("placement_epoch", "Commits since start; equal on all ranks.", metrics.epoch)

    def _phase(self) -> Iterator[Metric]:
        phase = _gauge("cycle_phase", "1 for the phase the cycle is in.", ["phase"])
        for name in PHASES:
            phase.add_metric([name], float(name == self._metrics.phase))
        yield phase
        yield _value("cycle_phase_age_seconds", "Time since the phase changed.", self._metrics.phase_age_s)

    def _counters(self) -> Iterator[Metric]:
        totals = self._metrics.totals
        cycles = CounterMetricFamily(
            PREFIX + "cycles", "Plans by kind, result and reason.", labels=["kind", "result", "reason"]
        )
        for labels, number in sorted(totals.cycles.copy().items()):
            cycles.add_metric(labels, number)
        yield cycles
        yield _counter("steps", "Forward passes seen.", self._metrics.steps)
        yield _counter("windows", "Sub-windows measured.", totals.windows)
        yield _counter("tokens", "Tokens dispatched to experts, over all layers.", totals.tokens)
        yield _counter("moves", "Experts moved.", totals.moves)
        yield _counter("moved_bytes", "Bytes of weights moved.", totals.moved_bytes)
        yield _counter("cross_node_bytes", "Bytes of weights moved between nodes.", totals.cross_node_bytes)
        yield _counter("worker_restarts", "Workers started beyond the first.", totals.worker_restarts)
        yield _counter(
            "agreement_failures", "Cycles dropped because ranks did not agree.", totals.agreement_failures
        )
        yield _counter("stalls", "Times a cycle made no progress for breaker.stall_warning_s.", totals.stalls)
        yield _counter(
            "log_lines_lost", "Lines of the event log lost to a slow or full disk.", totals.log_lines_lost
        )

    def _timers(self) -> Iterator[Metric]:
        host = HistogramMetricFamily(
            PREFIX + "host_seconds", "Host time per step on the forward path, by part.", labels=["part"]
        )
        for part, timer in sorted(self._metrics.host.copy().items()):
            host.add_metric([part], _buckets(timer, HOST_EDGES_S), timer.sum_s)
        yield host
        for name, text, timer, edges in (
            ("plan_seconds", "Time the worker took for a plan.", self._metrics.plan, PLAN_EDGES_S),
            ("cycle_seconds", "Time from request to commit or drop.", self._metrics.cycle, CYCLE_EDGES_S),
        ):
            family = HistogramMetricFamily(PREFIX + name, text)
            family.add_metric([], _buckets(timer, edges), timer.sum_s)
            yield family

    def _details(self) -> Iterator[Metric]:
        layer = _gauge("layer_imbalance", "max/mean rank load of one layer.", ["layer"])
        for index, value in enumerate(self._metrics.layer_imbalance):
            layer.add_metric([str(index)], float(value))
        yield layer
        rank = _gauge("rank_load_share", "Share of all tokens one rank served.", ["rank"])
        for index, value in enumerate(self._metrics.rank_share):
            rank.add_metric([str(index)], float(value))
        yield rank


class MetricsServer:
    """Serves `/metrics` on 127.0.0.1 from a thread of the official client."""

    def __init__(self, metrics: Metrics, *, port: int, per_layer: bool = False) -> None:
        """Raises `ConfigError` if the port is taken."""
        registry = CollectorRegistry()
        registry.register(BalancerCollector(metrics, per_layer=per_layer))
        try:
            self._server, self._thread = _start(port, registry)
        except OSError as error:
            raise ConfigError(f"metrics.port: cannot listen on 127.0.0.1:{port}: {error.strerror}") from None

    def close(self, timeout_s: float) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout_s)


def register(metrics: Metrics, registry: CollectorRegistry, *, per_layer: bool = False) -> Callable[[], None]:
    """Adds our families to the engine's own registry; the result removes them again."""
    collector = BalancerCollector(metrics, per_layer=per_layer)
    registry.register(collector)
    return lambda: registry.unregister(collector)


def _start(port: int, registry: CollectorRegistry) -> tuple[WSGIServer, Thread]:
    return start_http_server(port, addr="127.0.0.1", registry=registry)


def _gauge(name: str, text: str, labels: list[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=labels)


def _value(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _buckets(timer: Timer, edges: tuple[float, ...]) -> list[tuple[str, float]]:
    """Cumulative buckets as the client wants them; the last one holds everything."""
    known = [(repr(edge), float(number)) for edge, number in timer.cumulative(edges)]
    return [*known, ("+Inf", float(sum(timer.counts)))]
