"""Which part of a served model one balancer looks after, and what of the options must be its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from swiftbalancer.config import Config


@dataclass(frozen=True, slots=True)
class Part:
    """The MoE layers of one model on one pipeline stage; a draft model lives on the last stage."""

    stage: int = 0
    num_stages: int = 1
    draft: bool = False

    @property
    def label(self) -> str:
        """Empty for the first stage of the served model: alone, it needs none."""
        if self.draft:
            return "draft"
        return f"stage{self.stage}" if self.stage else ""

    def named(self, model_name: str) -> str:
        """The model's name, different for every part: recordings and `swiftbalancer top` tell engines by it."""
        return f"{model_name} ({self.label})" if self.label and f"({self.label})" not in model_name else model_name

    def own(self, config: Config) -> Config:
        """The options with a metrics port and an event log that no other part uses.

        Stage `p` has the given port plus `p`, the draft model the one after the last stage's.
        """
        metrics = config.metrics
        if not self.label:
            return config
        if metrics.port is not None:
            metrics = replace(metrics, port=metrics.port + (self.num_stages if self.draft else self.stage))
        if metrics.event_log is not None:
            path = Path(metrics.event_log)
            metrics = replace(metrics, event_log=str(path.with_name(f"{path.stem}.{self.label}{path.suffix}")))
        return replace(config, metrics=metrics)


def part_of(model_config: Any) -> Part:
    """The part that a model with this configuration is on this rank. In vLLM's workers, while models are loaded."""
    from vllm.config import get_current_vllm_config
    from vllm.distributed.parallel_state import get_pp_group

    draft = model_config is draft_of(get_current_vllm_config())
    return Part(get_pp_group().rank_in_group, get_pp_group().world_size, draft)


def draft_of(vllm_config: Any) -> Any:
    """The configuration of the draft model; None without one. To drafts made without a model, such as ngram's, vLLM
    gives the served model's own."""
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    return None if draft is vllm_config.model_config else draft
