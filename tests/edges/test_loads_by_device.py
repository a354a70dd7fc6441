"""Devices write what they counted where rank 0 reads it: whole, once, as late as may be, and no thread helps."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch._C._distributed_c10d import TCPStore
from typing_extensions import override

from swiftbalancer.attach import attach
from swiftbalancer.balancer import MOST_QUIET_STEPS, Balancer
from swiftbalancer.border import GroupInfo
from swiftbalancer.bulk import WindowLoads
from swiftbalancer.config import from_dict
from swiftbalancer.device import DeviceLayer
from swiftbalancer.device.host import HostLayer
from swiftbalancer.gathering import RING, LoadBoard, num_bytes
from swiftbalancer.recorder import LoadRecorder, Snapshot
from tests.edges.engines import wait_for
from tests.edges.main_thread import blocking, calls_of
from tests.edges.ranks import run_ranks
from tests.edges.scripted_device import ScriptedEvent, ScriptedLayer
from tests.edges.synthetic_rank import Options, SyntheticEngine

SIZE, LAYERS, SLOTS = 2, 3, 4
WIDTH = LAYERS * SLOTS + 2


class ReachingLayer(ScriptedLayer):
    """Reaches host memory, as late as it does everything."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.reached: list[int] = []

    @override
    def reach(self, memory: NDArray[np.uint8]) -> Callable[[], None] | None:
        self.reached.append(memory.ctypes.data)
        return self.reached.clear


@dataclass(eq=False)
class Rank:
    """One rank's device, counters and recorder, and what a thread of it has yet to bring to the board."""

    rank: int
    board: LoadBoard
    layer: ReachingLayer
    counters: torch.Tensor = field(default_factory=lambda: torch.zeros(LAYERS, SLOTS, dtype=torch.int32))
    passes: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    window: int = 0
    waiting: deque[Snapshot] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.recorder = LoadRecorder(self.layer, self.counters, self.passes, self.board)

    def count(self) -> None:
        """A pass, and the end of a sub-window; the device does both when it gets there."""
        self.layer.launch(torch.Tensor.add_, self.counters, 100 * self.window + self.rank + 1)
        self.layer.launch(torch.Tensor.add_, self.passes, 1)
        snapshot = self.recorder.take(self.window)
        if snapshot.number is None:
            self.waiting.append(snapshot)
        self.window += 1

    def bring(self) -> None:
        """What a thread does where there was no room."""
        if self.waiting and self.board.has_room(self.waiting[0].window):
            snapshot = self.waiting.popleft()
            self.board.write(snapshot.window, self.recorder.land(snapshot).numpy())
            self.recorder.release(snapshot)

    def counted(self, window: int) -> list[int]:
        return [window + 1, *[100 * window + self.rank + 1] * (LAYERS * SLOTS), window + 1]


@contextlib.contextmanager
def ranks(seed: int = 0) -> Iterator[list[Rank]]:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(num_bytes(SIZE, WIDTH))
        boards = [LoadBoard(os.open(file.name, os.O_RDWR), rank=rank, size=SIZE, width=WIDTH) for rank in range(SIZE)]
        yield [Rank(rank, board, ReachingLayer(seed + rank)) for rank, board in enumerate(boards)]
        for board in boards:
            board.close()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), turns=st.lists(st.sampled_from("ccdddbr"), max_size=200), data=st.data())
def test_every_sub_window_is_read_once_and_whole_however_late_devices_are(
    seed: int, turns: list[str], data: st.DataObject
) -> None:
    """c: a rank counts; d: its device does one thing; b: its thread looks; r: rank 0 reads."""
    with ranks(seed) as group:
        first, read = group[0].board, 0

        def take() -> int:
            if first.late(read):
                return read
            assert first.take(read).tolist() == [rank.counted(read) for rank in group]
            return read + 1

        for turn in turns:
            rank = group[data.draw(st.integers(0, SIZE - 1))]
            if turn == "c":
                rank.count()
            elif turn == "d":
                rank.layer.run_something()
            elif turn == "b":
                rank.bring()
            else:
                read = take()
        last = max(rank.window for rank in group)
        for rank in group:
            while rank.window < last:
                rank.count()
        for _ in range(2 * last + RING):
            for rank in group:
                rank.layer.synchronize()
                rank.bring()
            read = take() if read < last else read
        assert read == last


def test_a_row_that_the_device_has_not_written_is_not_there() -> None:
    """Of the work it has for it, the last that does anything is the copy."""
    with ranks() as group:
        for rank in group:
            rank.count()
        group[0].layer.synchronize()
        device = group[1].layer
        while any(work.op is not None for work in device._main.queue):
            assert group[0].board.late(0) == [1]
            device.run_something()
        assert group[0].board.late(0) == []


def test_taking_a_sub_window_waits_for_nothing() -> None:
    with ranks() as group:
        for _ in range(RING):
            group[1].count()
        assert not group[1].waiting
        calls = calls_of(lambda: group[1].recorder.take(RING))
        assert blocking(calls) == set()


@pytest.mark.parametrize("done", [True, False])
def test_the_board_is_let_go_of_unless_the_device_has_yet_to_write_there(done: bool) -> None:
    with ranks() as group:
        rank = group[1]
        rank.count()
        reached = [rank.board.memory.ctypes.data]
        assert rank.layer.reached == reached
        if done:
            rank.layer.synchronize()
        rank.recorder.close()
        assert rank.layer.reached == ([] if done else reached)


def test_the_board_stays_with_a_device_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: ScriptedEvent) -> bool:
        raise RuntimeError("an illegal memory access was encountered")

    with ranks() as group:
        monkeypatch.setattr(ScriptedEvent, "query", broken)
        group[1].recorder.close()
        assert len(group[1].layer.reached) == 1
        group[1].recorder.close()


# -- in the balancer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reaches", [True, False])
def test_ranks_but_0_have_no_work_at_the_end_of_a_sub_window_where_devices_reach_the_board(
    reaches: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But to tell of steps now and then. Rank 0 gets the same loads in either case."""
    steps, windows = 8, 3 * RING
    monkeypatch.setattr(LoadBoard, "is_gone", lambda *_: False)  # ranks of one process
    if not reaches:
        monkeypatch.setattr(HostLayer, "reach", DeviceLayer.reach)
    config = from_dict(
        {
            "mode": "observe",
            "window": {"sub_window_steps": steps, "refresh_sub_windows": 0, "replan_sub_windows": 0},
            "worker": {"spawn": False, "endpoint": f"ipc://{tmp_path}/nobody"},
        }
    )
    seen: list[WindowLoads] = []

    def is_near(window: int) -> bool:
        """That rank 0 has read, so that there is room."""
        return len(seen) > window - RING

    def body(rank: int, store: TCPStore) -> tuple[int, int]:
        engine = SyntheticEngine(Options(out="", ranks=SIZE), rank)
        group = GroupInfo(rank=rank, size=SIZE, store=store, device=torch.device("cpu"))
        balancer = attach(config, engine.binding(), group)
        balancer.on_window.append(seen.append)
        jobs = jobs_of(balancer)
        try:
            for step in range(steps * windows):
                wait_for(partial(is_near, step // steps))
                engine.counters += step + rank
                engine.passes += 1
                balancer.after_forward()
            wait_for(lambda: len(seen) == windows)
            told, num_jobs = sum(ring.count for ring in balancer.stats.host_s), len(jobs)
        finally:
            balancer.close()
        return num_jobs, told

    (first, _), (second, told) = run_ranks(SIZE, body)
    assert first == windows
    assert second == (steps * windows // MOST_QUIET_STEPS if reaches else windows)
    assert told >= MOST_QUIET_STEPS // 2 or not reaches
    slots = seen[0].in_force.placement.topology.slots_per_rank
    for window, loads in enumerate(seen):
        assert loads.window == window
        counted = range(steps * window, steps * (window + 1))
        of_ranks = [sum(step + rank for step in counted) for rank in range(SIZE)]
        assert (loads.slots == np.repeat(of_ranks, slots)).all()


def jobs_of(balancer: Balancer) -> list[Any]:
    """What the lane gets from now on."""
    jobs: list[Any] = []
    put = balancer._bulk.lane.put

    def noted(job: Callable[[], None]) -> None:
        jobs.append(job)
        put(job)

    balancer._bulk.lane.put = noted  # type: ignore[method-assign]
    return jobs
