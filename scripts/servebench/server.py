"""vLLM's OpenAI server as users start it, with balancing off, vLLM's own or ours, and our metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from scripts.processes import free_port

MODES = ("off", "vllm", "ours")
STOP_S = 30.0


class Server:
    """A running server. `url` is its base, `log` its output; `metrics_url` is rank 0's exporter, of mode ours."""

    def __init__(self, url: str, metrics_url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self.metrics_url = metrics_url
        self.log = log
        self.process = process

    def wait_until_ready(self, timeout_s: float) -> None:
        """Raises RuntimeError with the end of its log if it ends or is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready after {timeout_s:.0f} s (--start-s):\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)

    def balancer(self) -> dict[str, float]:
        """What our metrics count: cycles that moved experts, cycles dropped, experts moved, waits for votes."""
        counts = {"placements": 0.0, "dropped": 0.0, "experts_moved": 0.0, "late_rounds": 0.0}
        with urllib.request.urlopen(self.metrics_url, timeout=30) as reply:
            for family in text_string_to_metric_families(reply.read().decode()):
                for sample in family.samples:
                    match sample.name, sample.labels.get("result"), sample.labels.get("kind"):
                        case "swiftbalancer_cycles_total", "committed", "placement":
                            counts["placements"] += sample.value
                        case "swiftbalancer_cycles_total", "dropped", _:
                            counts["dropped"] += sample.value
                        case "swiftbalancer_moves_total", _, _:
                            counts["experts_moved"] += sample.value
                        case "swiftbalancer_late_rounds_total", _, _:
                            counts["late_rounds"] += sample.value
        return counts

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        """Asks it to end, then ends it and whatever of its engines is left."""
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(
    arguments: list[str], metrics_port: int, log: Path, *, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """A server with vLLM's `arguments`, whose balancer, if it is ours, exports metrics at `metrics_port`.

    `env` is its environment, by default ours and no way to the outside.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), *arguments]
    env = env or {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        out.write((" ".join(command) + "\n").encode())
        out.flush()
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    here = "http://127.0.0.1"
    server = Server(f"{here}:{port}", f"{here}:{metrics_port}/metrics", log, process)
    try:
        yield server
    finally:
        server.stop()


def balancing_arguments(mode: str, ours: dict[str, Any], vllms: dict[str, Any], metrics_port: int) -> list[str]:
    """vLLM's command line for `mode`, with options of swiftbalancer or of vLLM's own balancer."""
    if mode == "off":
        return []
    if mode == "vllm":
        return ["--enable-eplb", "--eplb-config", json.dumps({"use_async": True} | vllms)]
    flag = {"enable": True} | ours | {"metrics": ours.get("metrics", {}) | {"port": metrics_port}}
    return ["--additional-config", json.dumps({"swiftbalancer": flag})]
