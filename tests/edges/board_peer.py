"""A rank's board in a process of its own, which does with it what it is told through a pipe."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swiftbalancer.agreement import BoardRounds
from swiftbalancer.board import Board
from swiftbalancer.cycle import VOTE_SIZE, Cycle, Vote
from tests.edges.engines import LONG_S

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["swiftbalancer.agreement"])  # or each of them spends seconds on importing torch


class Peer:
    """Another rank; `close` ends its process, the board's own does not."""

    def __init__(self, path: Path, *, rank: int, size: int) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs, path, rank, size), daemon=True)
        self._process.start()
        theirs.close()
        self.result()

    def do(self, action: Callable[..., Any], *values: Any) -> Any:
        """What `action(board, *values)` gives there."""
        self.start(action, *values)
        return self.result()

    def start(self, action: Callable[..., Any], *values: Any) -> None:
        """Does not wait for it: the result must be asked for."""
        self._pipe.send((action, values))

    def result(self) -> Any:
        assert self._pipe.poll(LONG_S), "the other process hangs"
        return self._pipe.recv()

    def kill(self) -> None:
        """As by `kill -9`."""
        self._process.kill()
        self._process.join(LONG_S)

    def close(self) -> None:
        self.kill()
        self._pipe.close()


def _serve(pipe: Any, path: Path, rank: int, size: int) -> None:
    board = open_at(path, rank=rank, size=size)
    pipe.send(None)
    while True:
        action, values = pipe.recv()
        pipe.send(action(board, *values))


def open_at(path: Path, *, rank: int, size: int) -> Board:
    """That rank's board for votes, in a file that is long enough."""
    return Board(os.open(path, os.O_RDWR), rank=rank, size=size, width=VOTE_SIZE)


def vote(step: int, *, epoch: int = 0) -> Vote:
    return Vote(step, 0, -1, epoch, 0, 0, 0, 0, 0, 0, 0)


def casting(one: Vote, *, rank: int = 0) -> Cycle:
    """A cycle that posts this vote."""
    return Cycle(rank=rank, posted=one)


# -- what a peer can be told ----------------------------------------------------------------------------------


def write_late(board: Board, seconds: float, turn: int, one: Vote) -> float:
    """Writes that vote after so long; gives the time, of the clock that all processes share."""
    time.sleep(seconds)
    now = time.perf_counter()
    board.write(turn, one.to_list(), now)
    return now


def unfinish(board: Board, turn: int) -> None:
    """As if this rank had not come to the last value of its row of that turn."""
    board._words[board._own_first[turn & 1] + board._width] ^= 1


def leave_a_child(_: Board) -> int:
    """Forks a process, which sleeps for long; its number."""
    child = os.fork()
    if not child:
        time.sleep(LONG_S)
        os._exit(0)
    return child


def vote_often(board: Board, rank: int, size: int, turns: int) -> list[int]:
    """So many rounds as fast as it goes; how many gave other votes than they must, and how many had to wait."""
    rounds = BoardRounds(board, size=size, deadline_s=LONG_S)
    wrong = waited = 0
    for turn in range(turns):
        rounds.post(casting(_one_of_many(rank, turn), rank=rank))
        over = rounds.take()
        wrong += over.votes != tuple(_one_of_many(peer, turn) for peer in range(size))
        waited += rounds.waited_s > 0
    return [wrong, waited]


def _one_of_many(rank: int, turn: int) -> Vote:
    """Every third time ranks differ."""
    return vote(turn, epoch=0 if turn % 3 else rank)
