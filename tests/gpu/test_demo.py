"""The demo on GPUs: the same model and text as on CPUs, balanced, and no byte changed by it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("model", [("--steps", "150"), ("--preset", "deepseek-v3", "--layers", "2", "--steps", "60")])
def test_the_demo_balances_on_gpus_and_changes_no_byte(model: tuple[str, ...]) -> None:
    pytest.importorskip("typer")
    command = [
        sys.executable,
        "-m",
        "swiftbalancer.cli",
        "demo",
        "--json",
        "--device",
        "cuda",
        "--ranks",
        "2",
        *model,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    assert result["mismatched_tokens"] == 0
    assert result["experts_moved"] > 0
    assert result["imbalance_with"] < result["imbalance_without"]
