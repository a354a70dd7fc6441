"""Metrics: what is counted, what Prometheus sees of it, and that dashboard and alerts ask for what exists."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from swiftbalancer.config import MetricsConfig
from swiftbalancer.cycle import Fault, Phase
from swiftbalancer.errors import ConfigError
from swiftbalancer.eventlog import MAX_QUEUED, EventLog
from swiftbalancer.exporter import BalancerCollector, MetricsServer, register
from swiftbalancer.load import expert_loads
from swiftbalancer.metrics import About, Metrics, PhaseView, WorkerView, reason_class
from swiftbalancer.monitor import Monitor
from swiftbalancer.placement import Placement
from swiftbalancer.stats import Stats, StepKind
from swiftbalancer.wire import Arrays, Outcome, Status
from swiftbalancer_worker.trace import open_trace
from tests.edges.engines import EXPERTS, LAYERS, PLACEMENT, TOPOLOGY, hello, wait_for
from tests.edges.processes import free_port

DOCS = Path(__file__).resolve().parents[2] / "docs"
LOADS = np.array([[30.0, 10.0], [20.0, 20.0]])


def outcome(*, committed: bool = True, reason: str = "", kind: Any = "placement") -> Outcome:
    return Outcome(1, kind, committed, reason, 2, 320, 3, 3 << 20, 1.25, {"total": 9})


def metrics(**about: str) -> Metrics:
    stats = Stats(steps=100, windows=3, experts_moved=7, bytes_moved=7 << 20, rounds=12, imbalance_predicted=1.1)
    for kind in StepKind:
        stats.host_s[kind].add(1e-5 * (1 + kind))
    stats.plan_s.add(0.02)
    stats.round_s.add(4e-4)
    stats.apply_steps.add(9)
    return Metrics(
        stats,
        About("engine", "model", "swift", about.get("mode", "on")),
        phase=lambda: PhaseView("moving", 2.5),
        worker=lambda: WorkerView(up=True, restarts=4),
    )


def samples(of: Metrics, *, per_layer: bool = False) -> dict[str, float]:
    """`name{labels}` -> value, through the client's own text format and parser."""
    registry = CollectorRegistry()
    register(of, registry, per_layer=per_layer)
    out = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            out[f"{sample.name}{{{labels}}}"] = sample.value
    return out


def test_a_scrape_shows_loads_cycles_and_times() -> None:
    counted = metrics()
    counted.window(LOADS)
    counted.cycle_ended(outcome())
    counted.cycle_ended(outcome(committed=False, reason="rank 3: checksum"))
    counted.cycle_ended(outcome(committed=False, reason="rank 1: checksum"))
    seen = samples(counted)
    assert seen["swiftbalancer_imbalance{stat=mean}"] == pytest.approx(1.25)
    assert seen["swiftbalancer_imbalance{stat=max}"] == pytest.approx(1.5)
    assert seen["swiftbalancer_balancedness{stat=min}"] == pytest.approx(1 / 1.5)
    assert seen["swiftbalancer_imbalance_predicted{}"] == pytest.approx(1.1)
    assert seen["swiftbalancer_tokens_total{}"] == 80
    assert seen["swiftbalancer_cycles_total{kind=placement,reason=,result=committed}"] == 1
    assert seen["swiftbalancer_cycles_total{kind=placement,reason=checksum,result=dropped}"] == 2
    assert seen["swiftbalancer_cycle_phase{phase=moving}"] == 1
    assert seen["swiftbalancer_cycle_phase{phase=idle}"] == 0
    assert seen["swiftbalancer_worker_restarts_total{}"] == 4
    assert seen["swiftbalancer_host_seconds_count{doing=committing}"] == 1
    assert seen["swiftbalancer_host_seconds{doing=moving,quantile=0.5}"] == pytest.approx(3e-5)
    assert seen["swiftbalancer_plan_seconds_sum{}"] == pytest.approx(0.02)
    assert seen["swiftbalancer_round_seconds{quantile=0.5}"] == pytest.approx(4e-4)
    assert seen["swiftbalancer_info{engine=engine,mode=on,model=model,policy=swift}"] == 1


def test_nothing_measured_yet_is_no_error() -> None:
    seen = samples(Metrics(Stats()))
    assert seen["swiftbalancer_imbalance{stat=mean}"] == 1.0
    assert "swiftbalancer_imbalance_predicted{}" not in seen


def test_series_do_not_grow_with_the_model_unless_asked() -> None:
    small, large = metrics(), metrics()
    small.window(np.ones((2, 2)))
    large.window(np.ones((94, 64)))
    assert len(samples(small)) == len(samples(large)) < 80
    assert len(samples(large, per_layer=True)) == len(samples(large)) + 94 + 64


def test_reasons_are_a_dozen_words_whatever_the_numbers_in_them() -> None:
    for fault in Fault:
        if fault:
            assert reason_class(f"rank 17: {fault.name.lower()}") == fault.name.lower()
    assert reason_class("rank 3 asked for a drain") == "drain"
    assert reason_class("rank 3 is off: its step is 7, of most ranks 8") == "lockstep"
    assert reason_class("ranks hold different plans") == "digest"
    assert reason_class("ranks differ in epoch: [1, 2]") == "disagreement"
    assert reason_class("no answer to request 12 within 3 s") == "worker"
    assert reason_class("the outcome of round 12 is unknown") == "agreement"
    assert reason_class("0x81723 went wrong") == "other"
    assert reason_class("") == ""


def test_a_plan_in_shadow_mode_is_neither_committed_nor_dropped() -> None:
    counted = metrics(mode="shadow")
    counted.cycle_ended(outcome(committed=False, reason="shadow mode: nothing is applied"))
    assert samples(counted)["swiftbalancer_cycles_total{kind=placement,reason=,result=shadow}"] == 1


def test_disagreements_are_counted_of_their_own() -> None:
    counted = metrics()
    for reason in ("ranks hold different plans", "rank 1 is off: ...", "rank 2: checksum"):
        counted.cycle_ended(outcome(committed=False, reason=reason))
    assert counted.agreement_failures == 2


def test_the_snapshot_has_plain_numbers_under_fixed_names() -> None:
    counted = metrics()
    before = counted.snapshot()
    counted.window(LOADS)
    after = counted.snapshot()
    assert set(before) == set(after)
    assert after["imbalance_mean"] == pytest.approx(1.25)
    assert after["host_us_per_step_p50"] == pytest.approx(25.0)
    json.dumps(after)


def test_the_server_answers_on_this_machine_only_and_ends() -> None:
    port = free_port()
    server = MetricsServer(metrics(), port=port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert b"swiftbalancer_imbalance{" in answer.read()
    with pytest.raises(ConfigError, match=rf"metrics\.port.*: cannot listen on 127\.0\.0\.1:{port}"):
        MetricsServer(metrics(), port=port)
    server.close(5.0)
    MetricsServer(metrics(), port=port).close(5.0)


def test_other_hosts_may_read_where_the_address_says_so() -> None:
    port = free_port()
    elsewhere = "127.0.0.2"  # not the default, and this machine's all the same
    with pytest.raises(ConfigError, match=r"metrics\.host: cannot listen on 192\.0\.2\.1"):
        MetricsServer(metrics(), port=port, host="192.0.2.1")
    server = MetricsServer(metrics(), port=port, host=elsewhere)
    with urllib.request.urlopen(f"http://{elsewhere}:{port}/metrics", timeout=30) as answer:
        assert b"swiftbalancer_imbalance{" in answer.read()
    server.close(5.0)


def test_an_engines_own_registry_can_take_our_families_and_give_them_back() -> None:
    registry = CollectorRegistry()
    remove = register(metrics(), registry)
    assert b"swiftbalancer_steps_total 100" in generate_latest(registry)
    remove()
    assert b"swiftbalancer" not in generate_latest(registry)


# -- dashboard and alerts ---------------------------------------------------------------------------------------


def known_series() -> set[str]:
    """Every series name a scrape can have."""
    counted = metrics()
    counted.window(LOADS)
    counted.cycle_ended(outcome())
    return {name.partition("{")[0] for name in samples(counted, per_layer=True)}


def known_labels() -> dict[str, set[str]]:
    counted = metrics()
    counted.window(LOADS)
    counted.cycle_ended(outcome(committed=False, reason="rank 1: checksum"))
    out: dict[str, set[str]] = {}
    for name in samples(counted):
        series, _, labels = name.partition("{")
        out.setdefault(series, set()).update(re.findall(r"(\w+)=", labels))
    return out


def queries() -> dict[str, str]:
    """Every PromQL expression of the dashboard and of the alert rules, by where it is."""
    dashboard = json.loads((DOCS / "grafana" / "dashboard.json").read_text())
    rules = yaml.safe_load((DOCS / "grafana" / "alerts.yaml").read_text())
    out = {f"{p['title']}/{t['refId']}": t["expr"] for p in dashboard["panels"] for t in p["targets"]}
    return out | {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}


@pytest.mark.parametrize("where", sorted(queries()))
def test_dashboard_and_alerts_ask_for_series_and_labels_that_exist(where: str) -> None:
    asked = re.findall(r"(swiftbalancer_\w+)(?:\{([^}]*)\})?", queries()[where])
    assert asked
    labels = known_labels()
    for series, selector in asked:
        assert series in known_series()
        used = set(re.findall(r"(\w+)\s*=?[=~]", selector)) - {"job"}
        assert used <= labels[series]


def test_every_series_is_in_the_docs() -> None:
    text = (DOCS / "metrics.md").read_text()
    families = {family.name for family in BalancerCollector(metrics(), per_layer=True).collect()}
    assert [name for name in families if not re.search(rf"\b{name}\b", text)] == []


def test_the_dashboard_is_one_grafana_can_load() -> None:
    dashboard = json.loads((DOCS / "grafana" / "dashboard.json").read_text())
    assert {"title", "panels", "templating", "schemaVersion"} <= set(dashboard)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) >= 10


# -- event log --------------------------------------------------------------------------------------------------


def test_the_event_log_is_what_replay_reads(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, metrics())
    log.start(hello())
    for step in range(3):
        log.window(step=step, loads=np.full((LAYERS, EXPERTS), step + 0.4))
        log.cycle(outcome())
    log.close(10.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", *["window", "cycle"] * 3]
    assert lines[2]["committed"] is True
    trace = open_trace(path)
    assert trace.shape == (3, LAYERS, EXPERTS)
    assert trace.topology == TOPOLOGY
    np.testing.assert_array_equal(trace.at(2), np.full((LAYERS, EXPERTS), 2.0))


def test_an_event_log_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.event_log: .*cannot be written"):
        EventLog(tmp_path / "no" / "folder.jsonl", metrics())


def test_a_full_disk_costs_lines_and_no_step(caplog: pytest.LogCaptureFixture) -> None:
    counted = metrics()
    log = EventLog("/dev/full", counted)
    for _ in range(5):
        log.cycle(outcome())
    wait_for(lambda: counted.lost_log_lines == 5)
    log.close(10.0)
    assert caplog.text.count("the event log cannot be written") == 1


def test_a_disk_that_hangs_costs_lines_and_no_step(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    counted = metrics()
    log = EventLog(pipe, counted)
    big = np.ones((64, 64))
    for _ in range(2 * MAX_QUEUED):
        log.window(step=1, loads=big)
    assert counted.lost_log_lines > 0
    began = time.monotonic()
    log.close(0.1)
    assert time.monotonic() - began < 30
    os.close(reader)


# -- the monitor ------------------------------------------------------------------------------------------------


@dataclass
class ScriptedBalancer:
    """What a monitor watches, driven by the test."""

    stats: Stats = field(default_factory=Stats)
    on_cycle: list[Callable[[Outcome], None]] = field(default_factory=list)
    on_window: list[Callable[[Any], None]] = field(default_factory=list)
    phase: Phase = Phase.MOVING
    progress_age_s: float = 3.0
    reported: list[Status] = field(default_factory=list)
    reported_at_rests: list[int] = field(default_factory=list)
    """How many reports were out when the observer rested."""

    def rest(self) -> None:
        self.reported_at_rests.append(len(self.reported))


@dataclass
class ScriptedLine:
    """A line to a worker that keeps what is sent."""

    restarts: int = 2
    is_ready: bool = True
    sent: list[Status] = field(default_factory=list)

    def send(self, message: Status, arrays: Arrays | None = None) -> bool:
        assert arrays is not None
        self.sent.append(message)
        return True


@dataclass(frozen=True)
class _InForce:
    epoch: int
    placement: Placement


@dataclass(frozen=True)
class _Window:
    """A sub-window as the balancer hands it over."""

    step: int
    slots: Any
    in_force: _InForce

    @property
    def expert_loads(self) -> Any:
        return expert_loads(self.slots, self.in_force.placement)

    @property
    def rank_loads(self) -> Any:
        return self.slots.reshape(LAYERS, 2, -1).sum(-1)


def test_a_sub_window_without_tokens_is_even() -> None:
    metrics = Metrics(Stats())
    metrics.window(np.zeros((LAYERS, 4)))
    assert metrics.layer_imbalance.tolist() == [1.0] * LAYERS
    assert metrics.rank_share.tolist() == [0.25] * 4


def test_the_monitor_measures_logs_and_reports(tmp_path: Path) -> None:
    line = ScriptedLine()
    balancer = ScriptedBalancer(reported=line.sent)
    config = MetricsConfig(event_log=str(tmp_path / "log.jsonl"))
    monitor = Monitor(balancer, line, hello=hello(), config=config)
    slots = np.ones((LAYERS, TOPOLOGY.num_slots), np.int64)
    slots[0, :6] = 3
    for step in (32, 64, 96):
        balancer.on_window[0](_Window(step, slots, _InForce(5, PLACEMENT)))
    balancer.on_cycle[0](outcome())
    monitor.close(10.0)
    assert monitor.metrics.layer_imbalance == pytest.approx([1.5, 1.0])
    (status,) = line.sent
    assert balancer.reported_at_rests == [0] * 5
    assert (status.phase, status.epoch, status.step) == ("moving", 5, 32)
    assert status.metrics["phase_age_s"] == 3.0
    assert status.metrics["worker_restarts"] == 2
    trace = open_trace(tmp_path / "log.jsonl")
    assert trace.shape == (3, LAYERS, EXPERTS)
    assert trace.at(0).sum() == slots.sum()
