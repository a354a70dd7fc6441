"""What a test asks of a real vLLM engine in its own process, and of its workers in others."""

from __future__ import annotations

import os
import time
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


def prompts(count: int) -> list[dict[str, list[int]]]:
    """Token prompts of different lengths, the same in every run."""
    return [{"prompt_token_ids": [(i * 37 + j * 11) % 500 for j in range(6 + 3 * i)]} for i in range(count)]


def short() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def wait_for_cycles(llm: Any, count: int, *, tries: int = 600) -> None:
    """Serves short requests until `count` cycles in all were committed: the same passes on every rank."""
    while tries and (count and (balancer(llm) is None or balancer(llm).stats.cycles_committed < count)):
        llm.generate(prompts(2), short(), use_tqdm=False)
        time.sleep(0.1)
        tries -= 1


def wait_for_parts(llm: Any, count: int, *, tries: int = 600) -> None:
    """The same until every balancer of every worker this process can ask has committed `count` cycles."""
    while tries and count and any(done < count for worker in llm.collective_rpc("committed") for done in worker):
        llm.generate(prompts(2), short(), use_tqdm=False)
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
                "workers": planning_processes(os.getpid()),
                **seen(state.model_states[key], model.balancer),
            }
            for key, model in (attached.models if attached is not None else {}).items()
        ]


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


def seen(state: Any, own: Any) -> dict[str, Any]:
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


def physical_map(llm: Any) -> Any:
    return next(iter(worker_of(llm).model_runner.eplb_state.model_states.values())).physical_to_logical_map


def is_initial(physical_to_logical_map: Any) -> bool:
    """Whether every expert is where vLLM's loader puts it."""
    import numpy as np

    rows = np.asarray(physical_to_logical_map)
    return bool((rows == np.arange(rows.shape[1]) % (rows.max() + 1)).all())


def planning_processes(parent: int) -> list[int]:
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
