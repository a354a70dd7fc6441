"""`swiftbalancer doctor`: checks this machine's device, streams, transports and worker."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from swiftbalancer.cli.app import app
from swiftbalancer.vendors import DEVICES

COLOURS = {"ok": "green", "warning": "yellow", "skipped": "dim", "failed": "bold red"}
EXIT_FAILED = 1


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help=f"One of auto, {', '.join(DEVICES)}.")] = "auto",
    ranks: Annotated[int, typer.Option(min=2, max=64, help="Processes that exchange experts, one device each.")] = 2,
    expert_mib: Annotated[int, typer.Option(min=1, max=4096, help="Size of an exchanged expert, MiB.")] = 44,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per check.")] = False,
) -> None:
    """Checks what balancing needs of this machine, one line each; exit status 1 if something will not work.

    [bold]Examples[/]

        swiftbalancer doctor

        swiftbalancer doctor --device npu --ranks 8
    """
    from swiftbalancer.doctor import Examination, Verdict, examine

    console = Console(highlight=False)
    failed = False
    for finding in examine(Examination(device=device, ranks=ranks, expert_mib=expert_mib)):
        failed = failed or finding.verdict is Verdict.FAILED
        if as_json:
            typer.echo(json.dumps(asdict(finding)))
            continue
        verdict = finding.verdict.value
        line = f"[{COLOURS[verdict]}]{verdict:8}[/] {finding.check:16} {escape(finding.text)}"
        console.print(line, soft_wrap=True)
    if failed:
        raise typer.Exit(EXIT_FAILED)
