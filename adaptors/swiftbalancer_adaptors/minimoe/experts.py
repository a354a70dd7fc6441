"""The experts of one rank: slot tensors, and two ways to run the rows that arrived for each slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftbalancer.errors import ConfigError
from swiftbalancer_adaptors.minimoe.config import ModelConfig


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows at the rank of their slots.

    `x` `[m, hidden]` as they arrived; `by_slot` `[m]` int64 their order by local slot, padding last; `counts`
    `[slots_per_rank]` int32 rows of each slot, without padding.
    """

    x: Tensor
    by_slot: Tensor
    counts: Tensor


class SlotWeights:
    """The weights in this rank's slots; the balancer overwrites them in place between forward passes.

    Per layer `w_gate_up` `[slots_per_rank, 2 * expert_hidden, hidden]` and `w_down`
    `[slots_per_rank, hidden, expert_hidden]`, contiguous, at addresses that never change.
    """

    def __init__(self, config: ModelConfig, slots_per_rank: int, *, device: torch.device, dtype: torch.dtype) -> None:
        up = (slots_per_rank, 2 * config.expert_hidden, config.hidden)
        down = (slots_per_rank, config.hidden, config.expert_hidden)
        layers = range(config.num_layers)
        self.w_gate_up = [torch.zeros(up, device=device, dtype=dtype) for _ in layers]
        self.w_down = [torch.zeros(down, device=device, dtype=dtype) for _ in layers]

    def of_layer(self, layer: int) -> list[Tensor]:
        """The tensors an expert of this layer consists of, each `[slots_per_rank, ...]`."""
        return [self.w_gate_up[layer], self.w_down[layer]]


class ExpertKernel(Protocol):
    """Runs the rows that arrived through the experts in the slots of one layer."""

    def __call__(self, layer: int, arrived: Rows) -> Tensor:
        """`[m, hidden]` in the order of `arrived.x`; undefined for rows that are padding."""
        ...


class ChunkedExperts:
    """Matrix products of one fixed shape, so that a row's result depends on nothing but the row and the expert.

    A BLAS may choose another kernel, and another order of summation, for another number of rows; cutting every
    slot's rows into chunks of exactly `chunk` (the last one padded) leaves it no choice. Reads the counts on the
    host: not for captured graphs.
    """

    def __init__(self, weights: SlotWeights, *, chunk: int) -> None:
        self._chunk = chunk
        self._up = [[slot.t() for slot in tensor] for tensor in weights.w_gate_up]
        self._down = [[slot.t() for slot in tensor] for tensor in weights.w_down]

    def __call__(self, layer: int, arrived: Rows) -> Tensor:
        """See `ExpertKernel`."""
        counts = arrived.counts.tolist()
        if not any(counts):
            return torch.zeros_like(arrived.x)
        chunks = [-(-count // self._chunk) for count in counts]
        place = self._places(arrived, counts, chunks)
        slots = [slot for slot, num in enumerate(chunks) for _ in range(num)]
        source = place.new_zeros(len(slots) * self._chunk).index_copy_(0, place, _ascending(place))
        x = arrived.x.index_select(0, source)
        inner = self._product(x, self._up[layer], slots)
        gate, up = inner.chunk(2, -1)
        return self._product(F.silu(gate) * up, self._down[layer], slots).index_select(0, place)

    def _places(self, arrived: Rows, counts: list[int], chunks: list[int]) -> Tensor:
        """`[m]` int64, where each arrived row goes in a layout that pads every slot to whole chunks."""
        shift, begin = [], 0
        for count, num in zip(counts, chunks, strict=True):
            shift.append(begin)
            begin += num * self._chunk - count
        device = arrived.x.device
        skipped = torch.tensor(shift, device=device).repeat_interleave(arrived.counts, output_size=sum(counts))
        place = torch.full((len(arrived.x),), begin + sum(counts) - 1, device=device)
        used = arrived.by_slot[: len(skipped)]
        return place.index_copy_(0, used, skipped + _ascending(used))

    def _product(self, x: Tensor, experts: list[Tensor], slots: list[int]) -> Tensor:
        """Each chunk of `x` by the matrix of its slot."""
        out = x.new_empty(len(x), experts[0].shape[1])
        parts, targets = torch.split(x, self._chunk), torch.split(out, self._chunk)
        for part, target, slot in zip(parts, targets, slots, strict=True):
            torch.mm(part, experts[slot], out=target)
        return out


class GroupedExperts:
    """One grouped matrix product over all slots; counts stay on the device, so it can be captured in a graph.

    Needs bfloat16 and torch's grouped product (CUDA, torch 2.8 or later); raises `ConfigError` otherwise.
    """

    def __init__(self, weights: SlotWeights) -> None:
        self._weights = weights
        self._product = _grouped_product()
        if weights.w_down[0].dtype != torch.bfloat16:
            raise ConfigError("minimoe.dtype: the padded exchange on an accelerator needs bfloat16")

    def __call__(self, layer: int, arrived: Rows) -> Tensor:
        """See `ExpertKernel`."""
        ends = arrived.counts.cumsum(0, dtype=torch.int32)
        w_gate_up, w_down = self._weights.of_layer(layer)
        x = arrived.x.index_select(0, arrived.by_slot)
        gate, up = self._product(x, w_gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        out: Tensor = self._product(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
        return torch.empty_like(out).index_copy_(0, arrived.by_slot, out)


def _ascending(like: Tensor) -> Tensor:
    """0, 1, 2, ... as many as `like` has elements."""
    return torch.arange(len(like), device=like.device)


def _grouped_product() -> Callable[..., Any]:
    product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        raise ConfigError(
            f"minimoe.exchange: padded on an accelerator needs torch 2.8 or later, not {torch.__version__}"
        )
    found: Callable[..., Any] = product
    return found
