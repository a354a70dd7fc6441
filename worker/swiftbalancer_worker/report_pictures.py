"""The report's pictures (PNG), drawn with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt  # after the choice of a backend that needs no display
import numpy as np

from swiftbalancer_worker.report_data import ReportData

GREY, COLOURS = "#9aa4b2", ("#1769aa", "#d1495b", "#2e933c", "#8d5a97", "#e09f3e")


def write(data: ReportData, report: Path) -> list[Path]:
    """`NAME.png`, an overview, and `NAME-experts.png`, beside the report; returns their paths."""
    overview, experts = report.with_suffix(".png"), report.with_name(f"{report.stem}-experts.png")
    _save(_overview(data), overview)
    _save(_experts(data), experts)
    return [overview, experts]


def _overview(data: ReportData) -> Any:
    """Ranks over time before and after, side by side, and the imbalance below."""
    figure, axes = plt.subplot_mosaic(
        [["before", "after"], ["time", "time"]], figsize=(11, 6.5), layout="constrained"
    )
    for name, values, title in (
        ("before", data.rank_before, f"layer {data.layer} without balancing"),
        ("after", data.rank_after, f"layer {data.layer} with {data.best.name}"),
    ):
        image = axes[name].imshow(
            values,
            aspect="auto",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            interpolation="nearest",
            extent=_extent(data, values),
        )
        axes[name].set(title=title, xlabel="recorded step", ylabel="rank")
    figure.colorbar(image, ax=[axes["before"], axes["after"]], label="load over the mean rank's")
    for index, line in enumerate(data.timelines):
        colour = GREY if line.name == "without" else COLOURS[(index - 1) % len(COLOURS)]
        style = ":" if "ideal" in line.name else "-"
        axes["time"].plot(line.steps, line.imbalance, style, color=colour, label=line.name, lw=1.5)
    axes["time"].set(xlabel="recorded step", ylabel="imbalance (max / mean rank load)", ylim=(1.0, None))
    axes["time"].grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def _experts(data: ReportData) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    top = max(2.0, float(np.quantile(data.expert_before, 0.98)))
    for axis, values, title in (
        (axes[0], data.expert_before, f"experts of layer {data.layer} without balancing"),
        (axes[1], data.expert_after, f"their busiest copies with {data.best.name}"),
    ):
        image = axis.imshow(
            values,
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=top,
            interpolation="nearest",
            extent=_extent(data, values),
        )
        axis.set(title=title, xlabel="recorded step")
    axes[0].set(ylabel="expert")
    figure.colorbar(image, ax=axes, label="load over the mean expert's")
    return figure


def _extent(data: ReportData, values: Any) -> tuple[float, float, float, float]:
    return (float(data.columns[0]) - 0.5, float(data.columns[-1]) + 0.5, len(values) - 0.5, -0.5)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
