"""What tokens, reads of weights and transfers cost in seconds, and whether moving experts pays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds and bytes, measured where the engine can and otherwise of a DeepSeek-V3 layer on an H200.

    The time of a rank in a layer is `seconds_per_token * (tokens + tokens_per_activation * activated experts)`,
    over its speed. In prefill every expert is activated anyway and only tokens count; in decode reading the
    weights of an activated expert often costs more than its few tokens (METRO, arXiv 2512.09277).
    """

    seconds_per_token: float = 1.5e-7
    """Time one rank needs for one token of one expert."""
    tokens_per_activation: float = 0.0
    """Tokens that take as long as reading one expert's weights in a step; 0: only tokens count."""
    steps_per_sub_window: float = 32.0
    """Forward passes each sub-window of the loads covers."""
    expert_bytes: float = 44.0 * 2**20
    """Size of one expert of one layer."""
    bytes_per_s: float = 100e9
    """Rate at which a rank receives from its own node."""
    remote_bytes_per_s: float = 40e9
    """Rate at which a rank receives from another node."""
    inflation: float = 0.1
    """Share of a transfer's duration that serving loses to it."""
    windows_until_replan: float = 1.0
    """How many times the observed load will be served before the next plan."""

    def __post_init__(self) -> None:
        for name in (
            "seconds_per_token",
            "steps_per_sub_window",
            "expert_bytes",
            "bytes_per_s",
            "remote_bytes_per_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"cost.{name}: {getattr(self, name)} must be above 0")
        for name in ("tokens_per_activation", "inflation", "windows_until_replan"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"cost.{name}: {getattr(self, name)} must not be below 0")

    def activations(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Expected steps of a sub-window in which a replica with `tokens` of its load is used at all.

        Tokens are taken as spread over the steps independently (Poisson).
        """
        per_step = tokens / self.steps_per_sub_window
        return self.steps_per_sub_window * -np.expm1(-per_step)

    def worth(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """The tokens of replicas in a sub-window and what reading their weights is worth, in tokens."""
        if self.tokens_per_activation == 0:
            return tokens
        return tokens + self.tokens_per_activation * self.activations(tokens)
