"""minimoe in one process: the same bits wherever experts sit, and honest counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swiftbalancer.dispatch import uniform_table
from swiftbalancer.errors import ConfigError, TopologyError
from swiftbalancer.placement import Placement
from swiftbalancer_adaptors.minimoe.config import preset
from swiftbalancer_adaptors.minimoe.dense import DenseMixture
from swiftbalancer_adaptors.minimoe.engine import EngineSpec, MiniMoeEngine
from swiftbalancer_adaptors.minimoe.experts import ChunkedExperts, GroupedExperts, Rows, SlotWeights
from swiftbalancer_adaptors.minimoe.model import MiniMoe
from swiftbalancer_adaptors.minimoe.text import TextStream, packaged_texts
from swiftbalancer_adaptors.minimoe.weights import TrainedWeights

DEMO = preset("demo")
NUM_ROWS = 90


def text_tokens(spec: EngineSpec, step: int = 0) -> Tensor:
    stream = TextStream(packaged_texts(), batch=spec.batch, length=spec.length, phase_steps=1)
    return torch.from_numpy(stream.batch(step, 0).tokens)


def random_experts(seed: int) -> SlotWeights:
    weights = SlotWeights(DEMO, 3, device=torch.device("cpu"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.of_layer(0):
        tensor.normal_(generator=generator)
    return weights


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), counts=st.lists(st.integers(0, 30), min_size=3, max_size=3))
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(seed: int, counts: list[int]) -> None:
    torch.set_num_threads(1)
    kernel = ChunkedExperts(random_experts(seed), chunk=16)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), DEMO.hidden, generator=generator)
    order = torch.randperm(sum(counts), generator=generator)
    out = kernel(0, Rows(x, order, torch.tensor(counts, dtype=torch.int32)))
    owner = np.repeat(np.arange(3), counts)
    for nth, row in enumerate(order.tolist()):
        one = torch.zeros(3, dtype=torch.int32)
        one[owner[nth]] = 1
        alone = kernel(0, Rows(x[row : row + 1], torch.zeros(1, dtype=torch.int64), one))
        assert torch.equal(alone[0], out[row])


def replace_placement(engine: MiniMoeEngine, seed: int) -> None:
    """Shuffles the slots of each layer, weights and maps, as a balancer would."""
    rng = np.random.default_rng(seed)
    old = engine.placement.physical_to_logical_map
    order = np.stack([rng.permutation(old.shape[1]) for _ in old])
    new = Placement(engine.placement.topology, DEMO.num_experts, np.take_along_axis(old, order, 1))
    for layer, slots in enumerate(order):
        for tensor in engine.expert_tensors(layer):
            tensor.copy_(tensor[torch.from_numpy(slots)])
    engine.dispatch_table.copy_(torch.from_numpy(uniform_table(new, engine.spec.table_width)))
    engine.placement = new


def test_logits_do_not_depend_on_placement_or_replicas() -> None:
    plain = MiniMoeEngine(EngineSpec(num_redundant=0), None, "cpu")
    spread = MiniMoeEngine(EngineSpec(num_redundant=8), None, "cpu")
    for step in range(6):
        tokens = text_tokens(plain.spec, step)
        assert torch.equal(plain.logits(tokens), spread.logits(tokens))
        before = spread.dispatch_table.clone()
        replace_placement(spread, step)
        assert not torch.equal(before, spread.dispatch_table)


def test_padded_exchange_gives_the_bits_of_the_uneven_one() -> None:
    uneven = MiniMoeEngine(EngineSpec(), None, "cpu")
    padded = MiniMoeEngine(EngineSpec(exchange="padded"), None, "cpu")
    tokens = text_tokens(uneven.spec)
    assert torch.equal(uneven.logits(tokens), padded.logits(tokens))
    assert torch.equal(uneven.counters, padded.counters)
    assert padded.overflow() == 0


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="needs torch's grouped product")
def test_grouped_product_agrees_with_chunks_and_ignores_padding() -> None:
    weights = SlotWeights(DEMO, 3, device=torch.device("cpu"), dtype=torch.bfloat16)
    for tensor in weights.of_layer(0):
        tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(64, DEMO.hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = Rows(x, torch.arange(64).flip(0), torch.tensor([20, 0, 13], dtype=torch.int32))
    out = GroupedExperts(weights)(0, rows)[-33:]
    torch.testing.assert_close(out, ChunkedExperts(weights, chunk=8)(0, rows)[-33:], rtol=0.05, atol=0.02)


def test_padded_exchange_counts_the_rows_it_drops() -> None:
    engine = MiniMoeEngine(EngineSpec(exchange="padded", capacity_factor=0.75), None, "cpu")
    engine.forward(text_tokens(engine.spec))
    rows = engine.spec.num_tokens * engine.top_k
    kept = engine.spec.pair_capacity(engine.top_k, 1)
    assert kept < rows
    assert engine.overflow() == DEMO.num_layers * (rows - kept)
    assert engine.counters.sum(1).tolist() == [kept] * DEMO.num_layers


def test_agrees_with_all_experts_computed_densely() -> None:
    engine = MiniMoeEngine(EngineSpec(), None, "cpu")
    source = TrainedWeights.of_package()
    model, dense = MiniMoe(DEMO), DenseMixture(DEMO)
    source.fill_backbone(model)
    dense.load_state_dict({k.removeprefix("experts."): v for k, v in source.tensors.items() if "experts." in k})
    tokens = text_tokens(engine.spec)
    dense.start()
    with torch.no_grad():
        expected = model(tokens, dense)
    torch.testing.assert_close(engine.logits(tokens), expected, rtol=1e-3, atol=1e-3)
    physical = engine.placement.physical_to_logical_map
    served = np.stack(
        [
            np.bincount(row, count, DEMO.num_experts)
            for row, count in zip(physical, engine.counters.numpy(), strict=True)
        ]
    )
    assert served.tolist() == dense.loads.tolist()


def test_dummy_and_warm_up_passes_count_as_passes_and_not_as_load() -> None:
    engine = MiniMoeEngine(EngineSpec(), None, "cpu")
    engine.dummy_forward()
    engine.set_recording(False)
    engine.forward(text_tokens(engine.spec))
    assert (int(engine.passes), int(engine.counters.sum())) == (2, 0)
    engine.set_recording(True)
    engine.forward(text_tokens(engine.spec))
    tokens = engine.spec.num_tokens * engine.top_k * DEMO.num_layers
    assert (int(engine.passes), int(engine.counters.sum())) == (3, tokens)


@pytest.mark.parametrize("exchange", ["uneven", "padded"])
def test_padding_is_not_counted(exchange: str) -> None:
    engine = MiniMoeEngine(EngineSpec(exchange=exchange), None, "cpu")  # type: ignore[arg-type]
    tokens = text_tokens(engine.spec)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    valid[1, :7] = True
    engine.forward(tokens, valid=valid)
    assert engine.counters.sum(1).tolist() == [7 * engine.top_k] * DEMO.num_layers


def test_tensors_keep_their_addresses() -> None:
    engine = MiniMoeEngine(EngineSpec(), None, "cpu")
    seen = [engine.counters, engine.passes, engine.dispatch_table, *engine.expert_tensors(0)]
    before = [tensor.data_ptr() for tensor in seen]
    engine.forward(text_tokens(engine.spec))
    after = [engine.counters, engine.passes, engine.dispatch_table, *engine.expert_tensors(0)]
    assert [tensor.data_ptr() for tensor in after] == before


def test_random_presets_give_every_replica_the_same_weights() -> None:
    engine = MiniMoeEngine(EngineSpec(preset="tiny", num_redundant=4), None, "cpu")
    for tensor in engine.expert_tensors(1):
        assert torch.equal(tensor[0], tensor[8])
        assert not torch.equal(tensor[0], tensor[1])


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="known: deepseek-v3, demo"):
        MiniMoeEngine(EngineSpec(preset="large"), None, "cpu")
    with pytest.raises(ConfigError, match="known: uneven, padded"):
        EngineSpec(exchange="direct")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="4 layers"):
        MiniMoeEngine(EngineSpec(num_layers=5), None, "cpu")
    with pytest.raises(TopologyError):
        MiniMoeEngine(EngineSpec(num_redundant=-1), None, "cpu")
