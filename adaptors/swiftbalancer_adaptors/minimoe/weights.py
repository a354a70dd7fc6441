"""Where weights come from: the trained demo file, or random numbers that every replica of an expert shares."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Protocol

import torch
from safetensors.torch import load
from torch import Tensor, nn

from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer.placement import Placement
from swiftbalancer_adaptors.minimoe.config import ModelConfig
from swiftbalancer_adaptors.minimoe.experts import SlotWeights
from swiftbalancer_adaptors.minimoe.model import MiniMoe


class WeightSource(Protocol):
    """Gives a model its numbers."""

    def fill_backbone(self, model: MiniMoe) -> None:
        """Writes every parameter of `model`."""
        ...

    def fill_expert(self, layer: int, expert: int, targets: list[Tensor]) -> None:
        """Writes one expert into `targets`, one slot's `w_gate_up` and `w_down`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TrainedWeights:
    """The demo's trained weights, bfloat16 in the package."""

    tensors: dict[str, Tensor]

    @classmethod
    def of_package(cls) -> TrainedWeights:
        """Reads the packaged file; raises `UnsupportedEngine` if the installation lacks it."""
        file = resources.files(__package__) / "weights" / "demo.safetensors"
        if not file.is_file():
            raise UnsupportedEngine(f"minimoe: {file} is missing; reinstall swiftbalancer")
        return cls(load(file.read_bytes()))

    def fill_backbone(self, model: MiniMoe) -> None:
        """See `WeightSource`."""
        prefix = "backbone."
        own = {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}
        model.load_state_dict(own)

    def fill_expert(self, layer: int, expert: int, targets: list[Tensor]) -> None:
        """See `WeightSource`."""
        targets[0].copy_(self.tensors["experts.w_gate_up"][layer, expert])
        targets[1].copy_(self.tensors["experts.w_down"][layer, expert])


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Normal numbers, seeded by layer and expert, so that all replicas and all ranks agree."""

    config: ModelConfig
    seed: int = 0

    def fill_backbone(self, model: MiniMoe) -> None:
        """See `WeightSource`."""
        for nth, (name, parameter) in enumerate(model.named_parameters()):
            generator = torch.Generator(parameter.device).manual_seed(self.seed * 1_000_003 + nth)
            if name.endswith("router.bias"):
                nn.init.normal_(parameter, std=self.config.router_bias, generator=generator)
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=self.config.hidden**-0.5, generator=generator)

    def fill_expert(self, layer: int, expert: int, targets: list[Tensor]) -> None:
        """See `WeightSource`."""
        nth = layer * self.config.num_experts + expert
        generator = torch.Generator(targets[0].device).manual_seed((self.seed + 1) * 1_000_003 + nth)
        for target in targets:
            target.normal_(std=target.shape[-1] ** -0.5, generator=generator)


def weight_source(preset: str, config: ModelConfig) -> WeightSource:
    """Trained weights for `demo`, random ones for every other preset."""
    return TrainedWeights.of_package() if preset == "demo" else RandomWeights(config)


@torch.no_grad()
def fill_slots(source: WeightSource, weights: SlotWeights, placement: Placement, rank: int) -> None:
    """Writes into the slots of `rank` the experts that `placement` puts there."""
    size = placement.topology.slots_per_rank
    for layer in range(placement.num_layers):
        held = placement.physical_to_logical_map[layer, rank * size : (rank + 1) * size]
        for slot, expert in enumerate(held.tolist()):
            source.fill_expert(layer, expert, [tensor[slot] for tensor in weights.of_layer(layer)])
