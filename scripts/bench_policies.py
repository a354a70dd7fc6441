"""Compares placement policies on drifting loads: `python -m scripts.bench_policies --help`.

Every policy re-plans after each window from the placement it has. Peers split tokens evenly, as their engines do;
ours also renews its dispatch tables every sub-window from those before. Nothing is judged on loads it has seen,
except in the columns `fit` and `bound`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402

from scripts.load_streams import SHAPES, STREAMS, FloatArray, Length, Shape  # noqa: E402
from scripts.peer_policies import Peer, ascend, deepseek, sglang, vllm_default  # noqa: E402
from swiftbalancer.dispatch import DispatchForm  # noqa: E402
from swiftbalancer.placement import Placement  # noqa: E402
from swiftbalancer.topology import Topology  # noqa: E402
from swiftbalancer_worker.cost import CostModel  # noqa: E402
from swiftbalancer_worker.planner import PlanInput, PlanLimits, Planner  # noqa: E402
from swiftbalancer_worker.solver import loads_of_fractions, slowest_over_ideal, slowest_time, solve  # noqa: E402

EXACT = DispatchForm("exact")
READ_S = 1e-5
"""Of one expert's weights, with `--decode`."""
PEER_SOURCES = {
    "vllm": "folder vllm/distributed/eplb/policy",
    "sglang": "folder sglang/srt/eplb/eplb_algorithms",
    "deepseek": "file eplb.py",
    "ascend": "folder vllm_ascend/eplb/core/policy",
}


@dataclass(frozen=True, slots=True)
class Score:
    """Means over windows. Imbalances are max/mean rank load, mean over layers.

    `fit`: on the window planned for; `next`, `next4`: on the sum of the next and the fourth next window; `live`: on
    every sub-window of the next one; `spread`: standard deviation of `live` over seeds; `worst`: live, worst layer;
    `bound`: best possible split of the next window on that placement. `us`: microseconds per layer and step, live, of
    the slowest rank by the cost model. `moves`: experts that change rank, per layer; `cross`: of them, to another
    node. `plan_kib`: size of a plan.
    """

    policy: str
    fit: float
    next: float
    next4: float
    live: float
    spread: float
    worst: float
    bound: float
    us: float
    moves: float
    cross: float
    plan_ms: float
    refresh_ms: float
    plan_kib: float


@dataclass(frozen=True, slots=True)
class Case:
    """A stream of loads on a topology."""

    name: str
    shape: Shape
    loads: FloatArray
    first: int = 0
    """The first window after which plans are scored."""
    cost: CostModel = field(default_factory=CostModel)

    @property
    def topology(self) -> Topology:
        return Topology(self.shape.ranks, self.shape.slots // self.shape.ranks, num_nodes=self.shape.nodes)


class Ours:
    """Our planner as the worker runs it: placements per window, dispatch per sub-window; `cost`: what it believes."""

    def __init__(
        self, case: Case, cost: CostModel, *, form: DispatchForm, limits: PlanLimits, policy: str = "swift"
    ) -> None:
        self.case, self.cost, self.form, self.limits = case, cost, form, limits
        self.planner, self.plan_kib = Planner("swift"), 0.0
        first = replace(limits, max_moves_per_layer=None, staging_experts=10**6, gated=False)
        initial = Placement.initial(case.topology, case.shape.experts, num_layers=case.shape.layers)
        plan = self.planner.plan(PlanInput(initial, case.loads[0], form, epoch=0, limits=first, cost=cost)).plan
        self.placement = plan.target(initial)
        self.planner = Planner(policy)
        self.planner.plan(PlanInput(self.placement, case.loads[0], form, epoch=0, limits=limits))

    def replan(self, window: FloatArray) -> None:
        given = PlanInput(self.placement, window, self.form, epoch=0, limits=self.limits, cost=self.cost)
        plan = self.planner.plan(given).plan
        self.placement = plan.target(self.placement)
        self.plan_kib = (plan.rows.nbytes + plan.moves.nbytes + plan.table.nbytes) / 1024

    def fractions(self, seen: FloatArray) -> FloatArray:
        given = PlanInput(self.placement, seen, self.form, epoch=0, cost=self.cost)
        return self.planner.refresh_dispatch(given).fractions


class Theirs:
    """A peer: places per window, splits evenly."""

    plan_kib = 0.0

    def __init__(self, case: Case, peer: Peer) -> None:
        self.case, self.peer = case, peer
        initial = Placement.initial(case.topology, case.shape.experts, num_layers=case.shape.layers)
        self.placement = initial
        self.replan(case.loads[0])

    def replan(self, window: FloatArray) -> None:
        rows = self.peer(window, self.placement.physical_to_logical_map.astype(np.int64))
        self.placement = Placement(self.case.topology, self.case.shape.experts, rows.astype(np.int32))

    def fractions(self, seen: FloatArray) -> FloatArray:  # noqa: ARG002
        count = self.placement.logical_replica_count()
        even: FloatArray = 1.0 / np.take_along_axis(count, self.placement.physical_to_logical_map.astype(np.int64), 1)
        return even


def score(name: str, contestant: Ours | Theirs, case: Case, *, history: int) -> Score:
    """Replays the stream."""
    windows, per_window = case.loads.shape[:2]
    flat = case.loads.reshape(-1, *case.loads.shape[2:])
    sums = case.loads.sum(1)
    rows = []
    for now in range(case.first, windows - 4):
        before = contestant.placement
        started = time.process_time()
        contestant.replan(case.loads[now])
        plan_ms = (time.process_time() - started) * 1e3
        placement = contestant.placement
        at_plan = contestant.fractions(flat[: (now + 1) * per_window][-history:])
        live, us, refresh_ms = [], [], 0.0
        for step in range((now + 1) * per_window, (now + 2) * per_window):
            started = time.process_time()
            fractions = contestant.fractions(flat[max(0, step - history) : step])
            refresh_ms += (time.process_time() - started) * 1e3 / per_window
            live.append(judged(placement, fractions, flat[step]))
            us.append(step_us(placement, fractions, flat[step], case.cost))
        best = solve(placement, sums[now + 1], EXACT)
        bound = slowest_over_ideal(placement, best.rank_loads(sums[now + 1])).mean()
        judgements = [judged(placement, at_plan, sums[now + ahead]).mean() for ahead in (0, 1, 4)]
        refresh_ms = refresh_ms if isinstance(contestant, Ours) else 0.0
        rows.append(
            (
                *(*judgements, np.mean(live), 0.0, np.mean(live, 0).max(), bound, np.mean(us)),
                *(*moves_between(before, placement), plan_ms, refresh_ms, contestant.plan_kib),
            )
        )
    return Score(name, *(float(value) for value in np.mean(rows, 0)))


def mean_of(scores: list[Score]) -> Score:
    """One policy's scores with several seeds as one."""
    values = np.array([[getattr(found, column.name) for column in fields(Score)[1:]] for found in scores])
    mean = dict(zip((column.name for column in fields(Score)[1:]), values.mean(0).tolist(), strict=True))
    mean["spread"] = float(np.std([found.live for found in scores]))
    digits = {"us": 1, "moves": 2, "cross": 2, "plan_ms": 1, "refresh_ms": 1, "plan_kib": 0}
    return Score(scores[0].policy, **{key: round(value, digits.get(key, 4)) for key, value in mean.items()})


def step_us(placement: Placement, fractions: FloatArray, loads: FloatArray, cost: CostModel) -> float:
    """Microseconds the slowest rank needs for a step, mean over layers, if `loads` are split by `fractions`."""
    tokens = float(slowest_time(placement, fractions, loads, cost).mean())
    return tokens * cost.seconds_per_token / cost.steps_per_sub_window * 1e6


def judged(placement: Placement, fractions: FloatArray, loads: FloatArray) -> FloatArray:
    """`[layers]` float64, max/mean rank load if `loads` are split by `fractions`."""
    return slowest_over_ideal(placement, loads_of_fractions(placement, fractions, loads))


def moves_between(old: Placement, new: Placement) -> tuple[float, float]:
    """Experts per layer that a rank, and that a node, has to fetch."""
    before, after = old.replicas_on_ranks() > 0, new.replicas_on_ranks() > 0
    shape = (old.num_layers, old.topology.num_nodes, -1, old.num_experts)
    on_node = before.reshape(shape).any(2, keepdims=True)
    fetched = (after & ~before).reshape(shape)
    return fetched.sum() / old.num_layers, (fetched & ~on_node).sum() / old.num_layers


def contestants(case: Case, options: argparse.Namespace) -> Iterator[tuple[str, Ours | Theirs]]:
    """Ours in the asked settings, then every peer whose code was given."""
    for budget in options.budgets:
        limits = PlanLimits(max_moves_per_layer=budget, staging_experts=options.staging)
        for width in options.widths:
            form = EXACT if width == 0 else DispatchForm("table", width)
            name = f"swift budget {budget} {'exact' if width == 0 else f'width {width}'}"
            yield name, Ours(case, case.cost, form=form, limits=limits)
            if case.cost.tokens_per_activation:
                tokens_only = replace(case.cost, tokens_per_activation=0.0)
                yield f"{name}, tokens only", Ours(case, tokens_only, form=form, limits=limits)
    if options.static:
        limits = PlanLimits(staging_experts=options.staging)
        yield "swift static log2phy", Ours(case, case.cost, form=DispatchForm("static"), limits=limits)
        yield "swift uniform", Ours(case, case.cost, form=DispatchForm("uniform"), limits=limits)
    if options.greedy:
        room = 10**6
        for name, limits in (
            ("no limits", PlanLimits(max_moves_per_layer=None, staging_experts=room, gated=False)),
            ("gated", PlanLimits(max_moves_per_layer=None, staging_experts=room)),
            ("same limits", PlanLimits(staging_experts=options.staging)),
        ):
            even = DispatchForm("uniform")
            yield f"greedy uniform, {name}", Ours(case, case.cost, form=even, limits=limits, policy="greedy")
    yield from peers(case, options)


def peers(case: Case, options: argparse.Namespace) -> Iterator[tuple[str, Theirs]]:
    """Every peer whose code was given."""
    shape = case.shape
    if options.vllm:
        yield "vLLM default, global", Theirs(case, vllm_default(options.vllm, shape, 1))
        if shape.nodes > 1:
            yield "vLLM default, hierarchical", Theirs(case, vllm_default(options.vllm, shape, shape.nodes))
    if options.sglang:
        for name in ("deepseek", "deepseek_vec"):
            yield f"SGLang {name}", Theirs(case, sglang(options.sglang, shape, name))
    if options.deepseek:
        yield "DeepSeek EPLB", Theirs(case, deepseek(options.deepseek, shape))
    if options.ascend:
        for name in ("swift", "flashlb"):
            yield f"vllm-ascend {name}", Theirs(case, ascend(options.ascend, shape, name))


def cases(options: argparse.Namespace) -> Iterator[list[Case]]:
    """The asked generated streams, one case per seed, then the asked traces.

    Traces hold a sample of the tokens of a service, so the gate cannot weigh time saved against transfers there:
    these are taken as free, and only the statistical part of the gate works.
    """
    for name in options.shapes:
        for kind in options.streams:
            yield [made_case(name, kind, seed, options) for seed in options.seeds]
    for path in options.traces:
        steps = np.load(path).astype(np.float64)
        per_window = max(1, min(8, len(steps) // 6))
        windows = len(steps) // per_window
        if windows < 6:
            raise SystemExit(f"{path}: {len(steps)} steps make {windows} windows, 6 are needed")
        loads = steps[: windows * per_window].reshape(windows, per_window, *steps.shape[1:])
        layers, experts = steps.shape[1:]
        shape = Shape(layers=layers, experts=experts, ranks=8, slots=experts + 8)
        yield [Case(f"{path.stem} ep8", shape, loads, cost=CostModel(inflation=0.0))]


def made_case(name: str, kind: str, seed: int, options: argparse.Namespace) -> Case:
    """A generated stream. With `--decode`, that many tokens per rank and step, and reads of weights cost time."""
    shape, cost, label = SHAPES[name], CostModel(), f"{name} {kind}"
    if options.flat:
        shape, label = replace(shape, nodes=1), f"{label} flat"
    if options.decode:
        cost = replace(cost, tokens_per_activation=READ_S / cost.seconds_per_token, steps_per_sub_window=256.0)
        shape = replace(shape, tokens=options.decode * shape.ranks * 256)
        label += f" decode {options.decode}"
    length = Length(windows=options.windows, drift=options.drift, seed=seed, shift=options.shift)
    return Case(label, shape, STREAMS[kind](shape, length), first=1 if options.shift else 0, cost=cost)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["r1-ep32"], choices=sorted(SHAPES))
    parser.add_argument("--streams", nargs="*", default=["domains"], choices=sorted(STREAMS))
    parser.add_argument("--traces", nargs="*", type=Path, default=[], help="NAME.npy, [steps, layers, experts]")
    parser.add_argument("--windows", type=int, default=13)
    parser.add_argument("--drift", type=float, default=0.5, help="walk of a domain's log weight per window")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1])
    parser.add_argument("--decode", type=int, default=0, help="tokens per rank and step of a decode; 0: prefill")
    parser.add_argument(
        "--shift", action="store_true", help="one mixture in window 0, another afterwards; scored from window 1"
    )
    parser.add_argument("--history", type=int, default=16, help="sub-windows a dispatch refresh sees")
    parser.add_argument("--budgets", nargs="*", type=int, default=[8], help="moves per layer and plan")
    parser.add_argument("--widths", nargs="*", type=int, default=[0], help="table columns; 0: exact fractions")
    parser.add_argument("--staging", type=int, default=2)
    parser.add_argument("--flat", action="store_true", help="all ranks on one node")
    parser.add_argument("--static", action="store_true", help="also static maps and even splits")
    parser.add_argument("--greedy", action="store_true", help="also our code for DeepSeek's algorithm, even splits")
    for name, what in PEER_SOURCES.items():
        place = os.environ.get(f"SWIFTBALANCER_PEER_{name.upper()}")
        parser.add_argument(
            f"--{name}", type=Path, default=place, help=f"{what}; else $SWIFTBALANCER_PEER_{name.upper()}"
        )
    parser.add_argument("--json", type=Path, help="also write the scores there")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    table = []
    columns = [column.name.replace("_", " ") for column in fields(Score)]
    for seeded in cases(options):
        print(f"\n## {seeded[0].name}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for same in zip(*(contestants(case, options) for case in seeded), strict=True):
            scores = [
                score(name, contestant, case, history=options.history)
                for (name, contestant), case in zip(same, seeded, strict=True)
            ]
            found = asdict(mean_of(scores))
            table.append({"case": seeded[0].name, **found})
            print("| " + " | ".join(str(value) for value in found.values()) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
