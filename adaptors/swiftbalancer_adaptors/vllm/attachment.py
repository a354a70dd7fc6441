"""What swiftbalancer adds to one `EplbState` of vLLM: a balancer for each model it holds."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import torch

from swiftbalancer.attach import attach
from swiftbalancer.balancer import Balancer
from swiftbalancer.config import Config
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import default_width
from swiftbalancer_adaptors.vllm.binding import (
    bind,
    check_layout,
    check_what_stays,
    ep_group,
    group_info,
    initial_placement,
)
from swiftbalancer_adaptors.vllm.maps import VllmMaps
from swiftbalancer_adaptors.vllm.part import Part
from swiftbalancer_adaptors.vllm_ascend.v2 import maps_of

SLOT = "_swiftbalancer_attachment"
"""Attribute of an `EplbState` that holds its attachment."""

logger = logging.getLogger(__name__)


class BalancedModel:
    """One model (the served one, or its draft) with its balancer, which is built at the first pass.

    Building waits for that pass because it allocates and talks to every rank: the first pass is vLLM's memory
    profile where it makes one, so the staging memory is accounted for, and it is outside vLLM's pool for weights,
    which sleep mode empties.
    """

    def __init__(self, model_state: Any, config: Config, *, device: DeviceLayer, part: Part) -> None:
        check_layout(model_state, device.device)
        self._state = model_state
        self._config = part.own(config)
        self._device = device
        self.part = part
        self._generation = 0
        self._initial = initial_placement(model_state, config)
        self._maps: VllmMaps | None = None
        self._at_initial = True
        """Whether every expert is where vLLM's weight loader expects it."""
        self.balancer: Balancer | None = None
        self._fill_redundant_slots()

    @torch.inference_mode(False)  # vLLM is in it, and our threads, outside, could not write tensors made in it
    def start(self) -> None:
        """Builds the balancer on the initial placement. Every rank must call it at the same pass."""
        check_what_stays(self._state)
        if self._maps is None:
            wanted = self._config.dispatch.width or default_width(self._initial.topology.num_ranks)
            width = min(wanted, self._state.logical_to_physical_map.shape[2])
            self._maps = maps_of(self._state, self._device, width=width)
        self._maps.write(self._initial)
        self._state.expert_load_pass.zero_()
        if self._generation:  # weights may have been loaded again
            self._fill_redundant_slots()
        self._generation += 1
        name = self.part.named(self._state.model_name)
        group = group_info(self._device.device, name=f"{self.part.label or 'model'}/{self._generation}")
        binding = bind(self._state, name=name, placement=self._initial, maps=self._maps)
        self._at_initial = False
        self.balancer = attach(self._config, binding, group)

    def stop(self) -> None:
        """Ends the balancer; the placement stays as it is."""
        if self.balancer is not None:
            self.balancer.drain()
            self.balancer.close()
            self.balancer = None

    def restore(self) -> None:
        """Ends the balancer and moves every expert back to where vLLM's weight loader expects it.

        Blocks, with vLLM's own transfer. Every rank must call it between two passes.
        """
        self.stop()
        if self._maps is None or self._at_initial:
            return
        self._to_initial(self._state.physical_to_logical_map)
        self._maps.write_for_vllm(self._initial)
        self._at_initial = True

    def _fill_redundant_slots(self) -> None:
        """Copies experts to the redundant slots of a draft model.

        The loaders of vLLM's MTP models fill only the first slot of each expert and leave garbage in the others.
        """
        if self.part.draft:
            filled = self._state.physical_to_logical_map.new_tensor(self._initial.physical_to_logical_map)
            filled[:, self._initial.num_experts :] = -1
            self._to_initial(filled)

    def _to_initial(self, slots: torch.Tensor) -> None:
        """Moves experts from where `slots` says they are, `[layers, slots]`, -1 for none, to their first slots."""
        from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

        rearrange_expert_weights_inplace(
            slots,
            slots.new_tensor(self._initial.physical_to_logical_map).cpu(),
            self._state.model.expert_weights,
            self._state.expert_buffer,
            ep_group().device_group,
            self._state.communicator,
        )

    def forget(self) -> None:
        """Ends the balancer and writes the initial maps: for weights that are gone and will be loaded anew."""
        self.stop()
        if self._maps is not None:
            self._maps.write_for_vllm(self._initial)
        self._at_initial = True


class Hold(Enum):
    """Why balancing is paused. Several reasons may hold at once."""

    ASLEEP = auto()
    WEIGHT_UPDATE = auto()
    CLOSED = auto()


class Attachment:
    """The balancers of one `EplbState`, and the switch that keeps dummy passes out of their counts."""

    def __init__(self, state: Any, config: Config) -> None:
        self._state = state
        self._config = config
        self._device = DeviceLayer.for_device(state.device)
        self._counting = False
        self._held: set[Hold] = set()
        self.models: dict[str, BalancedModel] = {}

    def add(self, key: str, part: Part) -> None:
        """Takes over the model vLLM has just added under `key`. Raises `UnsupportedEngine`."""
        model_state = self._state.model_states[key]
        self.models[key] = BalancedModel(model_state, self._config, device=self._device, part=part)
        self._guard_loader(model_state.model)
        self._count(False)

    def after_forward(self) -> None:
        """Once per pass, dummy ones included, on the main thread, the same pass on every rank."""
        if self._held:
            return
        for model in self.models.values():
            if model.balancer is None:
                model.start()
            else:
                model.balancer.after_forward()
        if not self._counting:
            self._count(True)

    def profiled(self) -> None:
        """After vLLM's memory profile pass: allocates everything, counts nothing."""
        for model in self.models.values():
            if model.balancer is None:
                model.start()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Around a dummy pass: its tokens are not load."""
        self._count(False)
        yield

    def pause(self, hold: Hold) -> None:
        """Before something happens to the weights: what is in flight is finished or dropped, nothing new begins."""
        for model in self.models.values():
            if model.balancer is not None:
                model.balancer.drain()
        self._held.add(hold)

    def resume(self, hold: Hold) -> None:
        """Ends one reason to pause; without another, balancing goes on, or starts anew where it was ended."""
        if hold not in self._held:
            return
        self._held.discard(hold)
        if self._held:
            return
        for model in self.models.values():
            if model.balancer is not None:
                model.balancer.resume()

    def restore(self) -> None:
        """Before weights are read or written by slot: every expert goes back to its initial slot.

        Balancing starts anew at the next pass, unless it is paused.
        """
        for model in self.models.values():
            model.restore()
        self._count(False)

    def forget(self) -> None:
        """After the weights were discarded: initial maps; balancing starts anew as after `restore`."""
        for model in self.models.values():
            model.forget()
        self._count(False)

    def close(self) -> None:
        """Ends every balancer and its worker for good. Idempotent."""
        for model in self.models.values():
            if model.balancer is not None:
                model.balancer.close()
                model.balancer = None
        self._held.add(Hold.CLOSED)

    def _guard_loader(self, model: Any) -> None:
        """A trainer may load weights into the model itself, past every method of vLLM's worker."""
        load_weights = model.load_weights

        @functools.wraps(load_weights)
        def load_at_initial_slots(*args: Any, **named: Any) -> Any:
            self.restore()
            return load_weights(*args, **named)

        model.load_weights = load_at_initial_slots

    def _count(self, on: bool) -> None:
        """Sets the flag vLLM's counting kernel reads. One tiny kernel, only when the state changes."""
        self._counting = on
        if self._state.should_record_tensor is not None:
            self._state.should_record_tensor.fill_(on)


def attachment_of(state: Any) -> Attachment | None:
    """The attachment of an `EplbState`; None for None and for one that is vLLM's own business."""
    return getattr(state, SLOT, None)
