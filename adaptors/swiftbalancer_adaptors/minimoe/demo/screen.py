"""The demo on a terminal: rank loads as bars, imbalance with and without balancing, what the balancer does."""

from __future__ import annotations

from collections import deque
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from swiftbalancer_adaptors.minimoe.demo.options import DemoOptions, News, Progress, Started
from swiftbalancer_adaptors.minimoe.demo.run import DemoResult, Outcome

BLOCKS = " ▁▂▃▄▅▆▇█"
HISTORY = 60
STARTING = "starting ranks and worker; its very first start compiles the planner, about a minute ..."


def sparkline(values: list[float], low: float, high: float) -> str:
    """Values as a line of blocks between `low` and `high`."""
    span = max(high - low, 1e-9)
    return "".join(BLOCKS[min(max(round((v - low) / span * 8), 0), 8)] for v in values)


class Screen:
    """Draws the news of a demo; `with Screen(options) as screen: run_demo(options, screen.show)`."""

    def __init__(self, options: DemoOptions, console: Console) -> None:
        self._options = options
        self._console = console
        self._live = Live(Text(STARTING), console=console, refresh_per_second=8)
        self._with: deque[float] = deque(maxlen=HISTORY)
        self._without: deque[float] = deque(maxlen=HISTORY)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, news: News) -> None:
        """Draws one piece of news."""
        if isinstance(news, Progress):
            self._with.append(news.imbalance)
            self._without.append(news.imbalance_without)
            self._live.update(self._draw(news))
        elif isinstance(news, Started) and not news.balanced:
            self._console.print("[dim]the same stream again, without balancing ...[/]")

    def _draw(self, news: Progress) -> Panel:
        title = f"swiftbalancer demo: {self._options.ranks} ranks, policy {self._options.policy}"
        return Panel(Group(_bars(news), self._lines(), _figures(news, self._options.steps)), title=title)

    def _lines(self) -> Table:
        low, high = 1.0, max([*self._with, *self._without, 1.2])
        table = Table.grid(padding=(0, 2))
        for name, color, values in (("without", "red", self._without), ("with", "green", self._with)):
            line = Text(sparkline(list(values), low, high), style=color)
            table.add_row(f"imbalance {name}", Text(f"{values[-1]:.2f}", style=f"bold {color}"), line)
        return table


def _bars(news: Progress) -> Table:
    mean = sum(news.rank_loads) / len(news.rank_loads) or 1.0
    table = Table.grid(padding=(0, 2))
    for rank, load in enumerate(news.rank_loads):
        share = load / mean
        bar = ProgressBar(
            total=2.0, completed=min(share, 2.0), width=46, complete_style="red" if share > 1.15 else "green"
        )
        table.add_row(f"rank {rank}", bar, f"{share:4.2f} x mean")
    return table


def _figures(news: Progress, steps: int) -> Text:
    return Text(
        f"step {news.step}/{steps}  text: {news.domain}  phase: {news.phase}\n"
        f"experts moved {news.experts_moved}  dispatch updates {news.dispatch_updates}  cycles {news.cycles} "
        f"({news.cycles_dropped} dropped)  host time per step {news.host_us:.0f} us",
        style="dim",
    )


def print_comparison(outcome: Outcome, console: Console) -> None:
    """The table at the end."""
    result: DemoResult = outcome.result
    table = Table(title="the same text, served twice")
    table.add_column("")
    table.add_column("without balancing", justify="right")
    table.add_column("with", justify="right", style="green")
    table.add_row("most loaded rank / mean", f"{result.imbalance_without:.3f}", f"{result.imbalance_with:.3f}")
    table.add_row("tokens that differ", "", str(result.mismatched_tokens))
    table.add_row("experts moved", "", str(result.experts_moved))
    table.add_row("dispatch updates", "", str(result.dispatch_updates))
    table.add_row("cycles (dropped)", "", f"{result.cycles} ({result.cycles_dropped})")
    table.add_row(
        "host us per step, p50 / p99", "", f"{result.host_us_per_step_p50:.0f} / {result.host_us_per_step_p99:.0f}"
    )
    console.print(table)
    saved = 1 - result.imbalance_with / result.imbalance_without
    console.print(f"Every layer waits for its most loaded rank: that wait is [bold green]{saved:.0%}[/] shorter.")
