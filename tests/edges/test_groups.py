"""Process groups of our own: what travels, what fails, and that a broken one is replaced."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from swiftbalancer.device import PeerOp
from swiftbalancer.groups import GroupFactory
from tests.edges.ranks import run_ranks

TIMEOUT_S = 20.0


def test_all_gather_puts_every_ranks_row_in_its_place() -> None:
    def body(rank: int, store: TCPStore) -> list[list[int]]:
        group = GroupFactory(store, rank=rank, size=3).create("g", timeout_s=TIMEOUT_S)
        out = torch.zeros(3, 2, dtype=torch.int64)
        group.wait(group.all_gather(out, torch.tensor([rank, rank * 10])), TIMEOUT_S)
        rows: list[list[int]] = out.tolist()
        return rows

    assert run_ranks(3, body) == [[[0, 0], [1, 10], [2, 20]]] * 3


def test_broadcast_comes_from_the_root() -> None:
    def body(rank: int, store: TCPStore) -> list[int]:
        group = GroupFactory(store, rank=rank, size=3).create("g", timeout_s=TIMEOUT_S)
        value = torch.full((2,), rank)
        group.wait(group.broadcast(value, root=1), TIMEOUT_S)
        numbers: list[int] = value.tolist()
        return numbers

    assert run_ranks(3, body) == [[1, 1]] * 3


def test_a_batch_of_sends_and_receives_crosses() -> None:
    def body(rank: int, store: TCPStore) -> int:
        group = GroupFactory(store, rank=rank, size=2).create("g", timeout_s=TIMEOUT_S)
        mine, theirs = torch.tensor([rank + 5]), torch.zeros(1, dtype=torch.int64)
        for work in group.exchange([PeerOp(True, mine, 1 - rank, 9), PeerOp(False, theirs, 1 - rank, 9)]):
            group.wait(work, TIMEOUT_S)
        return int(theirs)

    assert run_ranks(2, body) == [6, 5]


def test_a_missed_deadline_breaks_a_group_and_the_next_one_works() -> None:
    given_up = threading.Event()

    def body(rank: int, store: TCPStore) -> int:
        factory = GroupFactory(store, rank=rank, size=2)
        broken = factory.create("first", timeout_s=TIMEOUT_S)
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"(?i)timed out"):
                broken.wait(broken.recv(torch.zeros(1), 1), 0.2)
            given_up.set()
        given_up.wait(TIMEOUT_S)  # the peer is there all the time, and sends nothing
        broken.close()
        group = factory.create("second", timeout_s=TIMEOUT_S)
        out = torch.zeros(2, 1)
        group.wait(group.all_gather(out, torch.ones(1)), TIMEOUT_S)
        return int(out.sum())

    assert run_ranks(2, body) == [2, 2]


def test_a_peer_that_leaves_is_noticed_at_once() -> None:
    def body(rank: int, store: TCPStore) -> None:
        group = GroupFactory(store, rank=rank, size=2).create("g", timeout_s=TIMEOUT_S)
        if rank == 1:
            group.close()
            return
        with pytest.raises(RuntimeError, match=r"closed|reset"):
            group.wait(group.recv(torch.zeros(1), 1), TIMEOUT_S)

    run_ranks(2, body)


def test_a_rank_that_never_comes_is_a_timeout() -> None:
    def body(rank: int, store: TCPStore) -> None:
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
                GroupFactory(store, rank=0, size=2).create("g", timeout_s=0.5)

    run_ranks(2, body)
