"""Made-up expert loads that drift, for benchmarks: `[windows, sub_windows, layers, experts]` token counts.

Every generator is a pure function of its arguments and `seed`; counts are Poisson samples of a rate.
- `domain_mixture`: 6 domains, each with its own lognormal expert popularity on top of a common one; the log weight
  of every domain walks by `drift` per window (an Ornstein-Uhlenbeck walk of spread 1.5).
- `lognormal_walk`: log rates start normal with deviation 0.8 and walk independently.
- `zipf_exchange`: Zipf rates (exponent 0.6) over a random order; in each sub-window a share of experts changes rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model on a group of ranks. `tokens` enter every layer in a sub-window, each to `top_k` experts."""

    layers: int
    experts: int
    ranks: int
    slots: int
    top_k: int = 8
    nodes: int = 1
    tokens: int = 65536


SHAPES = {
    "r1-ep32": Shape(layers=58, experts=256, ranks=32, slots=288, nodes=4),
    "r1-ep64": Shape(layers=58, experts=256, ranks=64, slots=320, nodes=8),
    "r1-ep128": Shape(layers=58, experts=256, ranks=128, slots=384, nodes=16),
    "r1-ep256": Shape(layers=58, experts=256, ranks=256, slots=512, nodes=32),
    "r1-ep512": Shape(layers=58, experts=256, ranks=512, slots=1024, nodes=64),
    "qwen3-ep16": Shape(layers=94, experts=128, ranks=16, slots=144, nodes=2),
    "qwen3-ep32": Shape(layers=94, experts=128, ranks=32, slots=160, nodes=4),
    "kimi-ep64": Shape(layers=60, experts=384, ranks=64, slots=448, nodes=8),
}


@dataclass(frozen=True, slots=True)
class Length:
    """How much of a stream to make, and how fast it drifts."""

    windows: int = 13
    sub_windows: int = 8
    drift: float = 0.5
    seed: int = 1
    shift: bool = False
    """`domain_mixture`: the first window has one mixture, all others have another, unrelated one."""


def domain_mixture(shape: Shape, length: Length) -> FloatArray:
    """Domains whose mixture walks: what a change of users looks like."""
    rng = np.random.default_rng(length.seed)
    common = rng.normal(0, 0.75, (1, shape.layers, shape.experts))
    domains = np.exp(common + rng.normal(0, 0.66, (6, shape.layers, shape.experts)))
    domains /= domains.sum(-1, keepdims=True)
    level = rng.normal(0, 1.5, 6)
    step = length.drift / np.sqrt(length.sub_windows)
    first, second = (rng.normal(0, 1.5, 6), rng.normal(0, 1.5, 6)) if length.shift else (level, level)
    counts = []
    for nth in range(length.windows * length.sub_windows):
        level = level * (1 - 0.5 * (step / 1.5) ** 2) + rng.normal(0, step, 6)
        if length.shift:
            level = first if nth < length.sub_windows else second
        mixture = np.exp(level - level.max())
        counts.append(_sampled(rng, np.tensordot(mixture / mixture.sum(), domains, 1), shape))
    return _in_windows(counts, length)


def lognormal_walk(shape: Shape, length: Length) -> FloatArray:
    """Experts that drift independently of each other."""
    rng = np.random.default_rng(length.seed)
    steps = length.windows * length.sub_windows
    level = rng.normal(0, 0.8, (shape.layers, shape.experts))
    counts = []
    for _ in range(steps):
        level = level + rng.normal(0, length.drift / 4 / np.sqrt(length.sub_windows), level.shape)
        counts.append(_sampled(rng, np.exp(level), shape))
    return _in_windows(counts, length)


def zipf_exchange(shape: Shape, length: Length) -> FloatArray:
    """A fixed popularity curve on which experts change places."""
    rng = np.random.default_rng(length.seed)
    curve: FloatArray = np.arange(1, shape.experts + 1, dtype=np.float64) ** -0.6
    order = np.stack([rng.permutation(shape.experts) for _ in range(shape.layers)])
    counts = []
    for _ in range(length.windows * length.sub_windows):
        for row in order:
            pick = rng.choice(shape.experts, max(2, int(0.02 * length.drift * shape.experts)), replace=False)
            row[pick] = row[np.roll(pick, 1)]
        counts.append(_sampled(rng, curve[order], shape))
    return _in_windows(counts, length)


def _sampled(rng: np.random.Generator, rates: FloatArray, shape: Shape) -> FloatArray:
    """Counts of `rates` `[layers, experts]`; hardly an expert gets more than 0.9 of all tokens."""
    rates = rates / rates.sum(-1, keepdims=True)
    for _ in range(3):
        rates = np.minimum(rates, 0.9 / shape.top_k)
        rates = rates / rates.sum(-1, keepdims=True)
    return rng.poisson(rates * shape.tokens * shape.top_k).astype(np.float64)


def _in_windows(counts: list[FloatArray], length: Length) -> FloatArray:
    return np.array(counts).reshape(length.windows, length.sub_windows, *counts[0].shape)


STREAMS: dict[str, Callable[[Shape, Length], FloatArray]] = {
    "domains": domain_mixture,
    "lognormal": lognormal_walk,
    "zipf": zipf_exchange,
}
