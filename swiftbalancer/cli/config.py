"""`swiftbalancer config`: shows the options and checks files."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from swiftbalancer import config as configs
from swiftbalancer.cli.app import app
from swiftbalancer.config import Config
from swiftbalancer.errors import ConfigError


class Format(str, Enum):
    """How to print a configuration."""

    TABLE = "table"
    YAML = "yaml"
    JSON = "json"
    TOML = "toml"
    MARKDOWN = "markdown"


@app.command()
def config(
    show: Annotated[
        bool, typer.Option("--show", help="Print every option: the file's and the environment's over the defaults.")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option("--check", metavar="FILE", help="Only check this file, or this text if it begins with {."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Show with this file's values.")] = None,
    form: Annotated[Format, typer.Option("--format", help="Of --show.")] = Format.TABLE,
) -> None:
    """Shows all options with defaults and ranges, or checks a file.

    [bold]Examples[/]

        swiftbalancer config --show

        swiftbalancer config --show --format yaml > balancer.yaml

        swiftbalancer config --check balancer.yaml

        swiftbalancer config --check '{"swiftbalancer": {"enable": true, "num_redundant_experts": 8}}'
    """
    if not show and check is None:
        raise ConfigError("give --show or --check FILE")
    if check is not None:
        check_as_engine(configs.from_text(check) if check.lstrip().startswith("{") else configs.from_file(check))
        typer.echo(f"{check}: valid")
    if show:
        chosen = configs.load(file)
        if form is Format.TABLE:
            Console().print(_table(chosen))
        else:
            typer.echo(render(chosen, form), nl=False)


def check_as_engine(chosen: Config) -> None:
    """Raises what an engine would at its start: for an unknown policy or options of its, an endpoint or keys."""
    from swiftbalancer import endpoint as endpoints
    from swiftbalancer.sockets import check_keys
    from swiftbalancer_worker.policies import policy_named

    place = chosen.worker.endpoint
    check_keys(chosen.worker, None if place is None else endpoints.parse(place))
    policy_named(chosen.policy.name, chosen.policy.options)


def render(chosen: Config, form: Format) -> str:
    """The configuration as text that `config --check` accepts; as Markdown, the reference of all options."""
    values = configs.to_dict(chosen)
    if form is Format.JSON:
        return msgspec.json.format(msgspec.json.encode(values)).decode() + "\n"
    if form is Format.YAML:
        return msgspec.yaml.encode(values).decode()
    if form is Format.MARKDOWN:
        return markdown()
    return toml(values)


def markdown() -> str:
    """Every option with default, meaning and range; the table in `docs/configuration.md`."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for key, default, about in configs.describe():
        lines.append(f"| `{key}` | `{default}` | {about.replace('|', '&#124;')} |")
    return "\n".join(lines) + "\n"


def toml(values: dict[str, object]) -> str:
    """Plain values as TOML. It has no null: options that are empty stand as comments."""
    lines = [_toml_line(key, value) for key, value in values.items() if not isinstance(value, dict)]
    for name, section in values.items():
        if isinstance(section, dict):
            lines += ["", f"[{name}]", *(_toml_line(key, value) for key, value in section.items())]
    return "\n".join(lines) + "\n"


def _toml_line(key: str, value: object) -> str:
    if value is None:
        return f"# {key} ="
    if isinstance(value, dict):
        inner = ", ".join(_toml_line(msgspec.json.encode(k).decode(), v) for k, v in value.items() if v is not None)
        return f"{key} = {{{inner}}}" if inner else f"{key} = {{}}"
    return f"{key} = {msgspec.json.encode(value).decode()}"


def _table(chosen: Config) -> Table:
    table = Table(title="swiftbalancer options", title_justify="left", pad_edge=False)
    for heading in ("option", "value", "meaning"):
        table.add_column(heading, overflow="fold")
    for key, default, about in configs.describe():
        value: object = chosen
        for part in key.split("."):
            value = getattr(value, part)
        text = msgspec.json.encode(value).decode()
        table.add_row(key, text if text == default else f"[bold yellow]{text}[/] (default {default})", about)
    return table
