"""One rank of a real vLLM engine, run as a process: `engine.py JOB.json OUT`; see `Job`.

The engine lives in this process (vLLM's external launcher), so the job can look into it and force things.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.adaptors.vllm.probe import (
    balancer,
    prompts,
    recorded_drafts,
    seen,
    wait_for_cycles,
    wait_for_parts,
    worker_of,
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
    before: str = ""
    """Name of a function of `PREPARATIONS`, called with no engine before it is made."""
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


def main(job_path: str, out_path: str) -> None:
    from vllm import LLM, SamplingParams, __version__

    from tests.adaptors.vllm import interventions, weight_scripts

    between = interventions.SCRIPTS | weight_scripts.SCRIPTS
    before = interventions.PREPARATIONS | weight_scripts.PREPARATIONS
    job = Job(**json.loads(Path(job_path).read_text()))
    result = Result(vllm_version=__version__)
    if job.before:
        before[job.before](result.notes)
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
            between[job.script](llm, number, result.notes)
    if job.every_part:
        result.parts = llm.collective_rpc("parts")
    else:
        _inspect(llm, result)
    Path(out_path).write_text(json.dumps(asdict(result)))
    llm.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads outlive an orderly exit of two in-process engines


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
        arguments["worker_extension_cls"] = "tests.adaptors.vllm.probe.Probe"
    return arguments | job.engine


def _inspect(llm: Any, result: Result) -> None:
    own = balancer(llm)
    result.attached = own is not None
    if own is None:
        return
    state = next(iter(worker_of(llm).model_runner.eplb_state.model_states.values()))
    for name, value in seen(state, own).items():
        setattr(result, name, value)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
