"""What the flag makes of vLLM's configuration, and what it refuses, in a real vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.adaptors.vllm.harness import HERE, environment, free_port

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(600)


def flagged(**options: Any) -> dict[str, Any]:
    return {"swiftbalancer": {"enable": True} | options}


@pytest.fixture(scope="module")
def outcomes(qwen3_moe: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases in one process, since importing vLLM takes longer than any of them."""
    folder = tmp_path_factory.mktemp("configure")
    base = {
        "model": str(qwen3_moe),
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "distributed_executor_backend": "external_launcher",
        "skip_tokenizer_init": True,
    }
    four = flagged(num_redundant_experts=4)
    cases: dict[str, dict[str, Any]] = {
        "flag": base | {"additional_config": four},
        "no flag": base,
        "their redundant": base
        | {"additional_config": flagged(), "enable_eplb": True, "eplb_config": {"num_redundant_experts": 2}},
        "logging": base | {"additional_config": four, "eplb_config": {"log_balancedness": True}},
        "two numbers": base
        | {"additional_config": four, "enable_eplb": True, "eplb_config": {"num_redundant_experts": 2}},
        "odd": base | {"additional_config": flagged(num_redundant_experts=3)},
        "elastic": base | {"additional_config": four, "enable_elastic_ep": True},
        "fault tolerance": base | {"additional_config": four, "enable_fault_tolerance": True},
        "lora": base | {"additional_config": four, "enable_lora": True},
        "offload": base | {"additional_config": four, "offload_group_size": 2},
        "ngram": base
        | {
            "additional_config": flagged(num_redundant_experts=4, worker={"endpoint": "ipc:///tmp/never.sock"}),
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 4},
        },
        "policy": base | {"additional_config": four, "enable_eplb": True, "_policy": "theirs"},
        "one rank": base | {"additional_config": four, "tensor_parallel_size": 1},
        "no ep": base | {"additional_config": four, "enable_expert_parallel": False},
        "dense": base | {"model": str(dense), "additional_config": four},
        "typo": base | {"additional_config": flagged(num_redundant_expert=4)},
        "off": base | {"additional_config": flagged(mode="off")},
        "padding": base | {"additional_config": four, "_version": "0.24.0"},
        "unknown version": base | {"additional_config": four, "_version": "0.99.0"},
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    env = environment(folder / "plugins", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    env["MASTER_PORT"] = str(free_port())
    command = [sys.executable, str(HERE / "configure.py"), str(folder / "cases.json"), str(folder / "out.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results: dict[str, dict[str, Any]] = json.loads((folder / "out.json").read_text())
    results["log"] = {"text": done.stdout + done.stderr}
    return results


def test_one_flag_allocates_slots_and_turns_vllms_loop_off(outcomes: dict[str, dict[str, Any]]) -> None:
    expected = {"enabled": True, "redundant": 4, "async": False, "logs": False, "ray copies": "SWIFTBALANCER_IN_VLLM"}
    assert outcomes["flag"] == expected


@pytest.mark.parametrize("case", ["no flag", "off"])
def test_without_the_flag_the_configuration_is_vllms(case: str, outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes[case]["enabled"] is False
    assert outcomes[case]["redundant"] == 0
    assert outcomes[case]["ray copies"] == ""


def test_vllms_own_number_of_redundant_experts_is_kept(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["their redundant"]["redundant"] == 2
    assert outcomes["their redundant"]["async"] is False


def test_drafts_without_a_model_are_no_part_of_their_own(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["ngram"] == outcomes["flag"]


def test_vllms_blocking_balance_log_is_turned_off(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["logging"]["logs"] is False


@pytest.mark.parametrize(
    ("case", "error", "advice"),
    [
        ("two numbers", "ConfigError", "give one of them"),
        ("odd", "TopologyError", "4 redundant experts would"),
        ("elastic", "UnsupportedEngine", "--enable-elastic-ep"),
        ("lora", "UnsupportedEngine", "--enable-lora"),
        ("offload", "UnsupportedEngine", "--offload-group-size"),
        ("policy", "ConfigError", "--eplb-config.policy theirs"),
        ("one rank", "ValidationError", "parallel"),
        ("no ep", "UnsupportedEngine", "add --enable-expert-parallel"),
        ("dense", "ValidationError", "Number of experts"),
        ("typo", "ConfigError", "num_redundant_expert: unknown key"),
    ],
)
def test_what_cannot_work_is_refused_at_start_with_what_to_change(
    case: str, error: str, advice: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert outcomes[case].get("error") == error, outcomes[case]
    assert advice in outcomes[case]["message"]


def test_ranks_that_may_die_are_refused_where_vllm_lets_them(outcomes: dict[str, dict[str, Any]]) -> None:
    """vLLM 0.24 has no such option."""
    message = outcomes["fault tolerance"]["message"]
    assert "--enable-fault-tolerance: ranks may not come and go" in message or "unexpected keyword" in message


def test_a_vllm_that_counts_padding_is_warned_of(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["padding"] == outcomes["flag"]
    assert outcomes["log"]["text"].count("vLLM 0.24.0 counts the padding") == 1


def test_an_unknown_vllm_is_warned_of_and_left_alone(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["unknown version"] == outcomes["no flag"]
    assert "vLLM 0.99.0 is not one this release knows" in outcomes["log"]["text"]
