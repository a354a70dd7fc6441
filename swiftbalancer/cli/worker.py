"""`swiftbalancer worker` and `swiftbalancer keys`: a planning process run by hand."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from swiftbalancer.cli.app import app
from swiftbalancer.errors import ConfigError


class LogLevel(str, Enum):
    """How much the worker says."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command()
def worker(
    endpoint: Annotated[str, typer.Option(help="ipc:///PATH or tcp://HOST:PORT to listen on.")],
    policy: Annotated[str | None, typer.Option(help="Overrules the policy engines ask for.")] = None,
    log_level: Annotated[LogLevel, typer.Option(help="Verbosity on stderr.")] = LogLevel.INFO,
    record: Annotated[Path | None, typer.Option(metavar="DIR", help="Write recordings of all engines here.")] = None,
    view: Annotated[
        str | None, typer.Option(help="Live view endpoint; default: ENDPOINT.view for ipc, none for tcp.")
    ] = None,
    server_key: Annotated[Path | None, typer.Option(metavar="FILE", help="CURVE secret key, for tcp.")] = None,
    clients: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Public keys that may connect, one a line.")
    ] = None,
    niceness: Annotated[int, typer.Option(min=0, max=19, help="Lower its priority.")] = 0,
    cpus: Annotated[str | None, typer.Option(help="Cores it may use, like 4,5.")] = None,
) -> None:
    """Serves engines configured with worker.spawn false and this worker.endpoint, until Ctrl-C.

    [bold]Examples[/]

        swiftbalancer worker --endpoint ipc:///run/user/1000/sb.sock

        swiftbalancer worker --endpoint tcp://10.0.0.5:7711 --server-key server.key --clients clients.txt
    """
    from swiftbalancer_worker.__main__ import Options, run

    run(
        Options(
            endpoint=endpoint,
            policy=policy,
            view=view,
            record=record,
            log_level=log_level.value,
            niceness=niceness,
            cpus=None if cpus is None else _cores(cpus),
            server_key=server_key,
            clients=clients,
        )
    )


@app.command()
def keys(
    name: Annotated[Path, typer.Argument(help="Writes NAME.key (secret, mode 0600) and NAME.pub.")],
) -> None:
    """Makes a CURVE key pair for a worker, or for an engine, that talks over tcp.

    [bold]Example[/]

        swiftbalancer keys server && swiftbalancer keys engine && cat engine.pub >> clients.txt
    """
    import zmq

    public, secret = zmq.curve_keypair()
    for path, text, mode in ((Path(f"{name}.key"), secret, 0o600), (Path(f"{name}.pub"), public, 0o644)):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be created: {error.strerror}") from None
        with os.fdopen(fd, "wb") as file:
            file.write(text + b"\n")
    typer.echo(f"{name}.key (keep it secret)\n{name}.pub {public.decode()}")


def _cores(text: str) -> tuple[int, ...]:
    """The cores in `text`, with this process moved to them; raises `ConfigError` if one is not to be had."""
    try:
        cores = tuple(int(core) for core in text.split(","))
    except ValueError:
        raise ConfigError(f"--cpus: {text!r} is not a list of core numbers like 4,5") from None
    if not hasattr(os, "sched_setaffinity"):
        return cores
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)  # the kernel leaves out what it does not have, unless that is all
        missing = set(cores) - os.sched_getaffinity(0)
    except (OSError, ValueError, OverflowError):
        missing = set(cores) - allowed or set(cores)
    if missing:
        raise ConfigError(f"--cpus: no core {min(missing)} for this process; it has {_ranges(allowed)}")
    return cores


def _ranges(cores: set[int]) -> str:
    """`0-3,8` for {0, 1, 2, 3, 8}."""
    firsts = [core for core in sorted(cores) if core - 1 not in cores]
    lasts = [core for core in sorted(cores) if core + 1 not in cores]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))
