"""The experts of one rank: slot tensors, and two ways to run the rows that arrived for each slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftbalancer.errors import ConfigError
from swiftbalancer_adaptors.minimoe.config import ModelConfig
from swiftbalancer_adaptors.minimoe.model import swiglu


class SlotWeights:
    """The weights in this rank's slots; the balancer overwrites them in place between forward passes.

    Per layer `w_gate_up` `[slots_per_rank, 2 * expert_hidden, hidden]` and `w_down`
    `[slots_per_rank, hidden, expert_hidden]`, contiguous, at addresses that never change.
    """

    def __init__(
        self, config: ModelConfig, slots_per_rank: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        up = (slots_per_rank, 2 * config.expert_hidden, config.hidden)
        down = (slots_per_rank, config.hidden, config.expert_hidden)
        layers = range(config.num_layers)
        self.w_gate_up = [torch.zeros(up, device=device, dtype=dtype) for _ in layers]
        self.w_down = [torch.zeros(down, device=device, dtype=dtype) for _ in layers]

    def of_layer(self, layer: int) -> list[Tensor]:
        """The tensors an expert of this layer consists of, each `[slots_per_rank, ...]`."""
        return [self.w_gate_up[layer], self.w_down[layer]]


class ExpertKernel(Protocol):
    """Runs rows grouped by slot through the experts in the slots of one layer."""

    def __call__(self, layer: int, rows: Tensor, counts: Tensor) -> Tensor:
        """`rows` `[m, hidden]` in the order of their slots, `counts` `[slots_per_rank]` rows each -> `[m, hidden]`.

        Rows beyond the sum of `counts` are padding; what comes out for them is undefined.
        """
        ...


class ChunkedExperts:
    """Matrix products of one fixed shape, so that a row's result depends on nothing but the row and the expert.

    A BLAS may choose another kernel, and another order of summation, for another number of rows; cutting every
    slot's rows into chunks of exactly `chunk` (the last one padded) leaves it no choice. Reads `counts` on the
    host: not for captured graphs.
    """

    def __init__(self, weights: SlotWeights, *, chunk: int) -> None:
        first = weights.w_gate_up[0]
        self._weights = weights
        self._chunk = chunk
        self._padded = torch.zeros(chunk, first.shape[2], device=first.device, dtype=first.dtype)

    def __call__(self, layer: int, rows: Tensor, counts: Tensor) -> Tensor:
        """See `ExpertKernel`."""
        out = torch.empty_like(rows)
        begin = 0
        w_gate_up, w_down = self._weights.of_layer(layer)
        for slot, count in enumerate(counts.tolist()):
            end = begin + count
            for start in range(begin, end, self._chunk):
                stop = min(start + self._chunk, end)
                done = swiglu(self._full(rows[start:stop]), w_gate_up[slot], w_down[slot])
                out[start:stop] = done[: stop - start]
            begin = end
        return out

    def _full(self, rows: Tensor) -> Tensor:
        if len(rows) == self._chunk:
            return rows
        self._padded[: len(rows)] = rows
        return self._padded


class GroupedExperts:
    """One grouped matrix product over all slots; counts stay on the device, so it can be captured in a graph.

    Needs bfloat16 and torch's grouped product (CUDA, torch 2.8 or later); raises `ConfigError` otherwise.
    """

    def __init__(self, weights: SlotWeights) -> None:
        self._weights = weights
        self._product = _grouped_product()
        if weights.w_down[0].dtype != torch.bfloat16:
            raise ConfigError("minimoe.dtype: grouped experts need bfloat16")

    def __call__(self, layer: int, rows: Tensor, counts: Tensor) -> Tensor:
        """See `ExpertKernel`."""
        ends = counts.cumsum(0, dtype=torch.int32)
        w_gate_up, w_down = self._weights.of_layer(layer)
        gate, up = self._product(rows, w_gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        out: Tensor = self._product(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
        return out


def _grouped_product() -> Callable[..., Any]:
    product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        raise ConfigError(f"minimoe.exchange: padded on an accelerator needs torch 2.8 or later, not {torch.__version__}")
    found: Callable[..., Any] = product
    return found
