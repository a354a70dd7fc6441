"""The report's interactive charts, drawn with plotly."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from swiftbalancer_worker.replay import FloatArray
from swiftbalancer_worker.report_data import ReportData

GREY, COLOURS = "#9aa4b2", ("#1769aa", "#d1495b", "#2e933c", "#8d5a97", "#e09f3e")
HOTTEST = 2.0
"""Ranks at twice the mean load get the end of the colour scale."""


def charts(data: ReportData) -> list[tuple[str, str, str]]:
    """`(heading, explanation, HTML)` of each chart; the first carries plotly's script for all."""
    least_even = f"in layer {data.layer}, the least even one"
    out: list[tuple[str, str, str]] = []
    for heading, text, draw in (
        ("Imbalance over time", "Load of the busiest rank over the mean rank's, mean over layers.", timeline),
        ("Ranks over time", f"Load of each rank over the mean rank's {least_even}.", ranks),
        ("Experts over time", f"Load of each expert's busiest copy over the mean expert's {least_even}.", experts),
        ("Moves per plan", "Experts moved by each placement plan, all layers together.", moves),
        ("Trade-off", f"Imbalance of {data.swept} at several budgets of moves, over the first steps.", trade_off),
        ("Worst layers", "The least even layers without balancing, and what becomes of them.", layers),
    ):
        figure = draw(data)
        figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 30, "b": 50}, height=360)
        chart = figure.to_html(full_html=False, include_plotlyjs=not out, config={"responsive": True})
        out.append((heading, text, chart))
    return out


def timeline(data: ReportData) -> Any:
    """One line per policy, and marks where a placement was planned."""
    figure = go.Figure()
    for index, line in enumerate(data.timelines):
        style = {"color": GREY} if line.name == "without" else {"color": COLOURS[(index - 1) % len(COLOURS)]}
        dash = {"dash": "dot"} if "ideal" in line.name else {}
        figure.add_scatter(x=line.steps, y=line.imbalance, name=line.name, mode="lines", line={**style, **dash})
    figure.update_xaxes(title="recorded step")
    figure.update_yaxes(title="max / mean rank load")
    return figure


def ranks(data: ReportData) -> Any:
    """Two heat maps on one scale."""
    scale = {"zmin": 0.0, "zmid": 1.0, "zmax": HOTTEST, "colorscale": "RdBu_r"}
    return _pair(data, (data.rank_before, data.rank_after), scale, what="rank")


def experts(data: ReportData) -> Any:
    """Two heat maps, capped where 2 % of the values without balancing lie above."""
    top = max(2.0, float(np.quantile(data.expert_before, 0.98)))
    scale = {"zmin": 0.0, "zmax": top, "colorscale": "Viridis"}
    return _pair(data, (data.expert_before, data.expert_after), scale, what="expert")


def _pair(data: ReportData, values: tuple[FloatArray, FloatArray], scale: dict[str, Any], *, what: str) -> Any:
    """Heat maps without balancing and with, side by side."""
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=("without", data.best.name))
    for column, heat in enumerate(values, start=1):
        figure.add_trace(go.Heatmap(x=data.columns, z=heat, showscale=column == 2, **scale), row=1, col=column)
    figure.update_xaxes(title="recorded step")
    figure.update_yaxes(title=what, row=1, col=1)
    return figure


def moves(data: ReportData) -> Any:
    """Bars per policy."""
    figure = go.Figure()
    for index, run in enumerate(data.result.runs):
        colour = COLOURS[index % len(COLOURS)]
        figure.add_bar(x=run.plan_steps, y=run.moves, name=run.name, marker_color=colour)
    figure.update_xaxes(title="recorded step")
    figure.update_yaxes(title="experts moved")
    return figure


def trade_off(data: ReportData) -> Any:
    """A point per budget."""
    points = data.trade_off
    labels = [f"budget {point.budget}" for point in points]
    figure = go.Figure()
    figure.add_scatter(
        x=[point.moves_per_layer for point in points],
        y=[point.imbalance for point in points],
        text=labels,
        mode="lines+markers+text",
        textposition="top right",
        line={"color": COLOURS[0]},
    )
    figure.update_xaxes(title="moves per layer and plan")
    figure.update_yaxes(title="imbalance")
    return figure


def layers(data: ReportData) -> Any:
    """Two bars per layer."""
    judged, worst = data.result.judged, data.worst_layers
    names = [str(layer) for layer in worst]
    figure = go.Figure()
    figure.add_bar(x=names, y=data.result.without[judged].mean(0)[worst], name="without", marker_color=GREY)
    after = data.best.imbalance[judged].mean(0)[worst]
    figure.add_bar(x=names, y=after, name=data.best.name, marker_color=COLOURS[0])
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(title="imbalance")
    return figure
