"""The one flag on Ascend with Model Runner V1: what vllm-ascend itself must be told, set or refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from swiftbalancer.config import FLAG, Config
from swiftbalancer.errors import ConfigError, UnsupportedEngine
from swiftbalancer.topology import Topology
from swiftbalancer.vendors import ASCEND

KEY = FLAG
HOOKS = "ascend-v1"
"""Tells worker processes which hooks to install."""
SWITCH = "DYNAMIC_EPLB"
"""vllm-ascend refuses `dynamic_eplb` without it."""
SERIES = tuple(f"0.{minor}" for minor in range(13, 28))
"""Minor releases of vllm-ascend whose source fits the V1 hooks (0.27: its main branch of August 2026)."""
V2_SERIES = ("0.27",)
"""vLLM releases under which vllm-ascend's Model Runner V2 was read."""
ON = ("1", "true")


def on_ascend() -> bool:
    """Whether this process runs vLLM's Ascend platform."""
    if importlib.util.find_spec("vllm_ascend") is None:
        return False
    from vllm.platforms import current_platform

    return bool(getattr(current_platform, "device_type", None) == ASCEND)


def on_v1_runner() -> bool:
    """Whether this engine runs vllm-ascend's Model Runner V1; V2 runs only when asked for."""
    return on_ascend() and os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0").lower() not in ON


def knows_v2(vllm_version: str) -> bool:
    """Whether this is vllm-ascend's Model Runner V2 on a vLLM whose hooks we know there."""
    return _minor(vllm_version) in V2_SERIES and on_ascend()


def unknown_release() -> str:
    """Why this vllm-ascend is left alone; empty if it is one we know."""
    version = importlib.metadata.version("vllm-ascend")
    if _minor(version) in SERIES:
        return ""
    return (
        f"swiftbalancer: vllm-ascend {version} is not one this release knows ({SERIES[0]} to {SERIES[-1]}); it is "
        "left alone and serves without swiftbalancer"
    )


def apply(args: Any, config: Config) -> None:
    """Sets `additional_config.eplb_config` and the environment; raises `ConfigError` for contradictions.

    Raises `UnsupportedEngine` without expert parallelism. Idempotent. Unknown keys of `eplb_config` are
    vllm-ascend's to refuse.
    """
    if getattr(args, "enable_eplb", False):
        raise ConfigError(
            "--enable-eplb: Model Runner V1 of vllm-ascend refuses it; drop it, the swiftbalancer flag is enough"
        )
    if not args.enable_expert_parallel:
        raise UnsupportedEngine(
            "swiftbalancer balances experts between expert-parallel ranks: add --enable-expert-parallel, with "
            "--tensor-parallel-size or --data-parallel-size of at least 2"
        )
    given = dict(args.additional_config)
    eplb = given.get("eplb_config") or {}
    if not isinstance(eplb, Mapping):
        raise ConfigError(f"additional_config.eplb_config: must be a mapping, got {eplb!r}")
    given["eplb_config"] = eplb_config(dict(eplb), config.num_redundant_experts)
    if given.get("mix_placement"):
        raise ConfigError(
            "additional_config.mix_placement: shared experts cannot be moved; drop it or the swiftbalancer flag"
        )
    args.additional_config = given
    os.environ[SWITCH] = "true"


def check(vllm_config: Any) -> None:
    """Raises `TopologyError` if slots do not divide over the ranks, with a number of redundant experts that would."""
    given = vllm_config.additional_config["eplb_config"]
    if given.get("expert_map_path"):
        return
    parallel = vllm_config.parallel_config
    num_ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    num_experts = vllm_config.model_config.get_num_experts()
    Topology.for_experts(num_experts, num_redundant=given["num_redundant_experts"], num_ranks=num_ranks)


def eplb_config(given: dict[str, Any], num_redundant: int | None) -> dict[str, Any]:
    """vllm-ascend's `eplb_config` as our updator needs it; raises `ConfigError` for what contradicts it."""
    where = "additional_config.eplb_config"
    if given.get("expert_map_record_path"):
        raise ConfigError(
            f"{where}.expert_map_record_path: vllm-ascend would record and not apply; drop it, and record loads with "
            f"additional_config.{KEY}"
        )
    theirs = given.get("num_redundant_experts", 0)
    if num_redundant is not None and theirs not in (0, num_redundant):
        raise ConfigError(
            f"{where}.num_redundant_experts {theirs} and additional_config.{KEY}.num_redundant_experts "
            f"{num_redundant} differ; give one of them"
        )
    if num_redundant and given.get("expert_map_path"):
        raise ConfigError(
            f"additional_config.{KEY}.num_redundant_experts: the file {where}.expert_map_path says how many slots "
            "there are; drop one of them"
        )
    return {
        **given,
        "dynamic_eplb": True,
        "num_redundant_experts": theirs if num_redundant is None else num_redundant,
    }


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
