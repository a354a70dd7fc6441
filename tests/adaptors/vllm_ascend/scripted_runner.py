"""One rank of a scripted Model Runner V1: vllm-ascend's call sequence over gloo, with its own updator or ours.

`python scripted_runner.py OPTIONS.json` with RANK, WORLD_SIZE, MASTER_PORT in the environment; writes a JSON result.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from swiftbalancer.border import GroupInfo
from swiftbalancer.config import from_dict
from swiftbalancer_adaptors.vllm_ascend.hooks import IdleProcess
from swiftbalancer_adaptors.vllm_ascend.updator import SwiftUpdator, V1Engine
from tests.adaptors.vllm_ascend import upstream
from tests.adaptors.vllm_ascend.plain_adaptor import PlainAdaptor, plain_maps
from tests.adaptors.vllm_ascend.scripted_model import ScriptedModel, Shape, adaptor_of, initial_maps, kinds_of
from tests.edges.main_thread import calls_of


class Options(msgspec.Struct):
    out: str
    root: str
    """Of vllm-ascend's source; empty: a stand-in for its adaptor."""
    ours: bool
    steps: int
    layers: int = 2
    dense_layers: int = 0
    experts: int = 8
    redundant: int = 4
    tp_size: int = 1
    quantised: bool = True
    multi_stage: bool = False
    lists_only: bool = False
    """Check the weights that are lists only."""
    expert_map_path: str | None = None
    policy: int = 2
    config: dict[str, Any] = {}
    step_s: float = 0.0
    until_moved: int = 0
    """Ends once so many slots have changed their expert, after `steps` at the latest; 0: after `steps`."""
    reload: bool = False
    """Once they have moved, the weights are loaded anew, and the same again."""


@dataclass
class Observed:
    """What a test wants to know of a run; `wrong_routes` counts experts that any rank sent to a slot of another."""

    wrong_routes: int = 0
    imbalances: list[float] = field(default_factory=list)
    changes: int = 0
    """Steps after which some rank's routes differed from those before."""
    placement: list[list[int]] = field(default_factory=list)
    routes: list[list[list[int]]] = field(default_factory=list)
    """`[layers][ranks][experts]` at the end."""
    moved: int = 0
    """Times a slot got another expert."""
    before_calls: list[str] = field(default_factory=list)
    """Everything `forward_before` has called, in C or in Python."""
    end_calls: list[str] = field(default_factory=list)
    """Everything in C that `forward_end` has called."""


class ScriptedRunner:
    """Calls the updator as `NPUModelRunner` does, around passes that count tokens where the routes send them."""

    def __init__(self, options: Options, rank: int, updator: Any) -> None:
        self.options, self.rank, self.updator = options, rank, updator
        path = Path(options.root, "vllm_ascend/eplb/adaptor/vllm_adaptor.py")
        source = path.read_text(encoding="utf-8") if options.root else ""
        self.shape = Shape(
            options.layers,
            options.dense_layers,
            options.experts,
            dist.get_world_size(),
            options.redundant,
            kinds_of(source, quantised=options.quantised),
        )
        maps = maps_at_start(options, self.shape, rank)
        self.model = ScriptedModel(self.shape, rank=rank, maps=maps, multi_stage=options.multi_stage)
        self.rng = np.random.default_rng(17)
        self.skew = np.sort(self.rng.lognormal(0, 1.2, (options.layers, options.experts)))
        self.seen = Observed()

    def eplb_warmup(self) -> None:
        adaptor = adaptor_of(self.model) if self.options.root else PlainAdaptor(self.model)
        loader = getattr(self.updator, "eplb_loader", None)
        if loader is not None:
            loader.set_adator(adaptor)
        self.updator.set_adaptor(adaptor)
        self.updator.warm_up_eplb()

    def execute(self) -> None:
        """One pass on every rank, with the calls of `execute_model` around it."""
        self.seen.before_calls = calls_of(self.updator.forward_before, self.seen.before_calls)
        if hasattr(self.updator, "take_update_info_from_eplb_process"):
            self.updator.take_update_info_from_eplb_process()
        self.forward()
        called = calls_of(self.updator.forward_end)
        in_c = {name for name in called if name.startswith("C ")}
        self.seen.end_calls = sorted(in_c | set(self.seen.end_calls))

    def forward(self) -> None:
        """Every rank has tokens of the same skew; arrivals are what all ranks' routes send here."""
        tokens = torch.from_numpy(self.rng.poisson(self.skew * 40))
        loads = torch.zeros(self.shape.layers, self.shape.ranks * self.shape.slots, dtype=torch.int64)
        routes = torch.stack([layer.log2phy for layer in self.model.experts]).to(torch.int64)
        loads.scatter_add_(1, routes, tokens)
        dist.all_reduce(loads)
        by_rank = loads.view(self.shape.layers, self.shape.ranks, -1)
        for number, layer in enumerate(self.model.experts):
            arrived = by_rank[number, self.rank]
            layer.count(arrived if number % 2 else arrived.cumsum(0), number % 2)
        totals = by_rank.sum(2).double()
        self.seen.imbalances.append(float((totals.amax(1) / totals.mean(1)).mean()))

    def check(self, before: Any) -> Any:
        """Compares the routes of all ranks with what the slots really hold; gives the routes."""
        experts, lists_only = self.shape.experts, self.options.lists_only
        held = torch.tensor([layer.held(experts, lists_only=lists_only) for layer in self.model.experts])
        mine = torch.stack([layer.log2phy.to(torch.int64) for layer in self.model.experts])
        everyones = [torch.empty_like(held) for _ in range(self.shape.ranks)]
        dist.all_gather(everyones, held)
        routes = [torch.empty_like(mine) for _ in range(self.shape.ranks)]
        dist.all_gather(routes, mine)
        slots = torch.cat(everyones, dim=1)
        for route in routes:
            self.seen.wrong_routes += int((slots.gather(1, route) != torch.arange(experts)).sum())
        now = [route.tolist() for route in routes]
        if before is not None:
            self.seen.changes += int(now != before[0])
            self.seen.moved += int((slots != torch.tensor(before[1])).sum())
        self.seen.placement = slots.tolist()
        self.seen.routes = [[now[rank][layer] for rank in range(self.shape.ranks)] for layer in range(len(now[0]))]
        return now, slots.tolist()


def maps_at_start(options: Options, shape: Shape, rank: int) -> Any:
    if not options.root:
        return plain_maps(shape, rank, tp_size=options.tp_size)
    return initial_maps(shape, rank, expert_map_path=options.expert_map_path, tp_size=options.tp_size)


def our_updator(options: Options, rank: int, store: TCPStore) -> SwiftUpdator:
    group = partial(_group, rank=rank, store=store)
    engine = V1Engine(
        config=from_dict(options.config),
        model="scripted",
        tp_size=options.tp_size,
        num_nodes=lambda: 1,
        group=group,
        gathers_tokens=lambda: False,
    )
    process = IdleProcess(shared_dict={})
    return SwiftUpdator(engine, SimpleNamespace(), None, process, process._launch_process())


def _group(device: torch.device, name: str, *, rank: int, store: TCPStore) -> GroupInfo:
    return GroupInfo(rank=rank, size=dist.get_world_size(), store=store, device=device, prefix=f"scripted/{name}")


def their_updator(options: Options) -> Any:
    """Built as `NPUModelRunner.__init__` builds it: 10 passes to count, 20 to plan, one per layer to move."""
    process_module = importlib.import_module("vllm_ascend.eplb.core.eplb_worker")
    loader = importlib.import_module("vllm_ascend.eplb.core.eplb_device_transfer_loader").D2DExpertWeightLoader()
    config = SimpleNamespace(
        expert_map_path=options.expert_map_path,
        expert_map_record_path=None,
        eplb_policy_type=options.policy,
        expert_heat_collection_interval=10,
        algorithm_execution_interval=20,
        num_iterations_eplb_update=10,
        num_wait_worker_iterations=20,
        gate_eplb=False,
    )
    named = (
        {"tp_size": options.tp_size} if "tp_size" in process_module.EplbProcess.__init__.__code__.co_varnames else {}
    )
    shared = _shared_dict()
    process = process_module.EplbProcess(shared_dict=shared, policy_type=options.policy, enable_d2d=True, **named)
    launched = process._launch_process()
    return importlib.import_module("vllm_ascend.eplb.eplb_updator").EplbUpdator(config, loader, process, launched)


def _shared_dict() -> Any:
    from multiprocessing import Manager

    return Manager().dict({"expert_map": None, "moe_load": None, "expert_maps": None})


def serve(runner: ScriptedRunner) -> None:
    updator, seen = runner.updator, runner.seen
    runner.eplb_warmup()
    for _ in range(3):
        runner.execute()
    if runner.options.ours:
        assert updator.balancer is not None
        assert updator.balancer.stats.steps == 0, "warm-up passes were balanced"
        updator.balancer.wait_for_worker(120.0)
        updator.begin_serving()
    seen.imbalances.clear()
    play(runner)
    if runner.options.reload:
        assert seen.moved, "nothing had moved before the reload"
        seen.moved = 0
        reload(runner)
        updator.balancer.wait_for_worker(120.0)
        play(runner)


def play(runner: ScriptedRunner) -> None:
    """Passes in lockstep, checked one by one. What ends it is known to every rank alike."""
    options = runner.options
    state = runner.check(None)
    for _ in range(options.steps):
        dist.barrier()
        runner.execute()
        state = runner.check(state)
        time.sleep(options.step_s)
        if options.until_moved and runner.seen.moved >= options.until_moved:
            break


def reload(runner: ScriptedRunner) -> None:
    """The loader writes every initial slot, as after sleep level 2."""
    maps = maps_at_start(runner.options, runner.shape, runner.rank)
    fresh = ScriptedModel(runner.shape, rank=runner.rank, maps=maps, multi_stage=False)
    for old, new in zip(runner.model.experts, fresh.experts, strict=True):
        for name, _, _ in old.kinds:
            for target, source in zip(getattr(old, name), getattr(new, name), strict=True):
                target.copy_(source)
    runner.updator.weights_reloaded()


def main() -> None:
    options = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Options)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    logging.basicConfig(level=logging.INFO, format=f"r{rank} %(levelname)s %(name)s %(message)s")
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), size, rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    if options.root:
        upstream.prepare(Path(options.root))
    updator = our_updator(options, rank, store) if options.ours else their_updator(options)
    runner = ScriptedRunner(options, rank, updator)
    with torch.inference_mode():
        serve(runner)
    dist.barrier()
    updator.shutdown()
    Path(f"{options.out}.{rank}").write_text(json.dumps(asdict(runner.seen)))


if __name__ == "__main__":
    main()
