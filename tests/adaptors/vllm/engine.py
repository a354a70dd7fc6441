"""One rank of a real vLLM engine, run as a process: `engine.py JOB.json OUT`; see `Job`.

The engine lives in this process (vLLM's external launcher), so the job can look into it and force things.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STATS = (
    "steps",
    "windows",
    "cycles_committed",
    "cycles_dropped",
    "drop_reasons",
    "experts_moved",
    "placement_updates",
    "dispatch_updates",
    "requests_failed",
    "off_reason",
    "imbalance",
)


@dataclass
class Job:
    """What to serve and what to do meanwhile."""

    model: str
    additional: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    num_prompts: int = 6
    max_tokens: int = 64
    rounds: int = 1
    wait_for_cycles: int = 0
    """Serve until so many cycles were committed before the rounds that count begin."""
    script: str = ""
    """Name of a function of `SCRIPTS`, called with the engine after every round."""
    every_part: bool = False
    """Wait for, and report, every balanced model of every worker, also of workers in processes of their own."""


@dataclass
class Result:
    """What one rank saw."""

    tokens: list[list[list[int]]] = field(default_factory=list)
    """Per round and prompt."""
    drafts: list[list[list[list[int]]]] = field(default_factory=list)
    """Per round and pass: what the draft model proposed, `[requests, drafted tokens]`."""
    attached: bool = False
    placement: list[list[int]] = field(default_factory=list)
    maps_match: bool = False
    """Whether vLLM's three maps hold what swiftbalancer says is in force, up to this rank's order of columns."""
    stats: dict[str, Any] = field(default_factory=dict)
    uneven_rows: int = 0
    """Rows of the dispatch table in force whose slots stand in different numbers of columns."""
    parts: list[list[dict[str, Any]]] = field(default_factory=list)
    """With `Job.every_part`: what `Probe.parts` says, per worker."""
    notes: dict[str, Any] = field(default_factory=dict)
    vllm_version: str = ""


def prompts(count: int) -> list[dict[str, list[int]]]:
    """Token prompts of different lengths, the same in every run."""
    return [{"prompt_token_ids": [(i * 37 + j * 11) % 500 for j in range(6 + 3 * i)]} for i in range(count)]


def main(job_path: str, out_path: str) -> None:
    from vllm import LLM, SamplingParams, __version__

    job = Job(**json.loads(Path(job_path).read_text()))
    result = Result(vllm_version=__version__)
    llm = LLM(**_engine_arguments(job))
    sampling = SamplingParams(temperature=0.0, max_tokens=job.max_tokens, ignore_eos=True)
    if job.every_part:
        wait_for_parts(llm, job.wait_for_cycles)
    else:
        wait_for_cycles(llm, job.wait_for_cycles)
    drafts = recorded_drafts(llm) if "speculative_config" in job.engine else []
    for number in range(job.rounds):
        first = len(drafts)
        outputs = llm.generate(prompts(job.num_prompts), sampling, use_tqdm=False)
        result.tokens.append([list(o.outputs[0].token_ids) for o in outputs])
        result.drafts.append(drafts[first:])
        if job.script:
            SCRIPTS[job.script](llm, number, result)
    if job.every_part:
        result.parts = llm.collective_rpc("parts")
    else:
        _inspect(llm, result)
    Path(out_path).write_text(json.dumps(asdict(result)))
    llm.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads outlive an orderly exit of two in-process engines


def wait_for_cycles(llm: Any, count: int, *, tries: int = 600) -> None:
    """Serves short requests until `count` cycles in all were committed: the same passes on every rank."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    while tries and (count and (balancer(llm) is None or balancer(llm).stats.cycles_committed < count)):
        llm.generate(prompts(2), sampling, use_tqdm=False)
        time.sleep(0.1)
        tries -= 1


def wait_for_parts(llm: Any, count: int, *, tries: int = 600) -> None:
    """The same until every balancer of every worker this process can ask has committed `count` cycles."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    while tries and count and any(done < count for worker in llm.collective_rpc("committed") for done in worker):
        llm.generate(prompts(2), sampling, use_tqdm=False)
        time.sleep(0.1)
        tries -= 1


def recorded_drafts(llm: Any) -> list[list[list[int]]]:
    """A list that grows by one entry with each pass of the draft model."""
    drafter, seen = worker_of(llm).model_runner.drafter, []
    propose = drafter.propose

    def recording(*args: Any, **named: Any) -> Any:
        proposed = propose(*args, **named)
        seen.append(proposed.tolist())
        return proposed

    drafter.propose = recording
    return seen


class Probe:
    """What every worker can be asked: vLLM mixes this class into its own worker's."""

    model_runner: Any

    def _attachment(self) -> Any:
        return getattr(getattr(self.model_runner, "eplb_state", None), "_swiftbalancer_attachment", None)

    def committed(self) -> list[int]:
        """Cycles committed by each balancer of this worker."""
        attached = self._attachment()
        models = [] if attached is None else attached.models.values()
        return [0 if model.balancer is None else model.balancer.stats.cycles_committed for model in models]

    def parts(self) -> list[dict[str, Any]]:
        """Each balanced model: its label, its ranks, its planning processes, and what `_seen` says."""
        from vllm.distributed.parallel_state import get_eplb_group

        attached, state = self._attachment(), self.model_runner.eplb_state
        return [
            {
                "label": model.part.label,
                "ranks": list(get_eplb_group().ranks),
                "workers": _workers(os.getpid()),
                **_seen(state.model_states[key], model.balancer),
            }
            for key, model in (attached.models if attached is not None else {}).items()
        ]


def _engine_arguments(job: Job) -> dict[str, Any]:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    arguments: dict[str, Any] = {
        "model": job.model,
        "dtype": "float32",
        "tensor_parallel_size": size,
        "enable_expert_parallel": size > 1,
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "seed": 0,
        "distributed_executor_backend": "external_launcher" if size > 1 else None,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "additional_config": job.additional,
        "skip_tokenizer_init": True,
    }
    if job.every_part:
        arguments["worker_extension_cls"] = "engine.Probe"
    return arguments | job.engine


def worker_of(llm: Any) -> Any:
    worker = llm.llm_engine.model_executor.driver_worker
    return getattr(worker, "worker", worker)


def attachment(llm: Any) -> Any:
    """What swiftbalancer added to the engine; None without the flag."""
    return getattr(getattr(worker_of(llm).model_runner, "eplb_state", None), "_swiftbalancer_attachment", None)


def balancer(llm: Any) -> Any:
    """The balancer of the served model; None before it was built."""
    attached = attachment(llm)
    return next(iter(attached.models.values())).balancer if attached is not None else None


def _inspect(llm: Any, result: Result) -> None:
    own = balancer(llm)
    result.attached = own is not None
    if own is None:
        return
    state = next(iter(worker_of(llm).model_runner.eplb_state.model_states.values()))
    for name, value in _seen(state, own).items():
        setattr(result, name, value)


def _seen(state: Any, own: Any) -> dict[str, Any]:
    """`placement`, `maps_match`, `uneven_rows` and `stats` of a balanced model."""
    import numpy as np

    in_force = own.in_force
    width = in_force.table.shape[2]
    maps_match = (
        np.array_equal(state.physical_to_logical_map.numpy(), in_force.placement.physical_to_logical_map)
        and np.array_equal(np.sort(state.logical_to_physical_map[:, :, :width].numpy()), np.sort(in_force.table))
        and bool((state.logical_replica_count == width).all())
    )
    rows = in_force.table.reshape(-1, width)
    return {
        "placement": in_force.placement.physical_to_logical_map.tolist(),
        "maps_match": bool(maps_match),
        "uneven_rows": sum(len(set(np.unique(row, return_counts=True)[1].tolist())) > 1 for row in rows),
        "stats": {name: getattr(own.stats, name) for name in STATS},
    }


# -- things a test does between rounds ------------------------------------------------------------------------


def kill_worker(llm: Any, number: int, result: Result) -> None:
    """Rank 0 kills the planning process after the first round."""
    import signal

    committed = balancer(llm).stats.cycles_committed
    children = _workers(os.getpid())
    result.notes.setdefault("workers", []).append(children)
    result.notes.setdefault("committed", []).append(committed)
    if number == 0:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        wait_for_cycles(llm, committed + 2)


def reload_weights(llm: Any, number: int, result: Result) -> None:
    """Loads the checkpoint again after the second round."""
    if number != 1:
        return
    own = balancer(llm)
    if own is not None:
        result.notes["before"] = own.in_force.placement.physical_to_logical_map.tolist()
    llm.collective_rpc("reload_weights")
    if own is not None:
        state = next(iter(worker_of(llm).model_runner.eplb_state.model_states.values()))
        result.notes["after"] = state.physical_to_logical_map.tolist()


class PooledMemory:
    """What vLLM's allocator does on GPUs with the memory of the weights, which the CPU build has not.

    Asleep, it holds nothing; awake again, it holds what was kept on the host (level 1), or garbage (level 2).
    vLLM's maps lie in it too, since they are made while the model is loaded.
    """

    def __init__(self, runner: Any) -> None:
        self._tensors = [parameter.data for parameter in runner.model.parameters()]
        for state in runner.eplb_state.model_states.values():
            self._tensors += [state.physical_to_logical_map, state.logical_to_physical_map]
            self._tensors += [state.logical_replica_count, state.expert_load_pass]
        self._kept: list[Any] | None = None

    def sleep(self, _worker: Any, level: int) -> None:
        self._kept = [tensor.clone() for tensor in self._tensors] if level == 1 else None
        for tensor in self._tensors:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

    def wake_up(self, _worker: Any, _tags: list[str] | None) -> None:
        for tensor, kept in zip(self._tensors, self._kept or (), strict=self._kept is not None):
            tensor.copy_(kept)


def sleep_and_wake(llm: Any, number: int, result: Result) -> None:
    """Through the worker's hooks, to sleep and back, first on level 1, then on level 2 with weights loaded anew."""
    from swiftbalancer_adaptors.vllm import hooks

    worker = worker_of(llm)
    memory = PooledMemory(worker.model_runner)
    if number < 2:
        hooks.sleep(worker, memory.sleep, number + 1)
        hooks.wake_up(worker, memory.wake_up)
    if number == 1:
        llm.collective_rpc("reload_weights")
    result.notes.setdefault("committed", []).append(0 if number == 1 else balancer(llm).stats.cycles_committed)


def serve_until_killed(_llm: Any, number: int, _result: Result) -> None:
    """Tells the test that the engine runs with a worker, and goes on."""
    ready = os.environ["READY_FILE"]
    if number == 0:
        Path(f"{ready}.{os.environ['RANK']}").write_text(json.dumps(_workers(os.getpid())))


def count_by_column(llm: Any, number: int, result: Result) -> None:
    """Freezes the table before the last round, so that the counters show which slots it used."""
    own = balancer(llm)
    state = next(iter(worker_of(llm).model_runner.eplb_state.model_states.values()))
    if number == 0:
        own.drain()
        own.config = _without_windows(own.config)
        state.expert_load_pass.zero_()
    else:
        result.notes["counts"] = state.expert_load_pass.tolist()
        result.notes["table"] = own.in_force.table.tolist()


def _without_windows(config: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(config, window=msgspec.structs.replace(config.window, sub_window_steps=1_000_000))


def _workers(parent: int) -> list[int]:
    """Process ids of the planning processes that `parent` started."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            ppid = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        if ppid == parent and b"swiftbalancer_worker" in command:
            found.append(int(folder.name))
    return found


def what_is_wrapped(_llm: Any, _number: int, result: Result) -> None:
    """Which methods of the hooked classes are not vLLM's own."""
    import functools

    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    result.notes["wrapped"] = [
        f"{owner.__name__}.{name}"
        for owner in (EngineArgs, EplbState, GPUModelRunner, Worker, WorkerWrapperBase)
        for name, value in vars(owner).items()
        if isinstance(value, functools.partialmethod)
    ]


SCRIPTS = {
    "what_is_wrapped": what_is_wrapped,
    "kill_worker": kill_worker,
    "reload_weights": reload_weights,
    "sleep_and_wake": sleep_and_wake,
    "serve_until_killed": serve_until_killed,
    "count_by_column": count_by_column,
}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
