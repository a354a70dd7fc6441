"""Things a test does to a running engine between its rounds, or before there is one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.adaptors.vllm.probe import balancer, planning_processes, wait_for_cycles, worker_of

Notes = dict[str, Any]
"""What a script hands to the test."""


def kill_worker(llm: Any, number: int, notes: Notes) -> None:
    """Rank 0 kills the planning process after the first round."""
    committed = balancer(llm).stats.cycles_committed
    children = planning_processes(os.getpid())
    notes.setdefault("workers", []).append(children)
    notes.setdefault("committed", []).append(committed)
    if number == 0:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        wait_for_cycles(llm, committed + 2)


def serve_until_killed(_llm: Any, number: int, _notes: Notes) -> None:
    """Tells the test that the engine runs with a worker, and goes on."""
    ready = os.environ["READY_FILE"]
    if number == 0:
        Path(f"{ready}.{os.environ['RANK']}").write_text(json.dumps(planning_processes(os.getpid())))


def count_by_column(llm: Any, number: int, notes: Notes) -> None:
    """Freezes the table before the last round, so that the counters show which slots it used."""
    own = balancer(llm)
    state = next(iter(worker_of(llm).model_runner.eplb_state.model_states.values()))
    if number == 0:
        own.drain()
        own.config = _without_windows(own.config)
        state.expert_load_pass.zero_()
    else:
        notes["counts"] = state.expert_load_pass.tolist()
        notes["table"] = own.in_force.table.tolist()


def _without_windows(config: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(config, window=msgspec.structs.replace(config.window, sub_window_steps=1_000_000))


def what_is_wrapped(_llm: Any, _number: int, notes: Notes) -> None:
    """Which methods of the hooked classes are not vLLM's own."""
    import functools

    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    notes["wrapped"] = [
        f"{owner.__name__}.{name}"
        for owner in (EngineArgs, EplbState, GPUModelRunner, Worker, WorkerWrapperBase)
        for name, value in vars(owner).items()
        if isinstance(value, functools.partialmethod)
    ]


def hand_back(llm: Any, number: int, notes: Notes) -> None:
    """vLLM rearranges its experts itself, as it does to scale."""
    if number == 0:
        state = worker_of(llm).model_runner.eplb_state
        notes["workers"] = len(planning_processes(os.getpid()))
        state.rearrange()
        notes["workers after"] = len(planning_processes(os.getpid()))
        notes["replicas"] = int(next(iter(state.model_states.values())).logical_replica_count.sum())


def vllms_own_loop(_llm: Any, _number: int, notes: Notes) -> None:
    notes["called"] = list(CALLED)


CALLED: list[str] = []
"""Parts of vLLM's own loop that ran since `watch_vllms_own_loop`."""


def watch_vllms_own_loop(_notes: Notes) -> None:
    """Notes each call of what balances in a stock vLLM, all of which block the main thread."""
    from vllm.distributed.eplb import eplb_state

    for owner, name in (
        (eplb_state, "compute_logical_maps"),
        (eplb_state, "_commit_eplb_maps"),
        (eplb_state, "rearrange_expert_weights_inplace"),
        (eplb_state.EplbState, "rearrange"),
        (eplb_state.EplbState, "_sync_load_pass"),
        (eplb_state.EplbState, "_allreduce_list"),
        (eplb_state.EplbState, "_all_ranks_result_ready"),
    ):
        setattr(owner, name, _noted(name, getattr(owner, name)))


def _noted(name: str, original: Any) -> Any:
    def noted(*args: Any, **named: Any) -> Any:
        CALLED.append(name)
        return original(*args, **named)

    return noted


def claim_another_version(_notes: Notes) -> None:
    import vllm

    vllm.__version__ = "0.99.0"


def lack_support(_notes: Notes) -> None:
    """Makes vLLM's method for plain weights say what one for a quantisation without support says."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    UnquantizedFusedMoEMethod.supports_eplb = property(lambda _method: False)


SCRIPTS = {
    "what_is_wrapped": what_is_wrapped,
    "kill_worker": kill_worker,
    "serve_until_killed": serve_until_killed,
    "count_by_column": count_by_column,
    "hand_back": hand_back,
    "vllms_own_loop": vllms_own_loop,
}
PREPARATIONS = {
    "watch_vllms_own_loop": watch_vllms_own_loop,
    "claim_another_version": claim_another_version,
    "lack_support": lack_support,
}
