"""minimoe on one CUDA device: the padded path inside a captured graph."""

from __future__ import annotations

import pytest
import torch

from swiftbalancer_adaptors.minimoe.engine import EngineSpec, MiniMoeEngine
from swiftbalancer_adaptors.minimoe.text import TextStream, packaged_texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def text_tokens(spec: EngineSpec, step: int) -> torch.Tensor:
    stream = TextStream(packaged_texts(), batch=spec.batch, length=spec.length, phase_steps=1)
    return torch.from_numpy(stream.batch(step, 0).tokens).cuda()


def test_a_captured_pass_counts_and_predicts_like_an_eager_one() -> None:
    spec = EngineSpec(exchange="padded", dtype="bfloat16")
    engine, eager = MiniMoeEngine(spec, None, "cuda"), MiniMoeEngine(spec, None, "cuda")
    tokens = text_tokens(spec, 0)
    for _ in range(3):
        engine.dummy_forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = engine.logits(tokens)
    engine.counters.zero_()
    for step in range(4):
        tokens.copy_(text_tokens(spec, step))
        graph.replay()
        assert torch.equal(scores, eager.logits(tokens))
    assert torch.equal(engine.counters, eager.counters)
    assert int(engine.passes) == 7


def test_the_exact_path_gives_the_same_bits_with_and_without_replicas() -> None:
    plain = MiniMoeEngine(EngineSpec(num_redundant=0), None, "cuda")
    spread = MiniMoeEngine(EngineSpec(num_redundant=8), None, "cuda")
    for step in range(4):
        tokens = text_tokens(plain.spec, step)
        assert torch.equal(plain.logits(tokens), spread.logits(tokens))
