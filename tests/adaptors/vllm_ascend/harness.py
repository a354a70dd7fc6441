"""Runs a scripted runner of several ranks and gives what they saw."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("scripted_runner.py")
FAST = {
    "worker": {"start_timeout_s": 140.0},
    "window": {"sub_window_steps": 8, "sub_windows": 2, "replan_sub_windows": 2},
    "agreement": {"idle_round_steps": 4},
}


def run(
    folder: Path, root: Path | None, *, ranks: int, ours: bool, steps: int, **options: Any
) -> list[dict[str, Any]]:
    """One process per rank; the results by rank. A rank that fails fails the test with everyone's log.

    `root` holds vllm-ascend's source; None: a stand-in for its adaptor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out, settings = folder / "out", folder / "options.json"
    config = {**FAST, **options.pop("config", {})}
    given = {"out": str(out), "root": str(root or ""), "ours": ours, "steps": steps, "config": config, **options}
    settings.write_text(json.dumps(given))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(str(ROOT / part) for part in ("", "worker", "adaptors"))
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port), "PYTHONPATH": path}
    shared["OMP_NUM_THREADS"] = "1"
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(settings)],
            env={**shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    logs = [process.communicate(timeout=170)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(logs)
    (folder / "log").write_text("\n".join(logs))
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]
