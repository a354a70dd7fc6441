"""Real vLLM on two CPU ranks: balancing must not change a single token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.adaptors.vllm.engine import Job
from tests.adaptors.vllm.harness import forced_moves, log_of, run, start

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(1800)

STEPS = 160


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek"])
def test_forced_moves_every_cycle_change_no_token(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(model)
    plain = run(Job(str(folder), max_tokens=STEPS), tmp_path / "plain")
    job = Job(str(folder), forced_moves(), max_tokens=STEPS, rounds=3, wait_for_cycles=1, script="vllms_own_loop")
    job.before = "watch_vllms_own_loop"
    moved = run(job, tmp_path / "moved")
    assert not plain[0].attached
    assert moved[0].attached
    assert moved[0].stats["placement_updates"] >= 3
    assert moved[0].stats["experts_moved"] > 0
    for ours, theirs in zip(moved, plain, strict=True):
        assert ours.tokens == theirs.tokens * 3
        assert ours.notes["called"] == [], "vLLM's own loop ran beside ours"
    assert moved[0].placement == moved[1].placement
    assert all(rank.maps_match for rank in moved)


def test_data_parallel_ranks_agree_and_change_no_token(qwen3_moe: Path, tmp_path: Path) -> None:
    ranks = {"tensor_parallel_size": 1, "data_parallel_size": 2}
    plain = run(Job(str(qwen3_moe), engine=ranks, max_tokens=48), tmp_path / "plain")
    job = Job(str(qwen3_moe), forced_moves(), ranks, max_tokens=48, rounds=2, wait_for_cycles=2)
    moved = run(job, tmp_path / "moved")
    assert moved[0].stats["placement_updates"] >= 2
    for ours, theirs in zip(moved, plain, strict=True):
        assert ours.tokens == theirs.tokens * 2
        assert ours.maps_match
    assert moved[0].placement == moved[1].placement


def test_weighted_tables_decide_which_replica_serves(qwen3_moe: Path, tmp_path: Path) -> None:
    additional = forced_moves(policy={"name": "swift", "min_gain": 0.0, "target_imbalance": 1.0})
    job = Job(str(qwen3_moe), additional, max_tokens=STEPS, rounds=2, wait_for_cycles=3, script="count_by_column")
    ranks = run(job, tmp_path / "weighted")
    table, counts = np.array(ranks[0].notes["table"]), np.array(ranks[0].notes["counts"])
    assert ranks[0].uneven_rows > 0, "no expert was split unevenly, so nothing was tested"
    assert ranks[0].tokens[1] == ranks[0].tokens[0]
    checked = 0
    for layer, expert in np.ndindex(table.shape[:2]):
        slots, columns = np.unique(table[layer, expert], return_counts=True)
        served = counts[layer, slots]
        if len(slots) > 1 and columns.max() >= 3 * columns.min() and served.sum() >= 200:
            assert served[columns.argmax()] > served[columns.argmin()]
            checked += 1
    named = np.zeros(counts.shape, bool)
    named[np.arange(len(table))[:, None, None], table] = True
    assert not counts[~named].any(), "a slot that stands in no column served tokens"
    assert checked or not named.all(), "no row was uneven enough to tell"


def test_where_reads_of_weights_count_one_replica_of_each_expert_serves(qwen3_moe: Path, tmp_path: Path) -> None:
    policy = {"name": "swift", "min_gain": 0.0, "target_imbalance": 1.0, "tokens_per_activation": 10_000}
    job = Job(
        str(qwen3_moe),
        forced_moves(policy=policy),
        max_tokens=STEPS,
        rounds=2,
        wait_for_cycles=1,
        script="count_by_column",
    )
    ranks = run(job, tmp_path)
    table, counts = np.array(ranks[0].notes["table"]), np.array(ranks[0].notes["counts"])
    assert (table == table[..., :1]).all(), "an expert has two replicas in use"
    assert all(rank.tokens[1] == rank.tokens[0] for rank in ranks)
    assert all(rank.maps_match for rank in ranks)
    served = counts > 0
    assert served.any()
    assert served.sum(1).max() <= table.shape[1], "a replica without a column served tokens"


def test_without_the_flag_vllm_is_not_touched(qwen3_moe: Path, tmp_path: Path) -> None:
    (rank,) = run(Job(str(qwen3_moe), max_tokens=4, script="what_is_wrapped"), tmp_path, ranks=1)
    assert rank.notes["wrapped"] == ["EngineArgs.create_engine_config"]


def test_with_the_flag_the_hooks_are_in_place(qwen3_moe: Path, tmp_path: Path) -> None:
    ranks = run(Job(str(qwen3_moe), forced_moves(), max_tokens=4, script="what_is_wrapped"), tmp_path)
    assert {"EplbState.step", "EplbState.add_model", "Worker.reload_weights"} <= set(ranks[0].notes["wrapped"])


def test_an_unknown_vllm_serves_without_us(qwen3_moe: Path, tmp_path: Path) -> None:
    (plain,) = run(Job(str(qwen3_moe), max_tokens=16), tmp_path / "plain", ranks=1)
    job = Job(str(qwen3_moe), forced_moves(), max_tokens=16, script="what_is_wrapped", before="claim_another_version")
    (rank,) = run(job, tmp_path / "unknown", ranks=1)
    assert rank.tokens == plain.tokens
    assert rank.notes["wrapped"] == ["EngineArgs.create_engine_config"]
    assert "vLLM 0.99.0 is not one this release knows" in log_of(tmp_path / "unknown", 0)


def test_experts_that_cannot_be_balanced_are_refused_with_what_to_change(qwen3_moe: Path, tmp_path: Path) -> None:
    job = Job(str(qwen3_moe), forced_moves(), max_tokens=4, before="lack_support")
    processes = start(job, tmp_path)
    assert [process.wait(300) != 0 for process in processes] == [True, True]
    for rank in range(2):
        log = log_of(tmp_path, rank)
        assert "UnsupportedEngine: EPLB is not supported UnquantizedFusedMoEMethod." in log, log[-4000:]
        assert "Use another --quantization or MoE backend, or drop the swiftbalancer flag" in log
