"""Commands and what happens to their errors. Each command imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.markup import escape

from swiftbalancer import __version__
from swiftbalancer.errors import BalancerError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="swiftbalancer",
    help="Background expert-parallel load balancing: run a worker, replay recorded loads, decide, watch.",
    epilog="Exit status: 0 success; 1 a check of doctor failed; 2 a wrong argument, file or setting, or no worker; "
    "130 interrupted.",
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"swiftbalancer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),  # noqa: ARG001
) -> None:
    """Options of the command itself."""
    if context.invoked_subcommand is None:
        with contextlib.redirect_stdout(sys.stderr):  # where rich draws the help while it is asked for
            typer.echo(context.get_help())
        raise typer.Exit(EXIT_ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status. Errors of ours become one line on stderr."""
    from swiftbalancer.cli import commands  # noqa: F401  # registers them

    try:
        app(None if arguments is None else list(arguments), prog_name="swiftbalancer")
    except BalancerError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _fail(text: str) -> int:
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    return EXIT_ERROR
