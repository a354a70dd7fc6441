"""Steps timed as an engine feels them: from launching one to its end on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from scripts.gpubench.decode import Decode


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of one kind of step, milliseconds."""

    num: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    mean_ms: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        if not seconds:
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        ms = np.asarray(seconds) * 1e3
        p50, p95, p99 = (round(float(v), 4) for v in np.percentile(ms, (50, 95, 99)))
        return cls(len(seconds), p50, p95, p99, round(float(ms.max()), 4), round(float(ms.mean()), 4))


def timed_steps(decode: Decode, num: int, *, after: Callable[[int], Any] | None = None) -> list[float]:
    """Seconds of each of `num` steps: forward, what `after(step)` does on the main thread, and the device's end."""
    times = []
    for number in range(num):
        began = time.perf_counter()
        decode.step(number)
        if after is not None:
            after(number)
        decode.layer.current_stream().synchronize()
        times.append(time.perf_counter() - began)
    return times


def steps_within(decode: Decode, seconds: float) -> int:
    """How many steps fit into `seconds`, the same number on every rank."""
    dist.barrier()
    one = float(np.median(timed_steps(decode, 20)))
    number = torch.tensor([max(int(seconds / one), 20)], device=decode.layer.device)
    dist.all_reduce(number, dist.ReduceOp.MIN)
    return int(number)


def memory_mib(decode: Decode) -> float:
    """Device memory in use by this process's device, MiB, whoever allocated it."""
    if not decode.layer.is_accelerator:
        return 0.0
    free, total = torch.cuda.mem_get_info(decode.layer.device)
    return (total - free) / 2**20


def as_row(spread: Spread, **more: Any) -> dict[str, Any]:
    """One line of results."""
    return {**more, **asdict(spread)}
