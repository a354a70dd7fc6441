"""A wire in software: carries Ethernet frames between two devices of a namespace, late and with gaps. Needs root.

For kernels without netem. Frames travel with the kernel's own note on unfinished checksums and segments
(`PACKET_VNET_HDR`), so that the offloads of the devices may stay on.
"""

from __future__ import annotations

import ctypes
import heapq
import os
import random
import select
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 0x0003
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
SO_RCVBUFFORCE = 33
BUFFER_BYTES = 8 << 20
MAX_FRAME_BYTES = 1 << 17
LONGEST_WAIT_S = 0.1


class RawBridge:
    """Joins two devices of the namespace `name` from `start` to `close`."""

    def __init__(self, name: str, devices: Sequence[str], *, delay_s: float, loss: float, seed: int = 0) -> None:
        self.carried = 0
        self.lost = 0
        self._delay_s, self._loss = delay_s, loss
        self._random = random.Random(seed)
        self._sockets = sockets_in(name, devices)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5.0)
        for end in self._sockets:
            end.close()

    def _carry(self) -> None:
        waiting: list[tuple[float, int, socket.socket, bytes]] = []
        while not self._stop.is_set():
            pause = waiting[0][0] - time.monotonic() if waiting else LONGEST_WAIT_S
            ready, _, _ = select.select(self._sockets, [], [], min(max(pause, 0.0), LONGEST_WAIT_S))
            for end in ready:
                self._accept(end, waiting)
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, target, frame = heapq.heappop(waiting)
                self._deliver(target, frame)

    def _accept(self, end: socket.socket, waiting: list[tuple[float, int, socket.socket, bytes]]) -> None:
        try:
            frame = end.recv(MAX_FRAME_BYTES)
        except OSError:  # says once that the device went down
            return
        if self._random.random() < self._loss:
            self.lost += 1
            return
        self.carried += 1
        target = self._sockets[1 - self._sockets.index(end)]
        heapq.heappush(waiting, (time.monotonic() + self._delay_s, self.carried, target, frame))

    def _deliver(self, target: socket.socket, frame: bytes) -> None:
        try:
            target.send(frame)
        except OSError:  # the device is down, or its queue is full
            self.lost += 1


def sockets_in(name: str, devices: Sequence[str]) -> list[socket.socket]:
    """A packet socket on each device of a network namespace; raises `OSError` where that is not allowed."""
    made: list[socket.socket] = []
    errors: list[OSError] = []

    def enter_and_open() -> None:  # a thread that has entered another namespace is of no other use
        try:
            _enter(name)
            made.extend(_packet_socket(device) for device in devices)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=enter_and_open)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return made


def _enter(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(Path("/run/netns") / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
    finally:
        os.close(fd)


def _packet_socket(device: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    end.setblocking(False)
    end.bind((device, ETH_P_ALL))
    return end
