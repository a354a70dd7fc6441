"""The text minimoe serves, and how well the packaged weights know it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swiftbalancer.errors import ConfigError
from swiftbalancer_adaptors.minimoe.engine import EngineSpec, MiniMoeEngine
from swiftbalancer_adaptors.minimoe.text import TextStream, packaged_texts, texts_of_folder
from swiftbalancer_adaptors.minimoe.weights import TrainedWeights

DOMAINS = ["c", "english", "french", "german", "japanese", "markup", "python", "russian"]


def stream(seed: int = 0) -> TextStream:
    return TextStream(packaged_texts(), batch=4, length=32, phase_steps=5, seed=seed)


def test_the_same_seed_serves_the_same_text_and_another_one_does_not() -> None:
    one, two, other = stream(), stream(), stream(seed=1)
    for step in (0, 7, 93):
        assert np.array_equal(one.batch(step, 3).tokens, two.batch(step, 3).tokens)
        assert not np.array_equal(one.batch(step, 3).tokens, other.batch(step, 3).tokens)
        assert not np.array_equal(one.batch(step, 3).tokens, one.batch(step, 2).tokens)


def test_domains_shift_through_mixtures_and_all_are_served() -> None:
    served = stream()
    pure = [served.describe(step) for step in range(0, 80, 10)]
    mixed = [served.describe(step) for step in range(5, 85, 10)]
    assert sorted(pure) == DOMAINS
    assert mixed == [f"{a} + {b}" for a, b in zip(pure, pure[1:] + pure[:1], strict=True)]
    assert set(served.batch(0, 0).domains) == {DOMAINS.index(pure[0])}


def test_sequences_are_stretches_of_their_domains_text() -> None:
    served, texts = stream(), packaged_texts()
    batch = served.batch(6, 1)
    for row, domain in zip(batch.tokens, batch.domains, strict=True):
        assert bytes(row.astype(np.uint8)) in texts[DOMAINS[domain]]


def test_own_files_are_grouped_by_folder_or_suffix(tmp_path: Path) -> None:
    (tmp_path / "logs" / "deep").mkdir(parents=True)
    (tmp_path / "logs" / "a.log").write_bytes(b"a" * 40)
    (tmp_path / "logs" / "deep" / "b.log").write_bytes(bytes(range(256)))
    (tmp_path / "x.py").write_bytes(b"x" * 50)
    (tmp_path / "README").write_bytes(b"r" * 60)
    (tmp_path / "empty.c").touch()
    texts = texts_of_folder(tmp_path)
    assert {name: len(text) for name, text in texts.items()} == {"logs": 297, "py": 50, "text": 60}


def test_folders_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        texts_of_folder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a folder"):
        texts_of_folder(tmp_path / "file")
    with pytest.raises(ConfigError, match="no file with content"):
        texts_of_folder(tmp_path)
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(ConfigError, match="32 bytes"):
        TextStream(texts_of_folder(tmp_path), batch=1, length=32)


def test_packaged_weights_are_small_and_finite() -> None:
    tensors = TrainedWeights.of_package().tensors
    assert sum(tensor.numel() * 2 for tensor in tensors.values()) <= 8_000_000
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in tensors.values())


def test_packaged_weights_predict_every_domain_and_route_domains_apart() -> None:
    engine = MiniMoeEngine(EngineSpec(num_redundant=0, batch=8, length=128), None, "cpu")
    loads, bits = [], []
    for text in packaged_texts().values():
        served = TextStream({"one": text}, batch=8, length=129)
        rows = torch.from_numpy(served.batch(0, 0).tokens)
        engine.counters.zero_()
        scores = engine.logits(rows[:, :-1])
        nats = F.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        bits.append(float(nats) / math.log(2))
        loads.append(engine.counters.flatten().double())
    assert max(bits) < 4
    assert sum(bits) / len(bits) < 2
    shares = torch.stack(loads)
    hottest = shares.view(len(loads), -1, 32).amax(2) / shares.view(len(loads), -1, 32).mean(2)
    assert float(hottest.mean()) > 2
    apart = torch.corrcoef(shares)[DOMAINS.index("python"), DOMAINS.index("russian")]
    assert float(apart) < 0.3
