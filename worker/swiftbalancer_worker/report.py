"""A replay as one self-contained HTML file (plotly) with pictures beside it (matplotlib)."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from swiftbalancer.errors import ConfigError, RecordingError
from swiftbalancer_worker.replay import ReplayResult
from swiftbalancer_worker.report_data import ReportData, report_data

COLUMNS = (
    ("policy", "name"),
    ("imbalance", "imbalance_live"),
    ("p95 over time", "imbalance_live_p95"),
    ("worst layer", "imbalance_worst_layer"),
    ("ideal split", "imbalance_bound"),
    ("moves per layer and plan", "moves_per_layer"),
    ("dispatch updates", "dispatch_updates"),
    ("plan ms, p50", "plan_ms_p50"),
    ("refresh ms, p50", "refresh_ms_p50"),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1.5rem; color: #1d2433 }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem }
p { margin: .3rem 0 .8rem; color: #4b5568 } .big { font-size: 1.15rem; color: #1d2433 }
table { border-collapse: collapse; margin-top: .8rem } th, td { padding: .3rem .8rem; text-align: right }
th { border-bottom: 2px solid #cbd2dd; font-weight: 600 } tr:nth-child(even) { background: #f4f6f9 }
th:first-child, td:first-child { text-align: left }
"""


def write_report(result: ReplayResult, path: Path) -> list[Path]:
    """Writes `path` and its pictures; returns the pictures. Raises `ConfigError` without plotly and matplotlib."""
    try:
        from swiftbalancer_worker import report_charts, report_pictures
    except ImportError as error:
        raise ConfigError(f"--report needs {error.name}: pip install 'swiftbalancer[report]'") from None
    data = report_data(result)
    charts = report_charts.charts(data)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(data, charts), encoding="utf-8")
        return report_pictures.write(data, path)
    except OSError as error:
        raise RecordingError(f"{path}: cannot be written: {error.strerror}") from None


def page(data: ReportData, charts: list[tuple[str, str, str]]) -> str:
    """The HTML: headline, table, then `(heading, explanation, chart)`; no reference to any other file."""
    about: Any = data.figures["recording"]
    title = f"swiftbalancer: {about['name']}"
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(_setting(about))}</p>"]
    parts.append(f'<p class="big">{html.escape(_headline(data))}</p>')
    parts.append(_table(data))
    for heading, text, chart in charts:
        parts.append(f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>{chart}")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def _setting(about: dict[str, Any]) -> str:
    budget = "no limit" if about["budget"] is None else about["budget"]
    return (
        f"{about['model'] or 'loads'}: {about['steps']} recorded steps, {about['layers']} layers, {about['experts']} "
        f"experts on {about['ranks']} ranks with {about['redundant']} redundant slots. A placement is planned every "
        f"{about['window']} steps (at most {budget} moves per layer), dispatch is renewed every {about['refresh']}, "
        f"form {about['dispatch']}. Planned from the past, judged on every step from {about['judged_from_step']} on."
    )


def _headline(data: ReportData) -> str:
    without: Any = data.figures["without"]
    before = float(without["imbalance_live"])
    after = float(data.best.imbalance[data.result.judged].mean())
    saved = 1 - after / before
    verdict = "a balanced expert layer would take" if saved > 0 else "balancing does not pay: a layer would take"
    return (
        f"The busiest rank carried {before:.2f} times the mean load; with {data.best.name} {after:.2f} times. "
        f"Where its load sets the pace, {verdict} {abs(100 * saved):.0f} % {'less' if saved > 0 else 'more'} time."
    )


def _table(data: ReportData) -> str:
    without: Any = data.figures["without"]
    rows = [["without balancing", _cell(without["imbalance_live"]), *[""] * (len(COLUMNS) - 2)]]
    policies: Any = data.figures["policies"]
    rows += [[_cell(policy[key]) for _, key in COLUMNS] for policy in policies]
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))
