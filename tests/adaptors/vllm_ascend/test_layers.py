"""What the adaptor says of a model, taken over: placement, counters, weights, maps; and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer_adaptors.vllm_ascend import formats, layers
from swiftbalancer_adaptors.vllm_ascend.log2phy import Log2phyMaps, replicas_in_turn, table_in_force
from swiftbalancer_adaptors.vllm_ascend.updator import _check_gathered
from tests.edges.scripted_device import ScriptedLayer

MAPS = torch.tensor([[[0, 1, 2, -1], [1, -1, 0, 2]], [[-1, 0, 1, 2], [2, 1, 0, -1]]], dtype=torch.int32)
"""Two layers, two ranks of three slots, four experts."""
PLAIN = formats.EngineFormats(DeviceLayer.for_device("cpu"))


class Padded:
    """A format that says every tensor is private."""

    def is_private(self, _tensor: torch.Tensor) -> bool:
        return True

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class RecordingAdaptor(SimpleNamespace):
    """As much of `VllmEplbAdaptor` as the maps use."""

    def do_update_expert_map(self, layer: int, experts: torch.Tensor) -> None:
        self.updated[layer] = experts.tolist()


def test_the_placement_is_what_the_expert_maps_say() -> None:
    placement = layers.placement_of(MAPS, num_nodes=1)
    assert placement.physical_to_logical_map.tolist() == [[0, 1, 2, 2, 0, 3], [1, 2, 3, 2, 1, 0]]
    assert placement.num_experts == 4


def test_an_empty_slot_is_refused_and_named() -> None:
    maps = MAPS.clone()
    maps[1, 0, 3] = -1
    with pytest.raises(UnsupportedEngine, match="layer 1: slot 2 of rank 0 holds no expert"):
        layers.placement_of(maps, num_nodes=1)


def test_counters_become_rows_of_one_tensor_and_history_is_dropped() -> None:
    modules = [
        SimpleNamespace(moe_load=torch.ones(3, dtype=torch.int64)),
        SimpleNamespace(moe_load=torch.ones(5, 3, dtype=torch.int32), multi_stage=True),
    ]
    counters = layers.take_over_counters(modules, slots_per_rank=3)
    assert counters.tolist() == [[0, 0, 0], [0, 0, 0]]
    modules[0].moe_load.add_(torch.tensor([1, 2, 3]))
    modules[1].moe_load += torch.tensor([4, 5, 6])
    assert counters.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert modules[1].multi_stage is False


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_table_of_all_ranks_is_told_from_the_own_maps(tp_size: int) -> None:
    placement = layers.placement_of(MAPS, num_nodes=1)
    table = replicas_in_turn(placement, tp_size=tp_size)
    for rank in range(2):
        told = table_in_force(placement, table[:, :, rank], rank=rank, tp_size=tp_size)
        assert np.array_equal(told[:, :, rank], table[:, :, rank])


def test_a_rule_of_replicas_we_do_not_know_is_refused() -> None:
    placement = layers.placement_of(MAPS, num_nodes=1)
    strange = replicas_in_turn(placement, tp_size=1)[:, :, 1].copy()
    strange[1, 2] = 1
    strange[0, 0] = 0
    with pytest.raises(UnsupportedEngine, match="routes expert 0 to slot 0 on rank 1"):
        table_in_force(placement, strange, rank=1, tp_size=1)


def test_maps_are_written_in_place_for_their_layers_only() -> None:
    placement = layers.placement_of(MAPS, num_nodes=1)
    device_maps = {3: torch.zeros(4, dtype=torch.int32), 4: torch.zeros(4, dtype=torch.int32)}
    adaptor: Any = RecordingAdaptor(
        expert_param_per_layer={3: [], 4: []}, log2phy_map_per_layer=device_maps, updated={}
    )
    maps = Log2phyMaps(adaptor, DeviceLayer.for_device("cpu"), placement, rank=1)
    table = np.arange(8, dtype=np.int32).reshape(1, 4, 2)
    maps.commit(maps.prepare(MapUpdate(np.array([1]), placement.physical_to_logical_map[1:], table, batch=0)))
    assert device_maps[3].tolist() == [0, 0, 0, 0]
    assert device_maps[4].tolist() == [1, 3, 5, 7]
    assert adaptor.updated == {4: MAPS[1, 1].tolist()}


def test_maps_wait_for_their_copies_on_a_device_whose_work_lands_late() -> None:
    placement = layers.placement_of(MAPS, num_nodes=1)
    device = ScriptedLayer(5)
    device_maps = {0: torch.zeros(4, dtype=torch.int32), 1: torch.zeros(4, dtype=torch.int32)}
    adaptor: Any = RecordingAdaptor(
        expert_param_per_layer={0: [], 1: []}, log2phy_map_per_layer=device_maps, updated={}
    )
    maps, side = Log2phyMaps(adaptor, device, placement, rank=0), device.side_stream()
    for first in range(20):
        table = np.arange(first, first + 16, dtype=np.int32).reshape(2, 4, 2)
        landed = device.event()
        with device.on(side):
            prepared = maps.prepare(MapUpdate(np.arange(2), placement.physical_to_logical_map, table, batch=0))
            device.record(landed)
        device.wait(device.current_stream(), landed)
        maps.commit(prepared)
        device.synchronize()
        assert device_maps[1].tolist() == [first + 8, first + 10, first + 12, first + 14]


def test_weights_are_read_by_name_where_the_adaptors_lists_hold_rows_of_the_first_expert() -> None:
    offsets = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
    tensors = [torch.full((2,), float(slot)) for slot in range(3)]
    prefix = "model.layers.1.mlp.experts."
    adaptor = SimpleNamespace(
        moe_layers=[SimpleNamespace(w13_weight_list=tensors, w13_weight_offset=offsets)],
        expert_weight_names=["w13_weight_list", "w13_weight_offset"],
        param_dict={prefix + "w13_weight_list": tensors, prefix + "w13_weight_offset": offsets},
        expert_param_per_layer={1: [[tensors[slot], offsets[0].data] for slot in range(3)]},
    )
    ((lists, rows),) = layers.expert_weights(
        adaptor, slots_per_rank=3, formats=formats.EngineFormats(DeviceLayer.for_device("cpu"))
    )
    assert [rows[slot].tolist() for slot in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [lists[slot].data_ptr() for slot in range(3)] == [tensor.data_ptr() for tensor in tensors]


def test_a_weight_without_a_tensor_for_every_slot_is_refused() -> None:
    adaptor = SimpleNamespace(moe_layers=[SimpleNamespace()], expert_param_per_layer={0: [[torch.zeros(2)]]})
    with pytest.raises(UnsupportedEngine, match="1 slots, this rank holds 2"):
        layers.expert_weights(adaptor, slots_per_rank=2, formats=PLAIN)


def layer_holding(**weights: Any) -> Any:
    """An adaptor of one layer of three slots; it names `w13_weight_list` and nothing else."""
    named = [torch.full((2,), float(slot)) for slot in range(3)]
    return SimpleNamespace(
        moe_layers=[SimpleNamespace(w13_weight_list=named, moe_load=torch.zeros(3), log2phy=None, **weights)],
        expert_param_per_layer={0: [[tensor] for tensor in named]},
    )


def test_a_weight_the_adaptor_does_not_name_moves_all_the_same() -> None:
    flat = torch.arange(12)
    bias = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
    scales = [torch.full((1,), float(slot)) for slot in range(3)]
    adaptor = layer_holding(
        fused_w1_scale=flat, w13_bias=bias, w2_weight_scale_list=scales, w3_bias=None, w2_none=[flat[:0]]
    )
    ((named, fused, biases, scale_list),) = layers.expert_weights(adaptor, slots_per_rank=3, formats=PLAIN)
    assert [len(kind) for kind in (named, fused, biases, scale_list)] == [3, 3, 3, 3]
    fused[1].fill_(-1)
    biases[2].fill_(-2)
    assert flat.tolist() == [0, 1, 2, 3, -1, -1, -1, -1, 8, 9, 10, 11], "in place"
    assert bias.tolist() == [[0, 1], [2, 3], [-2, -2]]
    assert scale_list[0].data_ptr() == scales[0].data_ptr()


@pytest.mark.parametrize("weight", [torch.zeros(4, 3), torch.zeros(5), [torch.zeros(1)] * 2], ids=str)
def test_a_weight_that_is_not_by_slot_is_refused_and_named(weight: Any) -> None:
    with pytest.raises(UnsupportedEngine, match=r"MoE layer 0: w2_codebook .* each of the 3 slots"):
        layers.expert_weights(layer_holding(w2_codebook=weight), slots_per_rank=3, formats=PLAIN)


def test_private_formats_that_pad_are_refused_and_those_that_do_not_are_aliased() -> None:
    dense = [torch.zeros(16, 32, dtype=torch.int8) for _ in range(2)]
    assert len(formats.plain(dense, Padded(), where="MoE layer 0")) == 2
    stacked = list(torch.zeros(2, 16, 32, dtype=torch.int8).unbind(0))
    assert len(formats.plain(stacked, Padded(), where="MoE layer 0")) == 2
    padded = [torch.zeros(16, 64, dtype=torch.int8)[:, :32] for _ in range(2)]
    with pytest.raises(UnsupportedEngine, match="1024 bytes in a private format, 512 expected"):
        formats.plain(padded, Padded(), where="MoE layer 0")


def test_where_tokens_are_gathered_only_the_plain_initial_placement_is_served() -> None:
    plain = torch.tensor([[[0, 1, -1, -1], [-1, -1, 0, 1]]], dtype=torch.int32)
    _check_gathered(layers.placement_of(plain, num_nodes=1))
    with pytest.raises(UnsupportedEngine, match="num_redundant_experts to 0"):
        _check_gathered(layers.placement_of(MAPS, num_nodes=1))
