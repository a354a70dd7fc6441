"""One rank of the synthetic engine that lives through a list of faults and writes down what each of them cost.

`python faulty_rank.py OPTIONS.json` with RANK, WORLD_SIZE, MASTER_PORT in the environment. Before every pass all
ranks compare, over the engine's own group, the epoch they are about to use; after it, outputs are compared with
what they must be.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from swiftbalancer import supervisor
from swiftbalancer.agreement import BoardRounds
from swiftbalancer.attach import attach
from swiftbalancer.border import GroupInfo, ModelBinding
from swiftbalancer.config import from_dict
from swiftbalancer.cycle import LEADER
from swiftbalancer.errors import AgreementLost
from swiftbalancer.placement import Placement
from tests.edges import synthetic_rank
from tests.edges.checked_minimoe import CheckedMinimoe
from tests.edges.fault import Fault, Place
from tests.edges.fault_script import Script
from tests.edges.fault_watch import Watch, closed, resident_bytes, store_port, watch_moves
from tests.edges.faults import KNOWN
from tests.edges.held import Held
from tests.edges.synthetic_rank import SyntheticEngine

SCRIPTED_WORKER = Path(__file__).with_name("scripted_worker.py")


class Engine(Protocol):
    """An engine whose outputs can be told right from wrong."""

    placement: Placement
    map: torch.Tensor
    """`[layers, slots]` int32, the `physical_to_logical_map` its passes use."""
    tokens_compared: int

    def binding(self) -> ModelBinding: ...

    def forward(self, step: int) -> None: ...

    def wrong_outputs(self) -> int: ...


class CheckedSynthetic(SyntheticEngine):
    """Its outputs are right where every slot holds what the map says, byte for byte."""

    tokens_compared = 0

    def wrong_outputs(self) -> int:
        return self.wrong_slots()


class Options(msgspec.Struct):
    out: str
    faults: list[str]
    engine: str = "synthetic"
    """Or `minimoe`."""
    seconds: float = 0.0
    """End between two faults after so long; 0: when all are over."""
    ranks: int = 2
    nodes: int = 1
    experts: int = 9
    redundant: int = 3
    host: str = "127.0.0.1"
    """Of rank 0."""
    step_s: float = 0.001
    config: dict[str, Any] = {}
    close_in: str = ""
    """A phase in which all ranks shut down, after the fault if there is one; empty: serve until all are over."""


class Rank:
    """Serves, injects, compares."""

    def __init__(self, options: Options, place: Place, engine: Engine) -> None:
        self.options, self.place, self.engine = options, place, engine
        self.watch = Watch()
        self.script = Script(place, options.faults) if place.rank == LEADER else None
        self._began = time.monotonic()
        self._armed: Fault | None = None
        self._index = self._last_epoch = -1
        self._last_map = engine.map.clone()

    def serve(self) -> None:
        """Until rank 0's script is over, or a fatal fault has ended serving."""
        number = 0
        over = False
        while not over:
            agreed = self._meet()
            over = bool(agreed[3])
            if over and self.options.close_in:
                return
            self._arm(agreed[2])
            self.engine.forward(number)
            if self._armed is not None and self.place.rank == self._armed.rank:
                self._armed.tick(self.place)
            if self._armed is None or not self._armed.skips_hook:
                self.place.balancer.after_forward(passes=number)
            self._compare()
            if number % 500 == 0:
                self._watch_memory()
            number += 1
            time.sleep(self.options.step_s)

    def _meet(self) -> list[int]:
        """The engine's own collective of a pass: epochs, the fault to arm, whether to end, whether it has fired."""
        epoch = self.place.balancer.in_force.epoch
        fired = self._armed is not None and self._armed.fired
        state = torch.tensor([epoch, -epoch, self._index, 0, fired])
        if self.script is not None:
            state[2] = self.script.next(fired=self._anywhere_fired)
            state[3] = self._closing() if self.options.close_in else self._over(self.script)
        if self.place.rank != LEADER:
            state[2] = -2
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        self.watch.epochs_apart += int(state[0] != -state[1])
        self._anywhere_fired = bool(state[4])
        return [int(v) for v in state]

    _anywhere_fired = False

    def _over(self, script: Script) -> bool:
        late = bool(self.options.seconds) and time.monotonic() - self._began > self.options.seconds
        return script.over or (late and script.index < 0)

    def _watch_memory(self) -> None:
        self.watch.late_rss_bytes = resident_bytes("self")
        if time.monotonic() - self._began < self.options.seconds / 10:
            self.watch.early_rss_bytes = self.watch.late_rss_bytes

    def _closing(self) -> bool:
        wanted = self.options.close_in
        ready = self._anywhere_fired or not self.options.faults
        return ready and self.place.balancer.phase.name == wanted and self.watch.passes > 200

    def _arm(self, index: int) -> None:
        if index == self._index:
            return
        self._index = index
        if self._armed is not None:
            self._armed.disarm()
            self._armed = None
            self._anywhere_fired = False
        if index >= 0:
            self._armed = KNOWN[self.options.faults[index]]()
            self._armed.arm(self.place)

    def _compare(self) -> None:
        self.watch.passes += 1
        self.watch.wrong_outputs += self.engine.wrong_outputs()
        self.watch.tokens_compared = self.engine.tokens_compared
        believed = self.place.balancer.in_force.placement.physical_to_logical_map
        self.watch.wrong_maps += int(not np.array_equal(believed, self.engine.map.numpy()))
        epoch = self.place.balancer.in_force.epoch
        if epoch == self._last_epoch:
            self.watch.changed_without_commit += int(not torch.equal(self._last_map, self.engine.map))
        self._last_epoch, self._last_map = epoch, self.engine.map.clone()


class ScriptedPopen(subprocess.Popen[bytes]):
    """Starts the scripted worker where the real one is asked for."""

    def __init__(self, command: list[str], **kwargs: Any) -> None:
        assert command[1:3] == ["-m", "swiftbalancer_worker"]
        super().__init__([command[0], str(SCRIPTED_WORKER), *command[3:]], **kwargs)


def script_the_worker(control: Path) -> None:
    os.environ["SCRIPTED_WORKER"] = str(control)
    vars(supervisor)["subprocess"] = SimpleNamespace(
        Popen=ScriptedPopen,
        PIPE=subprocess.PIPE,
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )


def build(options: Options, rank: int) -> Engine:
    if options.engine == "minimoe":
        return CheckedMinimoe(rank)
    size = synthetic_rank.Options(out=options.out, ranks=options.ranks)
    size.experts, size.redundant = options.experts, options.redundant
    engine = CheckedSynthetic(size, rank)
    spread = replace(engine.placement.topology, num_nodes=options.nodes)
    engine.placement = replace(engine.placement, topology=spread)
    return engine


def connect(options: Options, rank: int) -> TCPStore:
    size = int(os.environ["WORLD_SIZE"])
    store = TCPStore(options.host, store_port(), size, rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    return store


def main() -> None:
    options = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Options)
    rank = int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s r{rank} %(levelname)s %(name)s %(message)s")
    torch.set_num_threads(1)
    synthetic_rank.pattern = functools.lru_cache(maxsize=None)(synthetic_rank.pattern)
    control = Path(f"{options.out}.control")
    script_the_worker(control)
    store = connect(options, rank)
    engine = build(options, rank)
    group = GroupInfo(rank=rank, size=options.ranks, store=store, device=torch.device("cpu"))
    dist.barrier()  # the engine's own connections and threads are there now
    before = Held.now(store_port=store_port())
    balancer = attach(from_dict(options.config), engine.binding(), group)
    balancer.wait_for_worker(100.0)
    serving = Rank(options, Place(rank, balancer, control), engine)
    vars(balancer._parts.transport)["start"] = watch_moves(serving.watch, balancer)
    try:
        serving.serve()
    except (AgreementLost, RuntimeError) as error:
        serving.watch.raised = f"{type(error).__name__}: {error}"
    result = {
        "rank": rank,
        "watch": msgspec.to_builtins(serving.watch),
        "costs": msgspec.to_builtins(serving.script.costs) if serving.script is not None else [],
        "phase": balancer.phase.name,
        "votes_on": "board" if isinstance(balancer._rounds, BoardRounds) else "gloo",
        "physical_to_logical_map": engine.map.tolist(),
        "off_reason": balancer.stats.off_reason,
        "committed": balancer.stats.cycles_committed,
        "stalls": balancer.stats.stalls,
        "pauses": balancer.stats.pauses,
        "experts_moved": balancer.stats.experts_moved,
        **closed(balancer, serving.place, before),
    }
    Path(f"{options.out}.{rank}").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
