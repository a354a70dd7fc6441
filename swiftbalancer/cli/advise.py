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
from swiftbalancer.cli.replay import (
    DEFAULT,
    ExpertMib,
    Given,
    PolicyOption,
    TokensPerActivation,
    parse_dispatch,
    settings_for,
)

if TYPE_CHECKING:
    from swiftbalancer_worker.advise import Advice
    from swiftbalancer_worker.replay import ReplaySettings
    from swiftbalancer_worker.trace import Trace

ASSUMED = " assumed, as in DeepSeek-V3 in FP8; give --expert-mib"


@app.command()
def advise(
    recording: Annotated[Path, typer.Argument(help="What `replay` reads.")],
    ranks: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated. Default: the recording's.")] = None,
    redundant: Annotated[list[int] | None, typer.Option(min=0, help="May be repeated; default: 0-4 a rank.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: swift, greedy.")] = None,
    policy_option: PolicyOption = None,
    budget: Annotated[list[int] | None, typer.Option(min=0, help="May be repeated. Default: 4, 16.")] = None,
    expert_mib: ExpertMib = None,
    tokens_per_activation: TokensPerActivation = DEFAULT.tokens_per_activation,
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
    chosen_ranks = ranks or _ranks(trace)
    shortened = min(window, max(1, len(trace) // 4))
    given = Given(chosen_ranks[0], redundant=0, expert_mib=expert_mib, window=shortened, dispatch=dispatch)
    given = msgspec.structs.replace(
        given, options=tuple(policy_option or ()), tokens_per_activation=tokens_per_activation
    )
    base = settings_for(trace, given)
    sweep = advising.Sweep(chosen_ranks, redundant or (), policy or ("swift", "greedy"), budget or (4, 16))
    tries = [
        (replace(settings, dispatch=parse_dispatch(dispatch, settings.num_ranks)), name)
        for settings, name in advising.settings_to_try(trace, base, sweep)
    ]
    advice = _replayed(trace, tries, quiet=as_json)
    assumed = ASSUMED if expert_mib is None and not trace.expert_bytes else ""
    of_memory = f" ({base.expert_bytes / 2**20:g} MiB an expert{assumed})"
    words = [advising.sentence(r, o, advice.options, of_memory=of_memory) for r, o in advice.recommended.items()]
    if as_json:
        typer.echo(msgspec.json.encode(_as_json(advice, words)).decode())
        return
    _show(advice)
    planned = f"planned every {shortened} of {len(trace)} recorded steps{_shorter(window, shortened)}"
    Console().print(f"MiB/rank: of redundant experts{of_memory}; {planned}", style="dim", highlight=False)
    for text in words:
        Console().print(text, highlight=False)


def _shorter(asked: int, taken: int) -> str:
    return f", not every {asked}, which is more than a quarter of them" if taken < asked else ""


def _ranks(trace: Trace) -> list[int]:
    """Those of the recording, else the usual numbers that leave each rank two experts."""
    from swiftbalancer_worker.advise import RANKS

    if trace.topology is not None:
        return [trace.topology.num_ranks]
    return [n for n in RANKS if n * 2 <= trace.shape[2]] or [2]


def _replayed(trace: Trace, tries: list[tuple[ReplaySettings, str]], *, quiet: bool) -> Advice:
    """The advice, with a bar on stderr while it is worked out."""
    from swiftbalancer_worker.advise import advise as judge
    from swiftbalancer_worker.compiling import compiling_is_told

    console = Console(stderr=True, quiet=quiet)
    bar = iter(track(tries, description="replaying", console=console, transient=True))
    next(bar, None)
    with compiling_is_told():
        return judge(trace, tries, progress=lambda: next(bar, None) and None)


def _as_json(advice: Advice, words: list[str]) -> dict[str, object]:
    chosen = {str(r): None if o is None else asdict(o) for r, o in advice.recommended.items()}
    return {"options": [asdict(o) for o in advice.options], "recommended": chosen, "advice": words}


def _show(advice: Advice) -> None:
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
    Console().print(table)
