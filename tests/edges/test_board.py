"""The board that ranks of one host vote on: what each reads, who is gone, what is left behind, and rounds on it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from torch._C._distributed_c10d import HashStore, Store

from swiftbalancer import agreement, sharedmemory
from swiftbalancer.agreement import BoardRounds
from swiftbalancer.board import Board, num_bytes, open_board
from swiftbalancer.cycle import (
    VOTE_SIZE,
    CommitBatch,
    Cycle,
    Phase,
    RoundTaken,
    Vote,
    _round,
    says_nothing,
    step,
)
from swiftbalancer.errors import AgreementLost
from swiftbalancer.stats import TimeRing
from tests.edges.board_peer import Peer, casting, leave_a_child, open_at, unfinish, vote, vote_often, write_late
from tests.edges.engines import LONG_S

SIZE, WIDTH = 3, 2
LATE_S = 0.3
ROW = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=WIDTH, max_size=WIDTH)
FEW_KINDS = st.lists(st.integers(0, 1), min_size=WIDTH, max_size=WIDTH)
Write = tuple[int, int, list[int]]
"""Rank, turn and values."""
WRITES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 4), FEW_KINDS))


@dataclass(frozen=True)
class Shared:
    """One board, and each rank's object of it."""

    path: Path
    boards: list[Board]

    def write_torn(self, rank: int, turn: int, values: list[int], missing: Callable[[list[int]], list[int]]) -> None:
        """A row of which some bytes have not been written yet: those that `missing` picks, by their places."""
        before = self.path.read_bytes()
        self.boards[rank].write(turn, values, 0.0)
        after = self.path.read_bytes()
        changed = [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        with self.path.open("r+b") as file:
            for at in missing(changed):
                os.pwrite(file.fileno(), before[at : at + 1], at)


@contextlib.contextmanager
def shared(*, size: int = SIZE, width: int = WIDTH) -> Iterator[Shared]:
    """A board that nobody has written to. All ranks are of this process, so that they cannot tell who is gone."""
    with tempfile.NamedTemporaryFile() as file, contextlib.ExitStack() as stack:
        file.truncate(num_bytes(size, width))
        boards = [Board(os.open(file.name, os.O_RDWR), rank=rank, size=size, width=width) for rank in range(size)]
        for board in boards:
            stack.callback(board.close)
        yield Shared(Path(file.name), boards)


# -- rows -----------------------------------------------------------------------------------------------------


@given(rows=st.lists(ROW, min_size=SIZE, max_size=SIZE), turn=st.integers(1, 2**62))
def test_every_rank_reads_what_each_has_written(rows: list[list[int]], turn: int) -> None:
    with shared() as on:
        for board, row in zip(on.boards, rows, strict=True):
            board.write(turn, row, 0.0)
        assert [board.read(turn) for board in on.boards] == [rows] * SIZE


@given(writes=WRITES)
def test_a_row_is_there_until_its_rank_writes_the_turn_after_the_next(writes: list[Write]) -> None:
    """Among them a rank that is a turn behind, one a turn ahead, and one that says something else."""
    kept: dict[tuple[int, int], tuple[int, list[int]]] = {}
    last: dict[int, tuple[int, list[int]]] = {}
    with shared() as on:
        for rank, turn, values in writes:
            on.boards[rank].write(turn, values, 0.0)
            kept[rank, turn % 2] = last[rank] = (turn, values)
        for turn in range(1, 5):
            found = [kept.get((rank, turn % 2), (0, [])) for rank in range(SIZE)]
            expected = [values if of == turn else None for of, values in found]
            for rank, board in enumerate(on.boards):
                assert board.read(turn) == expected
                if last.get(rank, (0, []))[0] == turn:
                    assert board.all_alike(turn) == all(one == last[rank] for one in found)


def test_all_are_alike_only_once_the_last_rank_has_written_the_same_in_the_same_turn() -> None:
    with shared() as on:
        first, *others = on.boards
        assert not first.all_alike(1), "nobody has written"
        for board in on.boards:
            board.write(1, [5, 7], 0.0)
        assert all(board.all_alike(1) for board in on.boards)
        first.write(2, [5, 7], 0.0)
        others[0].write(2, [5, 7], 0.0)
        assert not first.all_alike(2), "one rank is a turn behind"
        others[1].write(2, [5, 8], 0.0)
        assert not any(board.all_alike(2) for board in on.boards), "one rank says something else"


def test_the_last_of_a_turn_is_timed_apart_from_the_other_turn() -> None:
    with shared() as on:
        for board, (first_s, second_s) in zip(on.boards, [(3.0, 6.0), (5.0, 6.5), (4.0, 6.25)], strict=True):
            board.write(1, [0, 0], first_s)
            board.write(2, [0, 0], second_s)
        assert [board.last_written(1) for board in on.boards] == [5.0] * SIZE
        assert [board.last_written(2) for board in on.boards] == [6.5] * SIZE


@given(old=ROW, new=ROW, data=st.data())
def test_a_row_with_any_bytes_missing_is_not_there(old: list[int], new: list[int], data: st.DataObject) -> None:
    """Whatever was written there before, and in whichever order a processor lets others see it."""

    def some(changed: list[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(changed), min_size=1, unique=True), label="missing bytes")

    with shared() as on:
        for board in on.boards:
            board.write(1, old, 0.0)
            board.write(3, new, 0.0)
        on.boards[1].write(1, old, 0.0)
        on.write_torn(1, 3, new, some)
        for board in on.boards:
            assert board.read(3) == [new, None, new]
            assert not board.all_alike(3)
        on.boards[1].write(3, new, 0.0)
        assert all(board.all_alike(3) for board in on.boards)


# -- turns ----------------------------------------------------------------------------------------------------

TURNS = 4
HALF, POST, TAKE = range(3)
"""What a rank does in each turn; between two of these any other may do something."""
Progress = tuple[int, ...]
"""By rank: how many of these it has done."""


def said(rank: int, turn: int) -> list[int]:
    """In every other turn all ranks say the same."""
    return [turn // 2, rank * (turn % 2)]


def play(on: Shared, schedule: Sequence[int]) -> None:
    """Each entry is a rank, which does what comes next for it."""
    done = [0] * SIZE
    for rank in schedule:
        turn, what = done[rank] // 3 + 1, done[rank] % 3
        if what == HALF:
            on.write_torn(rank, turn, said(rank, turn), lambda changed: changed[len(changed) // 2 :])
        elif what == POST:
            on.boards[rank].write(turn, said(rank, turn), 0.0)
        done[rank] += 1


def has_posted(progress: Progress, rank: int, turn: int) -> bool:
    return progress[rank] >= 3 * (turn - 1) + TAKE


def can_take(board: Board, rank: int, progress: Progress) -> bool:
    """Whether the turn is complete for a rank that is about to take it; it must see what was posted."""
    turn = progress[rank] // 3 + 1
    posted = [has_posted(progress, peer, turn) for peer in range(SIZE)]
    assert board.read(turn) == [said(peer, turn) if there else None for peer, there in enumerate(posted)]
    assert board.all_alike(turn) == (all(posted) and turn % 2 == 0)
    return all(posted)


def test_a_slow_rank_reads_its_turn_in_every_order_in_which_ranks_may_post_and_take() -> None:
    """All states of all orders, with a row half written as one of them. A rank posts once it has taken."""
    ways: dict[Progress, list[int]] = {(0,) * SIZE: []}
    new = list(ways)
    overtaken = 0
    while new:
        progress = new.pop()
        with shared() as on:
            play(on, ways[progress])
            for rank in range(SIZE):
                takes = progress[rank] % 3 == TAKE
                if progress[rank] == 3 * TURNS or (takes and not can_take(on.boards[rank], rank, progress)):
                    continue
                overtaken += takes and max(progress) > progress[rank] + TAKE
                then = tuple(done + (peer == rank) for peer, done in enumerate(progress))
                if then not in ways:
                    ways[then] = [*ways[progress], rank]
                    new.append(then)
    assert (3 * TURNS,) * SIZE in ways, "nobody came to the end"
    assert overtaken, "no rank was slow"


def test_processes_that_vote_as_fast_as_they_can_all_learn_the_same() -> None:
    turns = 3000
    with file_of_votes() as path, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(peer_at(path, rank)) for rank in range(SIZE)]
        for rank, peer in enumerate(peers):
            peer.start(vote_often, rank, SIZE, turns)
        results = [peer.result() for peer in peers]
    assert [wrong for wrong, _ in results] == [0] * SIZE
    assert sum(waited for _, waited in results) > turns // 2, "they hardly ever met"


# -- who is gone ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_of_votes() -> Iterator[Path]:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(num_bytes(SIZE, VOTE_SIZE))
        yield Path(file.name)


@contextlib.contextmanager
def peer_at(path: Path, rank: int) -> Iterator[Peer]:
    peer = Peer(path, rank=rank, size=SIZE)
    try:
        yield peer
    finally:
        peer.close()


@dataclass(frozen=True)
class Host:
    """Rank 0 in this process, the others in their own."""

    board: Board
    peers: dict[int, Peer]

    def rounds(self, *, deadline_s: float = LONG_S, took_s: TimeRing | None = None) -> BoardRounds:
        return BoardRounds(self.board, size=SIZE, deadline_s=deadline_s, took_s=took_s)

    def write(self, rank: int, one: Vote, *, turn: int = 1) -> None:
        self.peers[rank].do(Board.write, turn, one.to_list(), 0.0)


@pytest.fixture
def host() -> Iterator[Host]:
    with file_of_votes() as path, contextlib.ExitStack() as stack:
        board = open_at(path, rank=0, size=SIZE)
        stack.callback(board.close)
        yield Host(board, {rank: stack.enter_context(peer_at(path, rank)) for rank in range(1, SIZE)})


def gone(host: Host) -> list[list[int]]:
    """Which ranks are, to this process and to the last of the others. Asked twice, since asking could change it."""
    ways: list[Callable[[int], bool]] = [host.board.is_gone, lambda rank: host.peers[2].do(Board.is_gone, rank)]
    seen = [[rank for rank in range(SIZE) if is_gone(rank)] for _ in range(2) for is_gone in ways]
    assert seen[:2] == seen[2:]
    return seen[:2]


def test_a_rank_is_gone_once_its_process_is_killed_and_not_before(host: Host) -> None:
    assert gone(host) == [[], []]
    host.peers[1].kill()
    assert gone(host) == [[1], [1]]


def test_a_rank_is_gone_once_it_has_closed_its_board_and_what_it_wrote_stays(host: Host) -> None:
    host.write(1, vote(7))
    host.peers[1].do(Board.close)
    assert gone(host) == [[1], [1]]
    assert host.board.read(1) == [None, vote(7).to_list(), None]


def test_a_process_that_a_rank_has_forked_does_not_stand_in_for_it(host: Host) -> None:
    child = host.peers[1].do(leave_a_child)
    try:
        assert gone(host) == [[], []]
        host.peers[1].kill()
        assert gone(host) == [[1], [1]]
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


# -- rounds ---------------------------------------------------------------------------------------------------


def test_equal_votes_are_one_object_whether_all_are_equal_or_some(host: Host) -> None:
    rounds, own = host.rounds(), vote(8)
    rounds.post(casting(own))
    for rank in host.peers:
        host.write(rank, vote(8))
    over = rounds.take()
    assert over.votes == (own,) * SIZE and all(one is own for one in over.votes)
    rounds.post(casting(vote(16)))
    for rank in host.peers:
        host.write(rank, vote(16, epoch=3), turn=2)
    over = rounds.take()
    assert over.votes == (vote(16), vote(16, epoch=3), vote(16, epoch=3)) and over.votes[1] is over.votes[2]
    assert rounds.waited_s == 0.0


def test_a_late_vote_is_waited_for_and_the_next_is_not(host: Host) -> None:
    rounds = host.rounds()
    rounds.post(casting(vote(8)))
    host.write(2, vote(8))
    host.peers[1].start(write_late, LATE_S, 1, vote(8, epoch=1))
    began = time.perf_counter()
    over = rounds.take()
    assert over.votes == (vote(8), vote(8, epoch=1), vote(8))
    assert LATE_S / 2 < rounds.waited_s < time.perf_counter() - began
    host.peers[1].result()
    rounds.post(casting(vote(16)))
    for rank in host.peers:
        host.write(rank, vote(16), turn=2)
    rounds.take()
    assert rounds.waited_s == 0.0


def test_how_long_a_round_took_is_from_the_own_vote_to_the_last(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "TIMED_TURNS", 1)
    took_s = TimeRing(8)
    rounds = host.rounds(took_s=took_s)
    host.write(1, vote(8))
    before = time.perf_counter()
    rounds.post(casting(vote(8)))
    after = time.perf_counter()
    written = host.peers[2].do(write_late, LATE_S, 1, vote(8))
    rounds.take()
    assert written - after <= took_s.values()[0] <= written - before
    for rank in host.peers:
        host.write(rank, vote(16), turn=2)
    rounds.post(casting(vote(16)))
    rounds.take()
    assert took_s.values()[1] == 0.0, "this rank was the last"
    assert took_s.count == 2


def lost(rounds: BoardRounds) -> str:
    """What a round says that cannot be learnt."""
    with pytest.raises(AgreementLost) as error:
        rounds.take()
    return str(error.value)


def test_a_peer_that_is_gone_is_named_at_once_though_another_is_only_late(host: Host) -> None:
    rounds = host.rounds()
    rounds.post(casting(vote(8)))
    host.peers[2].kill()
    assert "rank 2 has ended" in lost(rounds)
    assert 0.0 < rounds.waited_s < LONG_S / 4


def test_a_peer_that_is_killed_while_it_is_waited_for_is_named_at_once(host: Host) -> None:
    rounds = host.rounds()
    rounds.post(casting(vote(8)))
    host.write(2, vote(8))
    killing = threading.Timer(LATE_S, host.peers[1].kill)
    killing.start()
    assert "rank 1 has ended" in lost(rounds)
    killing.join()
    assert LATE_S / 2 < rounds.waited_s < LONG_S / 4


def test_a_peer_that_has_voted_before_it_went_is_heard(host: Host) -> None:
    rounds = host.rounds()
    rounds.post(casting(vote(8)))
    host.write(1, vote(8, epoch=1))
    host.peers[1].kill()
    host.peers[2].start(write_late, LATE_S, 1, vote(8))  # so that there is time to look who is gone
    assert rounds.take().votes == (vote(8), vote(8, epoch=1), vote(8))


def test_a_peer_that_died_while_it_wrote_has_not_voted(host: Host) -> None:
    rounds = host.rounds()
    rounds.post(casting(vote(8)))
    host.write(1, vote(8))
    host.write(2, vote(8))
    host.peers[1].do(unfinish, 1)
    host.peers[1].kill()
    assert "rank 1 has ended" in lost(rounds)


def test_a_peer_that_lives_and_says_nothing_is_waited_for_until_the_deadline(host: Host) -> None:
    rounds = host.rounds(deadline_s=LATE_S)
    rounds.post(casting(vote(8)))
    host.write(1, vote(8))
    assert lost(rounds) == f"no outcome of a round within {LATE_S} s"
    assert LATE_S <= rounds.waited_s < LONG_S / 4


# -- opening one ----------------------------------------------------------------------------------------------


class Abroad:
    """The store as a rank of another host sees it: what is in a folder there is not in the same folder here."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder

    def get(self, key: str) -> bytes:
        name, _, mark = self._store.get(key).decode().partition("\n")
        return f"{self._folder / Path(name).name}\n{mark}".encode()


class Twin(Abroad):
    """A file of the same name is there, and was made by others."""

    def get(self, key: str) -> bytes:
        answer = super().get(key)
        Path(answer.decode().partition("\n")[0]).write_bytes(b"0" * num_bytes(SIZE, WIDTH))
        return answer


def opened(folder: Path | None, *, abroad: Callable[[Store], Abroad] | None = None) -> list[Board | None]:
    """By rank, each on a thread. The last one sees the store through `abroad`."""
    store, met, yeses = HashStore(), threading.Barrier(SIZE), []

    def all_agree(yes: bool) -> bool:
        yeses.append(yes)
        met.wait(LONG_S)
        return all(yeses)

    def body(rank: int) -> Board | None:
        seen = abroad(store) if abroad is not None and rank == SIZE - 1 else store
        return open_board(cast(Store, seen), all_agree, rank=rank, size=SIZE, width=WIDTH, folder=folder)

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(body, range(SIZE)))


def held_of(folder: Path) -> list[str]:
    """Files of that folder which this process has open or in its memory, or which are in it."""
    files = [os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    memory = Path("/proc/self/maps").read_text().splitlines()
    return [one for one in [*files, *memory, *map(str, folder.iterdir())] if f"{folder}/" in one]


def test_all_ranks_have_one_board_and_its_file_has_no_name_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharedmemory, "SHARED_MEMORY", tmp_path)
    boards = [board for board in opened(None) if board is not None]
    assert len(boards) == SIZE
    assert not list(tmp_path.iterdir()) and held_of(tmp_path)
    for rank, board in enumerate(boards):
        board.write(1, [rank, -rank], 0.0)
    assert [board.read(1) for board in boards] == [[[0, 0], [1, -1], [2, -2]]] * SIZE
    for board in boards:
        board.close()
    assert not held_of(tmp_path)


def test_nobody_has_a_board_where_the_first_rank_cannot_make_one(tmp_path: Path) -> None:
    assert opened(tmp_path / "not there") == [None] * SIZE


def test_nobody_has_a_board_where_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def full(_: int, first: int, length: int) -> None:
        asked.append((first, length))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert opened(tmp_path) == [None] * SIZE
    assert asked == [(0, num_bytes(SIZE, WIDTH))]
    assert not held_of(tmp_path)


@pytest.mark.parametrize("kind", [Abroad, Twin])
def test_nobody_has_a_board_where_one_rank_cannot_see_it(kind: type[Abroad], tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    assert opened(here, abroad=lambda store: kind(store, there)) == [None] * SIZE
    assert not held_of(here)
    assert len(held_of(there)) == (kind is Twin), "the file of others stays, closed"


def test_no_file_is_left_where_the_ranks_cannot_agree(tmp_path: Path) -> None:
    def all_agree(yes: bool) -> bool:
        assert yes and len(list(tmp_path.iterdir())) == 1
        raise RuntimeError("a peer has gone")

    with pytest.raises(RuntimeError, match="a peer has gone"):
        open_board(HashStore(), all_agree, rank=0, size=SIZE, width=WIDTH, folder=tmp_path)
    assert not list(tmp_path.iterdir())


# -- looked at ahead ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "looks"), [({}, False), ({"announce": 100}, True), ({"ready": 1}, True), ({"drain": 1}, False)]
)
def test_only_a_rank_that_says_something_looks_ahead(host: Host, says: dict[str, int], *, looks: bool) -> None:
    """But for one that is drained, which says so in every round, for as long as its engine sleeps."""
    rounds = host.rounds()
    rounds.post(casting(replace(vote(8), **says)))
    assert rounds.looks_ahead is looks


def test_a_rank_that_says_nothing_hears_one_that_does_when_it_takes_the_round(host: Host) -> None:
    rounds = host.rounds()
    cycle = casting(vote(8))
    rounds.post(cycle)
    announced = replace(vote(8), announce=100)
    for rank in host.peers:
        host.write(rank, announced if rank == 1 else vote(8))
    over = rounds.take()
    assert over.votes[1] == announced
    assert over.posted is cycle and over.ahead == step(cycle, RoundTaken(over.votes))


def test_what_all_ranks_say_is_decided_ahead(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = host.rounds()
    own = replace(vote(8), phase=int(Phase.MOVING), ready=1)
    cycle = Cycle(rank=0, phase=Phase.MOVING, num_batches=1, has_moves=True, ready=True, posted=own)
    rounds.post(cycle)
    for rank in host.peers:
        host.write(rank, own)
    rounds.look_ahead()
    monkeypatch.setattr(rounds, "_decide", None)
    over = rounds.take()
    assert over.ahead is not None and over.ahead[1][0] == CommitBatch(0, 0, 1)
    rounds.post(casting(replace(own, step=9)))
    assert rounds._over is None, "that was the last round"


def test_votes_read_ahead_are_not_read_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = host.rounds()
    cycle = casting(replace(vote(8), announce=100))
    rounds.post(cycle)
    rounds.look_ahead()
    assert not rounds._votes, "nobody else has voted"
    for rank in host.peers:
        host.write(rank, vote(8))
    rounds.look_ahead()
    monkeypatch.setattr(rounds, "_board", None)
    assert rounds._over is None, "what differs is decided when it is taken"
    over = rounds.take()
    assert over.votes == (replace(vote(8), announce=100), *[vote(8)] * (SIZE - 1))
    assert over.posted is cycle and over.ahead == step(cycle, RoundTaken(over.votes))


@given(st.lists(st.integers(0, 1), min_size=4, max_size=4), st.sampled_from(list(Phase)[:3]))
def test_votes_that_say_nothing_change_nothing(flags: list[int], phase: Phase) -> None:
    ready, fault, drain, announce = flags
    own = replace(vote(8), phase=int(phase), ready=ready, fault=fault, drain=drain, announce=announce)
    cycle = Cycle(rank=0, phase=phase, posted=own)
    if says_nothing((own,) * SIZE):
        over = replace(cycle, posted=None)
        assert _round(over, (own,) * SIZE) == (over, []), "else `step` must not skip it"
        assert step(cycle, RoundTaken((own,) * SIZE)) == (over, [])
    else:
        assert any(flags)
    assert not says_nothing((own, replace(own, window=1), own)), "a rank that is off is news"
