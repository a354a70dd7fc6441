"""`Metrics` for Prometheus, through the official client: a collector that reads them when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from swiftbalancer.cycle import Phase
from swiftbalancer.errors import ConfigError
from swiftbalancer.metrics import Metrics, host_rings
from swiftbalancer.stats import TimeRing

PREFIX = "swiftbalancer_"
QUANTILES = (0.5, 0.9, 0.99)


class BalancerCollector(Collector):
    """Turns one `Metrics` into metric families at every scrape; no state of its own."""

    def __init__(self, metrics: Metrics, *, per_layer: bool = False) -> None:
        """`per_layer` adds one series per layer and one per rank."""
        self._metrics, self._per_layer = metrics, per_layer

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._loads()
        yield from self._state()
        yield from self._cycles()
        yield from self._counters()
        yield from self._times()
        if self._per_layer:
            yield from self._details()

    def _loads(self) -> Iterator[Metric]:
        layers = self._metrics.layer_imbalance
        uneven = _gauge("imbalance", "max/mean rank load of the last sub-window, over layers; 1 is perfect.", "stat")
        for stat, value in (
            ("mean", layers.mean()),
            ("p95", np.quantile(layers, 0.95)),
            ("max", layers.max()),
        ):
            uneven.add_metric([stat], float(value))
        yield uneven
        even = _gauge("balancedness", "mean/max rank load of the last sub-window, over layers; 1 is perfect.", "stat")
        for stat, value in (("mean", (1 / layers).mean()), ("min", (1 / layers).min())):
            even.add_metric([stat], float(value))
        yield even
        predicted = self._metrics.stats.imbalance_predicted
        if predicted is not None:
            yield _value("imbalance_predicted", "What the last plan predicted for the loads after it.", predicted)

    def _state(self) -> Iterator[Metric]:
        metrics, about, view = self._metrics, self._metrics.about, self._metrics.phase()
        info = GaugeMetricFamily(
            PREFIX + "info",
            "Constant 1; what is balanced and how.",
            labels=["engine", "model", "policy", "mode"],
        )
        info.add_metric([about.engine, about.model, about.policy, about.mode], 1)
        yield info
        phase = _gauge("cycle_phase", "1 for the phase the cycle is in.", "phase")
        for known in Phase:
            phase.add_metric([known.name.lower()], float(known.name.lower() == view.name))
        yield phase
        yield _value("cycle_phase_age_seconds", "Time since the cycle last made progress.", view.age_s)
        yield _value("worker_up", "1 if the worker answers.", float(metrics.worker().up))

    def _cycles(self) -> Iterator[Metric]:
        cycles = CounterMetricFamily(
            PREFIX + "cycles", "Plans by kind, result and reason.", labels=["kind", "result", "reason"]
        )
        for key, number in self._metrics.cycles().items():
            cycles.add_metric([key.kind, key.result, key.reason], number)
        yield cycles

    def _counters(self) -> Iterator[Metric]:
        metrics, stats = self._metrics, self._metrics.stats
        for name, text, value in (
            ("steps", "Forward passes seen.", stats.steps),
            ("windows", "Sub-windows measured.", stats.windows),
            ("tokens", "Tokens that experts served, over all layers.", metrics.tokens),
            ("planned_moves", "Experts that plans asked to move, taken up or not.", stats.moves_planned),
            ("moves", "Experts moved.", stats.experts_moved),
            ("moved_bytes", "Bytes of weights moved.", stats.bytes_moved),
            ("plans_declined", "Plans that found nothing worth doing.", stats.plans_declined),
            ("requests_failed", "Plan requests the worker did not answer.", stats.requests_failed),
            ("worker_restarts", "Workers started beyond the first.", metrics.worker().restarts),
            ("agreement_failures", "Cycles dropped because ranks did not agree.", metrics.agreement_failures),
            ("rounds", "Votes taken among ranks.", stats.rounds),
            ("late_rounds", "Votes whose outcome was waited for.", stats.late_rounds),
            ("late_round_seconds", "Time waited for votes on the forward path.", stats.late_round_s),
            ("stalls", "Times a cycle made no progress for breaker.stall_warning_s.", stats.stalls),
            ("pauses", "Times balancing paused after repeated failures.", stats.pauses),
            ("lost_log_lines", "Lines of the event log lost to a slow or full disk.", metrics.lost_log_lines),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=value)

    def _times(self) -> Iterator[Metric]:
        host = SummaryMetricFamily(
            PREFIX + "host_seconds",
            "Main-thread time per step, by what the balancer did in it.",
            labels=["doing"],
        )
        for doing, ring in host_rings(self._metrics.stats).items():
            _add_ring(host, {"doing": doing}, ring)
        yield host
        rounds = SummaryMetricFamily(PREFIX + "round_seconds", "Time from a vote's posting to its outcome.")
        _add_ring(rounds, {}, self._metrics.stats.round_s)
        yield rounds
        plan = SummaryMetricFamily(PREFIX + "plan_seconds", "Time the worker took for a plan.")
        _add_ring(plan, {}, self._metrics.stats.plan_s)
        yield plan
        apply = SummaryMetricFamily(PREFIX + "apply_steps", "Steps from a plan's broadcast to its last commit.")
        _add_ring(apply, {}, self._metrics.stats.apply_steps)
        yield apply

    def _details(self) -> Iterator[Metric]:
        layer = _gauge("layer_imbalance", "max/mean rank load of one layer.", "layer")
        for index, value in enumerate(self._metrics.layer_imbalance):
            layer.add_metric([str(index)], float(value))
        yield layer
        rank = _gauge("rank_load_share", "Share of all tokens that one rank served.", "rank")
        for index, value in enumerate(self._metrics.rank_share):
            rank.add_metric([str(index)], float(value))
        yield rank


class MetricsServer:
    """Serves `/metrics` from a thread of the official client."""

    def __init__(self, metrics: Metrics, *, port: int, host: str = "127.0.0.1", per_layer: bool = False) -> None:
        """Raises `ConfigError` if the port is taken, or the host is none of this machine's."""
        registry = CollectorRegistry()
        registry.register(BalancerCollector(metrics, per_layer=per_layer))
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"metrics.port, metrics.host: cannot listen on {host}:{port}: {error.strerror}"
            ) from None

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


def _gauge(name: str, text: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=[label])


def _value(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _add_ring(family: SummaryMetricFamily, labels: dict[str, str], ring: TimeRing) -> None:
    """Count and sum since start, quantiles of the values the ring still has."""
    for q in QUANTILES:
        family.add_sample(family.name, {**labels, "quantile": str(q)}, ring.percentile(100 * q))
    family.add_sample(family.name + "_count", labels, ring.count)
    family.add_sample(family.name + "_sum", labels, ring.total)
