"""What this process holds of the system, as the kernel counts it and in words: sockets and threads."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

TCP_STATES = (
    "", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSED", "CLOSE_WAIT",
    "LAST_ACK", "LISTEN", "CLOSING",
)  # fmt: skip
"""By the kernel's numbers (`net/tcp_states.h`)."""
ENDING_S = 1.0


@dataclass(frozen=True)
class OpenSocket:
    """One of them."""

    local_port: int
    """0 where it has none."""
    words: str
    """Kind, both ends and, with TCP, the state."""


@dataclass(frozen=True)
class Held:
    """Sockets and threads of this process at one time."""

    sockets: dict[int, OpenSocket]
    """By inode; without those that the engine's store has accepted. Each of these is one end of a connection whose
    other end some rank holds and counts, and it stays for as long as that rank has not closed."""
    threads: dict[int, str]
    """Names by the kernel's numbers, native threads included."""

    @classmethod
    def now(cls, *, store_port: int) -> Held:
        sockets = {inode: one for inode, one in open_sockets().items() if one.local_port != store_port}
        return cls(sockets, native_threads())

    def beyond(self, before: Held) -> dict[str, list[str]]:
        """What was not there before, in words."""
        return {
            "sockets_left": [one.words for inode, one in self.sockets.items() if inode not in before.sockets],
            "native_threads_left": [name for number, name in self.threads.items() if number not in before.threads],
        }


def left_since(before: Held, *, store_port: int) -> dict[str, list[str]]:
    """What is held that was not before, in words: sockets at this moment, threads a moment later.

    The kernel may end a thread only after Python's `join` of it has returned, on a busy machine noticeably.
    """
    left = Held.now(store_port=store_port).beyond(before)
    end = time.monotonic() + ENDING_S
    while left["native_threads_left"] and time.monotonic() < end:
        time.sleep(0.01)
        left["native_threads_left"] = Held.now(store_port=store_port).beyond(before)["native_threads_left"]
    return left


def open_sockets() -> dict[int, OpenSocket]:
    """All of this process, by inode, as far as they stay open while being looked at."""
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{fd}")
            if link.startswith("socket:["):
                found[int(link[8:-1])] = _described(fd)
    return found


def _described(fd: int) -> OpenSocket:
    with socket.socket(fileno=os.dup(fd)) as one:
        here, there = one.getsockname(), _peer(one)
        words = f"{one.family.name} {one.type.name} {here} -> {there}"
        if one.family not in (socket.AF_INET, socket.AF_INET6):
            return OpenSocket(0, words)
        if one.type == socket.SOCK_STREAM:
            words += " " + TCP_STATES[one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]]
        return OpenSocket(here[1], words)


def _peer(one: socket.socket) -> object:
    try:
        return one.getpeername()
    except OSError:
        return None


def native_threads(process: str = "self") -> dict[int, str]:
    """Name of every thread of a process, this one or that of a number, by the kernel's number of the thread."""
    names = {}
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(OSError):  # it ended in between
            names[int(task.name)] = (task / "comm").read_text().strip()
    return names
