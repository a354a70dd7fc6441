"""One rank of the demo: `python -m swiftbalancer_adaptors.minimoe.demo.rank OPTIONS.json FOLDER`.

Serves the stream twice in one process, balanced and not, and leaves per-step loads and predicted bytes in FOLDER.
Rank 0 writes news as JSON lines to its standard output.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from swiftbalancer import wire
from swiftbalancer.attach import attach
from swiftbalancer.balancer import Balancer
from swiftbalancer.border import GroupInfo
from swiftbalancer.bulk import WindowLoads
from swiftbalancer.device import DeviceLayer
from swiftbalancer.load import expert_loads, imbalance
from swiftbalancer.stats import StepKind
from swiftbalancer_adaptors.minimoe.border import bind
from swiftbalancer_adaptors.minimoe.demo.options import DemoOptions, Finished, News, Progress, Started
from swiftbalancer_adaptors.minimoe.engine import EngineSpec, MiniMoeEngine
from swiftbalancer_adaptors.minimoe.text import TextStream, packaged_texts, texts_of_folder

STORE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """One run of one rank.

    `loads` `[steps, layers]` int64 tokens that arrived here; `bytes_` `[steps, batch, length]` uint8, the likeliest
    next byte at every position; `step_s` `[steps]` float64, wall seconds.
    """

    loads: np.ndarray
    bytes_: np.ndarray
    step_s: np.ndarray


class Reporter:
    """Turns windows and cycles of rank 0 into news for the screen."""

    def __init__(self, balancer: Balancer, stream: TextStream) -> None:
        self._balancer = balancer
        self._stream = stream
        self.first_cycle_step = -1
        balancer.on_window.append(self.window)
        balancer.on_cycle.append(self.cycle)

    def window(self, loads: WindowLoads) -> None:
        balancer, stats = self._balancer, self._balancer.stats
        per_rank = loads.rank_loads
        experts = expert_loads(loads.slots, loads.in_force.placement)
        plain = experts.reshape(len(experts), per_rank.shape[1], -1).sum(2)
        total = stats.host_s[StepKind.IDLE]
        tell(
            Progress(
                step=loads.step,
                domain=self._stream.describe(loads.step),
                phase=balancer.phase.name.lower(),
                rank_loads=per_rank.sum(0).tolist(),
                imbalance=float(imbalance(per_rank).mean()),
                imbalance_without=float(imbalance(plain).mean()),
                experts_moved=stats.experts_moved,
                dispatch_updates=stats.dispatch_updates,
                cycles=stats.cycles_committed,
                cycles_dropped=stats.cycles_dropped,
                host_us=total.percentile(50) * 1e6,
            )
        )

    def cycle(self, outcome: wire.Outcome) -> None:
        if outcome.committed and self.first_cycle_step < 0:
            self.first_cycle_step = outcome.step


def tell(news: News) -> None:
    """One line to the screen."""
    sys.stdout.buffer.write(msgspec.json.encode(news) + b"\n")
    sys.stdout.buffer.flush()


def build(options: DemoOptions, redundant: int, group: dist.ProcessGroup | None) -> MiniMoeEngine:
    """The engine with so many redundant experts; the rest is the same in both runs."""
    spec = EngineSpec(
        preset=options.preset,
        num_layers=options.num_layers,
        num_redundant=redundant,
        batch=options.batch,
        length=options.length,
    )
    device = (
        options.device
        if options.device == "cpu"
        else f"{options.device}:{os.environ.get('LOCAL_RANK', os.environ['RANK'])}"
    )
    return MiniMoeEngine(spec, group, device)


def serve(engine: MiniMoeEngine, stream: TextStream, steps: int, balancer: Balancer | None) -> Served:
    """Serves the stream; the balancer's hook runs between passes."""
    loads = np.zeros((steps, engine.config.num_layers), np.int64)
    answers = np.zeros((steps, engine.spec.batch, engine.spec.length), np.uint8)
    seconds = np.zeros(steps)
    before = engine.counters.sum(1)
    for step in range(steps):
        began = time.perf_counter()
        tokens = torch.from_numpy(stream.batch(step, engine.rank).tokens).to(engine.device)
        answers[step] = engine.forward(tokens).cpu().numpy()
        loads[step] = (engine.counters.sum(1) - before).cpu().numpy()
        if balancer is not None:
            balancer.after_forward()
        before = engine.counters.sum(1)
        seconds[step] = time.perf_counter() - began
    return Served(loads, answers, seconds)


def balanced_run(options: DemoOptions, group: GroupInfo, stream: TextStream) -> Served:
    """The run with balancing; rank 0 reports it."""
    engine = build(options, options.redundant, dist.group.WORLD)
    balancer = attach(options.balancer_config(), bind(engine), group)
    reporter = Reporter(balancer, stream) if group.rank == 0 else None
    try:
        balancer.wait_for_worker(balancer.config.worker.start_timeout_s)
        dist.barrier()
        if reporter is not None:
            tell(Started(balanced=True))
        served = serve(engine, stream, options.steps, balancer)
        dist.barrier()
    finally:
        balancer.close()
    if reporter is not None:
        tell(summary(balancer, reporter, options.steps))
    return served


def summary(balancer: Balancer, reporter: Reporter, steps: int) -> Finished:
    stats = balancer.stats
    host = np.concatenate([ring.values() for ring in stats.host_s]) * 1e6
    return Finished(
        first_cycle_step=reporter.first_cycle_step if reporter.first_cycle_step >= 0 else steps,
        experts_moved=stats.experts_moved,
        dispatch_updates=stats.dispatch_updates,
        cycles=stats.cycles_committed,
        cycles_dropped=stats.cycles_dropped,
        worker_restarts=stats.worker_restarts,
        host_us_p50=float(np.percentile(host, 50)),
        host_us_p99=float(np.percentile(host, 99)),
    )


def main() -> None:
    options = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=DemoOptions)
    folder, rank, size = Path(sys.argv[2]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; it ends us with SIGTERM
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank} %(levelname)s %(message)s")
    layer = DeviceLayer.for_device(options.device)
    if layer.is_accelerator:
        DeviceLayer.for_device(f"{options.device}:{rank}").bind_thread()
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        rank == 0,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
    )
    dist.init_process_group(layer.backend, store=store, rank=rank, world_size=size)
    texts = packaged_texts() if options.text is None else texts_of_folder(Path(options.text))
    stream = TextStream(texts, batch=options.batch, length=options.length, seed=options.seed)
    device = torch.device(options.device if options.device == "cpu" else f"{options.device}:{rank}")
    group = GroupInfo(rank=rank, size=size, store=store, device=device)
    runs = {"with": balanced_run(options, group, stream)}
    if rank == 0:
        tell(Started(balanced=False))
    runs["without"] = serve(build(options, 0, dist.group.WORLD), stream, options.steps, None)
    for name, served in runs.items():
        np.savez(folder / f"{name}.{rank}.npz", loads=served.loads, bytes=served.bytes_, step_s=served.step_s)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
