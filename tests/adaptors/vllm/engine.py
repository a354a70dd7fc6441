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


@dataclass
class Result:
    """What one rank saw."""

    tokens: list[list[list[int]]] = field(default_factory=list)
    """Per round and prompt."""
    attached: bool = False
    placement: list[list[int]] = field(default_factory=list)
    maps_match: bool = False
    """Whether vLLM's three maps hold what swiftbalancer says is in force, up to this rank's order of columns."""
    stats: dict[str, Any] = field(default_factory=dict)
    uneven_rows: int = 0
    """Rows of the dispatch table in force whose slots stand in different numbers of columns."""
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
    wait_for_cycles(llm, job.wait_for_cycles)
    for number in range(job.rounds):
        outputs = llm.generate(prompts(job.num_prompts), sampling, use_tqdm=False)
        result.tokens.append([list(o.outputs[0].token_ids) for o in outputs])
        if job.script:
            SCRIPTS[job.script](llm, number, result)
    _inspect(llm, result)
    Path(out_path).write_text(json.dumps(asdict(result)))
    worker_of(llm).shutdown()
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
    import numpy as np

    state = next(iter(worker_of(llm).model_runner.eplb_state.model_states.values()))
    in_force = own.in_force
    width = in_force.table.shape[2]
    result.placement = in_force.placement.physical_to_logical_map.tolist()
    result.maps_match = bool(
        np.array_equal(state.physical_to_logical_map.numpy(), in_force.placement.physical_to_logical_map)
        and np.array_equal(np.sort(state.logical_to_physical_map[:, :, :width].numpy()), np.sort(in_force.table))
        and bool((state.logical_replica_count == width).all())
    )
    result.uneven_rows = sum(
        len(set(np.unique(row, return_counts=True)[1].tolist())) > 1 for row in in_force.table.reshape(-1, width)
    )
    result.stats = {name: getattr(own.stats, name) for name in STATS}


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


def sleep_and_wake(llm: Any, number: int, _result: Result) -> None:
    """What the worker's hooks do around sleep, first of level 1, then of level 2 (the CPU cannot sleep itself)."""
    attached = attachment(llm)
    attached.pause()
    if number == 0:
        attached.resume()
    elif number == 1:
        attached.forget()
        llm.collective_rpc("reload_weights")


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
