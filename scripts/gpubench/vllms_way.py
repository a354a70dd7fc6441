"""What asynchronous balancing costs the main thread as vLLM does it, on the same model in the same run.

Per step while a rebalance is in flight: a blocking gloo all-reduce of one small tensor. Per committed layer: maps
rebuilt on the main thread and uploaded from pageable memory.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from scripts.gpubench import peers
from scripts.gpubench.decode import Decode
from scripts.gpubench.measure import Spread, as_row, timed_steps

MAX_REPLICAS = 1024
"""Width of vLLM's `logical_to_physical_map`."""


def bench_vllms_way(decode: Decode, *, steps: int) -> dict[str, Any]:
    """Step times plain, with a blocking all-reduce, with an asynchronous one; and the cost of maps per layer."""
    group = dist.new_group(backend="gloo")
    meet = _Meeting(group)
    rows = [as_row(Spread.of(timed_steps(decode, steps)), step="plain")]
    for name, after in (("blocking all-reduce", meet.blocking), ("asynchronous all-reduce", meet.posting)):
        meet.host_s.clear()
        times = timed_steps(decode, steps, after=after)
        host = Spread.of(meet.host_s)
        rows.append(as_row(Spread.of(times), step=name, host_p50_ms=host.p50_ms, host_p99_ms=host.p99_ms))
    meet.finish()
    return {"steps": rows, "maps": _maps(decode)}


class _Meeting:
    def __init__(self, group: Any) -> None:
        self._group = group
        self._value = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None
        self.host_s: list[float] = []

    def blocking(self, _step: int) -> None:
        began = time.perf_counter()
        dist.all_reduce(self._value, group=self._group)
        self.host_s.append(time.perf_counter() - began)

    def posting(self, _step: int) -> None:
        """Waits for the all-reduce posted a step ago, which has ended by then, and posts the next."""
        began = time.perf_counter()
        self.finish()
        self._work = dist.all_reduce(self._value, group=self._group, async_op=True)
        self.host_s.append(time.perf_counter() - began)

    def finish(self) -> None:
        if self._work is not None:
            self._work.wait()


def _maps(decode: Decode) -> dict[str, Any]:
    """Milliseconds to rebuild and upload one layer's maps behind a step in flight; {} without vLLM's function."""
    rebuild = peers.vllm_logical_maps()
    if rebuild is None:
        return {}
    row = torch.arange(288) % 256
    target = torch.full((256, MAX_REPLICAS), -1, device=decode.layer.device)
    compute_s, upload_s = [], []
    for number in range(20):
        decode.step(number)
        began = time.perf_counter()
        slots, _ = rebuild(row, 256)
        built = time.perf_counter()
        padded = torch.nn.functional.pad(slots, (0, MAX_REPLICAS - slots.shape[-1]), value=-1)
        target.copy_(padded)
        compute_s.append(built - began)
        upload_s.append(time.perf_counter() - built)
        decode.layer.current_stream().synchronize()
    return {"compute": as_row(Spread.of(compute_s)), "upload": as_row(Spread.of(upload_s))}
