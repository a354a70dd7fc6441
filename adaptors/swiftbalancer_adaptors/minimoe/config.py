"""Sizes of the model, and the named presets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from swiftbalancer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of `num_layers` blocks, each attention followed by an MoE layer, over bytes.

    `router_bias` is the standard deviation of a fixed per-expert bias that random weights get, so that they
    route as unevenly as trained ones; trained weights have none.
    """

    hidden: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 32
    top_k: int = 4
    expert_hidden: int = 64
    vocabulary: int = 256
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    router_bias: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.num_heads):
            raise ConfigError(f"model.hidden: {self.hidden} is not a multiple of 2 x {self.num_heads} heads")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"model.top_k: {self.top_k} is outside 1..{self.num_experts} experts")
        if self.num_layers < 1 or self.expert_hidden < 1:
            raise ConfigError(f"model: {self.num_layers} layers of width {self.expert_hidden}: need 1 or more")

    @property
    def head_size(self) -> int:
        return self.hidden // self.num_heads

    @property
    def expert_elements(self) -> int:
        """Numbers in one expert's weights."""
        return 3 * self.hidden * self.expert_hidden


PRESETS: dict[str, ModelConfig] = {
    "demo": ModelConfig(),
    "tiny": ModelConfig(hidden=32, num_layers=2, num_heads=2, num_experts=8, top_k=2, expert_hidden=16),
    "qwen3-30b": ModelConfig(hidden=2048, num_heads=16, num_experts=128, top_k=8, expert_hidden=768, router_bias=1.0),
    "deepseek-v3": ModelConfig(
        hidden=7168, num_heads=56, num_experts=256, top_k=8, expert_hidden=2048, router_bias=1.0
    ),
}
"""`demo` has trained weights; the others are random, with the expert sizes of the models they are named after."""


def preset(name: str, *, num_layers: int | None = None) -> ModelConfig:
    """The preset of this name, with another number of layers if given; raises `ConfigError` if unknown."""
    if name not in PRESETS:
        raise ConfigError(f"minimoe.preset: unknown {name!r}; known: {', '.join(sorted(PRESETS))}")
    if num_layers is None or num_layers == PRESETS[name].num_layers:
        return PRESETS[name]
    if name == "demo":
        raise ConfigError(f"minimoe.num_layers: the demo's trained weights have {PRESETS[name].num_layers} layers")
    return replace(PRESETS[name], num_layers=num_layers)
