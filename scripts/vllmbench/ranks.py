"""What of the vLLM benchmark happens on a rank: weights, routers, its balancer, and what the hook did."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.vllmbench.settings import KINDS, Settings, load_settings
from scripts.vllmbench.weights import Gates, count_wrong_slots, fill_weights

HOOK = ("end_s", "hook_ms", "kind", "balancer_step")
STATS: tuple[str, ...] = (
    "cycles_committed",
    "cycles_dropped",
    "drop_reasons",
    "placement_updates",
    "dispatch_updates",
)
STATS += ("experts_moved", "bytes_moved", "rounds", "late_rounds", "late_round_s", "off_reason", "imbalance")


class Rank:
    """One rank of the engine. Its methods are called on all ranks between the same two steps."""

    def __init__(self, worker: Any, settings: Settings) -> None:
        self._worker = worker
        self._settings = settings
        self._rank = int(worker.rank)
        self._model = worker.model_runner.model
        self._state: Any = getattr(worker.model_runner, "eplb_state", None)
        self._gates = Gates(self._model, settings.skew)
        self._outcomes: list[dict[str, Any]] = []
        self._hooks: list[tuple[float, float, str, int]] = []
        """As `HOOK`, of every call; times of the monotonic clock, which all processes of a host share."""
        self._moves = 0
        self._seen_steps = 0
        if self._state is not None:
            self._watch_hook()

    def open(self) -> str:
        """Gives every tensor its seeded values; says what runs here."""
        fill_weights(self._model, self._rank, self._settings)
        return type(self._worker.model_runner).__module__

    def skew(self, seed: str, step: int) -> None:
        """New popular experts."""
        self._gates.skew(seed, step)

    def switch(self, on: bool) -> None:
        """Lets the balancer work, or keeps it from it."""
        settings = self._settings
        if settings.mode == "vllm":
            self._state.expert_rearrangement_step_interval = settings.interval if on else 1_000_000_000
            self._state.expert_rearrangement_step = settings.interval * 3 // 4 if on else 0
        own = self._balancer
        if own is None:
            return
        if self._cycle_ended not in own.on_cycle:
            own.on_cycle.append(self._cycle_ended)
        if on:
            own.resume()
        else:
            own.drain()

    def committed(self) -> int:
        """Cycles so far."""
        return 0 if self._balancer is None else int(self._balancer.stats.cycles_committed)

    def wrong_slots(self) -> int:
        """Local slots whose weights are not those of the expert that vLLM's map says they hold; -1: no map."""
        if self._state is None:
            return -1
        if self._balancer is not None:
            self._balancer.drain()
        model_state = next(iter(self._state.model_states.values()))
        experts = model_state.physical_to_logical_map.cpu()
        return count_wrong_slots(self._model, self._rank, experts, self._settings)

    def result(self) -> dict[str, Any]:
        """What was seen on this rank."""
        return {"hooks": self._hooks, "outcomes": self._outcomes, "stats": self._stats()}

    @property
    def _balancer(self) -> Any:
        attachment = getattr(self._state, "_swiftbalancer_attachment", None)
        return next(iter(attachment.models.values())).balancer if attachment is not None else None

    def _watch_hook(self) -> None:
        """Watches `EplbState.step`, and the layers that vLLM's own loop commits."""
        import vllm.distributed.eplb.eplb_state as module

        step, move = self._state.step, module._move_to_workspace

        def counted(*args: Any, **named: Any) -> Any:
            self._moves += 1
            return move(*args, **named)

        def timed(*args: Any, **named: Any) -> Any:
            moves, began = self._moves, time.perf_counter()
            try:
                return step(*args, **named)
            finally:
                end = time.perf_counter()
                balancer = self._balancer
                own_step = len(self._hooks) if balancer is None else balancer.steps
                self._hooks.append((end, (end - began) * 1e3, self._kind(self._moves > moves), own_step))

        self._state.step, module._move_to_workspace = timed, counted

    def _kind(self, moved: bool) -> str:
        """What the balancer did in the call just made."""
        if self._settings.mode == "vllm":
            busy = any(state.rebalanced for state in self._state.model_states.values())
            return "committing" if moved else "moving" if busy else "idle"
        if self._balancer is None:
            return "idle"
        called = self._balancer.steps > self._seen_steps
        self._seen_steps = self._balancer.steps
        return KINDS[self._balancer.step_kind] if called else "idle"

    def _cycle_ended(self, outcome: Any) -> None:
        self._outcomes.append(
            {n: getattr(outcome, n) for n in ("kind", "committed", "reason", "step", "moves", "moved_bytes")}
        )

    def _stats(self) -> dict[str, Any]:
        own = self._balancer
        if own is None:
            return {}
        stats = own.stats
        values = {name: getattr(stats, name) for name in STATS}
        host = {k: [r.count, r.percentile(50), r.percentile(99)] for k, r in zip(KINDS, stats.host_s, strict=True)}
        rounds = [stats.round_s.count, stats.round_s.percentile(50), stats.round_s.percentile(99)]
        return values | {
            "host_s": host,
            "round_s": rounds,
            "plan_s_p50": stats.plan_s.percentile(50),
            "threads_share": own._throttle.share,
        }


class Ranks(ABC):
    """The ranks that an engine's driver reaches."""

    @abstractmethod
    def call(self, name: str, *args: Any) -> list[Any]:
        """Calls a method of each `Rank`; results by rank."""

    @abstractmethod
    def shutdown(self) -> None: ...


class OwnRank(Ranks):
    """The one rank whose worker lives in the driver's process, as with vLLM's external launcher."""

    def __init__(self, engine: Any, settings: Settings) -> None:
        worker = engine.model_executor.driver_worker
        self._worker = getattr(worker, "worker", worker)
        self._rank = Rank(self._worker, settings)

    def call(self, name: str, *args: Any) -> list[Any]:
        return [getattr(self._rank, name)(*args)]

    def shutdown(self) -> None:
        self._worker.shutdown()


class RanksElsewhere(Ranks):
    """Ranks with a process each, as `vllm serve` has them."""

    def __init__(self, engine: Any, settings_path: Path) -> None:
        self._engine = engine
        self._path = str(settings_path)

    def call(self, name: str, *args: Any) -> list[Any]:
        results: list[Any] = self._engine.collective_rpc(call_here, args=(self._path, name, args))
        return results

    def shutdown(self) -> None:
        self._engine.engine_core.shutdown()


_here: list[Rank] = []


def call_here(worker: Any, settings_path: str, name: str, args: tuple[Any, ...]) -> Any:
    """Runs in a worker's process: calls a method of its `Rank`."""
    import torch

    with torch.inference_mode():
        if not _here:
            _here.append(Rank(getattr(worker, "worker", worker), load_settings(Path(settings_path))))
        method: Callable[..., Any] = getattr(_here[0], name)
        return method(*args)
