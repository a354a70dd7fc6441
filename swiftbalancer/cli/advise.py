"""`swiftbalancer advise`: whether and how to balance, from a recording."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from swiftbalancer.cli.app import app
from swiftbalancer.cli.replay import DEFAULT, Given, parse_dispatch, settings_for

if TYPE_CHECKING:
    from swiftbalancer_worker.advise import Advice


@app.command()
def advise(
    recording: Annotated[Path, typer.Argument(help="What `replay` reads.")],
    ranks: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated. Default: the recording's.")] = None,
    redundant: Annotated[list[int] | None, typer.Option(min=0, help="May be repeated; default: 0-4 a rank.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: swift, greedy.")] = None,
    budget: Annotated[list[int] | None, typer.Option(min=0, help="May be repeated. Default: 4, 16.")] = None,
    expert_mib: Annotated[float | None, typer.Option(min=0.001, help="Size of one expert of one layer.")] = None,
    window: Annotated[
        int, typer.Option(min=1, help="Recorded steps between plans, at most a quarter of all.")
    ] = DEFAULT.window,
    dispatch: Annotated[str, typer.Option(help="table, table:COLUMNS, static, uniform or exact.")] = DEFAULT.dispatch,
    steps: Annotated[int, typer.Option(min=2, help="Use only the first so many recorded steps.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
) -> None:
    """Tries ranks, redundant experts, policies and budgets on recorded loads, and says what is worth having.

    Gains are of the expert layers' time, as far as the busiest rank sets their pace: an upper bound.

    [bold]Examples[/]

        swiftbalancer advise run/

        swiftbalancer advise loads.npy --ranks 8 --ranks 16 --expert-mib 44
    """
    from swiftbalancer_worker import advise as advising
    from swiftbalancer_worker.trace import open_trace

    trace = open_trace(recording).head(steps)
    recorded = trace.topology.num_ranks if trace.topology is not None else None
    fitting = [n for n in advising.RANKS if n * 2 <= trace.shape[2]] or [2]
    chosen_ranks = ranks or ([recorded] if recorded is not None else fitting)
    window = min(window, max(1, len(trace) // 4))
    given = Given(chosen_ranks[0], redundant=0, expert_mib=expert_mib, window=window, dispatch=dispatch)
    base = settings_for(trace, given)
    sweep = advising.Sweep(chosen_ranks, redundant or (), policy or ("swift", "greedy"), budget or (4, 16))
    tries = [
        (replace(settings, dispatch=parse_dispatch(dispatch, settings.num_ranks)), name)
        for settings, name in advising.settings_to_try(trace, base, sweep)
    ]
    console = Console(stderr=True, quiet=as_json)
    bar = iter(track(tries, description="replaying", console=console, transient=True))
    next(bar, None)
    advice = advising.advise(trace, tries, progress=lambda: next(bar, None) and None)
    if as_json:
        typer.echo(msgspec.json.encode(_as_json(advice)).decode())
    else:
        _show(advice)


def _as_json(advice: Advice) -> dict[str, object]:
    from swiftbalancer_worker.advise import sentence

    chosen = {str(r): None if o is None else asdict(o) for r, o in advice.recommended.items()}
    words = [sentence(r, o, advice.options) for r, o in advice.recommended.items()]
    return {"options": [asdict(o) for o in advice.options], "recommended": chosen, "advice": words}


def _show(advice: Advice) -> None:
    from swiftbalancer_worker.advise import sentence

    table = Table(pad_edge=False)
    for heading in ("ranks", "redundant", "policy", "budget", "imbalance", "gain", "MiB/rank", "moves"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    before = None
    for option in advice.options:
        if option.ranks != before:
            table.add_section()
            without = f"{option.imbalance_without:.3f}"
            table.add_row(str(option.ranks), "", "without", "", without, "", "", "", style="dim")
        before = option.ranks
        best = option is advice.recommended[option.ranks]
        table.add_row(
            str(option.ranks),
            str(option.redundant),
            option.policy,
            "" if option.budget is None else str(option.budget),
            f"{option.imbalance:.3f}",
            f"{100 * option.gain:.1f} %",
            f"{option.memory_mib:.0f}",
            f"{option.moves_per_layer:.1f}",
            style="bold green" if best else "",
        )
    console = Console()
    console.print(table)
    for ranks, chosen in advice.recommended.items():
        console.print(sentence(ranks, chosen, advice.options), highlight=False)
