"""All experts in one process, each computed for every token: for training, and as the serving path's oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftbalancer_adaptors.minimoe.config import ModelConfig
from swiftbalancer_adaptors.minimoe.model import Routing


class DenseMixture(nn.Module):
    """Every expert's weights, and the mixture as one wide SwiGLU layer whose units a token's experts gate.

    For experts this small, computing all of them beats sorting tokens on a GPU: shapes are static and the
    matrix products are large. `balance_loss` sums over the layers of one forward pass the auxiliary loss of
    Switch Transformers (Fedus et al. 2021), over the whole batch, 1.0 per layer at perfect balance;
    `loads` `[layers, experts]` are the tokens each expert got. `start()` before each pass.
    """

    loads: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        lead = (config.num_layers, config.num_experts)
        self.w_gate_up = nn.Parameter(torch.empty(*lead, 2 * config.expert_hidden, config.hidden))
        self.w_down = nn.Parameter(torch.empty(*lead, config.hidden, config.expert_hidden))
        self.register_buffer("loads", torch.zeros(lead), persistent=False)
        self.balance_loss = torch.zeros(())

    def start(self) -> None:
        """Forgets the loads and the loss of the pass before."""
        self.loads.zero_()
        self.balance_loss = torch.zeros((), device=self.loads.device)

    def forward(self, layer: int, x: Tensor, routing: Routing) -> Tensor:
        """`x` `[n, hidden]` -> `[n, hidden]`; see `Mixture`."""
        num_experts, width = self.config.num_experts, self.config.expert_hidden
        gates = torch.zeros_like(routing.probabilities).scatter(1, routing.ids, routing.weights)
        self._record(layer, gates, routing)
        wide = F.linear(x, self.w_gate_up[layer].flatten(0, 1)).view(-1, num_experts, 2, width)
        inner = F.silu(wide[:, :, 0]) * wide[:, :, 1] * gates.to(wide.dtype)[:, :, None]
        return F.linear(inner.flatten(1), self.w_down[layer].transpose(0, 1).flatten(1))

    def _record(self, layer: int, gates: Tensor, routing: Routing) -> None:
        load = (gates > 0).sum(0).float()
        self.loads[layer] = load.detach()
        share = load / load.sum()
        mean_probability = routing.probabilities.mean(0)
        self.balance_loss = self.balance_loss + self.config.num_experts * (share * mean_probability).sum()
