"""Draws imbalance against moves: `python -m scripts.plot_tradeoff SCORES.json OUT.svg`, scores from `--json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot


def draw(scores: list[dict[str, Any]], out: Path) -> None:
    """One line for our budgets, one point per peer; moves on a scale that shows 0 and 300."""
    ours = [row for row in scores if row["policy"].startswith("swift budget")]
    others = [row for row in scores if row not in ours]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([row["moves"] for row in ours], [row["live"] for row in ours], "o-", label="swift, budgets")
    for row in ours:
        budget = row["policy"].split()[2]
        axes.annotate(budget, (row["moves"], row["live"]), textcoords="offset points", xytext=(4, 5), fontsize=8)
    for row in others:
        axes.plot(row["moves"], row["live"], "s", label=row["policy"])
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("experts moved per layer and plan")
    axes.set_ylabel("imbalance of the next window, live (max/mean)")
    axes.set_title(scores[0]["case"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scores", type=Path, help="what `python -m scripts.bench_policies --json` wrote")
    parser.add_argument("out", type=Path, help="the picture, .svg")
    options = parser.parse_args()
    draw(json.loads(options.scores.read_text()), options.out)


if __name__ == "__main__":
    main()
