"""Ten minutes on a new machine, automated: is everything there that balancing needs, and how fast is it?"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftbalancer import vendors, wire
from swiftbalancer.config import Config, WorkerConfig, to_dict
from swiftbalancer.errors import BalancerError
from swiftbalancer.topology import Topology

if TYPE_CHECKING:
    import torch

    from swiftbalancer.device import DeviceLayer, Stream
    from swiftbalancer.doctor_rank import Task

PACKAGES = ("torch", *vendors.PACKAGES, "vllm", "vllm-ascend", "numpy", "numba", "pyzmq", "msgspec")
ENVIRONMENT = ("SWIFTBALANCER_", "DYNAMIC_EPLB", *vendors.ENVIRONMENT)
RANKS_S = 180.0
POLL_S = 0.05
BATCH = 8
"""Experts each rank sends at once on an accelerator: one alone would show the handshakes rather than the link."""
COPY_BYTES = 256 << 20
MATRIX = 4096
PRODUCTS = 20
FELL_BACK = "fell back because"
GOOD_OVERLAP = 0.5
"""Part of the shorter of two jobs that must run beside the other."""


class Verdict(str, Enum):
    """What a check came to; only FAILED means that balancing will not work."""

    OK = "ok"
    WARNING = "warning"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    verdict: Verdict
    text: str


@dataclass(frozen=True, slots=True)
class Examination:
    """What to look at: `device`, auto or of `vendors.DEVICES`; `ranks` processes exchange experts of `expert_mib`."""

    device: str = "auto"
    ranks: int = 2
    expert_mib: int = 44


def examine(examination: Examination) -> Iterator[Finding]:
    """Every finding as soon as it is there. Device checks need torch; without it they are skipped."""
    yield versions()
    yield environment()
    yield worker_start()
    try:
        layer = open_device(examination.device)
    except ImportError as error:
        yield Finding("device", Verdict.SKIPPED, f"torch is not installed ({error}); a worker alone needs none")
        return
    except BalancerError as error:
        yield Finding("device", Verdict.FAILED, str(error))
        return
    yield device(layer)
    if doubt := layer.collective.doubt():
        yield Finding("collectives", Verdict.WARNING, doubt)
    yield tried("stream order", lambda: stream_order(layer))
    yield tried("stream overlap", lambda: stream_overlap(layer))
    for transport in transports(layer):
        yield exchange(layer, transport, examination)


def tried(check: str, examine_it: Callable[[], Finding]) -> Finding:
    """What a check finds; a device that cannot even do that has failed it, with the first line of its complaint."""
    try:
        return examine_it()
    except RuntimeError as error:  # torch's for all a device or its driver may say
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Finding(check, Verdict.FAILED, first)


def versions() -> Finding:
    installed = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding("versions", Verdict.OK, ", ".join(installed))


def environment() -> Finding:
    """The variables that change what we do, as they are set."""
    known = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(ENVIRONMENT)]
    return Finding("environment", Verdict.OK, " ".join(known) or "nothing set")


def worker_start() -> Finding:
    """Starts a worker as rank 0 would, and ends it."""
    from swiftbalancer.link import WorkerLink

    hello = wire.Hello(
        engine=f"doctor@{socket.gethostname()}/{os.getpid()}",
        model=wire.ModelSpec(name="doctor", num_layers=1, num_experts=2, top_k=1, expert_bytes=1),
        topology=Topology(num_ranks=2, slots_per_rank=1),
        config=to_dict(Config()),
    )
    began = time.perf_counter()
    config = WorkerConfig()
    link = WorkerLink(hello, config)
    try:
        welcome = link.wait_ready(config.start_timeout_s)
    except BalancerError as error:
        return Finding("worker", Verdict.FAILED, str(error))
    finally:
        link.close(5.0)
    return Finding("worker", Verdict.OK, f"ready after {time.perf_counter() - began:.1f} s, pid {welcome.pid}")


def open_device(wanted: str) -> DeviceLayer:
    """The layer of the wanted device; auto takes the first accelerator that works, else the CPU."""
    from swiftbalancer.device import DeviceLayer, best_layer

    return best_layer() if wanted == "auto" else DeviceLayer.for_device(wanted)


def device(layer: DeviceLayer) -> Finding:
    shares = "peers can write into its memory" if layer.can_share_memory else "peers send and receive"
    return Finding(
        "device", Verdict.OK, f"{layer.device}, {layer.num_devices} in all, collectives by {layer.backend}, {shares}"
    )


def stream_order(layer: DeviceLayer, repeats: int = 20) -> Finding:
    """A side stream that waits for an event must see what came before it, and the main stream what the side did."""
    import torch

    source, target = torch.zeros(2, 1 << 20, device=layer.device).unbind(0)
    host, side = layer.pinned((1 << 20,), torch.float32), layer.side_stream()
    late = 0
    for value in range(1, repeats + 1):
        layer.launch(torch.Tensor.fill_, source, value)
        written, landed = layer.event(), layer.event()
        layer.record(written)
        with layer.on(side):
            layer.wait(side, written)
            layer.copy(target, source)
            layer.copy(host, target)
            layer.record(landed)
        layer.wait(layer.current_stream(), landed)
        layer.launch(torch.Tensor.fill_, source, -1)
        landed.synchronize()
        late += int(not bool((host == value).all()))
    if late:
        return Finding("stream order", Verdict.FAILED, f"{late} of {repeats} copies read what came later")
    return Finding("stream order", Verdict.OK, f"{repeats} copies on a side stream read what the events promise")


def stream_overlap(layer: DeviceLayer) -> Finding:
    """How much of a host copy on a side stream hides behind matrix products on the main one."""
    if not layer.is_accelerator:
        return Finding("stream overlap", Verdict.SKIPPED, "a CPU runs everything where it is called")
    work = _Overlap.of(layer)
    work.seconds(products=True, copy=True)
    main_s, side_s = work.seconds(products=True, copy=False), work.seconds(products=False, copy=True)
    hidden = (main_s + side_s - work.seconds(products=True, copy=True)) / min(main_s, side_s)
    text = f"{max(hidden, 0.0):.0%} of the shorter hides (products {main_s * 1e3:.1f} ms, copy {side_s * 1e3:.1f} ms)"
    return Finding("stream overlap", Verdict.OK if hidden >= GOOD_OVERLAP else Verdict.WARNING, text)


@dataclass(frozen=True, slots=True, eq=False)
class _Overlap:
    """Two jobs of some milliseconds: products of `matrix` on the main stream, `host` to `target` on `side`."""

    layer: DeviceLayer
    matrix: torch.Tensor
    host: torch.Tensor
    target: torch.Tensor
    side: Stream

    @staticmethod
    def of(layer: DeviceLayer) -> _Overlap:
        import torch

        return _Overlap(
            layer,
            matrix=torch.ones(MATRIX, MATRIX, dtype=torch.float16, device=layer.device),
            host=layer.pinned((COPY_BYTES,), torch.uint8),
            target=torch.empty(COPY_BYTES, dtype=torch.uint8, device=layer.device),
            side=layer.side_stream(),
        )

    def seconds(self, *, products: bool, copy: bool) -> float:
        self.layer.synchronize()
        began = time.perf_counter()
        if copy:
            with self.layer.on(self.side):
                self.layer.copy(self.target, self.host)
        for _ in range(PRODUCTS if products else 0):
            self.matrix.mm(self.matrix)
        self.layer.synchronize()
        return time.perf_counter() - began


def transports(layer: DeviceLayer) -> list[str]:
    """What to try between ranks: what `auto` chooses, and send and receive alone where that may differ."""
    return ["auto", "p2p"] if layer.can_share_memory else ["auto"]


def exchange(layer: DeviceLayer, transport: str, examination: Examination) -> Finding:
    """Ranks as processes, one device each: experts from every rank to the next, compared at the end."""
    from swiftbalancer.doctor_rank import Task

    name = f"transport {transport}"
    size = max(examination.ranks, 2)
    experts = BATCH if layer.is_accelerator else 1
    if layer.is_accelerator and layer.num_devices < size:
        return Finding(name, Verdict.SKIPPED, f"{layer.num_devices} {layer.device.type} device(s), {size} needed")
    with tempfile.TemporaryDirectory(prefix="swiftbalancer-doctor-") as folder:
        task = Task("", 0, size, _free_port(), transport, examination.expert_mib, experts)
        ranks = _start_ranks(layer, task, Path(folder))
        try:
            first = _first_to_fail(ranks, RANKS_S)
        except TimeoutError:
            return Finding(name, Verdict.FAILED, f"{size} ranks were not done after {RANKS_S:.0f} s")
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        said = Path(folder, f"err.{first or 0}").read_text(errors="replace")
        if first is not None:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            return Finding(name, Verdict.FAILED, f"rank {first} ended with status {ranks[first].returncode}: {last}")
        lines = Path(folder, "out.0").read_text(errors="replace").splitlines()
    report = next(line for line in reversed(lines) if line.startswith("{"))  # libraries may print there, too
    return exchanged(name, json.loads(report), said=said)


def _start_ranks(layer: DeviceLayer, task: Task, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Their output goes to files, since a pipe that nobody reads would stop a rank that says much."""
    ranks = []
    for rank in range(task.size):
        name = f"{layer.device.type}:{rank}" if layer.is_accelerator else layer.device.type
        own = json.dumps(asdict(replace(task, device=name, rank=rank)))
        with Path(folder, f"out.{rank}").open("wb") as out, Path(folder, f"err.{rank}").open("wb") as err:
            command = [sys.executable, "-m", "swiftbalancer.doctor_rank", own]
            ranks.append(subprocess.Popen(command, stdout=out, stderr=err))
    return ranks


def _first_to_fail(ranks: list[subprocess.Popen[bytes]], deadline_s: float) -> int | None:
    """The rank whose process failed first, None if all succeed; raises `TimeoutError`.

    The others would wait long for one that is gone.
    """
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        ended = [process.poll() for process in ranks]
        for rank, status in enumerate(ended):
            if status:
                return rank
        if None not in ended:
            return None
        time.sleep(POLL_S)
    raise TimeoutError


def exchanged(name: str, report: dict[str, Any], *, said: str) -> Finding:
    """What rank 0 reported; `said` is its stderr, where a fallback to a slower transport is told."""
    size = f"{report['ranks']} ranks, {report['experts']} x {report['mib']} MiB each"
    text = f"{report['carrier']}, {size}: {report['gb_per_s']:.1f} GB/s a rank"
    if report["wrong"]:
        return Finding(name, Verdict.FAILED, f"{text}; {report['wrong']} experts arrived damaged")
    for line in said.splitlines():
        if FELL_BACK in line:
            return Finding(name, Verdict.WARNING, f"{text}; {line}")
    return Finding(name, Verdict.OK, f"{text}, contents right")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
