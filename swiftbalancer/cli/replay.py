"""`swiftbalancer replay`: what balancing would have done with recorded loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from swiftbalancer.cli.app import app
from swiftbalancer.errors import ConfigError
from swiftbalancer.variables import scalar

if TYPE_CHECKING:
    from swiftbalancer.dispatch import DispatchForm
    from swiftbalancer_worker.replay import ReplayResult, ReplaySettings
    from swiftbalancer_worker.trace import Trace

REPORT_ENDINGS = (".html", ".htm")
COLUMNS = (
    ("policy", "name", "{}"),
    ("imbalance", "imbalance_live", "{:.3f}"),
    ("p95", "imbalance_live_p95", "{:.3f}"),
    ("worst", "imbalance_worst_layer", "{:.3f}"),
    ("bound", "imbalance_bound", "{:.3f}"),
    ("moves", "moves_per_layer", "{:.2f}"),
    ("updates", "dispatch_updates", "{}"),
    ("plan", "plan_ms_p50", "{:.1f}"),
    ("refresh", "refresh_ms_p50", "{:.1f}"),
)
TIME = ("time", "time_live", "{:.3f}")
"""In the place of `bound`, which is about tokens, where reads of weights count."""
LEGEND = (
    "imbalance: max/mean rank load, 1 is perfect; worst: of the worst layer; {}; moves: per layer and plan; "
    "updates: of dispatch tables; plan, refresh: ms, median"
)
MEANINGS = {
    "bound": "bound: with the split that fits each step",
    "time": "time: of the slowest ranks, reads of weights included, over that without",
}


class Given(msgspec.Struct, frozen=True):
    """What was given on the command line, with the defaults of every command; `dispatch` as `table` or `table:32`."""

    ranks: int | None = None
    nodes: int | None = None
    redundant: int | None = None
    budget: int = 8
    expert_mib: float | None = None
    pay_back: float | None = None
    window: int = 8
    refresh: int = 1
    min_refresh_gain: float = 0.002
    dispatch: str = "table"
    tokens_per_activation: float = 0.0
    options: tuple[str, ...] = ()
    """Of the policies, as NAME=VALUE."""


DEFAULT = Given()
TokensPerActivation = Annotated[
    float,
    typer.Option(
        min=0,
        max=100_000,
        help="Tokens that take as long as reading one expert's weights, for decode; 0: only tokens count.",
    ),
]
PolicyOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of policy.options, for each policy. May be repeated.")
]
ExpertMib = Annotated[
    float | None,
    typer.Option(
        min=0.001, help="Size of one expert of one layer. Default: the recording's, else 44 (DeepSeek-V3 in FP8)."
    ),
]


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(help="Recording folder, event log, .npy, or what `convert` reads.")],
    ranks: Annotated[int | None, typer.Option(min=1, help="Default: those of the recording.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: those of the recording, or 1.")] = None,
    redundant: Annotated[int | None, typer.Option(min=0, help="Extra slots; default: the recording's.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: swift.")] = None,
    policy_option: PolicyOption = None,
    window: Annotated[int, typer.Option(min=1, help="Recorded steps between placement plans.")] = DEFAULT.window,
    refresh: Annotated[
        int, typer.Option(min=0, help="Recorded steps between dispatch refreshes; 0: none.")
    ] = DEFAULT.refresh,
    min_refresh_gain: Annotated[
        float, typer.Option(min=0, help="Fall of the predicted imbalance that is worth a refresh.")
    ] = DEFAULT.min_refresh_gain,
    budget: Annotated[int, typer.Option(min=-1, help="Moves per layer and plan; -1: no limit.")] = DEFAULT.budget,
    dispatch: Annotated[str, typer.Option(help="table, table:COLUMNS, static, uniform or exact.")] = DEFAULT.dispatch,
    expert_mib: ExpertMib = None,
    tokens_per_activation: TokensPerActivation = DEFAULT.tokens_per_activation,
    pay_back: Annotated[
        float | None,
        typer.Option(
            min=0, help="Moves must save this multiple of their cost; default: 1 for live recordings, else 0."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Only the first so many recorded steps.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write charts to one HTML file.")] = None,
) -> None:
    """Runs the real planner over recorded loads as if live, and says how even every step would have been.

    Always planned from the past only, judged on every recorded step after the first window.

    [bold]Examples[/]

        swiftbalancer replay loads.npy --ranks 8 --redundant 8

        swiftbalancer replay run/ --policy swift --policy greedy --report report.html

        swiftbalancer replay loads.npy --ranks 8 --redundant 8 --json | jq .policies
    """
    from swiftbalancer_worker.replay_summary import summary
    from swiftbalancer_worker.trace import open_trace

    _check_ending(report)
    trace = open_trace(recording)
    trace = trace if steps is None else trace.head(steps)
    given = Given(ranks, nodes, redundant, budget, expert_mib, pay_back, window, refresh, min_refresh_gain, dispatch)
    given = msgspec.structs.replace(
        given, options=tuple(policy_option or ()), tokens_per_activation=tokens_per_activation
    )
    result = run_with_progress(trace, settings_for(trace, given), policy or ["swift"], quiet=as_json)
    if report is not None:
        _write_report(result, report)
    figures = summary(result)
    if as_json:
        typer.echo(msgspec.json.encode(figures).decode())
    else:
        show(figures)


def _check_ending(report: Path | None) -> None:
    if report is not None and report.suffix.lower() not in REPORT_ENDINGS:
        raise ConfigError(f"--report: {report}: a report is HTML; name it {report.with_suffix('.html')}")


def _write_report(result: ReplayResult, path: Path) -> None:
    from swiftbalancer_worker.report import write_report

    pictures = write_report(result, path)
    Console(stderr=True).print(f"report: {path} and {len(pictures)} pictures beside it", highlight=False)


def settings_for(trace: Trace, given: Given) -> ReplaySettings:
    """Command line over recording over defaults; raises `ConfigError` if nobody knows the number of ranks."""
    from swiftbalancer_worker.replay import ASSUMED_EXPERT_MIB, ReplaySettings

    recorded = trace.topology
    if given.ranks is None and recorded is None:
        raise ConfigError(f"--ranks: {trace.name} does not say how many ranks; give their number")
    num_ranks = given.ranks if given.ranks is not None else recorded.num_ranks if recorded else 1
    same = recorded is not None and recorded.num_ranks == num_ranks
    redundant = recorded.num_slots - trace.shape[2] if recorded is not None and same else 0
    nodes = recorded.num_nodes if recorded is not None and same else 1
    recorded_live = trace.expert_bytes > 0
    mib = given.expert_mib if given.expert_mib is not None else trace.expert_bytes / 2**20 or ASSUMED_EXPERT_MIB
    return ReplaySettings(
        num_ranks=num_ranks,
        num_redundant=redundant if given.redundant is None else given.redundant,
        num_nodes=nodes if given.nodes is None else given.nodes,
        window=given.window,
        refresh=given.refresh,
        budget=None if given.budget < 0 else given.budget,
        dispatch=parse_dispatch(given.dispatch, num_ranks),
        expert_bytes=mib * 2**20,
        options=parse_options(given.options),
        pay_back=float(recorded_live) if given.pay_back is None else given.pay_back,
        min_refresh_gain=given.min_refresh_gain,
        tokens_per_activation=given.tokens_per_activation,
    )


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE each, values read as JSON where they are JSON; raises `ConfigError`."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise ConfigError(f"--policy-option: {wrong[0]!r} is not NAME=VALUE")
    return {name: scalar(value) for name, _, value in pairs}


def parse_dispatch(text: str, num_ranks: int) -> DispatchForm:
    """`table:32` and the like, `table` for as many columns as is usual with so many ranks; raises `ConfigError`."""
    from swiftbalancer.dispatch import DispatchForm, default_width

    kind, _, width = text.partition(":")
    if width and not width.isdigit():
        raise ConfigError(f"--dispatch: {text!r}: {width!r} is not a number of columns")
    return DispatchForm(kind, int(width or default_width(num_ranks)))  # type: ignore[arg-type]  # it checks the name itself


def run_with_progress(trace: Trace, settings: ReplaySettings, policies: list[str], *, quiet: bool) -> ReplayResult:
    """The replay with a bar per policy on stderr."""
    from swiftbalancer_worker.compiling import compiling_is_told
    from swiftbalancer_worker.replay import replay as run

    console = Console(stderr=True, quiet=quiet)
    bars = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                    TimeRemainingColumn(), console=console, transient=True)  # fmt: skip
    tasks = {name: bars.add_task(name, total=len(trace)) for name in policies}
    with bars, compiling_is_told():
        return run(trace, settings, policies=policies, progress=lambda name, _: bars.advance(tasks[name]))


def show(figures: dict[str, Any]) -> None:
    """The figures as a table."""
    about = figures["recording"]
    title = (
        f"{about['name']}: {about['steps']} steps x {about['layers']} layers x {about['experts']} experts on "
        f"{about['ranks']} ranks, {about['redundant']} redundant, dispatch {about['dispatch']}"
    )
    figure = "time" if about["tokens_per_activation"] > 0 else "bound"
    columns = [TIME if column[0] == "bound" and figure == "time" else column for column in COLUMNS]
    table = Table(title=title, title_justify="left", pad_edge=False)
    for heading, _, _ in columns:
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    without = f"{figures['without']['imbalance_live']:.3f}"
    table.add_row("without", without, *[""] * (len(columns) - 2), style="dim")
    for row in figures["policies"]:
        table.add_row(*("" if row[key] is None else form.format(row[key]) for _, key, form in columns))
    console = Console()
    console.print(table)
    console.print(LEGEND.format(MEANINGS[figure]), style="dim")
