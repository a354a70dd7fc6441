"""What one run of the vLLM benchmark is asked to do, and the model it serves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODES = ("off", "static", "vllm", "ours")
LAYOUTS = ("one_process", "processes")
"""Each rank with an engine of its own around it, in one process; or one engine, and a process for each rank."""
KINDS = ("idle", "planning", "moving", "committing")
EXPERTS = 128
SUB_WINDOW_STEPS = 32
"""As by default, about: dispatch tables are renewed as often."""


@dataclass
class Phase:
    """`steps` decode steps; `rebalance`: whether the balancer runs. Routers are re-skewed in any case.

    Phases with the same `seed` decode the same prompts under the same routers. A phase called `settle` decodes
    until the first cycle has been committed, so that the planner's start is not measured. One called `sleep` sends
    the engine to sleep and wakes it; `--engine` must enable that.
    """

    name: str
    seed: str
    rebalance: bool
    steps: int

    @classmethod
    def parse(cls, text: str) -> Phase:
        """`NAME[=SEED]:REBALANCE:STEPS`; the seed is the name unless given."""
        name, rebalance, steps = text.split(":")
        name, _, seed = name.partition("=")
        return cls(name, seed or name, rebalance == "1", int(steps))


UNMEASURED = frozenset(("settle", "sleep"))
"""Phases of which no step counts."""


@dataclass
class Settings:
    """One run; everything a rank process needs to know."""

    mode: str
    out: str
    tag: str
    gpus: int = 2
    layers: int = 48
    batch: int = 64
    redundant: int = 16
    top_k: int = 8
    interval: int = 60
    skew: float = 0.7
    dtype: str = "bfloat16"
    greedy: bool = False
    tiny: bool = False
    pin: bool = False
    one_gpu: bool = False
    pieces: bool = False
    layout: str = "one_process"
    limit_s: int = 200
    phases: list[Phase] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)


def sub_windows(interval: int) -> tuple[int, int]:
    """How many to a rebalance, and their steps."""
    number = max(round(interval / SUB_WINDOW_STEPS), 1)
    return number, max(interval // number, 1)


def load_settings(path: Path) -> Settings:
    values = json.loads(path.read_text())
    phases = [Phase(**phase) for phase in values.pop("phases")]
    return Settings(**values, phases=phases)


def model_name(settings: Settings) -> str:
    return f"model-{settings.layers}-top{settings.top_k}{'-tiny' if settings.tiny else ''}"


def write_model(folder: Path, settings: Settings) -> None:
    """The configuration of an MoE with the geometry of Qwen3-30B-A3B; its weights are made in each process."""
    tiny = settings.tiny
    hidden = 64 if tiny else 2048
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 512 if tiny else 151936,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": 32 if tiny else 768,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 4 if tiny else 32,
        "num_key_value_heads": 2 if tiny else 4,
        "head_dim": 32 if tiny else 128,
        "max_position_embeddings": 4096,
        "decoder_sparse_step": 1,
        "num_experts_per_tok": settings.top_k,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": settings.dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
