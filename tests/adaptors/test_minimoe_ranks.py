"""minimoe over real gloo processes: the bits of one process, whatever moves, and counts of what arrived.

Run as a script, this file is one rank: `python test_minimoe_ranks.py RANK SIZE FOLDER EXCHANGE`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import FileStore

from swiftbalancer.dispatch import uniform_table
from swiftbalancer.placement import Placement
from swiftbalancer_adaptors.minimoe.engine import EngineSpec, MiniMoeEngine
from swiftbalancer_adaptors.minimoe.text import TextStream, packaged_texts
from swiftbalancer_adaptors.minimoe.weights import TrainedWeights, fill_slots

NUM_STEPS = 8
IDLE_RANK, IDLE_STEP = 1, 4
"""In this step this rank serves nothing and runs a dummy pass beside the others."""
ROOT = Path(__file__).parents[2]


class RecordingRoute:
    """Routes as before and keeps what was dispatched: `sent[layer]` `[slots]` int64 of the last pass."""

    def __init__(self, engine: MiniMoeEngine) -> None:
        self._route = engine.mixture.route
        self._num_slots = engine.placement.topology.num_slots
        self.sent = np.zeros((engine.config.num_layers, self._num_slots), np.int64)

    def __call__(self, topk_ids: torch.Tensor, layer: int) -> torch.Tensor:
        slots = self._route(topk_ids, layer)
        self.sent[layer] = np.bincount(slots.flatten().numpy(), minlength=self._num_slots)
        return slots


def random_placement(base: Placement, seed: int) -> Placement:
    """Every layer's slots shuffled, with random experts in the redundant ones."""
    rng = np.random.default_rng(seed)
    shape = base.physical_to_logical_map.shape
    table = np.tile(np.arange(shape[1]) % base.num_experts, (shape[0], 1))
    table[:, base.num_experts :] = rng.integers(0, base.num_experts, (shape[0], shape[1] - base.num_experts))
    return Placement(base.topology, base.num_experts, rng.permuted(table, axis=1).astype(np.int32))


def serve(rank: int, size: int, folder: Path, exchange: str) -> None:
    """One rank: serves text while placements change after every step, and writes what it saw."""
    store = FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    spec = spec_of(exchange)
    engine = MiniMoeEngine(spec, dist.group.WORLD, "cpu")
    engine.mixture.route = route = RecordingRoute(engine)
    stream = stream_of(spec)
    scores: list[NDArray[np.float32]] = []
    sent, arrived = [], []
    for step in range(NUM_STEPS):
        engine.counters.zero_()
        if (rank, step) == (IDLE_RANK, IDLE_STEP):
            engine.dummy_forward()
            scores.append(np.zeros_like(scores[-1]))
            sent.append(np.zeros_like(route.sent))
        else:
            scores.append(engine.logits(torch.from_numpy(stream.batch(step, rank).tokens)).numpy())
            sent.append(route.sent.copy())
        arrived.append(engine.counters.numpy().copy())
        move_everything(engine, random_placement(engine.placement, step))
    np.savez(folder / f"{rank}.npz", scores=scores, sent=sent, arrived=arrived, passes=engine.passes.numpy())
    dist.destroy_process_group()


def move_everything(engine: MiniMoeEngine, placement: Placement) -> None:
    """Writes another placement's weights and table in place."""
    source = TrainedWeights.of_package()
    fill_slots(source, engine._weights, placement, engine.rank)
    engine.dispatch_table.copy_(torch.from_numpy(uniform_table(placement, engine.spec.table_width)))


def spec_of(exchange: str) -> EngineSpec:
    return EngineSpec(num_redundant=4, batch=2, length=24, exchange=exchange)  # type: ignore[arg-type]


def stream_of(spec: EngineSpec) -> TextStream:
    return TextStream(packaged_texts(), batch=spec.batch, length=spec.length, phase_steps=2)


def run_ranks(size: int, folder: Path, exchange: str) -> list[dict[str, NDArray[np.float64]]]:
    """What each rank saw; raises if one fails or does not end in 120 s."""
    path = ":".join(str(ROOT / part) for part in ("", "worker", "adaptors"))
    command = [sys.executable, __file__]
    arguments = [str(size), str(folder), exchange]
    ranks = [subprocess.Popen([*command, str(rank), *arguments], env={"PYTHONPATH": path}) for rank in range(size)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)]


@pytest.mark.parametrize(("size", "exchange"), [(2, "padded"), (4, "uneven")])
def test_ranks_give_the_bits_of_one_process_while_every_expert_moves(
    size: int, exchange: str, tmp_path: Path
) -> None:
    seen = run_ranks(size, tmp_path, exchange)
    alone = MiniMoeEngine(spec_of("uneven"), None, "cpu")
    stream = stream_of(alone.spec)
    for rank in range(size):
        for step in range(NUM_STEPS):
            if (rank, step) == (IDLE_RANK, IDLE_STEP):
                continue
            expected = alone.logits(torch.from_numpy(stream.batch(step, rank).tokens)).numpy()
            assert np.array_equal(seen[rank]["scores"][step], expected), (rank, step)
    sent = sum(rank["sent"] for rank in seen)
    arrived = np.concatenate([rank["arrived"] for rank in seen], axis=2)
    assert np.array_equal(arrived, sent)
    tokens = alone.spec.num_tokens * alone.top_k * (size * NUM_STEPS - 1) * alone.config.num_layers
    assert int(arrived.sum()) == tokens
    assert [int(rank["passes"][0]) for rank in seen] == [NUM_STEPS] * size


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
