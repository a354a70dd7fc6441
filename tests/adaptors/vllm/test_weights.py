"""Real vLLM on two CPU ranks: weights that sleep, are loaded again, arrive in pieces, are saved or moved by vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adaptors.vllm.engine import Job, Result
from tests.adaptors.vllm.harness import forced_moves, log_of, run

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(1800)

TOKENS = 48


@pytest.fixture(scope="module")
def reloaded(qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """The same rounds and reload without balancing. vLLM's reload itself changes tokens on CPU."""
    job = Job(str(qwen3_moe), max_tokens=TOKENS, rounds=3, script="reload_weights")
    return run(job, tmp_path_factory.mktemp("reloaded"))


def test_weights_are_reloaded_into_the_slots_the_loader_fills(
    qwen3_moe: Path, reloaded: list[Result], tmp_path: Path
) -> None:
    job = Job(str(qwen3_moe), forced_moves(), max_tokens=TOKENS, rounds=3, wait_for_cycles=2, script="reload_weights")
    ranks = run(job, tmp_path)
    assert ranks[0].notes["before"] != ranks[0].notes["after"], "nothing had moved: the reload had nothing to undo"
    for rank, plain in zip(ranks, reloaded, strict=True):
        assert rank.tokens == plain.tokens
        assert rank.attached
        assert rank.maps_match


def test_weights_and_maps_survive_sleep_and_balancing_goes_on(
    qwen3_moe: Path, reloaded: list[Result], tmp_path: Path
) -> None:
    """Level 1; level 2 with weights preserved; level 2 with weights loaded anew: `LLM.sleep` and `LLM.wake_up`."""
    job = Job(str(qwen3_moe), forced_moves(), max_tokens=TOKENS, rounds=4, wait_for_cycles=2, script="sleep_and_wake")
    ranks = run(job, tmp_path)
    for rank, plain in zip(ranks, reloaded, strict=True):
        assert rank.notes["moved"] == [True] * 3, "experts were at home: sleep could do no harm"
        assert rank.notes["asleep"] == [True] * 3, "vLLM did not sleep"
        assert rank.notes["same"] == [True, False, False], "after level 1 balancing goes on, after level 2 anew"
        assert rank.tokens == [plain.tokens[0]] * 3 + [plain.tokens[2]]
        assert rank.maps_match


def test_weights_that_arrive_in_pieces_find_their_slots(qwen3_moe: Path, tmp_path: Path) -> None:
    """Passes in between start no balancing; updates that fail, at once or later, end the wait."""
    job = Job(str(qwen3_moe), forced_moves(), max_tokens=TOKENS, rounds=3, wait_for_cycles=2, script="update_weights")
    job.before = "replay_weights"
    for rank in run(job, tmp_path):
        assert rank.notes["moved"] == [True] * 3, "experts were at home: the update could do no harm"
        assert rank.notes["at home"] == [True, True]
        assert rank.notes["equal"], "the experts are not those of the slots the loader fills"
        assert rank.notes["balancing"] == [False, False]
        assert rank.notes["failed"] == ["RuntimeError", "KeyError"]
        assert rank.tokens[1] == rank.tokens[2] == rank.tokens[0]
        assert rank.attached and rank.maps_match


def test_saved_weights_are_in_the_slots_the_loader_fills(qwen3_moe: Path, tmp_path: Path) -> None:
    job = Job(str(qwen3_moe), forced_moves(), max_tokens=TOKENS, rounds=2, wait_for_cycles=2, script="save_weights")
    job.before = "replay_weights"
    for rank in run(job, tmp_path, SAVE_TO=str(tmp_path / "saved")):
        assert rank.notes["moved"], "experts were at home: saving could do no harm"
        assert rank.notes["experts"]
        assert rank.notes["equal"]
        assert rank.tokens[1] == rank.tokens[0]
        assert rank.attached


def test_vllm_may_rearrange_its_experts_itself_and_balancing_ends(qwen3_moe: Path, tmp_path: Path) -> None:
    job = Job(str(qwen3_moe), forced_moves(), max_tokens=TOKENS, rounds=2, wait_for_cycles=2, script="hand_back")
    ranks = run(job, tmp_path)
    assert ranks[0].notes["workers"] == 1
    assert ranks[0].notes["workers after"] == 0
    for rank in ranks:
        assert rank.tokens[1] == rank.tokens[0]
        assert not rank.attached
        assert rank.notes["replicas"] == 4 * 20, "vLLM's maps count each replica once"
    assert "balancing ends here" in log_of(tmp_path, 0)
