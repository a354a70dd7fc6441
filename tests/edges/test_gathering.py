"""Rank 0 gets every sub-window of every rank, once, in order and whole, or learns that it cannot."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import TCPStore

from swiftbalancer import gathering as module
from swiftbalancer.dispatch import nothing
from swiftbalancer.gathering import RING, BoardGathering, Gathering, GroupGathering, LoadBoard, num_bytes
from swiftbalancer.groups import GroupFactory
from tests.edges.engines import LONG_S
from tests.edges.ranks import run_ranks

SIZE, WIDTH = 3, 40
SHORT_S = 0.3


@dataclass(frozen=True)
class Shared:
    """One board, and each rank's object of it. All are of this process, so that they cannot tell who is gone."""

    path: Path
    boards: list[LoadBoard]

    def gatherings(self, *, deadline_s: float = LONG_S) -> list[BoardGathering]:
        return [BoardGathering(board, rank=rank, deadline_s=deadline_s) for rank, board in enumerate(self.boards)]


@contextlib.contextmanager
def shared(*, in_process: Sequence[int] = range(SIZE)) -> Iterator[Shared]:
    with tempfile.NamedTemporaryFile() as file, contextlib.ExitStack() as stack:
        file.truncate(num_bytes(SIZE, WIDTH))
        boards = [open_at(Path(file.name), rank) for rank in in_process]
        for board in boards:
            stack.callback(board.close)
        yield Shared(Path(file.name), boards)


def open_at(path: Path, rank: int) -> LoadBoard:
    return LoadBoard(os.open(path, os.O_RDWR), rank=rank, size=SIZE, width=WIDTH)


def counted(rank: int, window: int) -> torch.Tensor:
    """What a rank has counted, unlike anybody else's."""
    values = torch.arange(WIDTH) * 1000 + rank * 100 + window
    values[0] = window + 1
    return values


def whole(window: int) -> list[list[int]]:
    return [counted(rank, window).tolist() for rank in range(SIZE)]


def nobody_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ranks of one process were processes."""
    monkeypatch.setattr(LoadBoard, "is_gone", lambda *_: False)


@pytest.mark.parametrize("kind", ["board", "group"])
def test_rank_0_gets_what_every_rank_has_counted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long each takes, and may it use its tensor for something else right after."""
    nobody_is_gone(monkeypatch)
    with shared() as on:

        def gathering_of(rank: int, store: TCPStore) -> Gathering:
            if kind == "board":
                return on.gatherings()[rank]
            group = GroupFactory(store, rank=rank, size=SIZE).create("bulk", timeout_s=LONG_S)
            return GroupGathering(group, deadline_s=LONG_S)

        def body(rank: int, store: TCPStore) -> list[Any]:
            rng = np.random.default_rng(rank)
            gathering, found = gathering_of(rank, store), []
            for window in range(5 * RING):
                time.sleep(rng.uniform(0, 0.005) * (rng.random() < 0.3))
                own = counted(rank, window)
                rows = gathering.gather(window, own, nothing)
                own.zero_()
                found.append(None if rows is None else rows.tolist())
            return found

        by_rank = run_ranks(SIZE, body)
    expected = [whole(window) for window in range(5 * RING)]
    assert by_rank[0] == expected
    for others in by_rank[1:]:
        assert others == ([None] * len(expected) if kind == "board" else expected)


@settings(deadline=None)
@given(turns=st.lists(st.integers(0, SIZE), max_size=60))
def test_nothing_is_lost_in_whichever_order_ranks_write_and_read(turns: list[int]) -> None:
    """`SIZE` stands for the reading of rank 0."""
    written, read = [0] * SIZE, 0
    with shared() as on:
        for turn in turns:
            if turn == SIZE:
                late = on.boards[0].late(read)
                assert late == [rank for rank in range(SIZE) if written[rank] <= read]
                if not late:
                    assert on.boards[0].take(read).tolist() == whole(read)
                    read += 1
            else:
                window, board = written[turn], on.boards[turn]
                assert board.has_room(window) == (window < read + RING)
                if board.has_room(window):
                    board.write(window, counted(turn, window).numpy())
                    written[turn] += 1


@settings(deadline=None)
@given(data=st.data())
def test_a_row_with_any_bytes_missing_is_not_there(data: st.DataObject) -> None:
    """In whichever order a processor lets others see it."""
    window = data.draw(st.integers(0, 2 * RING))
    with shared() as on:
        for rank, board in enumerate(on.boards):
            if window >= RING:
                board.write(window - RING, counted(rank, window - RING).numpy())
            if rank != 1:
                board.write(window, counted(rank, window).numpy())
        before = on.path.read_bytes()
        on.boards[1].write(window, counted(1, window).numpy())
        after = on.path.read_bytes()
        changed = [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        with on.path.open("r+b") as file:
            for at in data.draw(st.lists(st.sampled_from(changed), min_size=1, unique=True)):
                os.pwrite(file.fileno(), before[at : at + 1], at)
        assert on.boards[0].late(window) == [1]
        on.boards[1].write(window, counted(1, window).numpy())
        assert not on.boards[0].late(window)
        assert on.boards[0].take(window).tolist() == whole(window)


def test_a_row_of_which_only_the_number_is_there_is_not_there() -> None:
    """What was written there before is whole."""
    with shared() as on:
        for rank, board in enumerate(on.boards):
            board.write(0, counted(rank, 0).numpy())
            board.write(RING, counted(rank, RING).numpy())
        on.boards[1].write(0, counted(1, 0).numpy())
        on.boards[1].own_rows[0][0] = RING + 1
        assert on.boards[0].late(RING) == [1]


def test_who_is_far_ahead_waits_until_rank_0_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_is_gone(monkeypatch)
    with shared() as on, ThreadPoolExecutor(SIZE) as pool:
        first, *others = on.gatherings()
        done = [0] * SIZE

        def ahead(rank: int) -> None:
            for window in range(2 * RING):
                others[rank - 1].gather(window, counted(rank, window), nothing)
                done[rank] += 1

        running = [pool.submit(ahead, rank) for rank in range(1, SIZE)]
        end = time.monotonic() + LONG_S
        while done[1:] != [RING] * (SIZE - 1):
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(SHORT_S)
        assert done[1:] == [RING] * (SIZE - 1)
        for window in range(2 * RING):
            rows = first.gather(window, counted(0, window), nothing)
            assert rows is not None and rows.tolist() == whole(window)
        for one in running:
            one.result(LONG_S)


def test_a_sub_window_that_rank_0_could_not_read_holds_up_none_after_it() -> None:
    with shared() as on:
        for window in range(RING):
            for rank, board in enumerate(on.boards):
                board.write(window, counted(rank, window).numpy())
        assert not on.boards[1].has_room(RING)
        assert not on.boards[0].late(RING - 1)
        assert on.boards[0].take(RING - 1).tolist() == whole(RING - 1)
        assert on.boards[1].has_room(2 * RING - 1)


def test_rank_0_rests_between_writing_and_reading_and_others_do_not_at_all() -> None:
    with shared() as on:
        first, *others = on.gatherings()
        for rank, other in enumerate(others, 1):
            other.gather(0, counted(rank, 0), lambda: pytest.fail("it has one piece of work"))
        rested = []

        def rest() -> None:
            row = on.boards[0]._own[0]
            rested.append((row[0], on.boards[0]._taken[0]))

        assert first.gather(0, counted(0, 0), rest) is not None
        assert rested == [(1, 0)]


@pytest.mark.parametrize("late", [0, 2])
def test_who_waits_in_vain_says_for_whom(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_is_gone(monkeypatch)
    with shared() as on:
        gatherings = on.gatherings(deadline_s=SHORT_S)
        if late:
            gatherings[1].gather(0, counted(1, 0), nothing)
            with pytest.raises(
                RuntimeError, match=r"ranks \[2\] have not written their loads of sub-window 0 in time"
            ):
                gatherings[0].gather(0, counted(0, 0), nothing)
        else:
            for window in range(RING):
                gatherings[1].gather(window, counted(1, window), nothing)
            with pytest.raises(RuntimeError, match=r"ranks \[0\] have not read what was written before in time"):
                gatherings[1].gather(RING, counted(1, RING), nothing)


# -- other processes ------------------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["swiftbalancer.gathering"])


def _peer(path: Path, rank: int, pipe: Any) -> None:
    board = open_at(path, rank)
    pipe.send("open")
    if pipe.recv() == "write":
        board.write(0, counted(rank, 0).numpy())
        pipe.send("written")
    time.sleep(LONG_S)


@pytest.mark.parametrize("writes", [False, True])
def test_a_rank_whose_process_is_killed_is_not_waited_for(writes: bool) -> None:
    """What it wrote before is read all the same."""
    with shared(in_process=[0]) as on:
        peers = []
        for rank in (1, 2):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_peer, args=(on.path, rank, theirs), daemon=True)
            process.start()
            theirs.close()
            peers.append((process, ours))
        for _, pipe in peers:
            assert pipe.recv() == "open"
        for rank, (process, pipe) in enumerate(peers, 1):
            pipe.send("write" if rank == 2 or writes else "nothing")
            if rank == 2 or writes:
                assert pipe.recv() == "written"
            if rank == 1:
                process.kill()
                process.join(LONG_S)
        gathering = BoardGathering(on.boards[0], rank=0, deadline_s=LONG_S)
        began = time.monotonic()
        if writes:
            rows = gathering.gather(0, counted(0, 0), nothing)
            assert rows is not None and rows.tolist() == whole(0)
        else:
            with pytest.raises(RuntimeError, match=r"ranks \[1\] are gone"):
                gathering.gather(0, counted(0, 0), nothing)
        assert time.monotonic() - began < LONG_S / 2
        for process, _ in peers:
            process.kill()


def test_looks_get_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes a step longer."""
    nobody_is_gone(monkeypatch)
    with shared() as on:
        first, *others = on.gatherings()
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 6:
                for rank, other in enumerate(others, 1):
                    other.gather(0, counted(rank, 0), nothing)

        monkeypatch.setattr(time, "sleep", sleep)
        assert first.gather(0, counted(0, 0), nothing) is not None
    longest = module.LONGEST_PAUSE_S
    assert pauses == [module.FIRST_PAUSE_S * 2**n for n in range(4)] + [longest] * 2
