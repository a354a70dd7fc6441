"""What a demo is asked to do, and what its processes tell each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from swiftbalancer import config as configs
from swiftbalancer.config import Config
from swiftbalancer.errors import ConfigError
from swiftbalancer.topology import Topology
from swiftbalancer.vendors import DEVICES
from swiftbalancer_adaptors.minimoe.config import preset


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `swiftbalancer demo`, handed to every rank as JSON.

    The run without balancing has no redundant experts, so the experts alone must divide over the ranks, too.
    """

    ranks: int = 4
    steps: int = 600
    policy: str = "swift"
    text: str | None = None
    seed: int = 0
    device: str = "cpu"
    preset: str = "demo"
    num_layers: int | None = None
    redundant: int = 8
    batch: int = 4
    length: int = 48
    config: dict[str, Any] = {}
    """Laid over the demo's own configuration."""

    def check(self) -> None:
        """Raises `ConfigError` for what cannot work, before any process is started."""
        if self.ranks < 1 or self.steps < 1 or self.redundant < 0:
            raise ConfigError(
                f"demo: ranks={self.ranks}, steps={self.steps}: at least 1; redundant={self.redundant}: at least 0"
            )
        if self.device not in DEVICES:
            raise ConfigError(f"demo: unknown device {self.device!r}; known: {', '.join(DEVICES)}")
        experts = preset(self.preset, num_layers=self.num_layers).num_experts
        for redundant in (self.redundant, 0):
            Topology.for_experts(experts, num_redundant=redundant, num_ranks=self.ranks)
        if self.text is not None and not Path(self.text).is_dir():
            raise ConfigError(f"demo: --text {self.text} is not a folder")
        self.balancer_config()

    def balancer_config(self) -> Config:
        """Windows are short, so that a run of half a minute shows many cycles."""
        values: dict[str, Any] = {
            "policy": {"name": self.policy},
            "window": {"sub_window_steps": 8, "sub_windows": 4, "refresh_sub_windows": 1, "replan_sub_windows": 2},
            "agreement": {"idle_round_steps": 2, "lag_steps": 1},
            "worker": {"log_level": "warning", "niceness": 0},
            "seed": self.seed,
        }
        return configs.from_dict(configs.merge(values, self.config))


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Rank 0 to the screen, once per sub-window."""

    step: int
    domain: str
    phase: str
    rank_loads: list[float]
    """Tokens per rank over all layers, of the sub-window."""
    imbalance: float
    imbalance_without: float
    """Of the same tokens, with every expert in one place, in order."""
    experts_moved: int
    dispatch_updates: int
    cycles: int
    cycles_dropped: int
    host_us: float


class Started(msgspec.Struct, frozen=True, tag="started"):
    """Rank 0 to the screen: a run begins."""

    balanced: bool


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """Rank 0 to the screen: the figures of the balanced run."""

    first_cycle_step: int
    """The step after which the first change was in force; the number of steps if there was none."""
    experts_moved: int
    dispatch_updates: int
    cycles: int
    cycles_dropped: int
    worker_restarts: int
    host_us_p50: float
    host_us_p99: float


News = Progress | Started | Finished


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment of a rank's process."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
