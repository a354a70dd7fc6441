"""Two hosts on one machine: network namespaces joined by veth pairs through a third one. Needs root.

    host a: NAMEa <-- veth --> to_a | middle | to_b <-- veth --> NAMEb :host b

Delay and loss come from netem on the middle's ends where the kernel has it, and from `RawBridge` where it has not;
a wire without either is the kernel's own bridge. It is cut as a cable is: one of the middle's ends goes down.
"""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.edges.raw_bridge import RawBridge

ADDRESSES = ("10.213.77.1", "10.213.77.2")
ENDS = ("to_a", "to_b")
LOOK_EVERY_S = 0.02


@dataclass(frozen=True)
class Weather:
    """How the wire treats packets, each way.

    `cut_file` cuts it while the file exists; while it is down there is one with the suffix `.down`.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    cut_file: Path | None = None

    @property
    def fair(self) -> bool:
        return not self.delay_s and not self.loss


class LongWire:
    """The namespaces and the wire, for the time of a `with`. Raises `OSError` where it may not be built."""

    def __init__(self, weather: Weather, *, seed: int = 0) -> None:
        self.weather = weather
        self.cuts = 0
        self._seed = seed
        self._hosts = [f"swb{os.getpid() % 100000}{side}" for side in "ab"]
        self._middle = f"swb{os.getpid() % 100000}m"
        self._bridge: RawBridge | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> LongWire:
        try:
            self._lay()
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
        return ["ip", "netns", "exec", self._hosts[host], *command]

    def environment(self, host: int) -> dict[str, str]:
        """What gloo needs to find the wire."""
        return {"GLOO_SOCKET_IFNAME": self._hosts[host]}

    def retransmitted(self) -> int:
        """TCP segments that the hosts had to send again: what loss and cuts came to."""
        return sum(self._snmp(host)["RetransSegs"] for host in (0, 1))

    def _snmp(self, host: int) -> dict[str, int]:
        text = _run(*self.command(host, ["cat", "/proc/net/snmp"]))
        names, values = (line.split()[1:] for line in text.splitlines() if line.startswith("Tcp:"))
        return dict(zip(names, map(int, values), strict=True))

    def _lay(self) -> None:
        for name in (*self._hosts, self._middle):
            _run("ip", "netns", "add", name)
        for host, (name, end) in enumerate(zip(self._hosts, ENDS, strict=True)):
            peer = ["peer", "name", end, "netns", self._middle]
            _run("ip", "link", "add", name, "netns", name, "type", "veth", *peer)
            _run("ip", "-n", name, "addr", "add", ADDRESSES[host], "peer", ADDRESSES[1 - host], "dev", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            # Each packet a packet of its own, so that losing one loses no more than on a wire.
            _run("ip", "-n", name, "link", "set", name, "up", "gso_max_segs", "1")
            _run("ip", "-n", self._middle, "link", "set", end, "up")
        if self.weather.fair or self._has_netem():
            self._join_in_kernel()
        else:
            weather = self.weather
            self._bridge = RawBridge(self._middle, ENDS, delay_s=weather.delay_s, loss=weather.loss, seed=self._seed)

    def _has_netem(self) -> bool:
        """Whether netem is there; it is in place then, on both ends."""
        delay, loss = f"{self.weather.delay_s * 1e3:g}ms", f"{self.weather.loss:%}"
        netem = ["root", "netem", "delay", delay, "loss", loss]
        try:
            for end in ENDS:
                _run("tc", "-n", self._middle, "qdisc", "add", "dev", end, *netem)
        except OSError:
            return False
        return True

    def _join_in_kernel(self) -> None:
        _run("ip", "-n", self._middle, "link", "add", "name", "bridge", "type", "bridge")
        for end in ENDS:
            _run("ip", "-n", self._middle, "link", "set", end, "master", "bridge")
        _run("ip", "-n", self._middle, "link", "set", "bridge", "up")

    def _watch(self) -> None:
        """Takes the wire down while the file is there."""
        if self.weather.cut_file is None:
            return
        down = self.weather.cut_file.with_suffix(".down")
        while not self._stop.wait(LOOK_EVERY_S):
            if self.weather.cut_file.exists() and not down.exists():
                self._set("down")
                self.cuts += 1
                down.touch()
            elif down.exists() and not self.weather.cut_file.exists():
                self._set("up")
                down.unlink()

    def _set(self, state: str) -> None:
        _run("ip", "-n", self._middle, "link", "set", ENDS[0], state)

    def _remove(self) -> None:
        if self._bridge is not None:
            self._bridge.close()
        for name in (*self._hosts, self._middle):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _run(*command: str) -> str:
    """What a command prints; raises `OSError` if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout
