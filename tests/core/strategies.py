"""Random but valid values of the core, for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from swiftbalancer import wire
from swiftbalancer.dispatch import uniform_table
from swiftbalancer.placement import Placement
from swiftbalancer.plan import Plan
from swiftbalancer.topology import Topology


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    nodes = draw(st.integers(1, 3))
    ranks = nodes * draw(st.integers(1, 3))
    return Topology(num_ranks=ranks, slots_per_rank=draw(st.integers(1, 5)), num_nodes=nodes)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Every expert somewhere, none twice on a rank: dealt in random order to the emptiest ranks that lack it."""
    topology = draw(topologies())
    fewest = topology.slots_per_rank  # a rank needs that many different experts
    num_experts = draw(st.integers(fewest, topology.num_slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [_row(topology, num_experts, rng) for _ in range(draw(st.integers(1, 3)))]
    return Placement.of(topology, num_experts, np.stack(rows))


def _row(topology: Topology, num_experts: int, rng: np.random.Generator) -> NDArray[np.int32]:
    held: list[list[int]] = [[] for _ in range(topology.num_ranks)]
    for expert in rng.permutation(num_experts):
        min(held, key=len).append(int(expert))
    for own in held:
        others = np.setdiff1d(np.arange(num_experts), own)
        own.extend(rng.permutation(others)[: topology.slots_per_rank - len(own)].tolist())
    return np.concatenate([rng.permutation(rank) for rank in held]).astype(np.int32)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Placement, Plan]:
    """A placement and a valid plan for it, made of random new rows for some layers, one batch each."""
    base = draw(placements())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chosen = rng.permutation(base.num_layers)[: draw(st.integers(0, base.num_layers))]
    rows = [_row(base.topology, base.num_experts, rng) for _ in chosen]
    width = draw(st.integers(1, 6))
    moves = [_moves(base, int(layer), row) for layer, row in zip(chosen, rows, strict=True)]
    if not any(map(len, moves)):
        return base, Plan.dispatch_only(base, base_epoch=0, table=uniform_table(base, width))
    target = base.with_layers(chosen, np.stack(rows))
    plan = Plan(
        kind="placement",
        base_epoch=0,
        base_digest=base.digest(),
        layers=chosen.astype(np.int32),
        rows=np.stack(rows),
        moves=np.concatenate(moves).astype(np.int32),
        layer_batch=np.arange(len(rows), dtype=np.int32),
        move_batch=np.repeat(np.arange(len(rows), dtype=np.int32), [len(m) for m in moves]),
        table=uniform_table(target, width),
    )
    return base, plan


def _moves(base: Placement, layer: int, row: NDArray[np.int32]) -> NDArray[np.int32]:
    old = base.physical_to_logical_map[layer]
    changed = np.nonzero(old != row)[0]
    moves = [(layer, int(row[s]), int(np.nonzero(old == row[s])[0][0]), int(s)) for s in changed]
    return np.asarray(moves, np.int32).reshape(-1, 4)


def plan_reply(plan: Plan) -> list[bytes]:
    """The frames of a worker's answer."""
    arrays = wire.plan_arrays(plan)
    reply = wire.PlanReply(
        request=1,
        kind=plan.kind,
        base_epoch=plan.base_epoch,
        base_digest=plan.base_digest,
        imbalance_now=1.4,
        imbalance_predicted=1.1,
        plan_seconds=0.01,
        cross_node_bytes=0,
        arrays=wire.specs(arrays),
    )
    return wire.encode(reply, arrays)
