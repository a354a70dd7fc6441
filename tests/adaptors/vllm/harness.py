"""Runs `engine.py` on two ranks, and servers, with the plugins a vLLM process finds on its path."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tests.adaptors.vllm.engine import Job, Result

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SHIM = ("cpu-shim", "swiftbalancer_cpu_shim = cpu_shim:install")
PRODUCT = ("swiftbalancer", "swiftbalancer = swiftbalancer_adaptors.vllm:register")


def environment(plugins: Path, **extra: str) -> dict[str, str]:
    """The environment of an engine process on CPU. `plugins` is a folder for throw-away entry points."""
    _write_entry_point(plugins, *SHIM)
    path = [str(plugins), str(HERE), str(ROOT)]
    if not any(point.name == "swiftbalancer" for point in entry_points(group="vllm.general_plugins")):
        _write_entry_point(plugins, *PRODUCT)
        path += [str(ROOT / "worker"), str(ROOT / "adaptors")]
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(before + path),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "VLLM_MLA_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


def _write_entry_point(folder: Path, name: str, line: str) -> None:
    info = folder / f"{name.replace('-', '_')}_plugin-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{line}\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(job: Job, folder: Path, *, ranks: int = 2, **extra: str) -> list[subprocess.Popen[bytes]]:
    """One process per rank; each writes `rankN.json` and `rankN.log` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    port = str(free_port())
    (folder / "port").write_text(port)
    processes = []
    for rank in range(ranks):
        env = environment(
            folder / "plugins",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            **extra,
        )
        command = [
            sys.executable,
            str(HERE / "engine.py"),
            str(folder / "job.json"),
            str(folder / f"rank{rank}.json"),
        ]
        with (folder / f"rank{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    return processes


def finish(processes: list[subprocess.Popen[bytes]], folder: Path, *, timeout_s: float) -> list[Result]:
    """Waits for every rank; fails with the end of a log as soon as one did not end well: the others wait for it."""
    deadline = time.monotonic() + timeout_s
    try:
        while not _all_ended_well(processes, folder):
            assert time.monotonic() < deadline, f"still running after {timeout_s} s:\n{log_of(folder, 0)[-4000:]}"
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
        _forget_shared_memory(folder)
    return [Result(**json.loads((folder / f"rank{rank}.json").read_text())) for rank in range(len(processes))]


def _all_ended_well(processes: list[subprocess.Popen[bytes]], folder: Path) -> bool:
    codes = [process.poll() for process in processes]
    for rank, code in enumerate(codes):
        assert not code, f"rank {rank} ended with {code}:\n{log_of(folder, rank)[-4000:]}"
    return None not in codes


def _forget_shared_memory(folder: Path) -> None:
    """Engines that end abruptly leave vLLM's shared memory behind; its name holds the run's port."""
    port = (folder / "port").read_text()
    for segment in Path("/dev/shm").glob(f"*sb{port}*"):
        segment.unlink(missing_ok=True)


def run(job: Job, folder: Path, *, timeout_s: float = 600, ranks: int = 2, **extra: str) -> list[Result]:
    return finish(start(job, folder, ranks=ranks, **extra), folder, timeout_s=timeout_s)


def log_of(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}.log").read_text(errors="replace")


def forced_moves(**sections: Any) -> dict[str, Any]:
    """The flag with a policy that moves experts at random in every cycle, as often as it can."""
    options: dict[str, Any] = {
        "enable": True,
        "num_redundant_experts": 4,
        "policy": {"name": "random", "max_moves_per_layer": 4, "min_gain": 0.0},
        "window": {"sub_window_steps": 2, "sub_windows": 2, "refresh_sub_windows": 1, "replan_sub_windows": 1},
        "agreement": {"idle_round_steps": 1},
        "worker": {"niceness": 0, "start_timeout_s": 300.0},
    }
    return {"swiftbalancer": options | sections}
