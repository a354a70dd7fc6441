"""One rank of a synthetic engine, run as a script: real groups, transport and worker, weights that can be checked.

`python synthetic_rank.py OPTIONS.json` with RANK, WORLD_SIZE, MASTER_PORT in the environment; writes a JSON result.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from swiftbalancer.attach import attach
from swiftbalancer.balancer import Balancer
from swiftbalancer.border import GroupInfo, ModelBinding
from swiftbalancer.bulk import WindowLoads
from swiftbalancer.config import from_dict
from swiftbalancer.cycle import Phase
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import DispatchForm, check_table, slot_fractions, uniform_table
from swiftbalancer.load import expert_loads, imbalance, rank_loads
from swiftbalancer.maps import TableMaps
from swiftbalancer.placement import Placement
from swiftbalancer.stats import StepKind
from swiftbalancer.topology import Topology


class Options(msgspec.Struct):
    out: str
    steps: int = 300
    ranks: int = 2
    layers: int = 3
    experts: int = 8
    redundant: int = 4
    width: int = 8
    step_s: float = 0.0
    until_epoch: int = 0
    """Ends before `steps` once this many commits are in force, which is after the same step on all ranks."""
    shift_every: int = 97
    """Steps after which other experts are popular."""
    seed: int = 0
    config: dict[str, Any] = {}
    drain_every: int = 0
    """Drain and resume after every so many steps; 0: never."""
    skip_at: tuple[int, int] = (-1, -1)
    """Rank and step at which that rank's hook is not called."""


def pattern(layer: int, expert: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What expert `expert` of `layer` holds, everywhere and always."""
    generator = torch.Generator().manual_seed(layer * 10_007 + expert)
    values = torch.randint(-100, 100, shape, generator=generator)
    return values.to(dtype)


class SyntheticEngine:
    """Counts tokens as a real engine would, by its own placement and table, and can tell whether they are right."""

    SHAPES = (((6, 5), torch.float32), ((7,), torch.int8), ((4, 3), torch.bfloat16))

    def __init__(self, options: Options, rank: int) -> None:
        self.options, self.rank = options, rank
        topology = Topology.for_experts(options.experts, num_redundant=options.redundant, num_ranks=options.ranks)
        self.placement = Placement.initial(topology, options.experts, num_layers=options.layers)
        self.slots = topology.slots_per_rank
        self.weights = [self._layer_weights(layer) for layer in range(options.layers)]
        self.counters = torch.zeros(options.layers, self.slots, dtype=torch.int32)
        self.passes = torch.zeros(1, dtype=torch.int64)
        self.table = torch.from_numpy(uniform_table(self.placement, options.width).copy())
        self.map = torch.from_numpy(self.placement.physical_to_logical_map.copy())
        self.rng = np.random.default_rng(options.seed)
        self.skew = self.rng.lognormal(0, 1.0, (options.layers, options.experts))

    def binding(self) -> ModelBinding:
        return ModelBinding(
            name="synthetic",
            placement=self.placement,
            top_k=2,
            weights=self.weights,
            counters=self.counters,
            counts="local",
            maps=TableMaps(DeviceLayer.for_device("cpu"), self.table, self.map),
            dispatch=DispatchForm("table", self.options.width),
            per_rank_dispatch=True,
            passes=self.passes,
        )

    def forward(self, step: int) -> None:
        """Counts this rank's arrivals as if all ranks dispatched by the table; the skew jumps now and then."""
        if step % self.options.shift_every == 0:
            self.skew = self.rng.lognormal(0, 1.0, self.skew.shape)
        tokens = self.rng.poisson(self.skew * 50)
        share = slot_fractions(self.table.numpy(), self.current())
        per_slot = share * np.take_along_axis(tokens, self.map.numpy().astype(np.int64), 1)
        first = self.rank * self.slots
        self.counters += torch.from_numpy(per_slot[:, first : first + self.slots]).to(torch.int32)
        self.passes += 1

    def imbalances(self, window: WindowLoads) -> tuple[float, float]:
        """As served, and with the placement and the even split of the start; mean over layers."""
        tokens = expert_loads(window.slots, window.in_force.placement)
        share = slot_fractions(uniform_table(self.placement, self.options.width), self.placement)
        start = share * np.take_along_axis(tokens, self.placement.physical_to_logical_map.astype(np.int64), 1)
        served, unmoved = imbalance(window.rank_loads), imbalance(rank_loads(start, self.placement))
        return float(served.mean()), float(unmoved.mean())

    def current(self) -> Placement:
        return self.placement.with_layers(np.arange(self.options.layers), self.map.numpy())

    def wrong_slots(self) -> int:
        """Slots whose weights differ from what the engine's own map says, plus maps that are not valid."""
        wrong = 0
        for layer, kinds in enumerate(self.weights):
            for local in range(self.slots):
                expert = int(self.map[layer, self.rank * self.slots + local])
                for tensor, (shape, dtype) in zip(kinds, self.SHAPES, strict=True):
                    wrong += int(not torch.equal(tensor[local], pattern(layer, expert, shape, dtype)))
        check_table(self.table.numpy(), self.current())
        return wrong

    def _layer_weights(self, layer: int) -> list[torch.Tensor]:
        row = self.placement.physical_to_logical_map[layer]
        own = row[self.rank * self.slots : (self.rank + 1) * self.slots].tolist()
        tensors = [torch.stack([pattern(layer, e, shape, dtype) for e in own]) for shape, dtype in self.SHAPES]
        tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
        return tensors


@dataclass
class Observed:
    """What a test wants to know of a run."""

    epochs: list[tuple[int, int]] = field(default_factory=list)
    """Step and epoch, whenever the epoch changes."""
    cycles: list[tuple[int, int]] = field(default_factory=list)
    """Step and number of committed cycles, whenever that changes."""
    wrong_slots: int = 0
    imbalances: list[tuple[float, float]] = field(default_factory=list)
    """Of every sub-window: as served, and as the same tokens would be served by the placement at the start."""
    drains: int = 0
    busy_after_drain: int = 0
    closed_after_resume: int = 0
    """Times that the transport would have had to connect beside forward passes."""
    busy_hooks: int = 0
    """Hooks that found something to do, or had to look."""


def count_busy_hooks(balancer: Balancer, seen: Observed) -> None:
    go_on = balancer._go_on

    def counted(passes: int) -> None:
        seen.busy_hooks += 1
        go_on(passes)

    vars(balancer)["_go_on"] = counted


def serve(options: Options, rank: int, balancer: Balancer, engine: SyntheticEngine) -> Observed:
    """Runs the steps in lockstep, after the worker is there."""
    seen = Observed()
    count_busy_hooks(balancer, seen)
    balancer.on_window.append(lambda window: seen.imbalances.append(engine.imbalances(window)))
    balancer.wait_for_worker(60.0)
    for number in range(options.steps):
        dist.barrier()
        engine.forward(number)
        if (rank, number) != options.skip_at:
            balancer.after_forward()
        if options.drain_every and number % options.drain_every == options.drain_every - 1:
            balancer.drain()
            seen.drains += 1
            seen.busy_after_drain += int(balancer.phase is not Phase.IDLE)
            balancer.resume()
            seen.closed_after_resume += int(balancer._parts.transport._mover is None)
        epoch = balancer.in_force.epoch
        if not seen.epochs or epoch != seen.epochs[-1][1] or number == options.steps - 1:
            seen.epochs.append((number, epoch))
            seen.wrong_slots += engine.wrong_slots()
        cycles = balancer.stats.cycles_committed
        if cycles != (seen.cycles[-1][1] if seen.cycles else 0):
            seen.cycles.append((number, cycles))
        if 0 < options.until_epoch <= epoch:
            break
        time.sleep(options.step_s)
    return seen


def report(rank: int, balancer: Balancer, seen: Observed) -> dict[str, Any]:
    """As JSON values."""
    stats, late = balancer.stats, np.array(seen.imbalances[len(seen.imbalances) // 2 :]).reshape(-1, 2)
    return {
        "rank": rank,
        "epochs": seen.epochs,
        "cycles": seen.cycles,
        "wrong_slots": seen.wrong_slots,
        "drains": seen.drains,
        "busy_after_drain": seen.busy_after_drain,
        "closed_after_resume": seen.closed_after_resume,
        "busy_hooks": seen.busy_hooks,
        "imbalance_late": late.mean(0).tolist() if len(late) else None,
        "committed": stats.cycles_committed,
        "dropped": stats.cycles_dropped,
        "drop_reasons": stats.drop_reasons,
        "moved": stats.experts_moved,
        "placements": stats.placement_updates,
        "dispatches": stats.dispatch_updates,
        "off_reason": stats.off_reason,
        "late_rounds": stats.late_rounds,
        "host_us": {
            k.name: [r.count, r.percentile(50) * 1e6, r.percentile(99) * 1e6]
            for k, r in zip(StepKind, stats.host_s, strict=True)
        },
    }


def main() -> None:
    options = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Options)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    logging.basicConfig(level=logging.INFO, format=f"r{rank} %(levelname)s %(name)s %(message)s")
    torch.set_num_threads(1)
    port = int(os.environ["MASTER_PORT"])
    store = TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    engine = SyntheticEngine(options, rank)
    group = GroupInfo(rank=rank, size=size, store=store, device=torch.device("cpu"))
    balancer = attach(from_dict(options.config), engine.binding(), group)
    seen = serve(options, rank, balancer, engine)
    dist.barrier()
    balancer.close()
    Path(f"{options.out}.{rank}").write_text(json.dumps(report(rank, balancer, seen)))


if __name__ == "__main__":
    main()
