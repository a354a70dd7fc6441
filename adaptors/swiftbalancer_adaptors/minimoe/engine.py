"""MiniMoeEngine: one rank of the embedded engine, with what a balancer needs to see of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from swiftbalancer.dispatch import uniform_table
from swiftbalancer.errors import ConfigError
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_adaptors.minimoe.config import ModelConfig, preset
from swiftbalancer_adaptors.minimoe.exchange import Exchange, PaddedExchange, Peers, UnevenExchange
from swiftbalancer_adaptors.minimoe.experts import ChunkedExperts, ExpertKernel, GroupedExperts, SlotWeights
from swiftbalancer_adaptors.minimoe.model import MiniMoe
from swiftbalancer_adaptors.minimoe.parallel import Counters, ParallelMixture, TableRoute
from swiftbalancer_adaptors.minimoe.weights import fill_slots, weight_source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What to serve, the same on every rank.

    `batch` sequences of `length` bytes are a rank's tokens in one pass. `exchange`: "uneven" sends exactly the
    rows there are, and is exact to the bit wherever experts sit; "padded" can be captured in a CUDA graph.
    `capacity_factor` bounds the rows per pair of ranks of the padded exchange, as a multiple of the even share;
    0 means as many as there can be. `chunk` is the number of rows in one expert product.
    """

    preset: str = "demo"
    num_layers: int | None = None
    num_redundant: int = 8
    num_nodes: int = 1
    table_width: int = 32
    batch: int = 4
    length: int = 48
    exchange: Literal["uneven", "padded"] = "uneven"
    dtype: Literal["float32", "bfloat16"] = "float32"
    chunk: int = 32
    capacity_factor: float = 0.0

    def __post_init__(self) -> None:
        if min(self.batch, self.length, self.table_width, self.chunk) < 1 or self.capacity_factor < 0:
            raise ConfigError(
                f"minimoe: batch={self.batch}, length={self.length}, table_width={self.table_width}, "
                f"chunk={self.chunk} must be at least 1, capacity_factor={self.capacity_factor} at least 0"
            )
        if self.exchange not in ("uneven", "padded"):
            raise ConfigError(f"minimoe.exchange: unknown {self.exchange!r}; known: uneven, padded")
        if self.dtype not in DTYPES:
            raise ConfigError(f"minimoe.dtype: unknown {self.dtype!r}; known: {', '.join(DTYPES)}")

    @property
    def num_tokens(self) -> int:
        """Tokens of one rank in one pass."""
        return self.batch * self.length

    def pair_capacity(self, top_k: int, num_ranks: int) -> int:
        """Rows one rank may send another in the padded exchange."""
        most = self.num_tokens * top_k
        return most if not self.capacity_factor else min(most, math.ceil(self.capacity_factor * most / num_ranks))


class MiniMoeEngine:
    """One rank. All ranks of `group` run the same passes; each serves its own tokens.

    The tensors below are this engine's, at addresses that never change; a balancer writes `expert_tensors`,
    `dispatch_table` and `physical_to_logical_map` in place, between passes:
    `dispatch_table` `[layers, experts, width]` int32, `physical_to_logical_map` `[layers, slots]` int32,
    `counters` `[layers, slots_per_rank]` int32 tokens that arrived here, `passes` `[1]` int64.
    On a CPU it sets torch's threads to 1: ranks share the cores. Raises `TopologyError` if the experts do not
    divide over the ranks and `ConfigError` for a preset or option that cannot be.
    """

    def __init__(self, spec: EngineSpec, group: dist.ProcessGroup | None, device: torch.device | str) -> None:
        self.spec = spec
        self.device = torch.device(device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        peers = Peers(group)
        self.rank, self.num_ranks = peers.rank, peers.size
        self.config: ModelConfig = preset(spec.preset, num_layers=spec.num_layers)
        self.placement = initial_placement(spec, self.config, peers.size)
        """In force at the start; the balancer keeps track from there."""
        self._build_maps()
        self._counters = Counters(self.config.num_layers, self.slots_per_rank, self.device)
        self._weights = SlotWeights(self.config, self.slots_per_rank, device=self.device, dtype=DTYPES[spec.dtype])
        self._model = self._build_model()
        route = TableRoute(self.dispatch_table, spec.num_tokens)
        self.mixture = ParallelMixture(route, self._build_exchange(peers), self._build_kernel(), self._counters)

    @property
    def slots_per_rank(self) -> int:
        return self.placement.topology.slots_per_rank

    @property
    def top_k(self) -> int:
        return self.config.top_k

    @property
    def counters(self) -> Tensor:
        return self._counters.load

    @property
    def passes(self) -> Tensor:
        return self._counters.passes

    def expert_tensors(self, layer: int) -> list[Tensor]:
        """Everything the expert kernels of a layer read, each `[slots_per_rank, ...]`."""
        return self._weights.of_layer(layer)

    def set_recording(self, on: bool) -> None:
        """Whether this rank's tokens count as load from the next pass on; off for warm-up."""
        self._counters.recording.fill_(int(on))

    @torch.no_grad()
    def logits(self, tokens: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """One pass: `tokens` `[batch, length]` int64 bytes -> `[batch, length, 256]`, scores of each next byte.

        `valid` `[batch, length]` bool marks what is not padding; padding travels but is not counted.
        """
        self.mixture.valid = None if valid is None else valid.flatten()
        scores: Tensor = self._model(tokens, self.mixture)
        self._counters.passes += 1
        return scores

    def forward(self, tokens: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """One pass: `tokens` `[batch, length]` int64 -> the likeliest next byte at every position, same shape."""
        return self.logits(tokens, valid=valid).argmax(-1)

    def dummy_forward(self) -> None:
        """A pass in which this rank has nothing to serve but its experts may: counts as a pass, not as load."""
        tokens = torch.zeros(self.spec.batch, self.spec.length, dtype=torch.int64, device=self.device)
        was = self._counters.recording.clone()
        self.set_recording(False)
        self.logits(tokens)
        self._counters.recording.copy_(was)

    def overflow(self) -> int:
        """Rows the padded exchange has dropped for want of capacity; waits for the device."""
        return int(self._exchange.overflow) if isinstance(self._exchange, PaddedExchange) else 0

    def _build_maps(self) -> None:
        table = uniform_table(self.placement, self.spec.table_width)
        self.dispatch_table = torch.from_numpy(table).to(self.device)
        map_copy = self.placement.physical_to_logical_map.copy()
        self.physical_to_logical_map = torch.from_numpy(map_copy).to(self.device)

    def _build_model(self) -> MiniMoe:
        with torch.device(self.device):
            model = MiniMoe(self.config).to(DTYPES[self.spec.dtype])
        source = weight_source(self.spec.preset, self.config)
        with torch.no_grad():
            source.fill_backbone(model)
        fill_slots(source, self._weights, self.placement, self.rank)
        return model.requires_grad_(False)

    def _build_exchange(self, peers: Peers) -> Exchange:
        self._exchange: Exchange
        if self.spec.exchange == "uneven":
            self._exchange = UnevenExchange(peers, self.slots_per_rank, device=self.device)
        else:
            capacity = self.spec.pair_capacity(self.top_k, peers.size)
            self._exchange = PaddedExchange(peers, self.slots_per_rank, capacity=capacity, device=self.device)
        return self._exchange

    def _build_kernel(self) -> ExpertKernel:
        if self.spec.exchange == "padded" and self.device.type != "cpu":
            return GroupedExperts(self._weights)
        return ChunkedExperts(self._weights, chunk=self.spec.chunk)


def initial_placement(spec: EngineSpec, config: ModelConfig, num_ranks: int) -> Placement:
    """The placement every rank starts with; raises `TopologyError` if the slots do not divide over the ranks."""
    topology = Topology.for_experts(
        config.num_experts, num_redundant=spec.num_redundant, num_ranks=num_ranks, num_nodes=spec.num_nodes
    )
    return Placement.initial(topology, config.num_experts, num_layers=config.num_layers)
