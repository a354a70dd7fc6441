"""Decode latency of real vLLM with expert balancing off, static, vLLM's own, and swiftbalancer's.

    python scripts/bench_vllm.py run  --mode ours --layers 48 --gpus 2 --out results
    python scripts/bench_vllm.py report results

`run` starts one process per GPU, each an in-process engine (vLLM's external launcher) on an MoE of Qwen3-30B-A3B's
geometry with seeded random weights, and decodes a fixed batch in phases. The routers are re-skewed every
`--interval` steps, so that every rebalance has work. `report` prints inter-token percentiles per class of step, host
time, steps from trigger to applied, and whether greedy tokens agree with a run that never rebalances (`static`: the
same slots and kernels, the first placement for good).

Moving an expert to another rank changes the order in which the outputs of a token's experts are added. With
`--top-k 1` nothing is added, so tokens must agree to the last bit in any precision; with more, rounding may tip
near-ties of the router.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MODES = ("off", "static", "vllm", "ours")
KINDS = ("idle", "planning", "moving", "committing")
RECORD = ("phase", "step", "gap_ms", "outputs", "reskewed", "hook_ms", "kind", "balancer_step")
EXPERTS = 128
SKIPPED_STEPS = 5
"""First steps of a phase, which mix prefill and decode."""


# -- settings -------------------------------------------------------------------------------------------------


@dataclass
class Phase:
    """`steps` decode steps; `rebalance`: whether the balancer runs. Routers are re-skewed in any case."""

    name: str
    rebalance: bool
    steps: int


@dataclass
class Settings:
    """One run; everything a rank process needs to know."""

    mode: str
    out: str
    tag: str
    gpus: int = 2
    layers: int = 48
    batch: int = 64
    redundant: int = 16
    top_k: int = 8
    interval: int = 60
    skew: float = 0.7
    dtype: str = "bfloat16"
    greedy: bool = False
    tiny: bool = False
    limit_s: int = 200
    phases: list[Phase] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure one mode")
    run.add_argument("--mode", choices=MODES, required=True)
    run.add_argument("--out", required=True, help="folder of results")
    run.add_argument("--tag", help="name of the result; default: mode and layers")
    run.add_argument("--gpus", type=int, default=2)
    run.add_argument("--layers", type=int, default=48)
    run.add_argument("--batch", type=int, default=64)
    run.add_argument("--redundant", type=int, default=16, help="redundant experts per layer")
    run.add_argument("--top-k", type=int, default=8, help="experts per token")
    run.add_argument("--interval", type=int, default=60, help="steps between rebalances and between re-skews")
    run.add_argument("--skew", type=float, default=0.7, help="sd of the log scale of each router row")
    run.add_argument("--dtype", default="bfloat16")
    run.add_argument("--greedy", action="store_true", help="temperature 0, to compare tokens between modes")
    run.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script without a GPU")
    run.add_argument("--limit-s", type=int, default=200, help="the run is ended after this many seconds")
    run.add_argument(
        "--phases", default="warm:0:60,idle:0:300,busy:1:600", help="name:rebalance(0 or 1):decode steps, ..."
    )
    run.add_argument("--options", type=json.loads, default={}, help="JSON, more swiftbalancer options")
    run.add_argument("--engine", type=json.loads, default={}, help="JSON, more arguments of vllm.LLM")
    rank = commands.add_parser("rank", help="one rank of a run (started by run)")
    rank.add_argument("settings", type=Path)
    report = commands.add_parser("report", help="print what runs measured")
    report.add_argument("out", type=Path)
    report.add_argument("--rank", type=int, default=0)
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> Settings:
    phases = [Phase(n, r == "1", int(s)) for n, r, s in (part.split(":") for part in args.phases.split(","))]
    tag = args.tag or f"{args.mode}-{args.layers}"
    names = Settings.__dataclass_fields__.keys() - {"phases", "tag"}
    return Settings(**{n: getattr(args, n) for n in names}, phases=phases, tag=tag)


def load_settings(path: Path) -> Settings:
    values = json.loads(path.read_text())
    phases = [Phase(**phase) for phase in values.pop("phases")]
    return Settings(**values, phases=phases)


# -- starting the ranks ---------------------------------------------------------------------------------------


def run(settings: Settings) -> int:
    """Starts a process per GPU and waits; returns 0 if all ended well."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / model_name(settings), settings)
    path = out / f"{settings.tag}.settings.json"
    path.write_text(json.dumps(asdict(settings)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    began = time.monotonic()
    processes = [start_rank(settings, path, rank, port) for rank in range(settings.gpus)]
    codes = [wait_for(process, began + settings.limit_s + 20) for process in processes]
    print(f"{settings.tag}: {time.monotonic() - began:.0f} s, exit codes {codes}", flush=True)
    if any(codes):
        print((out / f"{settings.tag}.rank0.log").read_text(errors="replace")[-3000:])
    return int(any(codes))


def start_rank(settings: Settings, path: Path, rank: int, port: str) -> subprocess.Popen[bytes]:
    env = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(settings.gpus),
    }
    with Path(settings.out, f"{settings.tag}.rank{rank}.log").open("wb") as log:
        command = [sys.executable, __file__, "rank", str(path)]
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def wait_for(process: subprocess.Popen[bytes], deadline: float) -> int:
    try:
        return process.wait(max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def model_name(settings: Settings) -> str:
    return f"model-{settings.layers}-top{settings.top_k}{'-tiny' if settings.tiny else ''}"


def write_model(folder: Path, settings: Settings) -> None:
    """The configuration of an MoE with the geometry of Qwen3-30B-A3B; its weights are made in each process."""
    tiny = settings.tiny
    hidden = 64 if tiny else 2048
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 512 if tiny else 151936,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": 32 if tiny else 768,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 4 if tiny else 32,
        "num_key_value_heads": 2 if tiny else 4,
        "head_dim": 32 if tiny else 128,
        "max_position_embeddings": 4096,
        "decoder_sparse_step": 1,
        "num_experts_per_tok": settings.top_k,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": settings.dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


# -- one rank -------------------------------------------------------------------------------------------------


def rank_main(path: Path) -> None:
    """Builds the engine, runs the phases, writes `TAG.rankN.json`."""
    settings = load_settings(path)
    faulthandler.dump_traceback_later(settings.limit_s, exit=True)
    bench = Bench(settings)
    import torch

    with torch.inference_mode():
        fill_weights(bench.runner.model, bench.rank, settings)
        bench.settle()
        for phase in settings.phases:
            bench.run(phase)
    bench.save()
    bench.shutdown()
    sys.stdout.flush()
    os._exit(0)  # the process groups of an in-process engine do not end in an order of their own


def engine_arguments(settings: Settings) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "model": str(Path(settings.out, model_name(settings))),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.gpus,
        "enable_expert_parallel": True,
        "distributed_executor_backend": "external_launcher",
        "enforce_eager": settings.tiny,
        "max_model_len": 4096,
        "max_num_seqs": settings.batch,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": (6 << 30) if cuda else (256 << 20),
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if cuda:
        arguments["async_scheduling"] = True
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sorted({1, 32, settings.batch})}
    return arguments | balancing_arguments(settings) | settings.engine


def balancing_arguments(settings: Settings) -> dict[str, Any]:
    if settings.mode == "off":
        return {}
    if settings.mode in ("static", "vllm"):
        return {
            "enable_eplb": True,
            "eplb_config": {
                "num_redundant_experts": settings.redundant,
                "window_size": 20,
                "step_interval": 1_000_000_000,
                "use_async": settings.mode == "vllm",
                "communicator": "torch_gloo",
            },
        }
    sub_windows = 6
    options: dict[str, Any] = {
        "enable": True,
        "num_redundant_experts": settings.redundant,
        "window": {
            "sub_window_steps": max(settings.interval // sub_windows, 1),
            "sub_windows": 2,
            "refresh_sub_windows": 1,
            "replan_sub_windows": sub_windows,
        },
        "policy": {"min_gain": 0.0},
    }
    return {"additional_config": {"swiftbalancer": options | settings.options}}


def fill_weights(model: Any, rank: int, settings: Settings) -> None:
    """Seeded weights by name and by expert, so that the replicas of an expert, and all modes, hold the same ones."""
    import torch

    for name, weight in model.named_parameters():
        generator = torch.Generator(device=weight.device)
        if name.endswith(("w13_weight", "w2_weight")):
            slots = weight.shape[0]
            for local in range(slots):
                slot = rank * slots + local
                expert = slot if slot < EXPERTS else (slot - EXPERTS) % EXPERTS
                generator.manual_seed(_seed(name) * EXPERTS + expert)
                weight.data[local].normal_(0.0, 0.05 if not settings.tiny else 0.2, generator=generator)
        elif weight.dim() >= 2:
            vocabulary = "embed_tokens" in name or "lm_head" in name
            generator.manual_seed(_seed(name) + (rank + 1 if vocabulary else 0))
            weight.data.normal_(0.0, 1.0 if "embed_tokens" in name else 0.02, generator=generator)
        else:
            weight.data.fill_(1.0)


def _seed(name: str) -> int:
    return sum((i + 1) * byte for i, byte in enumerate(name.encode())) * 1009


class Bench:
    """An engine and what its steps took: a record of `RECORD` per engine step."""

    def __init__(self, settings: Settings) -> None:
        from vllm import LLM, __version__

        self.settings = settings
        self.rank = int(os.environ["RANK"])
        self.version = __version__
        self.engine = LLM(**engine_arguments(settings)).llm_engine
        worker = self.engine.model_executor.driver_worker
        self._worker = getattr(worker, "worker", worker)
        self.runner = self._worker.model_runner
        self.state: Any = getattr(self.runner, "eplb_state", None)
        self._gates = Gates(self.runner.model, settings.skew)
        self.records: list[tuple[Any, ...]] = []
        self.outcomes: list[dict[str, Any]] = []
        self.tokens: dict[str, list[int]] = {}
        self._hook_ms = 0.0
        self._commits = 0
        self._last_end = 0.0
        self._counts = [0] * len(KINDS)
        if self.state is not None:
            self._time_hooks()
        self._say(f"vLLM {__version__}, runner {type(self.runner).__module__}, mode {settings.mode}")

    def _say(self, text: str) -> None:
        print(f"[{self.settings.tag} rank {self.rank}] {text}", flush=True)

    def _time_hooks(self) -> None:
        """Adds up the main thread's time in `EplbState.step`, and counts the layers vLLM's own loop commits."""
        import vllm.distributed.eplb.eplb_state as module

        step, commit = self.state.step, module._move_to_workspace

        def timed_step(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return step(*args, **named)
            finally:
                self._hook_ms += (time.perf_counter() - began) * 1e3

        def counted_commit(*args: Any, **named: Any) -> Any:
            self._commits += 1
            return commit(*args, **named)

        self.state.step = timed_step
        module._move_to_workspace = counted_commit

    @property
    def balancer(self) -> Any:
        attachment = getattr(self.state, "_swiftbalancer_attachment", None)
        return next(iter(attachment.models.values())).balancer if attachment is not None else None

    def settle(self, *, tries: int = 150) -> None:
        """Decodes until the first cycle has been committed, so that the planner's start is not measured."""
        if self.settings.mode != "ours":
            return
        while self.balancer is None or not self.balancer.stats.cycles_committed:
            assert tries, f"no cycle was committed: {self.balancer.stats}"
            self.run(Phase("settle", True, 2 * self.settings.interval))
            tries -= 1
        self.outcomes.clear()

    def run(self, phase: Phase) -> None:
        """Decodes the batch for `phase.steps` steps."""
        self._gates.skew(phase.name, 0)
        self._switch(phase.rebalance)
        self._add_requests(phase)
        gc.collect()
        gc.freeze()  # as vLLM's own workers do: what is there already is not searched again
        began, number = time.monotonic(), 0
        while self.engine.has_unfinished_requests():
            reskew = number > 0 and number % self.settings.interval == 0
            if reskew:
                self._gates.skew(phase.name, number)
            self._tick(phase.name, number, reskew)
            number += 1
        self._say(f"phase {phase.name}: {number} steps in {time.monotonic() - began:.1f} s")

    def _switch(self, on: bool) -> None:
        if self.settings.mode == "vllm":
            interval = self.settings.interval
            self.state.expert_rearrangement_step_interval = interval if on else 1_000_000_000
            self.state.expert_rearrangement_step = interval * 3 // 4 if on else 0
        own = self.balancer
        if own is None:
            return
        if self._cycle_ended not in own.on_cycle:
            own.on_cycle.append(self._cycle_ended)
        if on:
            own.resume()
        else:
            own.drain()

    def _cycle_ended(self, outcome: Any) -> None:
        self.outcomes.append(
            {n: getattr(outcome, n) for n in ("kind", "committed", "reason", "step", "moves", "moved_bytes")}
        )

    def _add_requests(self, phase: Phase) -> None:
        import torch
        from vllm import SamplingParams

        temperature = 0.0 if self.settings.greedy else 1.0
        sampling = SamplingParams(temperature=temperature, max_tokens=phase.steps, ignore_eos=True, detokenize=False)
        generator = torch.Generator().manual_seed(_seed(phase.name))
        vocabulary = self.engine.vllm_config.model_config.get_vocab_size()
        for number in range(self.settings.batch):
            prompt = torch.randint(3, vocabulary, (16,), generator=generator).tolist()
            self.engine.add_request(f"{phase.name}-{number}", {"prompt_token_ids": prompt}, sampling)

    def _tick(self, phase: str, number: int, reskewed: bool) -> None:
        self._hook_ms, commits = 0.0, self._commits
        outputs = self.engine.step()
        end = time.perf_counter()
        own_step = self.balancer.stats.steps if self.balancer is not None else number
        gap_ms = (end - self._last_end) * 1e3
        # Tuples of numbers and strings, since the garbage collector soon stops looking at those.
        self.records.append(
            (phase, number, gap_ms, len(outputs), reskewed, self._hook_ms, self._kind(commits), own_step)
        )
        self._last_end = end
        for output in outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)

    def _kind(self, commits_before: int) -> str:
        """What the balancer did in the step just made."""
        if self.settings.mode == "vllm":
            busy = any(state.rebalanced for state in self.state.model_states.values())
            return "committing" if self._commits > commits_before else "moving" if busy else "idle"
        if self.balancer is None:
            return "idle"
        counts = [ring.count for ring in self.balancer.stats.host_s]
        grown = [kind for kind, now, then in zip(KINDS, counts, self._counts, strict=True) if now > then]
        self._counts = counts
        return grown[-1] if grown else "idle"

    def save(self) -> None:
        result = {
            "settings": asdict(self.settings),
            "vllm": self.version,
            "records": [dict(zip(RECORD, record, strict=True)) for record in self.records],
            "outcomes": self.outcomes,
            "tokens": self.tokens if self.settings.greedy else {},
            "stats": self._stats(),
        }
        Path(self.settings.out, f"{self.settings.tag}.rank{self.rank}.json").write_text(json.dumps(result))

    def _stats(self) -> dict[str, Any]:
        own = self.balancer
        if own is None:
            return {}
        stats = own.stats
        names: tuple[str, ...] = (
            "cycles_committed",
            "cycles_dropped",
            "drop_reasons",
            "placement_updates",
            "dispatch_updates",
        )
        names += ("experts_moved", "bytes_moved", "rounds", "late_rounds", "late_round_s", "off_reason", "imbalance")
        values = {name: getattr(stats, name) for name in names}
        host = {k: [r.count, r.percentile(50), r.percentile(99)] for k, r in zip(KINDS, stats.host_s, strict=True)}
        return values | {"host_s": host, "plan_s_p50": stats.plan_s.percentile(50)}

    def shutdown(self) -> None:
        self._worker.shutdown()


class Gates:
    """The routers; `skew` gives every expert a new popularity, the same on all ranks and in all modes.

    Waiting for the device around it puts the change between the same two passes in every run.
    """

    def __init__(self, model: Any, sd: float) -> None:
        import torch

        gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        self._gates = [gate for gate in gates if gate.weight.numel()]  # vLLM on CPU repacks them out of reach
        self._base: list[Any] = []
        self._sd = sd
        self._generator = torch.Generator()

    def skew(self, phase: str, step: int) -> None:
        import torch

        self._generator.manual_seed(_seed(phase) + step)
        if not self._base:
            self._base = [gate.weight.detach().clone() for gate in self._gates]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for gate, base in zip(self._gates, self._base, strict=True):
            scale = torch.exp(self._sd * torch.randn(base.shape[0], 1, generator=self._generator))
            gate.weight.data.copy_(base * scale.to(base.device, base.dtype))
        if torch.cuda.is_available():
            torch.cuda.synchronize()


# -- report ---------------------------------------------------------------------------------------------------


def report(out: Path, rank: int) -> None:
    """Prints a Markdown table per run, then how tokens compare."""
    runs = {}
    for path in sorted(out.glob(f"*.rank{rank}.json")):
        runs[path.name.split(".rank")[0]] = json.loads(path.read_text())
    for tag, result in runs.items():
        print(f"\n### {tag} (vLLM {result['vllm']}, rank {rank})\n")
        print_latencies(result)
        print_cycles(result)
    print_tokens(runs)


def classes(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Steps that count, by class. With a scheduler that runs ahead, a step's work shows in the next step's time,
    so a step belongs to the busiest kind of itself and its predecessor."""
    groups: dict[str, list[dict[str, Any]]] = {}
    batch = result["settings"]["batch"]
    before = {"phase": "", "kind": "idle", "reskewed": False, "outputs": 0}
    for record in result["records"]:
        whole = record["outputs"] == batch == before["outputs"] and before["phase"] == record["phase"] != "settle"
        if whole and record["step"] >= SKIPPED_STEPS and not record["reskewed"] and not before["reskewed"]:
            kind = max(record["kind"], before["kind"], key=KINDS.index)
            groups.setdefault(f"{record['phase']}, all", []).append(record)
            if result["settings"]["mode"] in ("vllm", "ours"):
                groups.setdefault(f"{record['phase']}, {kind}", []).append(record)
        before = record
    return groups


def print_latencies(result: dict[str, Any]) -> None:
    print("| steps | n | p50 | p95 | p99 | max ms | hook p50 | hook p99 | hook max ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, records in classes(result).items():
        gaps = [record["gap_ms"] for record in records]
        hooks = [record["hook_ms"] for record in records]
        cells = [f"{percentile(gaps, q):.2f}" for q in (50, 95, 99, 100)]
        cells += [f"{percentile(hooks, q):.3f}" for q in (50, 99, 100)]
        print(f"| {name} | {len(records)} | {' | '.join(cells)} |")


def print_cycles(result: dict[str, Any]) -> None:
    if result["stats"]:
        print(f"\nstats: {json.dumps(result['stats'])}")
    steps = steps_to_apply(result)
    if steps:
        print(
            f"placement cycles applied: {len(steps)}; steps from trigger to applied: "
            f"p50 {percentile(steps, 50):.0f}, max {max(steps)}; moves "
            f"{[o['moves'] for o in result['outcomes'] if o['committed'] and o['kind'] == 'placement']}"
        )
    lost = [outcome["reason"] for outcome in result["outcomes"] if not outcome["committed"]]
    if lost:
        print(f"cycles lost: {lost}")


def steps_to_apply(result: dict[str, Any]) -> list[int]:
    """Steps from the end of the sub-window that asked for a placement to its last commit; rank 0 knows both.

    Before a commit come moving steps, and before those the planning steps that began at the trigger.
    """
    kinds = {record["balancer_step"]: record["kind"] for record in result["records"]}
    found = []
    for outcome in result["outcomes"]:
        if not outcome["committed"] or outcome["kind"] != "placement":
            continue
        step = outcome["step"]
        while kinds.get(step - 1, "idle") != "idle":
            step -= 1
        found.append(outcome["step"] - step)
    return found


def print_tokens(runs: dict[str, dict[str, Any]]) -> None:
    """Compares greedy runs with the static one of the same shape."""
    for tag, result in runs.items():
        base = next((other for other in runs.values() if is_base(other, result)), None)
        if base is None:
            continue
        names = [name for name in base["tokens"] if not name.startswith("settle")]
        pairs = [(result["tokens"][name], base["tokens"][name]) for name in names]
        equal = sum(a == b for a, b in pairs)
        first = min((first_difference(a, b) for a, b in pairs if a != b), default=None)
        note = "" if first is None else f"; first difference at token {first}"
        total, distinct = sum(len(b) for _, b in pairs), len({token for _, b in pairs for token in b})
        print(f"\n{tag}: {equal} of {len(pairs)} sequences equal ({total} tokens, {distinct} distinct){note}")


def is_base(other: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether `other` is the run without rebalancing to compare the greedy run `result` with."""
    same = ("layers", "dtype", "phases", "interval", "top_k", "batch", "redundant")
    alike = all(other["settings"][name] == result["settings"][name] for name in same)
    modes = other["settings"]["mode"] == "static" and result["settings"]["mode"] not in ("static", "off")
    return alike and modes and bool(other["tokens"]) and bool(result["tokens"])


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def percentile(values: list[float] | list[int], q: float) -> float:
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(q / 100 * len(ordered)))])


def main() -> int:
    args = parse(sys.argv[1:])
    if args.command == "rank":
        rank_main(args.settings)
    elif args.command == "report":
        report(args.out, args.rank)
    else:
        return run(settings_of(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
