"""minimoe as an engine that knows the right answers: every byte it predicts is compared with one process alone."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from swiftbalancer.border import ModelBinding
from swiftbalancer.placement import Placement
from swiftbalancer_adaptors.minimoe.border import bind
from swiftbalancer_adaptors.minimoe.engine import EngineSpec, MiniMoeEngine
from swiftbalancer_adaptors.minimoe.text import TextStream, packaged_texts

SPEC = EngineSpec(num_redundant=4, batch=2, length=24)
NUM_BATCHES = 64
"""Batches are served in turn, for ever; their domains shift as the stream's do."""


class CheckedMinimoe:
    """One expert-parallel rank, with the scores that the same model gives in one process, to the bit."""

    def __init__(self, rank: int) -> None:
        stream = TextStream(packaged_texts(), batch=SPEC.batch, length=SPEC.length, phase_steps=8)
        self._batches = [torch.from_numpy(stream.batch(step, rank).tokens) for step in range(NUM_BATCHES)]
        alone = MiniMoeEngine(SPEC, None, "cpu")
        self._expected = [alone.logits(batch).clone() for batch in self._batches]
        self._engine = MiniMoeEngine(SPEC, dist.group.WORLD, "cpu")
        self.placement: Placement = self._engine.placement
        self.map = self._engine.physical_to_logical_map
        self.tokens_compared = 0
        self._wrong = 0

    def binding(self) -> ModelBinding:
        return bind(self._engine)

    def forward(self, step: int) -> None:
        """Serves one batch; remembers how many positions have other scores than they should."""
        scores = self._engine.logits(self._batches[step % NUM_BATCHES])
        expected = self._expected[step % NUM_BATCHES]
        self._wrong = int((scores != expected).any(-1).sum())
        self.tokens_compared += int(np.prod(expected.shape[:2]))

    def wrong_outputs(self) -> int:
        """Of the last pass."""
        return self._wrong
