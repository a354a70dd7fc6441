"""Our updator in place of vllm-ascend's `EplbUpdator` in Model Runner V1, with the same methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from swiftbalancer.attach import attach
from swiftbalancer.balancer import Balancer
from swiftbalancer.border import GroupInfo, ModelBinding
from swiftbalancer.config import Config
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import DispatchForm
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer.placement import Placement
from swiftbalancer_adaptors.vllm_ascend import layers
from swiftbalancer_adaptors.vllm_ascend.formats import EngineFormats
from swiftbalancer_adaptors.vllm_ascend.log2phy import IntArray, Log2phyMaps, own_maps, table_in_force

NORMAL_MODE = torch.inference_mode(False)
"""The runner calls under inference mode, whose tensors the balancer's threads could not write."""


@dataclass(frozen=True, slots=True)
class V1Engine:
    """What the updator needs of the engine beside the adaptor. The callables run in the profile run, on all ranks."""

    config: Config
    model: str
    tp_size: int
    num_nodes: Callable[[], int]
    group: Callable[[torch.device, str], GroupInfo]
    """Who this rank is; the name is used once."""
    gathers_tokens: Callable[[], bool]
    """Whether some batches are gathered on all ranks before they are routed (`ALLGATHER`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """A model taken over: what its loader fills and its router starts with, and where we read and write."""

    placement: Placement
    table: IntArray
    maps: Log2phyMaps
    counters: torch.Tensor


class SwiftUpdator:
    """Counts, plans and moves through swiftbalancer. The runner calls it as it calls its own updator.

    Balancing begins with `begin_serving`; passes before it (profile, warm-up, graph capture) are not load.
    """

    def __init__(self, engine: V1Engine, *_upstream: Any) -> None:
        self._engine = engine
        self._model: Attached | None = None
        self._passes = 0
        self._generation = 0
        self._serving = False
        self.adaptor: Any = None
        """vllm-ascend's own adaptor to the model; the runner uses it through us."""
        self.balancer: Balancer | None = None

    # -- what the runner calls ----------------------------------------------------------------------------

    def set_adaptor(self, adaptor: Any) -> None:
        """Frees the adaptor's own staging buffers: ours are elsewhere, and only its own loader used them."""
        self.adaptor = adaptor
        adaptor.buffer_tensor_list.clear()

    @NORMAL_MODE
    def warm_up_eplb(self) -> None:
        """Builds the balancer. Collective; the runner calls it in its profile run, so that memory is counted.

        Raises `UnsupportedEngine` for a model or a setting that cannot be balanced.
        """
        adaptor, engine = self.adaptor, self._engine
        placement = layers.placement_of(adaptor.get_global_expert_map(), num_nodes=engine.num_nodes())
        if engine.gathers_tokens():
            _check_gathered(placement)
        counters = layers.take_over_counters(
            layers.moe_modules(adaptor), slots_per_rank=placement.topology.slots_per_rank
        )
        group = self._next_group(counters.device)
        own = np.stack([layer_map.cpu().numpy() for layer_map in own_maps(adaptor)])
        table = table_in_force(placement, own, rank=group.rank, tp_size=engine.tp_size)
        maps = Log2phyMaps(adaptor, DeviceLayer.for_device(counters.device), placement, group.rank)
        self._model = Attached(placement, table, maps, counters)
        self._attach(self._model, group)

    def forward_before(self) -> None:
        """Before every pass: nothing blocks here, and nothing is transferred on the main stream."""
        self._passes += 1

    def take_update_info_from_eplb_process(self) -> None:
        """Early releases call it between forward_before and forward_end; there is nothing to take."""

    @NORMAL_MODE
    def forward_end(self, _counted: bool = True) -> None:
        """After every pass, dummy ones included; whether it counted was decided on the device, by the runner."""
        if self._serving and self.balancer is not None:
            self.balancer.after_forward(self._passes)

    def shutdown(self) -> None:
        """Ends the balancer and its worker. Idempotent."""
        self._serving = False
        if self.balancer is not None:
            self.balancer.close()
            self.balancer = None

    # -- what our hooks call ------------------------------------------------------------------------------

    @NORMAL_MODE
    def begin_serving(self) -> None:
        """After warm-up and graph capture, on every rank: what was counted so far is forgotten."""
        if self._model is not None:
            self._model.counters.zero_()
        self._passes = 0
        self._serving = True

    @NORMAL_MODE
    def pause(self) -> None:
        """Before the weights go to sleep, on every rank: what is in flight ends, nothing new begins."""
        if self.balancer is not None:
            self.balancer.drain()
        self._serving = False

    @NORMAL_MODE
    def resume(self) -> None:
        """The weights are back as they were."""
        if self.balancer is not None:
            self.balancer.resume()
        self._serving = True

    @NORMAL_MODE
    def weights_reloaded(self) -> None:
        """The loader has filled the initial slots anew, on every rank: initial maps, and balancing starts again."""
        model = self._model
        if model is None:
            return
        if self.balancer is not None:
            self.balancer.drain()
        self.shutdown()
        model.maps.write(model.placement, model.table)
        self._attach(model, self._next_group(model.counters.device))
        self.begin_serving()

    # -- ours ---------------------------------------------------------------------------------------------

    def _next_group(self, device: torch.device) -> GroupInfo:
        self._generation += 1
        return self._engine.group(device, str(self._generation))

    def _attach(self, model: Attached, group: GroupInfo) -> None:
        weights = layers.expert_weights(
            self.adaptor,
            slots_per_rank=model.placement.topology.slots_per_rank,
            formats=EngineFormats(DeviceLayer.for_device(model.counters.device)),
        )
        binding = ModelBinding(
            name=self._engine.model,
            placement=model.placement,
            top_k=layers.top_k(layers.moe_modules(self.adaptor)[0]),
            weights=weights,
            counters=model.counters,
            counts="local",
            maps=model.maps,
            dispatch=DispatchForm("static", model.placement.topology.num_ranks),
            per_rank_dispatch=True,
            current_table=model.table,
        )
        self.balancer = attach(self._engine.config, binding, group)


def _check_gathered(placement: Placement) -> None:
    """Gathered batches are routed alike on all ranks and masked by slot in the table of the initial experts."""
    slots = np.arange(placement.topology.num_slots)
    if not (placement.physical_to_logical_map == slots).all():
        raise UnsupportedEngine(
            "vllm-ascend gathers the tokens of some batches on this device (moe_comm_type ALLGATHER), where each "
            "rank's own choice of a replica would lose tokens; redundant experts and expert_map_path do not work "
            "there: set num_redundant_experts to 0 and drop expert_map_path"
        )
