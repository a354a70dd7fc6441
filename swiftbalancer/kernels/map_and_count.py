"""`swiftbalancer.routing.map_and_count` in one launch.

Each program takes a block of the flattened ids. Small batches add each id to the counters directly; larger ones
count in a histogram of their own first, so that every program touches a counter at most once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DIRECT_IDS = 8192
"""Up to this many ids, an atomic for each is quicker than a histogram (measured on an H200)."""
DIRECT_BLOCK = 128
HISTOGRAM_BLOCK = 2048


def launch(
    out: torch.Tensor,
    topk_ids: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor,
    *,
    record: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    limit: int,
) -> None:
    """Fills `out` `[tokens, k]` and adds to `counts`; see `routing.map_and_count` for the arguments."""
    num_ids = topk_ids.numel()
    if not num_ids:
        return
    direct = num_ids <= DIRECT_IDS
    block = DIRECT_BLOCK if direct else HISTOGRAM_BLOCK
    _map_and_count[(triton.cdiv(num_ids, block),)](
        out,
        topk_ids,
        table,
        counts,
        record,
        num_valid_tokens,
        num_ids,
        topk_ids.shape[1],
        limit,
        table.shape[0],
        table.shape[1],
        table.stride(0),
        counts.shape[0],
        block=block,
        bins=0 if direct else triton.next_power_of_2(counts.shape[0] + 1),
        num_warps=4 if direct else 8,
    )


@triton.jit(do_not_specialize=["num_ids", "limit"])  # type: ignore[untyped-decorator]
def _map_and_count(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a kernel's arguments are flat
    out,
    topk_ids,
    table,
    counts,
    record,
    num_valid_tokens,
    num_ids,
    top_k: tl.constexpr,
    limit,
    num_experts: tl.constexpr,
    width: tl.constexpr,
    table_stride: tl.constexpr,
    num_slots: tl.constexpr,
    block: tl.constexpr,
    bins: tl.constexpr,
):
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < num_ids
    expert = tl.load(topk_ids + at, mask=inside, other=-1)
    known = inside & (expert >= 0) & (expert < num_experts)
    token = at // top_k
    column = ((token.to(tl.uint32) * 2654435769) % width).to(tl.int32)
    slot = tl.load(table + expert.to(tl.int32) * table_stride + column, mask=known, other=-1)
    tl.store(out + at, slot.to(out.dtype.element_ty), mask=inside)
    if num_valid_tokens is not None:
        limit = tl.minimum(limit, tl.load(num_valid_tokens).to(tl.int32))
    counted = known & (token < limit) & (slot >= 0) & (slot < num_slots)
    if record is not None:
        counted = counted & (tl.load(record) != 0)
    if bins == 0:
        tl.atomic_add(counts + slot, 1, mask=counted, sem="relaxed")
    else:
        hits = tl.histogram(tl.where(counted, slot, num_slots), bins)
        bin_at = tl.arange(0, bins)
        tl.atomic_add(counts + bin_at, hits, mask=(bin_at < num_slots) & (hits > 0), sem="relaxed")
