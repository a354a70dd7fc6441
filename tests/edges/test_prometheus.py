"""Exporter, alert rules and dashboard before Prometheus' own `promtool` (Debian: `apt install prometheus`)."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from swiftbalancer.exporter import MetricsServer
from swiftbalancer.metrics import Metrics
from tests.edges.engines import LONG_S
from tests.edges.processes import free_port
from tests.edges.test_metrics import DOCS, known_labels, metrics, outcome

RULES = DOCS / "grafana" / "alerts.yaml"
RULE_TESTS = Path(__file__).with_name("alerts_test.yaml")


@pytest.fixture
def promtool() -> str:
    found = os.environ.get("SWIFTBALANCER_PROMTOOL") or shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool: install Prometheus, or set SWIFTBALANCER_PROMTOOL to its path")
    return found


def passes(*command: str, given: str = "") -> str:
    """Runs it; fails the test with what it said unless it ends well. Gives what it printed."""
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=LONG_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def busy() -> Metrics:
    """Figures in which nothing is missing."""
    counted = metrics()
    counted.window(np.array([[30.0, 10.0], [20.0, 20.0]]))
    counted.cycle_ended(outcome())
    counted.cycle_ended(outcome(committed=False, reason="rank 1: checksum"))
    return counted


def scrape() -> str:
    """What the real exporter answers, details included."""
    port = free_port()
    server = MetricsServer(busy(), port=port, per_layer=True)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONG_S) as answer:
        text: str = answer.read().decode()
    server.close(5.0)
    return text


def dashboard() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((DOCS / "grafana" / "dashboard.json").read_text())
    return values


def panel_queries() -> dict[str, str]:
    """The dashboard's expressions by panel, its variables filled in."""
    targets = [(panel["title"], target) for panel in dashboard()["panels"] for target in panel["targets"]]
    return {f"{title}/{target['refId']}": target["expr"].replace("$job", ".*") for title, target in targets}


def test_prometheus_finds_nothing_wrong_with_the_exporters_output(promtool: str) -> None:
    assert passes(promtool, "check", "metrics", given=scrape()) == ""


def test_prometheus_loads_the_alert_rules(promtool: str) -> None:
    assert "8 rules found" in passes(promtool, "check", "rules", str(RULES))


def test_alerts_fire_when_they_should_and_only_then(promtool: str) -> None:
    assert "SUCCESS" in passes(promtool, "test", "rules", str(RULE_TESTS))


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    rules = yaml.safe_load(RULES.read_text())
    cases = [case for test in yaml.safe_load(RULE_TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert fires == {rule["alert"] for group in rules["groups"] for rule in group["rules"]}


def test_every_panel_shows_something_for_what_the_exporter_sends(promtool: str, tmp_path: Path) -> None:
    """Every expression is evaluated by Prometheus over all series of a real scrape, as counters that rise."""
    series = [line.rpartition(" ")[0] for line in scrape().splitlines() if not line.startswith("#")]
    cases = [
        {"expr": f"count({expr}) > bool 0", "eval_time": "30m", "exp_samples": [{"labels": "{}", "value": 1}]}
        for expr in panel_queries().values()
    ]
    inputs = [
        {"series": with_job(name), "values": "1+1x120" if "_phase{" not in name else "1x120"} for name in series
    ]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": cases}
    path = tmp_path / "dashboard_test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "1m", "tests": [test]}))
    assert "SUCCESS" in passes(promtool, "test", "rules", str(path))


def with_job(series: str) -> str:
    """The series as Prometheus stores it, with the job it was scraped for."""
    name, brace, labels = series.partition("{")
    return f'{name}{{job="engines",{labels}' if brace else f'{name}{{job="engines"}}'


# -- the dashboard's own structure ------------------------------------------------------------------------------


def test_grafanas_own_schema_knows_every_value() -> None:
    """Grafana's published models (`pip install grafana-foundation-sdk`) read the dashboard and give it back whole."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="no grafana-foundation-sdk here")
    pytest.importorskip("grafana_foundation_sdk.cog.plugins").register_default_plugins()
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder").JSONEncoder()
    read = models.Dashboard.from_json(dashboard())
    assert [panel.title for panel in read.panels] == [panel["title"] for panel in dashboard()["panels"]]
    assert lost(dashboard(), json.loads(encoder.encode(read))) == []


def lost(written: Any, read: Any, where: str = "") -> list[str]:
    """Where `read` lacks a value of `written`, or has another."""
    if isinstance(written, dict) and isinstance(read, dict):
        return [path for key in written for path in lost(written[key], read.get(key), f"{where}/{key}")]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        return [path for index in range(len(read)) for path in lost(written[index], read[index], f"{where}/{index}")]
    return [] if written == read else [where]


def test_legends_name_labels_that_the_series_have() -> None:
    labels = known_labels()
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]))
            asked = re.findall(r"swiftbalancer_\w+", target["expr"])
            assert named <= set.union(*(labels[series] for series in asked)), panel["title"]


def test_panels_lie_side_by_side_within_the_grid() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in itertools.combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y


def test_every_variable_that_is_used_is_defined() -> None:
    text = json.dumps(dashboard()["panels"]) + json.dumps(dashboard()["templating"])
    used = set(re.findall(r"\$\{?([a-z]\w*)", text))
    assert used == {variable["name"] for variable in dashboard()["templating"]["list"]}
