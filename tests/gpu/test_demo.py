"""The demo on GPUs: the same model and text as on CPUs, balanced, and no byte changed by it."""

from __future__ import annotations

import pytest
import torch

from tests.edges.test_demo import demo


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("model", [("--steps", "150"), ("--preset", "deepseek-v3", "--layers", "2", "--steps", "60")])
def test_the_demo_balances_on_gpus_and_changes_no_byte(model: tuple[str, ...]) -> None:
    pytest.importorskip("typer")
    result = demo("--device", "cuda", "--ranks", "2", *model)
    assert result["mismatched_tokens"] == 0
    assert result["experts_moved"] > 0
    assert result["imbalance_with"] < result["imbalance_without"]
