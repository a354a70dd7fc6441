"""The demo, as a user runs it: real processes, the trained model, real text; every predicted byte compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors")
ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "ranks",
    "steps",
    "policy",
    "imbalance_without",
    "imbalance_with",
    "experts_moved",
    "dispatch_updates",
    "cycles",
    "cycles_dropped",
    "worker_restarts",
    "mismatched_tokens",
    "host_us_per_step_p50",
    "host_us_per_step_p99",
    "step_ms_p50",
}


def demo(*arguments: str) -> dict[str, Any]:
    """Runs `swiftbalancer demo --json`; its standard output must be one JSON object and nothing else."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "worker", "adaptors"))
    ended = subprocess.run(
        [sys.executable, "-m", "swiftbalancer.cli", "demo", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    assert set(result) == KEYS
    return result


def test_the_demo_balances_and_changes_no_byte() -> None:
    result = demo("--ranks", "4", "--steps", "120")
    assert result["mismatched_tokens"] == 0
    assert result["experts_moved"] > 0
    assert result["cycles"] > 0
    assert result["imbalance_with"] - 1 < (result["imbalance_without"] - 1) * 0.8


def test_hundreds_of_steps_with_moves_in_every_cycle_change_no_byte() -> None:
    result = demo("--ranks", "2", "--steps", "300", "--policy", "random", "--seed", "3")
    assert result["mismatched_tokens"] == 0
    assert result["cycles"] >= 3
    assert result["experts_moved"] >= 100


def test_the_users_own_files_are_served(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"some {name} text, again and again; " * 200)
    result = demo("--ranks", "2", "--steps", "24", "--policy", "none", "--text", str(tmp_path))
    assert result["mismatched_tokens"] == 0
    assert result["experts_moved"] == 0
