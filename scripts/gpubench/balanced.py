"""The whole balancer on the model: steps by what the balancer was doing, cycles, and equality of outputs."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from scripts.gpubench.decode import NUM_INPUTS, Decode
from scripts.gpubench.measure import Spread, as_row, memory_mib, steps_within, timed_steps
from scripts.gpubench.moving import transport_options
from swiftbalancer.attach import attach
from swiftbalancer.balancer import Balancer
from swiftbalancer.border import GroupInfo
from swiftbalancer.config import from_dict
from swiftbalancer.cycle import Phase
from swiftbalancer.errors import WorkerLost
from swiftbalancer.stats import StepKind, percentiles

WORKER_START_S = 60.0
REPLAN_STEPS = 64
DRAIN_EVERY = 150
"""Steps of the soak."""
SOAK_STAGING_MIB = 64
SETTLING_STEPS = 512
"""Two plans of the defaults."""
MOST_SETTLING = 8
"""Times so many steps until no cycle is committed in them."""
RANDOM = {"name": "random"}
"""Every cycle moves most experts."""
REPAIR = {"name": "swift", "max_moves_per_layer": 4, "target_imbalance": 1.0, "min_gain": 0.0}
"""Every cycle moves the few experts that a change of load asks for."""


def replanning(steps: int, policy: dict[str, Any], transport: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a balancer that plans a placement every `steps` steps."""
    window = {"sub_windows": 4, "refresh_sub_windows": 0, "replan_sub_windows": 4, "sub_window_steps": steps // 4}
    return {"window": window, "policy": policy, "transport": transport, "breaker": {"max_failures": 1000}}


@contextmanager
def balanced(decode: Decode, values: dict[str, Any]) -> Iterator[Balancer]:
    """A balancer configured by `values`, closed at the end. Collective."""
    unique = [f"bench/{time.monotonic_ns()}"]
    dist.broadcast_object_list(unique, src=0)
    store = dist.distributed_c10d._get_default_store()
    group = GroupInfo(rank=decode.rank, size=decode.size, store=store, device=decode.layer.device, prefix=unique[0])
    balancer = attach(from_dict(values), decode.binding(), group)
    try:
        yield balancer
    finally:
        balancer.drain()
        decode.keep(balancer.in_force.placement, balancer.in_force.table)
        balancer.close(20.0)
        dist.barrier()


def until_first_cycle(decode: Decode, balancer: Balancer, *, shift: bool) -> None:
    """Steps until the worker has started and a cycle has been committed, which all ranks see after the same step."""
    for number in range(steps_within(decode, WORKER_START_S)):
        if shift and number % REPLAN_STEPS == 0:
            decode.shift_load()
        timed_steps(decode, 1, after=lambda _: balancer.after_forward())
        if balancer.stats.cycles_committed:
            return
    raise WorkerLost(f"no cycle was committed within {WORKER_START_S} s of steps")


@dataclass(slots=True)
class Diary:
    """Sorts steps by what the balancer did in them, and times cycles."""

    balancer: Balancer
    decode: Decode
    shift: bool = True
    """Whether the load changes for every plan."""
    kinds: list[StepKind] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)
    """Of the hook in each step. The balancer's own figures come later, and not all by the end."""
    cycle_s: list[float] = field(default_factory=list)
    cycle_steps: list[int] = field(default_factory=list)
    _began_s: float = 0.0
    _began_step: int = 0

    def after_step(self, step: int) -> None:
        if self.shift and step % REPLAN_STEPS == 0:
            self.decode.shift_load()
        began = time.perf_counter()
        self.balancer.after_forward()
        self.host_s.append(time.perf_counter() - began)
        self.kinds.append(self.balancer.step_kind)
        self._watch_cycle()

    def _watch_cycle(self) -> None:
        busy = self.balancer.phase in (Phase.RECEIVING, Phase.MOVING)
        if busy and not self._began_s:
            self._began_s, self._began_step = time.perf_counter(), len(self.kinds)
        elif not busy and self._began_s:
            self.cycle_s.append(time.perf_counter() - self._began_s)
            self.cycle_steps.append(len(self.kinds) - self._began_step)
            self._began_s = 0.0

    def rows(self, times: list[float], **more: Any) -> list[dict[str, Any]]:
        """A line for each kind of step."""
        rows = []
        for kind in StepKind:
            steps = [number for number, each in enumerate(self.kinds) if each == kind]
            host_us = np.array([1e6 * self.host_s[number] for number in steps])
            p50, p99, longest = percentiles(host_us, 50, 99, 100)
            rows.append(
                as_row(
                    Spread.of([times[number] for number in steps]),
                    **more,
                    step_kind=kind.name.lower(),
                    host_us_mean=round(float(host_us.sum()) / max(len(steps), 1), 1),
                    host_us_p50=round(p50, 1),
                    host_us_p99=round(p99, 1),
                    host_us_max=round(longest, 1),
                )
            )
        return rows


def bench_balanced(decode: Decode, kind: str, *, steps: int) -> dict[str, Any]:
    """Step times of balancing off, and on with a change of load for every cycle; and what the cycles did."""
    off = Spread.of(timed_steps(decode, steps // 4))
    before = memory_mib(decode)
    transport = transport_options(kind) | {"staging_mib": 512}
    with balanced(decode, replanning(REPLAN_STEPS, REPAIR, transport)) as balancer:
        held = memory_mib(decode) - before
        until_first_cycle(decode, balancer, shift=True)
        diary = Diary(balancer, decode)
        times = timed_steps(decode, steps, after=diary.after_step)
        stats = balancer.stats
        return {
            "transport": balancer._parts.transport.name,
            "off": as_row(off),
            "all_on": as_row(Spread.of(times)),
            "by_kind": diary.rows(times),
            "cycles_committed": stats.cycles_committed,
            "cycles_dropped": stats.drop_reasons,
            "experts_moved": stats.experts_moved,
            "gib_moved": round(stats.bytes_moved / 2**30, 2),
            "cycle_s": [round(s, 4) for s in diary.cycle_s[:20]],
            "cycle_steps": diary.cycle_steps[:20],
            "plan_s_p50": round(stats.plan_s.percentile(50), 4),
            "round_ms_p50_p99": [round(stats.round_s.percentile(q) * 1e3, 3) for q in (50, 99)],
            "late_rounds": stats.late_rounds,
            "late_round_s": round(stats.late_round_s, 4),
            "threads_share": round(balancer._throttle.share, 4),
            "extra_memory_mib": round(held),
        }


def settles(decode: Decode, balancer: Balancer) -> bool:
    """Whether the worker was asked and found nothing to move, and nothing else was put in force. Collective."""
    stats = balancer.stats
    committed, declined = stats.cycles_committed, stats.plans_declined
    timed_steps(decode, SETTLING_STEPS, after=lambda _: balancer.after_forward())
    answer = [stats.cycles_committed == committed and stats.plans_declined > declined]  # only rank 0 sees plans
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def bench_at_rest(decode: Decode, kind: str, *, steps: int) -> dict[str, Any]:
    """Steps of a load that stays, balanced with the defaults: windows close, votes are cast and the worker is asked
    as usual, and finds nothing to move."""
    with balanced(decode, {"transport": transport_options(kind)}) as balancer:
        balancer.wait_for_worker(WORKER_START_S)
        for _ in range(MOST_SETTLING):
            if settles(decode, balancer):
                break
        committed = balancer.stats.cycles_committed
        diary = Diary(balancer, decode, shift=False)
        times = timed_steps(decode, steps, after=diary.after_step)
        return {"rows": diary.rows(times), "cycles_committed": balancer.stats.cycles_committed - committed}


def soak(decode: Decode, kind: str, *, steps: int) -> dict[str, Any]:
    """Moves in every cycle for `steps`, some of which a drain aborts; outputs must stay those of before, memory and
    threads what they were."""
    references = decode.references()
    wrong = torch.zeros(1, dtype=torch.int64, device=decode.layer.device)
    threads = threading.active_count()
    transport = transport_options(kind) | {"staging_mib": SOAK_STAGING_MIB, "max_step_inflation": 1.0}
    with balanced(decode, replanning(16, RANDOM, transport)) as balancer:
        until_first_cycle(decode, balancer, shift=False)
        memory = 0.0
        for number in range(steps):
            decode.step(number)
            wrong += (decode.output != references[number % NUM_INPUTS]).any()
            balancer.after_forward()
            decode.layer.current_stream().synchronize()
            if number % DRAIN_EVERY == DRAIN_EVERY - 1:
                balancer.drain()
                balancer.resume()
            if number == steps // 4:
                memory = memory_mib(decode)
        result: dict[str, Any] = {
            "transport": balancer._parts.transport.name,
            "steps": steps,
            "wrong_outputs": int(wrong),
            "cycles_committed": balancer.stats.cycles_committed,
            "cycles_dropped": balancer.stats.drop_reasons,
            "experts_moved": balancer.stats.experts_moved,
            "memory_growth_mib": round(memory_mib(decode) - memory, 1),
        }
    gc.collect()
    result["threads_left"] = threading.active_count() - threads
    assert result["wrong_outputs"] == 0, f"outputs changed: {result}"
    assert result["cycles_committed"] > 0, f"no cycle was committed: {result}"
    assert result["memory_growth_mib"] < 2 * SOAK_STAGING_MIB, f"memory is lost: {result}"
    return result
