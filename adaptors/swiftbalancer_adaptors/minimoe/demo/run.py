"""Runs a demo: starts the ranks, shows what they report, compares the two runs."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from swiftbalancer.errors import BalancerError
from swiftbalancer.load import imbalance
from swiftbalancer.supervisor import import_path
from swiftbalancer_adaptors.minimoe.demo.options import DemoOptions, Finished, News, environment

END_S = 10.0
Show = Callable[[News], None]


class DemoFailed(BalancerError):
    """A rank of the demo ended early; the message holds what it said last."""


class DemoResult(msgspec.Struct, frozen=True):
    """What `swiftbalancer demo --json` prints. Imbalances: max/mean rank load, mean over layers and steps."""

    ranks: int
    steps: int
    policy: str
    imbalance_without: float
    imbalance_with: float
    experts_moved: int
    dispatch_updates: int
    cycles: int
    cycles_dropped: int
    worker_restarts: int
    mismatched_tokens: int
    host_us_per_step_p50: float
    host_us_per_step_p99: float
    step_ms_p50: float

    def to_dict(self) -> dict[str, int | float | str]:
        values: dict[str, int | float | str] = msgspec.to_builtins(self)
        return values


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A finished demo: the figures, and the imbalance of every step for a picture, `[steps]` float64 each."""

    result: DemoResult
    with_by_step: np.ndarray
    without_by_step: np.ndarray


def run_demo(options: DemoOptions, show: Show) -> Outcome:
    """Serves the stream balanced and not; calls `show` with the news of rank 0. Raises `DemoFailed`."""
    options.check()
    with tempfile.TemporaryDirectory(prefix="swiftbalancer-demo-") as name:
        folder = Path(name)
        (folder / "options.json").write_bytes(msgspec.json.encode(options))
        with ranks(options, folder) as processes:
            finished = follow(processes, folder, show)
        return compare(options, folder, finished)


@contextlib.contextmanager
def ranks(options: DemoOptions, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The rank processes; none is left behind, however this ends."""
    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "swiftbalancer_adaptors.minimoe.demo.rank",
        str(folder / "options.json"),
        str(folder),
    ]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(options.ranks):
            env = {**environment(rank, options.ranks, port), **import_path("swiftbalancer", "swiftbalancer_adaptors")}
            with (folder / f"log.{rank}").open("wb") as log:
                out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
                processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=log))
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            process.kill()


def follow(processes: list[subprocess.Popen[bytes]], folder: Path, show: Show) -> Finished:
    """Shows rank 0's news until all ranks have ended; a rank that fails ends the others."""
    watcher = threading.Thread(target=_end_all_when_one_fails, args=(processes,), daemon=True)
    watcher.start()
    finished: Finished | None = None
    stdout = processes[0].stdout
    assert stdout is not None
    decoder = msgspec.json.Decoder(News)
    for line in stdout:
        news = decoder.decode(line)
        finished = news if isinstance(news, Finished) else finished
        show(news)
    codes = [process.wait() for process in processes]
    if any(codes) or finished is None:
        raise DemoFailed(_last_words(codes, folder))
    return finished


def compare(options: DemoOptions, folder: Path, finished: Finished) -> Outcome:
    """The figures of both runs, from what the ranks left in `folder`."""
    runs = {
        name: [np.load(folder / f"{name}.{rank}.npz") for rank in range(options.ranks)]
        for name in ("with", "without")
    }
    by_step = {name: imbalance(np.stack([r["loads"] for r in files], -1)).mean(1) for name, files in runs.items()}
    mismatched = sum(
        int((a["bytes"] != b["bytes"]).sum()) for a, b in zip(runs["with"], runs["without"], strict=True)
    )
    first = min(finished.first_cycle_step, options.steps - 1)
    result = DemoResult(
        ranks=options.ranks,
        steps=options.steps,
        policy=options.policy,
        imbalance_without=round(float(by_step["without"][first:].mean()), 4),
        imbalance_with=round(float(by_step["with"][first:].mean()), 4),
        experts_moved=finished.experts_moved,
        dispatch_updates=finished.dispatch_updates,
        cycles=finished.cycles,
        cycles_dropped=finished.cycles_dropped,
        worker_restarts=finished.worker_restarts,
        mismatched_tokens=mismatched,
        host_us_per_step_p50=round(finished.host_us_p50, 1),
        host_us_per_step_p99=round(finished.host_us_p99, 1),
        step_ms_p50=round(float(np.median(runs["with"][0]["step_s"])) * 1e3, 2),
    )
    return Outcome(result, by_step["with"], by_step["without"])


def _end_all_when_one_fails(processes: list[subprocess.Popen[bytes]]) -> None:
    waits = [threading.Thread(target=_end_others, args=(process, processes), daemon=True) for process in processes]
    for wait in waits:
        wait.start()


def _end_others(process: subprocess.Popen[bytes], processes: list[subprocess.Popen[bytes]]) -> None:
    if process.wait():
        for other in processes:
            if other.poll() is None:
                other.terminate()


def _last_words(codes: list[int], folder: Path) -> str:
    failed = next((rank for rank, code in enumerate(codes) if code not in (0, -15)), 0)
    lines = (folder / f"log.{failed}").read_text(errors="replace").strip().splitlines()
    return f"rank {failed} ended with status {codes[failed]}; it said: {lines[-1] if lines else 'nothing'}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
