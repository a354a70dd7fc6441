"""Seeded weights and routers, the same in every mode of the vLLM benchmark."""

from __future__ import annotations

from typing import Any

from scripts.vllmbench.settings import EXPERTS, Settings

EXPERT_TENSORS = ("w13_weight", "w2_weight")


def fill_weights(model: Any, rank: int, settings: Settings) -> None:
    """Seeded weights by name and by expert, so that the replicas of an expert, and all modes, hold the same ones."""
    import torch

    for name, weight in model.named_parameters():
        if name.endswith(EXPERT_TENSORS):
            slots = weight.shape[0]
            for local in range(slots):
                make_expert(weight.data[local], name, (rank * slots + local) % EXPERTS, settings)
        elif weight.dim() >= 2:
            vocabulary = "embed_tokens" in name or "lm_head" in name
            generator = torch.Generator(device=weight.device)
            generator.manual_seed(seed_of(name) + (rank + 1 if vocabulary else 0))
            weight.data.normal_(0.0, 1.0 if "embed_tokens" in name else 0.02, generator=generator)
        else:
            weight.data.fill_(1.0)


def make_expert(out: Any, name: str, expert: int, settings: Settings) -> None:
    """The weights of one expert of the tensor `name`, into `out`."""
    import torch

    generator = torch.Generator(device=out.device).manual_seed(seed_of(name) * EXPERTS + expert)
    out.normal_(0.0, 0.05 if not settings.tiny else 0.2, generator=generator)


def count_wrong_slots(model: Any, rank: int, experts: Any, settings: Settings) -> int:
    """Local slots, over layers, that differ from the expert `experts` `[layers, slots]` says they hold."""
    import torch

    wrong: set[tuple[int, int]] = set()
    seen: dict[str, int] = {}
    for name, weight in model.named_parameters():
        if not name.endswith(EXPERT_TENSORS):
            continue
        kind = name.rsplit(".", 1)[1]
        layer = seen[kind] = seen.get(kind, -1) + 1
        expected = torch.empty_like(weight.data[0])
        for local in range(weight.shape[0]):
            make_expert(expected, name, int(experts[layer, rank * weight.shape[0] + local]), settings)
            if not torch.equal(expected, weight.data[local]):
                wrong.add((layer, local))
    return len(wrong)


def seed_of(name: str) -> int:
    return sum((i + 1) * byte for i, byte in enumerate(name.encode())) * 1009


class Gates:
    """The routers; `skew` gives every expert a new popularity, the same on all ranks and in all modes.

    Waiting for the device around it puts the change between the same two passes in every run.
    """

    def __init__(self, model: Any, sd: float) -> None:
        import torch

        gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        self._gates = [gate for gate in gates if gate.weight.numel()]  # vLLM on CPU repacks them out of reach
        self._base: list[Any] = []
        self._sd = sd
        self._generator = torch.Generator()

    def skew(self, phase: str, step: int) -> None:
        import torch

        self._generator.manual_seed(seed_of(phase) + step)
        if not self._base:
            self._base = [gate.weight.detach().clone() for gate in self._gates]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for gate, base in zip(self._gates, self._base, strict=True):
            scale = torch.exp(self._sd * torch.randn(base.shape[0], 1, generator=self._generator))
            gate.weight.data.copy_(base * scale.to(base.device, base.dtype))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
