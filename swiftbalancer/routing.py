"""From logical expert ids to slots, counting on the way: the one thing swiftbalancer adds to a forward pass.

A `torch.library` operator: safe to capture in device graphs and to compile, no host synchronisation. A Triton
kernel where the device has one; elsewhere plain torch, with the same result bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch

from swiftbalancer.device.operators import KERNEL_KEYS, PLAIN_KEYS
from swiftbalancer.dispatch import HASH_MULTIPLIER

_LIBRARY: Any = torch.library.Library("swiftbalancer", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "map_and_count(Tensor topk_ids, Tensor table, Tensor(a!) counts, Tensor? record, "
    "Tensor? num_valid_tokens, SymInt limit) -> Tensor"
)


def map_and_count(
    topk_ids: torch.Tensor,
    table: torch.Tensor,
    *,
    counts: torch.Tensor,
    record: torch.Tensor | None = None,
    num_valid_tokens: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Slot ids `[tokens, k]`, of `topk_ids`' dtype; adds the tokens each slot gets to `counts`, in place.

    `topk_ids` `[tokens, k]` int32 or int64, logical experts; an id outside `0..experts - 1` gives slot -1 and is
    not counted. `table` `[experts, width]` int32, rows may be strided: the token at position `t` of the batch
    takes column `dispatch.column_of(t, width)`. `counts` `[slots]` int32. `record` `[1]` of any integer or bool
    dtype on the device: counts only where it is not 0. `num_valid_tokens`, a number or `[1]` integers on the
    device: tokens from there on are padding; they are mapped and not counted.
    """
    fixed = num_valid_tokens if isinstance(num_valid_tokens, int) else topk_ids.shape[0]
    on_device = num_valid_tokens if isinstance(num_valid_tokens, torch.Tensor) else None
    slots: torch.Tensor = torch.ops.swiftbalancer.map_and_count(topk_ids, table, counts, record, on_device, fixed)
    return slots


def map_and_count_torch(
    topk_ids: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    limit: int,
) -> torch.Tensor:
    """The operator in plain torch: for devices without kernels, and the others' reference."""
    num_experts, width = table.shape
    token = torch.arange(topk_ids.shape[0], device=topk_ids.device)
    column = ((token * HASH_MULTIPLIER) & 0xFFFFFFFF) % width
    known = (topk_ids >= 0) & (topk_ids < num_experts)
    found = table[topk_ids.clamp(0, num_experts - 1).long(), column[:, None]]
    slots = torch.where(known, found, -1)
    counted = (token < limit)[:, None] & known & (slots >= 0) & (slots < counts.shape[0])
    if num_valid_tokens is not None:
        counted &= (token < num_valid_tokens)[:, None]
    if record is not None:
        counted &= record != 0
    hits = torch.where(counted, slots, 0).long().view(-1)
    counts.scatter_add_(0, hits, counted.view(-1).to(counts.dtype))
    return slots.to(topk_ids.dtype)


def _map_and_count_kernel(
    topk_ids: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor,
    record: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    limit: int,
) -> torch.Tensor:
    from swiftbalancer.kernels import map_and_count as kernel

    ids = topk_ids.contiguous()
    out = torch.empty_like(ids)
    kernel.launch(out, ids, table, counts, record=record, num_valid_tokens=num_valid_tokens, limit=limit)
    return out


def _map_and_count_fake(
    topk_ids: torch.Tensor,
    table: torch.Tensor,  # noqa: ARG001 - the operator's signature
    counts: torch.Tensor,  # noqa: ARG001
    record: torch.Tensor | None,  # noqa: ARG001
    num_valid_tokens: torch.Tensor | None,  # noqa: ARG001
    limit: int,  # noqa: ARG001
) -> torch.Tensor:
    return torch.empty_like(topk_ids, memory_format=torch.contiguous_format)


for _key in PLAIN_KEYS:
    _LIBRARY.impl("map_and_count", map_and_count_torch, _key)
for _key in KERNEL_KEYS:
    _LIBRARY.impl("map_and_count", _map_and_count_kernel, _key)
torch.library.register_fake("swiftbalancer::map_and_count", _map_and_count_fake, lib=_LIBRARY)
