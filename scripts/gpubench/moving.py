"""What a step costs while experts move, transport by transport, without the rest of the balancer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from scripts.gpubench.decode import Decode
from scripts.gpubench.measure import Spread, as_row, memory_mib, steps_within, timed_steps
from swiftbalancer.groups import GroupFactory
from swiftbalancer.pacer import Pacer
from swiftbalancer.transport import (
    UNPACED,
    ExpertWeights,
    Lately,
    TransferBatch,
    TransferLimits,
    TransferState,
    Transport,
    Workplace,
    choose,
)

DEADLINE_S = 60.0
MOST_EXPERTS = 8
USUAL_PACES_MIB = (28, 36, 44, 52, 60, 68, 76)
"""Per step; about what the default bound of the step time allows the copy engine."""


@dataclass(frozen=True, slots=True, eq=False)
class Rig:
    """A connected transport on a model."""

    decode: Decode
    transport: Transport
    weights: ExpertWeights
    pacers: list[Pacer]
    """The one in use, if any: the transport's thread has it adapt."""

    @property
    def expert_bytes(self) -> int:
        return self.weights.payload_bytes(0)


def transport_options(kind: str) -> dict[str, Any]:
    """Options of `transport` for a kind as the command line names it; `p2p:8` has 8 thread blocks at most."""
    name, _, max_ctas = kind.partition(":")
    return {"kind": name} | ({"max_ctas": int(max_ctas)} if max_ctas else {})


@contextmanager
def rigged(decode: Decode, kind: str, *, verify: bool = True) -> Iterator[Rig]:
    """A transport of `kind`, closed at the end. Collective."""
    options = transport_options(kind)
    name = options.pop("kind")
    store = dist.distributed_c10d._get_default_store()
    prefix = f"bench/{kind}/{verify}/{time.monotonic_ns() if decode.rank == 0 else 0}"
    names = [prefix]
    dist.broadcast_object_list(names, src=0)
    groups = GroupFactory(store, rank=decode.rank, size=decode.size, prefix=names[0])
    weights = ExpertWeights(decode.weights, slots_per_rank=decode.shape.slots_per_rank)
    staging = MOST_EXPERTS * (weights.entry_bytes + 256)
    limits = TransferLimits(staging_bytes=staging, deadline_s=DEADLINE_S, verify=verify, **options)
    agree = groups.create("agree", timeout_s=DEADLINE_S)
    pacers: list[Pacer] = []

    def adapt() -> None:
        for pacer in pacers:
            pacer.adapt()

    place = Workplace(weights, decode.layer, groups, limits, adapt=adapt)
    transport = choose(name, place, agree, one_node=True)
    try:
        yield Rig(decode, transport, weights, pacers)
    finally:
        transport.close(DEADLINE_S)
        agree.close()
        dist.barrier()


def ring_batch(rig: Rig, number: int, experts: int) -> TransferBatch:
    """Every rank sends `experts` of one layer to the next rank, into the same slots there."""
    slots, size = rig.decode.shape.slots_per_rank, rig.decode.size
    layer = number % rig.decode.shape.layers
    moves = [
        (layer, 0, rank * slots + (number + i) % slots, (rank + 1) % size * slots + (number + i) % slots)
        for i in range(experts)
        for rank in range(size)
    ]
    return TransferBatch(1, number, np.array(moves, np.int32))


class Traffic:
    """Batches one after another, as fast as they go, driven from the main thread between steps."""

    def __init__(self, rig: Rig, experts: int, pacer: Pacer | FixedPace | None) -> None:
        self._rig = rig
        self._experts = experts
        self._pacer = pacer
        rig.pacers[:] = [pacer] if isinstance(pacer, Pacer) else []
        self._number = 0
        self._last = time.perf_counter()
        self.host_s: list[float] = []
        self._start()

    @property
    def num_done(self) -> int:
        return self._number - 1

    def after_step(self, _step: int) -> None:
        began = time.perf_counter()
        if self._pacer is not None:
            self._pacer.observe(began - self._last, self._rig.transport.lately())
        status = self._rig.transport.poll()
        assert status.state is not TransferState.FAILED, status.reason
        if status.state is TransferState.DONE:
            self._commit()
            self._start()
        if self._rig.transport.waits:
            self._rig.transport.advance(UNPACED if self._pacer is None else self._pacer.allowance())
        self._last = time.perf_counter()
        self.host_s.append(self._last - began)

    def finish(self) -> None:
        """Lets what is in flight end; a rank that is a batch behind its peers does that one, too."""
        furthest = torch.tensor([self._number], device=self._rig.decode.layer.device)
        dist.all_reduce(furthest, dist.ReduceOp.MAX)
        self._drain()
        while self._number < int(furthest):
            self._start()
            self._drain()

    def _drain(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while self._rig.transport.poll().state is TransferState.MOVING and time.monotonic() < end:
            self._rig.transport.advance()
            time.sleep(0.001)

    def _start(self) -> None:
        self._rig.transport.start(ring_batch(self._rig, self._number, self._experts))
        self._number += 1

    def _commit(self) -> None:
        self._rig.transport.commit_copies().enqueue(self._rig.decode.layer)


def bandwidth(rig: Rig, experts: int, *, repeats: int = 5) -> float:
    """GB/s a rank sends with no forward pass beside it, the best of `repeats` batches, handshakes included."""
    best = float("inf")
    for number in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        rig.transport.start(ring_batch(rig, 1000 + number, experts))
        rig.transport.advance()
        while rig.transport.poll().state is TransferState.MOVING:
            time.sleep(5e-5)  # not 0: that would keep the interpreter lock from the transport
        assert rig.transport.poll().state is TransferState.DONE, rig.transport.poll().reason
        best = min(best, time.perf_counter() - began)
    return experts * rig.expert_bytes / best / 1e9


def bench_transport(decode: Decode, kind: str, *, seconds: float) -> list[dict[str, Any]]:
    """Rows of one transport: bandwidth and step times at 1, 2, 4, 8 experts per rank, unpaced and paced."""
    rows: list[dict[str, Any]] = []
    before = memory_mib(decode)
    with rigged(decode, kind) as rig:
        staging = memory_mib(decode) - before
        steps = steps_within(decode, seconds)
        for experts in (1, 2, 4, 8):
            gb_s = bandwidth(rig, experts)
            plain = Spread.of(timed_steps(decode, steps))
            for pacer in (None, Pacer(0.02)):
                rows.append(_moving_row(rig, experts, steps, pacer=pacer))
                rows[-1] |= {
                    "bandwidth_gb_s": round(gb_s, 1),
                    "plain_p50_ms": plain.p50_ms,
                    "plain_p99_ms": plain.p99_ms,
                    "inflation_mean": round(rows[-1]["mean_ms"] / plain.mean_ms - 1, 4),
                    "inflation_p50": round(rows[-1]["p50_ms"] / plain.p50_ms - 1, 4),
                    "extra_memory_mib": round(staging),
                }
    return rows


def _moving_row(rig: Rig, experts: int, steps: int, *, pacer: Pacer | None) -> dict[str, Any]:
    dist.barrier()
    traffic = Traffic(rig, experts, pacer)
    times = timed_steps(rig.decode, steps, after=traffic.after_step)
    traffic.finish()
    dist.barrier()
    host = Spread.of(traffic.host_s)
    return as_row(
        Spread.of(times),
        transport=rig.transport.name,
        experts_per_rank=experts,
        paced=pacer is not None,
        batches=traffic.num_done,
        mib_per_step=round(traffic.num_done * experts * rig.expert_bytes / 2**20 / steps, 2),
        host_p50_ms=host.p50_ms,
        host_p99_ms=host.p99_ms,
    )


@dataclass(frozen=True, slots=True)
class FixedPace:
    """A pacer that allows every step the same."""

    bytes_per_step: int

    def observe(self, _step_s: float, _lately: Lately) -> None:
        """It does not adapt."""

    def allowance(self) -> int:
        return self.bytes_per_step


def bench_verify(decode: Decode, kind: str, *, seconds: float) -> dict[str, Any]:
    """With and without checksums: bandwidth, and how long a batch takes beside decode steps at usual paces.

    A batch ends with a step, so that a little more work shows at some paces as a whole step and at others not at all.
    """
    row: dict[str, Any] = {"transport": kind}
    steps = steps_within(decode, seconds)
    for verify in (True, False):
        setting = "on" if verify else "off"
        with rigged(decode, kind, verify=verify) as rig:
            row["transport"] = rig.transport.name
            row[f"gb_s_verify_{setting}"] = round(bandwidth(rig, MOST_EXPERTS, repeats=8), 2)
            took_ms, step_ms = zip(*(_paced_batch(rig, steps, mib) for mib in USUAL_PACES_MIB), strict=True)
            row[f"paced_batch_ms_verify_{setting}"] = round(sum(took_ms) / len(took_ms), 2)
            row[f"paced_step_ms_verify_{setting}"] = round(sum(step_ms) / len(step_ms), 3)
    return row


def _paced_batch(rig: Rig, steps: int, mib_per_step: int) -> tuple[float, float]:
    """Milliseconds from a batch's start to the next one's, and of a step beside it, means."""
    dist.barrier()
    traffic = Traffic(rig, MOST_EXPERTS, FixedPace(mib_per_step << 20))
    times = timed_steps(rig.decode, steps, after=traffic.after_step)
    done = max(traffic.num_done, 1)
    traffic.finish()
    dist.barrier()
    return 1e3 * sum(times) / done, 1e3 * sum(times) / len(times)


def link_bandwidth() -> float:
    """GB/s of one large copy from the first device to the second, the best of five: what a link can do."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:1")
    best = float("inf")
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return round(source.numel() / best / 1e6, 1)
