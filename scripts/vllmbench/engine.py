"""The driver of the vLLM benchmark: an engine, and what its steps took."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.vllmbench.pieces import Pieces
from scripts.vllmbench.ranks import HOOK, OwnRank, Ranks, RanksElsewhere
from scripts.vllmbench.settings import KINDS, Phase, Settings, load_settings, model_name, sub_windows
from scripts.vllmbench.weights import seed_of

WORKER_OF_ONE_GPU = "scripts.vllmbench.one_gpu.OneGpuWorker"
RECORD = ("phase", "step", "end_s", "gap_ms", "outputs", "reskewed", "core_ms")
CORE_LOOPS = 1000


def rank_main(path: Path) -> None:
    """Builds the engine, runs the phases, writes `TAG.rankN.json` for each rank that it reaches after each."""
    settings = load_settings(path)
    cores = pin(int(os.environ.get("RANK", "0")), settings.gpus) if settings.pin else []
    faulthandler.dump_traceback_later(settings.limit_s, exit=True)
    pieces = Pieces()
    if settings.pieces:
        pieces.watch()
    bench = Bench(settings, path, pieces)
    import torch

    with torch.inference_mode():
        bench.open()
        for phase in settings.phases:
            if len(cores) > 1:
                pin_main_thread(cores)
            if phase.name == "settle":
                bench.settle()
            elif phase.name == "sleep":
                bench.sleep()
            else:
                bench.run(phase)
                bench.save()
        bench.check()
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
        "distributed_executor_backend": "mp" if settings.layout == "processes" else "external_launcher",
        "enforce_eager": settings.tiny,
        "max_model_len": 4096,
        "max_num_seqs": settings.batch,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": (6 << 30) if cuda else (256 << 20),
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if settings.one_gpu:
        arguments |= {"worker_cls": WORKER_OF_ONE_GPU, "gpu_memory_utilization": 0.9 / settings.gpus}
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
    number, steps = sub_windows(settings.interval)
    options: dict[str, Any] = {
        "enable": True,
        "num_redundant_experts": settings.redundant,
        "window": {
            "sub_window_steps": steps,
            "sub_windows": min(number, 2),
            "refresh_sub_windows": 1,
            "replan_sub_windows": number,
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


def core_ms() -> float:
    """What a fixed piece of work takes of the calling thread's own time: how fast its core is just now.

    Virtual machines share cores with others, and hyperthreads make the same work take half as long again.
    """
    began, table = time.thread_time(), dict.fromkeys(range(64), 0)
    for number in range(CORE_LOOPS):
        table[number % 64] += number
    return (time.thread_time() - began) * 1e3


class Bench:
    """An engine and what its steps took: a record of `RECORD` per engine step."""

    def __init__(self, settings: Settings, path: Path, pieces: Pieces) -> None:
        from vllm import LLM, __version__

        self.settings = settings
        self._pieces = pieces
        self._first_rank = int(os.environ.get("RANK", "0"))
        self._version = __version__
        self._engine = LLM(**engine_arguments(settings)).llm_engine
        elsewhere = settings.layout == "processes"
        self._ranks: Ranks = RanksElsewhere(self._engine, path) if elsewhere else OwnRank(self._engine, settings)
        self._records: list[tuple[Any, ...]] = []
        self._tokens: dict[str, list[int]] = {}
        self._wrong_slots = [-1] * settings.gpus
        self._last_end = 0.0

    def open(self) -> None:
        """Gives every rank its weights."""
        self._say(f"vLLM {self._version}, runner {self._ranks.call('open')[0]}, mode {self.settings.mode}")

    def _say(self, text: str) -> None:
        print(f"[{self.settings.tag} rank {self._first_rank}] {text}", flush=True)

    def settle(self, *, tries: int = 150) -> None:
        """Decodes until the first cycle has been committed, so that the planner's start is not measured."""
        while self.settings.mode == "ours" and not self._ranks.call("committed")[0]:
            assert tries, "no cycle was committed"
            self.run(Phase("settle", "settle", True, 2 * self.settings.interval))
            tries -= 1

    def sleep(self) -> None:
        """Sends the engine to sleep, its weights to the host, and wakes it again."""
        began = time.monotonic()
        self._engine.sleep(level=1)
        asleep = time.monotonic()
        self._engine.wake_up()
        self._say(f"asleep after {asleep - began:.2f} s, awake after {time.monotonic() - asleep:.2f} s more")

    def run(self, phase: Phase) -> None:
        """Decodes the batch for `phase.steps` steps."""
        self._ranks.call("skew", phase.seed, 0)
        self._ranks.call("switch", phase.rebalance)
        self._add_requests(phase)
        gc.collect()
        gc.freeze()  # as vLLM's own workers do: what is there already is not searched again
        began, number, before = time.monotonic(), 0, cpu_of_threads()
        while self._engine.has_unfinished_requests():
            reskew = number > 0 and number % self.settings.interval == 0
            if reskew:
                self._ranks.call("skew", phase.seed, number)
            self._tick(phase.name, number, reskew)
            number += 1
        took = time.monotonic() - began
        used = {name: round(s - before.get(name, 0.0), 2) for name, s in cpu_of_threads().items()}
        busy = {name: s for name, s in sorted(used.items(), key=lambda item: -item[1]) if s > 0.02 * took}
        self._say(f"phase {phase.name}: {number} steps in {took:.1f} s; CPU seconds of threads: {busy}")

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
        vocabulary = self._engine.vllm_config.model_config.get_vocab_size()
        for number in range(self.settings.batch):
            prompt = torch.randint(3, vocabulary, (16,), generator=generator).tolist()
            self._engine.add_request(f"{phase.name}-{number}", {"prompt_token_ids": prompt}, sampling)

    def _tick(self, phase: str, number: int, reskewed: bool) -> None:
        outputs = self._engine.step()
        end = time.perf_counter()
        # Tuples of numbers and strings, since the garbage collector soon stops looking at those.
        self._records.append((phase, number, end, (end - self._last_end) * 1e3, len(outputs), reskewed, core_ms()))
        self._last_end = time.perf_counter()
        if self.settings.greedy:
            self._keep_tokens(outputs)

    def _keep_tokens(self, outputs: list[Any]) -> None:
        """Without a detokenizer vLLM 0.24 gives all tokens so far, whatever the output kind asked for."""
        for output in outputs:
            tokens = output.outputs[0].token_ids
            if len(tokens) == 1:
                self._tokens.setdefault(output.request_id, []).append(tokens[0])
            else:
                self._tokens[output.request_id] = tokens

    def check(self) -> None:
        """Compares every slot's weights with what its map says."""
        self._wrong_slots = self._ranks.call("wrong_slots")
        self._say(f"slots with other weights than their map says: {self._wrong_slots}")

    def save(self) -> None:
        """Writes what was measured so far, since a run may be ended by its limit."""
        for number, seen in enumerate(self._ranks.call("result")):
            result = {
                "settings": asdict(self.settings),
                "vllm": self._version,
                "records": with_hooks(self._records, seen["hooks"]),
                "outcomes": seen["outcomes"],
                "tokens": {name: list(tokens) for name, tokens in self._tokens.items()},
                "stats": seen["stats"],
                "wrong_slots": self._wrong_slots[number],
                "pieces": self._pieces.seen,
            }
            path = Path(self.settings.out, f"{self.settings.tag}.rank{self._first_rank + number}.json")
            unfinished = path.with_suffix(".part")
            unfinished.write_text(json.dumps(result))
            unfinished.replace(path)

    def shutdown(self) -> None:
        self._ranks.shutdown()


def with_hooks(records: list[tuple[Any, ...]], hooks: list[tuple[float, float, str, int]]) -> list[dict[str, Any]]:
    """Records of steps, each with what a rank's hook did between the end of the step before and its own."""
    merged: list[dict[str, Any]] = []
    at = own_step = 0
    for record in (dict(zip(RECORD, values, strict=True)) for values in records):
        calls: list[dict[str, Any]] = []
        while at < len(hooks) and hooks[at][0] <= record["end_s"]:
            calls.append(dict(zip(HOOK, hooks[at], strict=True)))
            own_step = hooks[at][3]
            at += 1
        hook_ms = sum(call["hook_ms"] for call in calls)
        kind = max((call["kind"] for call in calls), key=KINDS.index, default="idle")
        merged.append(record | {"hook_ms": hook_ms, "kind": kind, "balancer_step": own_step})
    return merged
