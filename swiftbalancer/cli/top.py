"""`swiftbalancer top`: a running worker and its engines, live, through its read-only socket."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from swiftbalancer import endpoint as endpoints
from swiftbalancer.cli.app import app
from swiftbalancer.errors import ConfigError, WorkerLost

if TYPE_CHECKING:
    from swiftbalancer_worker.status import EngineView, View

BLOCKS = " ▁▂▃▄▅▆▇█"
BAR_WIDTH = 24
MAX_RANK_BARS = 32
SILENT_S = 15.0
FAULTS = {
    "requests_failed": "requests not answered",
    "worker_restarts": "worker restarts",
    "agreement_failures": "disagreements of ranks",
    "stalls": "stalls",
    "pauses": "pauses after repeated failures",
}
"""Counters of an engine's report, and what to call them."""
KEYS_HINT = " One that has keys shows itself only to --server-public-key and --client-key of a client it knows."


@app.command()
def top(
    endpoint: Annotated[
        str | None, typer.Argument(help="The worker's endpoint; default: the newest one of yours here.")
    ] = None,
    view: Annotated[str | None, typer.Option(help="Its view endpoint, if that was given to the worker.")] = None,
    server_public_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The worker's .pub, for a tcp view with keys.")
    ] = None,
    client_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your .key, whose .pub is in the worker's --clients.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and end.")] = False,
    wait_s: Annotated[float, typer.Option(min=0.1, help="Give up after so many seconds without a word.")] = 10.0,
) -> None:
    """Shows ranks, layers, phase, plans, predicted and measured imbalance, and faults of all engines of a worker.

    It can only look: the socket takes nothing in.

    [bold]Examples[/]

        swiftbalancer top

        swiftbalancer top ipc:///run/user/1000/sb.sock

        swiftbalancer top --view tcp://10.0.0.5:7712 --server-public-key server.pub --client-key me.key

        swiftbalancer top --json | jq .engines
    """
    stream = views(view_address(endpoint, view), wait_s=wait_s, keys=_keys(server_public_key, client_key))
    if as_json:
        typer.echo(msgspec.json.encode(next(stream)).decode())
    elif once:
        Console().print(render(next(stream)))
    else:
        with Live(screen=True, auto_refresh=False) as live:
            for seen in stream:
                live.update(render(seen), refresh=True)


def view_address(endpoint: str | None, view: str | None) -> str:
    """Where to subscribe; raises `ConfigError` if nothing says where."""
    if view is not None:
        return endpoints.parse(view, name="--view").text
    found = endpoints.find_endpoints()[-1:] if endpoint is None else [endpoints.parse(endpoint, name="ENDPOINT")]
    if not found:
        raise ConfigError(
            "no worker of yours listens on an ipc:// endpoint here; watch another by the endpoint it was given with "
            "--view: swiftbalancer top --view ENDPOINT"
        )
    beside = found[0].view
    if beside is None:
        raise ConfigError(
            f"{endpoint}: a tcp worker has no view of its own; give --view, as it was given to the worker"
        )
    return beside.text


@dataclass(frozen=True, slots=True)
class Keys:
    """CURVE keys of a view over tcp (Z85): the worker's public one, and our own secret one."""

    server_public: str
    client_secret: str


def _keys(server_public_key: Path | None, client_key: Path | None) -> Keys | None:
    if server_public_key is None and client_key is None:
        return None
    if server_public_key is None or client_key is None:
        raise ConfigError("--server-public-key and --client-key go together")
    return Keys(endpoints.read_key(server_public_key), endpoints.read_key(client_key))


def views(address: str, *, wait_s: float, keys: Keys | None = None) -> ViewStream:
    """The worker's views as they come; raises `WorkerLost` after `wait_s` without one."""
    return ViewStream(address, wait_s, keys)


class ViewStream:
    """An iterator over views. Owns its socket."""

    def __init__(self, address: str, wait_s: float, keys: Keys | None = None) -> None:
        import zmq

        from swiftbalancer.sockets import become_client
        from swiftbalancer_worker.status import MAX_VIEW_BYTES

        self._address, self._wait_s = address, wait_s
        self._hint = KEYS_HINT if address.startswith("tcp://") else ""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 2)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_VIEW_BYTES)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            if keys is not None:
                become_client(self._socket, server_public=keys.server_public, client_secret=keys.client_secret)
            self._socket.connect(address)
        except (zmq.ZMQError, ValueError) as error:
            raise ConfigError(f"{address}: {error}") from None

    def __iter__(self) -> ViewStream:
        return self

    def __next__(self) -> View:
        from swiftbalancer_worker.status import decode_view

        if not self._socket.poll(int(1000 * self._wait_s)):
            raise WorkerLost(
                f"nothing heard from {self._address} for {self._wait_s:g} s: is the worker running?{self._hint}"
            )
        frame = self._socket.recv()
        try:
            return decode_view(frame)
        except msgspec.DecodeError as error:
            raise WorkerLost(f"{self._address} is no worker's view, or one of another version: {error}") from None


def render(seen: View) -> Group:
    """All of it, as something rich can print."""
    head = Text(
        f"worker {seen.pid}  {seen.endpoint}  up {seen.up_s:.0f} s  {time.strftime('%H:%M:%S')}", style="bold"
    )
    if seen.refusals:
        head.append(f"  {seen.refusals} refusals", style="yellow")
    if not seen.engines:
        return Group(head, Text("no engine has said hello", style="dim"))
    return Group(head, *(_engine(engine) for engine in seen.engines))


def _engine(engine: EngineView) -> Panel:
    parts: list[RenderableType] = [_headline(engine), _faults(engine), _loads(engine)]
    if engine.plans:
        parts.append(_plans(engine))
    if engine.outcomes and engine.mode != "shadow":
        parts.append(_outcomes(engine))
    stuck = engine.phase != "idle" and engine.metrics.get("phase_age_s", 0.0) > SILENT_S
    alarm = stuck or engine.silent_s > SILENT_S
    title = f"{engine.engine}  {engine.model}  {engine.num_layers} layers x {engine.num_experts} experts"
    return Panel(Group(*parts), title=title, title_align="left", border_style="red" if alarm else "cyan")


def _headline(engine: EngineView) -> Text:
    metrics = engine.metrics
    text = Text(f"{engine.policy}/{engine.mode or '?'}  step {engine.step}  epoch {engine.epoch}  phase ")
    text.append(engine.phase or "?", style="bold")
    text.append(f" for {metrics.get('phase_age_s', 0.0):.0f} s  imbalance ")
    text.append(f"{engine.imbalance:.3f} ", style=_colour(engine.imbalance))
    text.append(sparkline(engine.imbalance_history), style="cyan")
    if engine.silent_s > SILENT_S:
        text.append(f"  silent for {engine.silent_s:.0f} s", style="bold red")
    promise = engine.promise
    if engine.mode == "shadow" and promise.plans:
        text.append(
            f"\nshadow: {promise.plans} plans would each have cut the imbalance by {100 * promise.gain:.1f} %, for "
            f"{promise.moves / promise.plans:.0f} moves, {promise.moved_gib / promise.plans:.2f} GiB",
            style="bold magenta",
        )
    text.append(
        f"\ncycles {metrics.get('cycles_committed', 0):.0f} done {metrics.get('cycles_dropped', 0):.0f} dropped, "
        f"moved {metrics.get('experts_moved', 0):.0f} experts {metrics.get('bytes_moved', 0) / 2**20:.0f} MiB, "
        f"late votes {metrics.get('late_rounds', 0):.0f}, host "
        f"{metrics.get('host_us_per_step_p50', 0):.0f}/{metrics.get('host_us_per_step_p99', 0):.0f} us per step"
    )
    return text


def _faults(engine: EngineView) -> Text:
    """What has gone wrong since the start, where something has."""
    counts = [(words, int(engine.metrics.get(name, 0))) for name, words in FAULTS.items()]
    found = ", ".join(f"{count} {words}" for words, count in counts if count)
    return Text(f"faults so far: {found}" if found else "no faults so far", style="yellow" if found else "dim")


def _loads(engine: EngineView) -> Table:
    grid = Table.grid(padding=(0, 2))
    ranks = Table.grid(padding=(0, 1))
    for rank, share in list(enumerate(engine.rank_share))[:MAX_RANK_BARS]:
        filled = min(BAR_WIDTH, round(share * BAR_WIDTH / 2))
        ranks.add_row(f"rank {rank}", Text("█" * filled, style=_colour(share)), f"{share:.2f}")
    layers = Table.grid(padding=(0, 1))
    for layer, value in engine.worst_layers[: max(4, min(len(engine.rank_share), MAX_RANK_BARS))]:
        layers.add_row(f"layer {layer}", Text(f"{value:.3f}", style=_colour(value)))
    grid.add_row(ranks, layers)
    return grid


def _plans(engine: EngineView) -> Table:
    table = Table(title="plans", title_justify="left", pad_edge=False, expand=False)
    for heading in ("ago", "kind", "moves", "now", "predicted", "ms", ""):
        table.add_column(heading, justify="left" if heading in ("kind", "") else "right")
    for plan in engine.plans[-4:][::-1]:
        figures = (f"{plan.imbalance_now:.3f}", f"{plan.imbalance_predicted:.3f}", f"{plan.plan_ms:.1f}")
        table.add_row(f"{plan.age_s:.0f} s", plan.kind, str(plan.moves), *figures, Text(plan.reason[:60]))
    return table


def _outcomes(engine: EngineView) -> Table:
    table = Table(title="cycles", title_justify="left", pad_edge=False, expand=False)
    for heading in ("ago", "kind", "moves", "MiB", "steps", "imbalance", ""):
        table.add_column(heading, justify="left" if heading in ("kind", "") else "right")
    for end in engine.outcomes[-6:][::-1]:
        word = Text("committed", style="green") if end.committed else Text(f"dropped: {end.reason[:60]}", style="red")
        figures = (str(end.moves), f"{end.moved_mib:.1f}", str(end.steps), f"{end.imbalance:.3f}")
        table.add_row(f"{end.age_s:.0f} s", end.kind, *figures, word)
    return table


def sparkline(values: list[float]) -> str:
    """The last forty values as blocks, the lowest 1.0 (perfect balance)."""
    recent = [value for value in values[-40:] if value > 0]
    if not recent:
        return ""
    top_value = max(*recent, 1.01)
    return "".join(BLOCKS[1 + int((len(BLOCKS) - 2) * (max(v, 1.0) - 1.0) / (top_value - 1.0))] for v in recent)


def _colour(imbalance: float) -> str:
    return "green" if imbalance < 1.1 else "yellow" if imbalance < 1.3 else "red"
