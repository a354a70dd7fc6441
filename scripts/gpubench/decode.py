"""A decode-like step: layers of routing, all-to-all, experts and all-to-all back, captured in one graph.

Weights are random, of a named model's expert size. Every row of a slot's input belongs to one (rank, token), and
every expert product has the same shape, so outputs are equal to the bit wherever experts sit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray

from swiftbalancer.border import ModelBinding
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import DispatchForm, uniform_table
from swiftbalancer.maps import TableMaps
from swiftbalancer.placement import Placement
from swiftbalancer.routing import map_and_count
from swiftbalancer.topology import Topology

WIDTH = 16
NUM_INPUTS = 8
"""Batches that steps go through in turn."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes per rank. `tokens` per rank and step; experts are all slots but one redundant slot per rank."""

    layers: int
    slots_per_rank: int
    hidden: int
    expert_hidden: int
    tokens: int
    top_k: int
    fp8: bool = True

    def with_layers(self, layers: int) -> Shape:
        return replace(self, layers=layers)


SHAPES = {
    # DeepSeek-V3 as a rank of EP32 holds it: 58 layers x 9 slots of 44 MiB in fp8.
    "deepseek": Shape(layers=58, slots_per_rank=9, hidden=7168, expert_hidden=2048, tokens=32, top_k=8),
    "small": Shape(layers=6, slots_per_rank=18, hidden=1024, expert_hidden=512, tokens=16, top_k=8),
    # 58 x 288 slots over two ranks, experts too small to matter: what the host has to do.
    "host": Shape(layers=58, slots_per_rank=144, hidden=64, expert_hidden=32, tokens=16, top_k=8, fp8=False),
    # 8 x 144 slots over two ranks: a step that takes as long as the engine's own Python does.
    "eight": Shape(layers=8, slots_per_rank=72, hidden=64, expert_hidden=32, tokens=16, top_k=8, fp8=False),
    "tiny": Shape(layers=3, slots_per_rank=5, hidden=32, expert_hidden=16, tokens=4, top_k=2),
}


class Decode:
    """One rank's model. `step(i)` runs batch `i`; `output` `[tokens, hidden]` holds its result afterwards."""

    def __init__(self, shape: Shape, layer: DeviceLayer, *, local: bool = False) -> None:
        """`local`: ranks meet before each step instead of exchanging rows within it; outputs are wrong then."""
        self.shape = shape
        self._local = local
        self.layer = layer
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        topology = Topology(num_ranks=self.size, slots_per_rank=shape.slots_per_rank)
        num_experts = topology.num_slots - self.size
        self.placement = Placement.initial(topology, num_experts, num_layers=shape.layers)
        device = layer.device
        self.fp8 = shape.fp8 and layer.is_accelerator
        self.dtype = torch.bfloat16 if layer.is_accelerator else torch.float32
        self.current_table = uniform_table(self.placement, WIDTH)
        self.table = torch.from_numpy(self.current_table).to(device)
        self.map = torch.tensor(self.placement.physical_to_logical_map, device=device)
        self.counts = torch.zeros(shape.layers, topology.num_slots, dtype=torch.int32, device=device)
        self.passes = torch.zeros(1, dtype=torch.int64, device=device)
        self.inputs = self._random(NUM_INPUTS, shape.tokens, shape.hidden, seed=7 + self.rank)
        self.routers = self._random(shape.layers, num_experts, shape.hidden, seed=5)
        self.skew = self._random(shape.layers, num_experts, seed=6) * shape.hidden**0.5
        self.dense = self._random(shape.hidden, shape.hidden, seed=8) / shape.hidden**0.5
        self.weights = [self._layer_weights(number) for number in range(shape.layers)]
        self.x = self.inputs[0].clone()
        self.output = torch.zeros_like(self.x)
        self._token = torch.arange(shape.tokens, device=device)[:, None]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._rounds = 0
        """Of Python in each step."""

    def capture(self) -> None:
        """Captures the step in a CUDA graph; does nothing on a CPU."""
        if not self.layer.is_accelerator:
            return
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward()
        side.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):
            self._forward()
        torch.cuda.synchronize()

    def compute_in_python(self, seconds: float) -> None:
        """From now on each step does a fixed piece of work on the main thread, which takes it about so long alone."""
        took_s = []
        self._rounds = 10_000
        for _ in range(50):
            began = time.perf_counter()
            self._python()
            took_s.append(time.perf_counter() - began)
        self._rounds = round(self._rounds * seconds / float(np.median(took_s)))

    def _python(self) -> None:
        for _ in range(self._rounds):
            pass

    def step(self, number: int) -> None:
        """Enqueues one step; does not wait."""
        if self._local:
            dist.barrier()
        self.x.copy_(self.inputs[number % NUM_INPUTS])
        if self._graph is None:
            self._forward()
        else:
            self._graph.replay()
        self._python()

    def shift_load(self) -> None:
        """Makes other experts the popular ones, from the next step on."""
        self.skew.copy_(self.skew.roll(self.placement.num_experts // 3 + 1, dims=1))

    def keep(self, placement: Placement, table: NDArray[np.int32]) -> None:
        """What a balancer that is being closed has left in force; the next one begins with it."""
        self.placement, self.current_table = placement, table

    def references(self) -> torch.Tensor:
        """`[NUM_INPUTS, tokens, hidden]`: the outputs of every batch with the weights as they are placed now."""
        outs = []
        for number in range(NUM_INPUTS):
            self.step(number)
            outs.append(self.output.clone())
        return torch.stack(outs)

    def binding(self) -> ModelBinding:
        """This rank as the balancer sees it."""
        return ModelBinding(
            name="decode-like",
            placement=self.placement,
            top_k=self.shape.top_k,
            weights=self.weights,
            counters=self.counts,
            counts="global",
            maps=TableMaps(self.layer, self.table, self.map),
            dispatch=DispatchForm("table", WIDTH),
            per_rank_dispatch=True,
            passes=self.passes,
            current_table=self.current_table,
        )

    @torch.no_grad()
    def _forward(self) -> None:
        x = self.x
        for number in range(self.shape.layers):
            x = F.layer_norm(x + F.linear(x, self.dense) * 0.5, (self.shape.hidden,))
            x = F.layer_norm(x + self._moe(x, number), (self.shape.hidden,))
        self.output.copy_(x)
        self.passes += 1

    def _moe(self, x: torch.Tensor, number: int) -> torch.Tensor:
        tokens, top_k, hidden = self.shape.tokens, self.shape.top_k, self.shape.hidden
        scores = F.linear(x, self.routers[number]).float() + self.skew[number].float()
        gates, ids = (scores / hidden**0.5).softmax(-1).topk(top_k)
        slots = map_and_count(ids, self.table[number], counts=self.counts[number])
        rows = (slots * tokens + self._token).view(-1)
        send = x.new_zeros(self.placement.topology.num_slots * tokens, hidden)
        send.index_copy_(0, rows, x.repeat_interleave(top_k, 0))
        arrived = self._all_to_all(send).view(self.size, self.shape.slots_per_rank, tokens, hidden)
        out = self._experts(arrived.transpose(0, 1).reshape(self.shape.slots_per_rank, -1, hidden), number)
        home = out.view(self.shape.slots_per_rank, self.size, tokens, hidden).transpose(0, 1).contiguous()
        back = self._all_to_all(home.view(-1, hidden)).index_select(0, rows).view(tokens, top_k, hidden)
        mixed: torch.Tensor = (back * gates.to(back.dtype)[:, :, None]).sum(1)
        return mixed

    def _experts(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """`[slots_per_rank, m, hidden]` through each slot's expert."""
        up, up_scale, down, down_scale = self.weights[number]
        gate, value = self._products(x, up, up_scale).chunk(2, -1)
        return self._products(F.silu(gate) * value, down, down_scale)

    def _products(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        scales = scale.to(x.dtype)[:, None, None]
        if not self.layer.is_accelerator:
            return torch.stack([F.linear(rows, expert) for rows, expert in zip(x, weight, strict=True)]) * scales
        if not self.fp8:
            return torch.bmm(x, weight.transpose(1, 2)) * scales
        one, low = torch.ones((), device=x.device), x.to(torch.float8_e4m3fn)
        outs = [
            torch._scaled_mm(rows, expert.t(), scale_a=one, scale_b=one, out_dtype=self.dtype)
            for rows, expert in zip(low, weight, strict=True)
        ]
        return torch.stack(outs) * scales

    def _all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(rows)
        if self._local:
            return out.copy_(rows)
        dist.all_to_all_single(out, rows)
        return out

    def _layer_weights(self, number: int) -> list[torch.Tensor]:
        shape, first = self.shape, self.rank * self.shape.slots_per_rank
        kind = torch.float8_e4m3fn if self.fp8 else self.dtype
        up = torch.empty(
            shape.slots_per_rank, 2 * shape.expert_hidden, shape.hidden, dtype=kind, device=self.layer.device
        )
        down = torch.empty(
            shape.slots_per_rank, shape.hidden, shape.expert_hidden, dtype=kind, device=self.layer.device
        )
        scales = torch.empty(2, shape.slots_per_rank, device=self.layer.device)
        for slot in range(shape.slots_per_rank):
            expert = int(self.placement.physical_to_logical_map[number, first + slot])
            seed = 1000 + number * self.placement.num_experts + expert
            up[slot] = self._random(2 * shape.expert_hidden, shape.hidden, seed=seed).to(kind)
            down[slot] = self._random(shape.hidden, shape.expert_hidden, seed=seed + 10**6).to(kind)
            scales[0, slot] = (1 + expert % 7 / 10) / shape.hidden**0.5
            scales[1, slot] = (1 + expert % 5 / 10) / shape.expert_hidden**0.5
        return [up, scales[0], down, scales[1]]

    def _random(self, *sizes: int, seed: int) -> torch.Tensor:
        generator = torch.Generator(self.layer.device).manual_seed(seed)
        return torch.randn(*sizes, generator=generator, device=self.layer.device, dtype=self.dtype)
