"""Real vLLM on CPU with what is balanced apart: pipeline stages, and the draft model of speculative decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.adaptors.vllm import models
from tests.adaptors.vllm.engine import Job
from tests.adaptors.vllm.harness import forced_moves, free_port, run

vllm = pytest.importorskip("vllm")
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

PIPELINE = {
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "enable_expert_parallel": True,
    "distributed_executor_backend": "mp",
}
SPECULATIVE = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
TOKENS = 48

TwoRanks = list[dict[str, Any]]
"""One part as its two ranks see it."""


def plain_job(folder: Path, engine: dict[str, Any]) -> Job:
    return Job(str(folder), engine=engine, max_tokens=TOKENS, every_part=True)


def moving_job(folder: Path, engine: dict[str, Any], tmp_path: Path) -> Job:
    """Forced moves, with the options that every part must have to itself."""
    additional = forced_moves(metrics={"port": free_port(), "event_log": str(tmp_path / "cycles.jsonl")})
    return Job(str(folder), additional, engine, max_tokens=TOKENS, rounds=2, wait_for_cycles=1, every_part=True)


def check(parts: TwoRanks, *, label: str, ranks: list[int], layers: int) -> None:
    """Same placement, maps as they should be, experts moved, one worker."""
    assert [part["label"] for part in parts] == [label, label]
    assert parts[0]["ranks"] == parts[1]["ranks"] == ranks
    assert len(parts[0]["placement"]) == layers
    assert parts[0]["placement"] == parts[1]["placement"]
    for part in parts:
        assert part["maps_match"]
        assert part["stats"]["placement_updates"] >= 1
        assert part["stats"]["experts_moved"] > 0
        assert part["stats"]["off_reason"] == ""
    assert not parts[1]["workers"]


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek"])
def test_each_pipeline_stage_balances_its_own_layers(model: str, tmp_path: Path) -> None:
    """The DeepSeek-style model has one MoE layer on its first stage, after the dense one, and two on its second."""
    writer = {"qwen3_moe": models.write_qwen3_moe, "deepseek": models.write_deepseek}[model]
    folder = writer(tmp_path / "model", layers=4)
    (plain,) = run(plain_job(folder, PIPELINE), tmp_path / "plain", ranks=1)
    (moved,) = run(moving_job(folder, PIPELINE, tmp_path), tmp_path / "moved", ranks=1)
    assert plain.parts == [[], [], [], []]
    assert moved.tokens == plain.tokens * 2
    assert [len(worker) for worker in moved.parts] == [1, 1, 1, 1]
    stages = [worker[0] for worker in moved.parts]
    check(stages[:2], label="", ranks=[0, 1], layers=2 if model == "qwen3_moe" else 1)
    check(stages[2:], label="stage1", ranks=[2, 3], layers=2)
    assert len(stages[0]["workers"]) == len(stages[2]["workers"]) == 1
    assert stages[0]["workers"] != stages[2]["workers"]
    assert (tmp_path / "cycles.jsonl").exists() and (tmp_path / "cycles.stage1.jsonl").exists()


def test_a_stage_without_moe_layers_serves_and_the_other_is_balanced(tmp_path: Path) -> None:
    folder = models.write_deepseek(tmp_path / "model", layers=3)
    (plain,) = run(plain_job(folder, PIPELINE), tmp_path / "plain", ranks=1, VLLM_PP_LAYER_PARTITION="1,2")
    (moved,) = run(moving_job(folder, PIPELINE, tmp_path), tmp_path / "moved", ranks=1, VLLM_PP_LAYER_PARTITION="1,2")
    assert moved.tokens == plain.tokens * 2
    assert moved.parts[:2] == [[], []]
    check([worker[0] for worker in moved.parts[2:]], label="stage1", ranks=[2, 3], layers=2)


@pytest.mark.skipif(
    vllm.__version__.startswith("0.30."), reason="vLLM 0.30 launches Triton kernels to draft on CPU too, and fails"
)
def test_a_draft_model_has_a_balancer_of_its_own(tmp_path: Path) -> None:
    folder = models.write_deepseek(tmp_path / "model", draft=True)
    plain = run(plain_job(folder, SPECULATIVE), tmp_path / "plain")
    moved = run(moving_job(folder, SPECULATIVE, tmp_path), tmp_path / "moved")
    for ours, theirs in zip(moved, plain, strict=True):
        assert ours.tokens == theirs.tokens * 2
        assert ours.drafts == theirs.drafts * 2
        assert len(theirs.drafts[0]) < TOKENS, "no drafted token was accepted"
    parts = [rank.parts[0] for rank in moved]
    by_label = {label: [next(p for p in own if p["label"] == label) for own in parts] for label in ("", "draft")}
    check(by_label[""], label="", ranks=[0, 1], layers=2)
    check(by_label["draft"], label="draft", ranks=[0, 1], layers=1)
    assert len(parts[0][0]["workers"]) == 2
    assert (tmp_path / "cycles.jsonl").exists() and (tmp_path / "cycles.draft.jsonl").exists()
