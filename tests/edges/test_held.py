"""What fault tests look for once a balancer is closed is seen when it is there."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.edges.fault_runs import assert_nothing_left
from tests.edges.held import Held, left_since

CLEAN = {
    "rank": 0,
    "close_s": 0.1,
    "threads_left": [],
    "native_threads_left": [],
    "sockets_left": [],
    "shared_memory_left": 0,
    "worker_left": False,
    "folder_left": False,
}


@contextlib.contextmanager
def connected(server: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends, the client's first."""
    with socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            yield client, accepted


def test_a_socket_left_open_is_named_with_its_ends_and_state() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = Held.now(store_port=0)
        with connected(server) as (client, accepted):
            here, there = client.getsockname(), accepted.getsockname()
            left = Held.now(store_port=0).beyond(before)["sockets_left"]
            assert sorted(left) == sorted(
                f"AF_INET SOCK_STREAM {a} -> {b} ESTABLISHED" for a, b in [(here, there), (there, here)]
            )
        assert Held.now(store_port=0).beyond(before)["sockets_left"] == []


def test_a_socket_whose_peer_has_reset_it_is_still_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, connected(server) as (client, accepted):
        before = Held(sockets={}, threads={})
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()  # with a reset, as that lingers for no time
        left = Held.now(store_port=0).beyond(before)["sockets_left"]
        assert f"AF_INET SOCK_STREAM {client.getsockname()} -> None CLOSED" in left


def test_only_what_the_store_has_accepted_does_not_count_and_the_other_end_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        port = store.getsockname()[1]
        before = Held.now(store_port=port)
        with connected(store) as (client, _), socket.socket(socket.AF_UNIX) as other:
            left = Held.now(store_port=port).beyond(before)["sockets_left"]
            assert len(left) == 2, f"{client} and {other} are not {left}"
            assert any(str(client.getsockname()) in words.split("->")[0] for words in left)
            assert any(words.startswith("AF_UNIX") for words in left)


def test_a_thread_left_running_is_seen_though_another_has_ended() -> None:
    ending, staying = threading.Event(), threading.Event()
    first = threading.Thread(target=ending.wait)
    first.start()
    before = Held.now(store_port=0)
    second = threading.Thread(target=staying.wait)
    second.start()
    ending.set()
    first.join()
    assert len(left_since(before, store_port=0)["native_threads_left"]) == 1
    staying.set()
    second.join()
    assert left_since(before, store_port=0)["native_threads_left"] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads_left", ["swiftbalancer-bulk"]),
        ("native_threads_left", ["ZMQbg/IO/0"]),
        ("sockets_left", ["AF_INET"]),
        ("shared_memory_left", 1),
        ("worker_left", True),
        ("folder_left", True),
    ],
)
def test_anything_left_fails_a_test_and_is_named(name: str, value: object) -> None:
    assert_nothing_left(CLEAN)
    with pytest.raises(AssertionError, match=f"rank 0, closed, still has .*{name}"):
        assert_nothing_left({**CLEAN, name: value})
