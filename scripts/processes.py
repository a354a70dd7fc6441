"""What benchmarks do before they start the processes that they measure."""

from __future__ import annotations

import socket
import subprocess
import sys


def free_port() -> int:
    """A port of this host that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def compile_planner() -> None:
    """Compiles, once, what the first plan would wait a minute for."""
    subprocess.run([sys.executable, "-m", "swiftbalancer_worker.warmup"], check=True)
