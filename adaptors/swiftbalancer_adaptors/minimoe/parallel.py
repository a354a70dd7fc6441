"""The expert-parallel mixture: dispatch table, exchange, experts, combination; and the counting.

The path of a token is that of production engines: the router names logical experts, the dispatch table turns
them into slots, an all-to-all carries the token to the slots' ranks, and a second one brings the results back.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from swiftbalancer.dispatch import column_of
from swiftbalancer_adaptors.minimoe.exchange import Exchange
from swiftbalancer_adaptors.minimoe.experts import ExpertKernel
from swiftbalancer_adaptors.minimoe.model import Routing

Route = Callable[[Tensor, int], Tensor]
"""`route(topk_ids, layer) -> slot_ids`: both `[n, top_k]` int64; where another mapping kernel can be put in."""


class TableRoute:
    """Slots by the dispatch table: token `i` of the batch uses column `column_of(i)` of its expert's row.

    `table` `[layers, experts, width]` int32 on the device; written in place between passes, never replaced.
    """

    def __init__(self, table: Tensor, max_tokens: int) -> None:
        columns = column_of(np.arange(max_tokens), table.shape[2])
        self._table = table
        self._columns = torch.from_numpy(columns).to(table.device)[:, None]

    def __call__(self, topk_ids: Tensor, layer: int) -> Tensor:
        """`[n, top_k]` logical experts -> `[n, top_k]` int64 slots."""
        return self._table[layer][topk_ids, self._columns[: len(topk_ids)]].long()


class Counters:
    """Tokens that arrived at this rank's slots, and passes; on the device, only ever added to in place.

    `load` `[layers, slots_per_rank]` int32, `passes` `[1]` int64. `recording` `[1]` int32 is 1 while this rank's
    tokens are load, and 0 in dummy and warm-up passes.
    """

    def __init__(self, num_layers: int, slots_per_rank: int, device: torch.device) -> None:
        self.load = torch.zeros(num_layers, slots_per_rank, dtype=torch.int32, device=device)
        self.passes = torch.zeros(1, dtype=torch.int64, device=device)
        self.recording = torch.ones(1, dtype=torch.int32, device=device)

    def mark(self, num_tokens: int, valid: Tensor | None) -> Tensor:
        """`[num_tokens]` int32, 1 for each token to be counted; `valid` `[num_tokens]` bool excludes padding."""
        if valid is None:
            return self.recording.expand(num_tokens)
        return valid.int() * self.recording


class ParallelMixture:
    """The `Mixture` of an expert-parallel rank. `route` may be replaced; `valid` holds for the pass under way."""

    def __init__(self, route: Route, exchange: Exchange, kernel: ExpertKernel, counters: Counters) -> None:
        self.route = route
        self.valid: Tensor | None = None
        self._exchange = exchange
        self._kernel = kernel
        self._counters = counters

    def __call__(self, layer: int, x: Tensor, routing: Routing) -> Tensor:
        """`x` `[n, hidden]` -> `[n, hidden]`; a collective: every rank of the group calls it at the same layer."""
        slots = self.route(routing.ids, layer)
        arrived = self._exchange.scatter(x, slots, self._counters.mark(len(x), self.valid))
        self._counters.load[layer] += arrived.counted
        out = self._kernel(layer, arrived.rows)
        results = self._exchange.gather(out, arrived.trip)
        return combine(results.view(*slots.shape, -1), routing.weights).to(x.dtype)


def combine(results: Tensor, weights: Tensor) -> Tensor:
    """`[n, hidden]` float32: `results` `[n, top_k, hidden]` by `weights` `[n, top_k]`, summed in router order."""
    total = results[:, 0].float() * weights[:, :1]
    for choice in range(1, weights.shape[1]):
        total += results[:, choice].float() * weights[:, choice : choice + 1]
    return total
