"""Two hosts on one machine: network namespaces joined by a wire that can be slow, lossy or cut. Needs root.

Each namespace has a TUN device; a thread carries packets between the two, late and with gaps as asked. It works
where the kernel has no netem.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.213.77.1", "10.213.77.2")
TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x1001


@dataclass(frozen=True)
class Weather:
    """How the wire treats packets; `cut_file` cuts it while the file exists."""

    delay_s: float = 0.0
    loss: float = 0.0
    cut_file: Path | None = None


class LongWire:
    """The namespaces and the wire, for the time of a `with`. Raises `OSError` where it may not be built."""

    def __init__(self, weather: Weather, *, seed: int = 0) -> None:
        self.weather = weather
        self.carried = 0
        self.lost = 0
        self.lost_to_cut = 0
        self.names = [f"swb{os.getpid() % 100000}{side}" for side in "ab"]
        self._random = random.Random(seed)
        self._fds: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)

    def __enter__(self) -> LongWire:
        try:
            for index, name in enumerate(self.names):
                self._fds.append(_host(name, ADDRESSES[index], ADDRESSES[1 - index]))
        except BaseException:
            self._remove()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)
        self._remove()

    def command(self, host: int, command: list[str]) -> list[str]:
        """`command`, to be run on one of the hosts."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def environment(self, host: int) -> dict[str, str]:
        """What gloo needs to find the wire."""
        return {"GLOO_SOCKET_IFNAME": self.names[host]}

    def _remove(self) -> None:
        for fd in self._fds:
            os.close(fd)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        while not self._stop.is_set():
            pause = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else 0.1
            ready, _, _ = select.select(self._fds, [], [], min(pause, 0.1))
            for fd in ready:
                self._accept(fd, waiting)
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(waiting)
                os.write(target, packet)

    def _accept(self, fd: int, waiting: list[tuple[float, int, int, bytes]]) -> None:
        packet = os.read(fd, 65536)
        cut = self.weather.cut_file
        if cut is not None and cut.exists():
            self.lost_to_cut += 1
        elif self._random.random() < self.weather.loss:
            self.lost += 1
        else:
            self.carried += 1
            target = self._fds[1 - self._fds.index(fd)]
            heapq.heappush(waiting, (time.monotonic() + self.weather.delay_s, self.carried, target, packet))


def _host(name: str, own: str, other: str) -> int:
    """A namespace of that name with a TUN device of that name; the device's file."""
    _ip("netns", "add", name)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN_NO_PI))
        _ip("link", "set", name, "netns", name)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", own, "peer", other, "dev", name)
        _ip("-n", name, "link", "set", name, "up")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")
