"""The demo on GPUs: the same model and text as on CPUs, balanced, and no byte changed by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.edges.test_demo import demo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def demo_on_gpus(*options: str) -> dict[str, Any]:
    pytest.importorskip("typer")
    result = demo("--device", "cuda", "--ranks", "2", *options)
    assert result["mismatched_tokens"] == 0, result
    assert result["cycles"] > 0, result
    return result


def test_the_demo_balances_on_gpus_and_changes_no_byte() -> None:
    result = demo_on_gpus("--steps", "400")
    assert result["imbalance_with"] < result["imbalance_without"], result


def test_experts_of_real_size_move_and_change_no_byte() -> None:
    result = demo_on_gpus("--preset", "deepseek-v3", "--layers", "2", "--steps", "60")
    assert result["imbalance_with"] < result["imbalance_without"], result
    assert result["experts_moved"] > 0, result


def test_moves_in_every_cycle_change_no_byte() -> None:
    result = demo_on_gpus("--policy", "random", "--steps", "400")
    assert result["experts_moved"] > 0, result
