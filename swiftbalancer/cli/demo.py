"""`swiftbalancer demo`: the whole system on this machine, live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swiftbalancer.cli.app import app
from swiftbalancer.errors import ConfigError
from swiftbalancer.vendors import DEVICES

if TYPE_CHECKING:
    from swiftbalancer_adaptors.minimoe.demo.options import DemoOptions


@app.command()
def demo(
    ranks: Annotated[int, typer.Option(min=1, max=64, help="Processes the experts are spread over.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Forward passes of each of the two runs.")] = 400,
    policy: Annotated[str, typer.Option(help="swift, greedy, random, none or a plug-in.")] = "swift",
    text: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Serve these files instead of the samples.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Order and mix of the text.")] = 0,
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}; one device for each rank.")] = "cpu",
    preset: Annotated[
        str, typer.Option(help="Model: demo (trained), or random weights of tiny, qwen3-30b, deepseek-v3.")
    ] = "demo",
    layers: Annotated[int | None, typer.Option(min=1, help="MoE layers of a preset with random weights.")] = None,
    redundant: Annotated[int, typer.Option(min=0, help="Extra slots over all ranks.")] = 8,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Options laid over the demo's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")] = False,
) -> None:
    """Serves real text with a small trained MoE model, expert-parallel, while its topic shifts; balances it live.

    Then serves the same text without balancing and compares: load of the busiest rank, and every predicted byte.

    [bold]Examples[/]

        swiftbalancer demo

        swiftbalancer demo --policy greedy --steps 200 --json

        swiftbalancer demo --text ~/src --ranks 2

        swiftbalancer demo --device cuda --ranks 2 --preset deepseek-v3 --layers 2
    """
    _need_torch()
    from swiftbalancer.config import read_file
    from swiftbalancer_adaptors.minimoe.demo.options import DemoOptions

    options = DemoOptions(
        ranks=ranks,
        steps=steps,
        policy=policy,
        text=None if text is None else str(text),
        seed=seed,
        device=device,
        preset=preset,
        num_layers=layers,
        redundant=redundant,
        config={} if config is None else read_file(config),
    )
    _run(options, as_json=as_json)


def _run(options: DemoOptions, *, as_json: bool) -> None:
    from swiftbalancer_adaptors.minimoe.demo.run import run_demo

    if as_json:
        outcome = run_demo(options, lambda _: None)
        typer.echo(json.dumps(outcome.result.to_dict()))
    else:
        from rich.console import Console

        from swiftbalancer_adaptors.minimoe.demo.screen import Screen, print_comparison

        console = Console()
        with Screen(options, console) as screen:
            outcome = run_demo(options, screen.show)
        print_comparison(outcome, console)


def _need_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ConfigError("demo: needs PyTorch; install it with: pip install 'swiftbalancer[torch]'")
