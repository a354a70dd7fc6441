"""One rank of the vLLM benchmark: an in-process engine, its weights, and what its steps took."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.vllmbench.settings import KINDS, Phase, Settings, load_settings, model_name
from scripts.vllmbench.weights import Gates, count_wrong_slots, fill_weights, seed_of

RECORD = ("phase", "step", "gap_ms", "outputs", "reskewed", "hook_ms", "kind", "balancer_step")
STATS: tuple[str, ...] = (
    "cycles_committed",
    "cycles_dropped",
    "drop_reasons",
    "placement_updates",
    "dispatch_updates",
)
STATS += ("experts_moved", "bytes_moved", "rounds", "late_rounds", "late_round_s", "off_reason", "imbalance")


def rank_main(path: Path) -> None:
    """Builds the engine, runs the phases, writes `TAG.rankN.json`."""
    settings = load_settings(path)
    cores = pin(int(os.environ["RANK"]), settings.gpus) if settings.pin else []
    faulthandler.dump_traceback_later(settings.limit_s, exit=True)
    bench = Bench(settings)
    import torch

    with torch.inference_mode():
        fill_weights(bench.runner.model, bench.rank, settings)
        for phase in settings.phases:
            if len(cores) > 1:
                pin_main_thread(cores)
            if phase.name == "settle":
                bench.settle()
            elif phase.name == "sleep":
                bench.sleep()
            else:
                bench.run(phase)
        bench.check_slots()
    bench.save()
    bench.shutdown()
    sys.stdout.flush()
    os._exit(0)  # the process groups of an in-process engine do not end in an order of their own


def pin(rank: int, ranks: int) -> list[int]:
    """Keeps this process to its share of the cores, which it gives, so that ranks do not disturb each other."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks
    own = cores[rank * share : (rank + 1) * share]
    os.sched_setaffinity(0, own)
    return own


def pin_main_thread(cores: list[int]) -> None:
    """Gives the calling thread the first of `cores`, and those there are now the others.

    Where steps are bound by the host, what else runs on its core decides how long they take.
    """
    main = threading.get_native_id()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(task.name), cores[:1] if int(task.name) == main else cores[1:])


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


def cpu_of_threads() -> dict[str, float]:
    """CPU seconds so far of this process's threads, by name and id; Python's names where it knows the thread."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    seconds: dict[str, float] = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            name, _, fields = (task / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has just ended
            continue
        user, system = fields.split()[11:13]
        label = f"{names.get(int(task.name), name)}/{task.name}"
        seconds[label] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return seconds


class Timed:
    """A function that adds up its calls and the time they take."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.calls = 0
        self.total_ms = 0.0

    def __call__(self, *args: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._function(*args, **named)
        finally:
            self.calls += 1
            self.total_ms += (time.perf_counter() - began) * 1e3


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
        self.wrong_slots = -1
        self.tokens: dict[str, list[int]] = {}
        self._steps = self._moves = Timed(print)
        self._last_end = 0.0
        self._seen_steps = 0
        if self.state is not None:
            self._time_hooks()
        self._say(f"vLLM {__version__}, runner {type(self.runner).__module__}, mode {settings.mode}")

    def _say(self, text: str) -> None:
        print(f"[{self.settings.tag} rank {self.rank}] {text}", flush=True)

    def _time_hooks(self) -> None:
        """Watches `EplbState.step`, and the layers that vLLM's own loop commits."""
        import vllm.distributed.eplb.eplb_state as module

        self.state.step = self._steps = Timed(self.state.step)
        module._move_to_workspace = self._moves = Timed(module._move_to_workspace)

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
            self.run(Phase("settle", "settle", True, 2 * self.settings.interval))
            tries -= 1

    def sleep(self) -> None:
        """Sends the engine to sleep, its weights to the host, and wakes it again."""
        began = time.monotonic()
        self.engine.sleep(level=1)
        asleep = time.monotonic()
        self.engine.wake_up()
        self._say(f"asleep after {asleep - began:.2f} s, awake after {time.monotonic() - asleep:.2f} s more")

    def check_slots(self) -> None:
        """Counts local slots whose weights are not those of the expert that vLLM's map says they hold."""
        if self.state is None:
            return
        if self.balancer is not None:
            self.balancer.drain()
        model_state = next(iter(self.state.model_states.values()))
        experts = model_state.physical_to_logical_map.cpu()
        self.wrong_slots = count_wrong_slots(self.runner.model, self.rank, experts, self.settings)
        self._say(f"slots with other weights than their map says: {self.wrong_slots}")

    def run(self, phase: Phase) -> None:
        """Decodes the batch for `phase.steps` steps."""
        self._gates.skew(phase.seed, 0)
        self._switch(phase.rebalance)
        self._add_requests(phase)
        gc.collect()
        gc.freeze()  # as vLLM's own workers do: what is there already is not searched again
        began, number, before = time.monotonic(), 0, cpu_of_threads()
        while self.engine.has_unfinished_requests():
            reskew = number > 0 and number % self.settings.interval == 0
            if reskew:
                self._gates.skew(phase.seed, number)
            self._tick(phase.name, number, reskew)
            number += 1
        took = time.monotonic() - began
        used = {name: round(s - before.get(name, 0.0), 2) for name, s in cpu_of_threads().items()}
        busy = {name: s for name, s in sorted(used.items(), key=lambda item: -item[1]) if s > 0.02 * took}
        self._say(f"phase {phase.name}: {number} steps in {took:.1f} s; CPU seconds of threads: {busy}")

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
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0 if self.settings.greedy else 1.0,
            max_tokens=phase.steps,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        generator = torch.Generator().manual_seed(seed_of(phase.seed))
        vocabulary = self.engine.vllm_config.model_config.get_vocab_size()
        for number in range(self.settings.batch):
            prompt = torch.randint(3, vocabulary, (16,), generator=generator).tolist()
            self.engine.add_request(f"{phase.name}-{number}", {"prompt_token_ids": prompt}, sampling)

    def _tick(self, phase: str, number: int, reskewed: bool) -> None:
        hook_ms, moves = self._steps.total_ms, self._moves.calls
        outputs = self.engine.step()
        end = time.perf_counter()
        hook_ms, kind = self._steps.total_ms - hook_ms, self._kind(self._moves.calls > moves)
        own_step = self.balancer.steps if self.balancer is not None else number
        gap_ms = (end - self._last_end) * 1e3
        # Tuples of numbers and strings, since the garbage collector soon stops looking at those.
        self.records.append((phase, number, gap_ms, len(outputs), reskewed, hook_ms, kind, own_step))
        self._last_end = end
        if self.settings.greedy:
            self._keep_tokens(outputs)

    def _keep_tokens(self, outputs: list[Any]) -> None:
        """Without a detokenizer vLLM 0.24 gives all tokens so far, whatever the output kind asked for."""
        for output in outputs:
            tokens = output.outputs[0].token_ids
            if len(tokens) == 1:
                self.tokens.setdefault(output.request_id, []).append(tokens[0])
            else:
                self.tokens[output.request_id] = tokens

    def _kind(self, committed: bool) -> str:
        """What the balancer did in the step just made."""
        if self.settings.mode == "vllm":
            busy = any(state.rebalanced for state in self.state.model_states.values())
            return "committing" if committed else "moving" if busy else "idle"
        if self.balancer is None:
            return "idle"
        called = self.balancer.steps > self._seen_steps
        self._seen_steps = self.balancer.steps
        return KINDS[self.balancer.step_kind] if called else "idle"

    def save(self) -> None:
        result = {
            "settings": asdict(self.settings),
            "vllm": self.version,
            "records": [dict(zip(RECORD, record, strict=True)) for record in self.records],
            "outcomes": self.outcomes,
            "tokens": {name: list(tokens) for name, tokens in self.tokens.items()},
            "stats": self._stats(),
            "wrong_slots": self.wrong_slots,
        }
        Path(self.settings.out, f"{self.settings.tag}.rank{self.rank}.json").write_text(json.dumps(result))

    def _stats(self) -> dict[str, Any]:
        own = self.balancer
        if own is None:
            return {}
        stats = own.stats
        values = {name: getattr(stats, name) for name in STATS}
        host = {k: [r.count, r.percentile(50), r.percentile(99)] for k, r in zip(KINDS, stats.host_s, strict=True)}
        rounds = [stats.round_s.count, stats.round_s.percentile(50), stats.round_s.percentile(99)]
        return values | {"host_s": host, "round_s": rounds, "plan_s_p50": stats.plan_s.percentile(50)}

    def shutdown(self) -> None:
        self._worker.shutdown()
