"""The model itself: embedding, attention, router, norms; experts are reached through a seam.

Follows the common decoder of open MoE models: pre-norm RMSNorm, rotary positions, SwiGLU experts, a softmax
router with renormalised top-k weights (as in Mixtral and Qwen). Only the experts differ between training (all
experts in one process) and serving (experts spread over ranks), so the block calls a `Mixture` for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftbalancer_adaptors.minimoe.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the router sends `n` tokens.

    `ids` `[n, top_k]` int64 logical experts, best first; `weights` `[n, top_k]` float32, summing to 1;
    `probabilities` `[n, experts]` float32, the whole softmax.
    """

    ids: Tensor
    weights: Tensor
    probabilities: Tensor


class Mixture(Protocol):
    """Runs the experts of one layer."""

    def __call__(self, layer: int, x: Tensor, routing: Routing) -> Tensor:
        """`x` `[n, hidden]` -> the weighted sum of each token's experts, `[n, hidden]`."""
        ...


class RmsNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` -> the same shape and dtype."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight.float()).to(x.dtype)


def rotary_tables(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    """`[2, length, head_size / 2]` float32, cosines and sines of the rotary angles (Su et al. 2021)."""
    half = config.head_size // 2
    speed = config.rope_base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * speed[None, :]
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """`x` `[batch, heads, length, head_size]` turned by its position."""
    first, second = x.float().chunk(2, -1)
    cos, sin = tables[0], tables[1]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention within each sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, tables: Tensor) -> Tensor:
        """`x` `[batch, length, hidden]` -> the same shape."""
        batch, length, hidden = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, hidden // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = rotate(query, tables), rotate(key, tables)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.out(seen.transpose(1, 2).reshape(batch, length, hidden))
        return projected


class Router(nn.Module):
    """Softmax over experts, top-k of it, renormalised; always float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None

    def forward(self, x: Tensor) -> Routing:
        """`x` `[n, hidden]` -> its routing."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            logits = F.linear(x.float(), self.weight.float(), bias)
            probabilities = logits.softmax(-1)
            weights, ids = probabilities.topk(self.top_k, -1)
            return Routing(ids, weights / weights.sum(-1, keepdim=True), probabilities)


class Block(nn.Module):
    """One decoder block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RmsNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = RmsNorm(config.hidden, config.norm_eps)
        self.router = Router(config)

    def forward(self, x: Tensor, tables: Tensor, mixture: Mixture) -> Tensor:
        """`x` `[batch, length, hidden]` -> the same shape."""
        x = x + self.attention(self.attention_norm(x), tables)
        tokens = self.moe_norm(x).flatten(0, 1)
        return x + mixture(self.layer, tokens, self.router(tokens)).view_as(x)


class MiniMoe(nn.Module):
    """Everything but the experts: what each rank holds in full."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RmsNorm(config.hidden, config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor, mixture: Mixture) -> Tensor:
        """`tokens` `[batch, length]` int64 bytes -> logits `[batch, length, vocabulary]` of the next byte."""
        tables = rotary_tables(self.config, tokens.shape[1], tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, tables, mixture)
        logits: Tensor = self.head(self.norm(x))
        return logits
