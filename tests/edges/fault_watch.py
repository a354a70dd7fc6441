"""What a rank notes of itself: what was right and wrong while it served, and what it holds once it has closed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swiftbalancer.balancer import Balancer
from swiftbalancer.cycle import LEADER
from swiftbalancer.device import Event
from swiftbalancer.transport import TransferBatch
from tests.edges.fault import Place
from tests.edges.held import Held, left_since


@dataclass
class Watch:
    """What was right and wrong on this rank."""

    passes: int = 0
    tokens_compared: int = 0
    wrong_outputs: int = 0
    wrong_maps: int = 0
    early_rss_bytes: int = 0
    """Resident memory once a tenth of the time is over."""
    late_rss_bytes: int = 0
    epochs_apart: int = 0
    changed_without_commit: int = 0
    """Passes before which the map changed but the epoch did not: what a dropped cycle must not do."""
    moves: int = 0
    chosen_moves: int = 0
    """Moves of experts that were on the target's node as well as on another."""
    far_moves: int = 0
    """Those of them that came from the other."""
    raised: str = ""


def watch_moves(watch: Watch, balancer: Balancer) -> Callable[..., None]:
    """The transport's `start`, counting moves and those from farther away than needed."""
    real = balancer._parts.transport.start

    def start(batch: TransferBatch, *behind: Event) -> None:
        placement = balancer.in_force.placement
        node = placement.topology.slot_ranks() // placement.topology.ranks_per_node
        for layer, expert, source, target in batch.moves.tolist():
            holders = np.nonzero(placement.physical_to_logical_map[layer] == expert)[0]
            near = node[holders] == node[target]
            watch.moves += 1
            watch.chosen_moves += int(near.any() and not near.all())
            watch.far_moves += int(near.any() and node[source] != node[target])
        real(batch, *behind)

    return start


def closed(balancer: Balancer, place: Place, before: Held) -> dict[str, Any]:
    """Closes the balancer; how long it took and what of it is left, native threads and sockets included."""
    leads = place.rank == LEADER
    pid = place.link.worker_pid if leads else None
    folder = Path((place.link.endpoint or "").removeprefix("ipc://")).parent if leads else None
    began = time.monotonic()
    balancer.close(timeout_s=4.0)
    seconds = time.monotonic() - began
    left = left_since(before, store_port=store_port())
    names = [t.name for t in threading.enumerate() if t.name.startswith("swiftbalancer")]
    return {
        "close_s": seconds,
        "threads_left": names,
        **left,
        "shared_memory_left": Path("/proc/self/maps").read_text().count(" /dev/shm/"),
        "worker_left": pid is not None and Path(f"/proc/{pid}").exists(),
        "folder_left": folder is not None and folder.exists(),
    }


def store_port() -> int:
    """Where the engine's store listens, in rank 0's process."""
    return int(os.environ["MASTER_PORT"])


def resident_bytes(process: str) -> int:
    """Resident memory of a process, by its number or `self`."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")
