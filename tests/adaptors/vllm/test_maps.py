"""vLLM's maps as swiftbalancer writes them, on tensors of vLLM's shapes; no vLLM needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from swiftbalancer.border import MapUpdate
from swiftbalancer.device import DeviceLayer
from swiftbalancer.dispatch import column_of, uniform_table
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_adaptors.vllm.maps import VllmMaps
from tests.adaptors.vllm.cpu_shim import map_and_record

LAYERS, EXPERTS, SLOTS, WIDTH = 3, 6, 8, 16


@dataclass
class ModelState:
    """The map tensors of vLLM's state of a model."""

    physical_to_logical_map: torch.Tensor
    logical_to_physical_map: torch.Tensor
    logical_replica_count: torch.Tensor


@pytest.fixture
def state() -> ModelState:
    return ModelState(
        torch.zeros(LAYERS, SLOTS, dtype=torch.int64),
        torch.full((LAYERS, EXPERTS, 1024), -1, dtype=torch.int64),
        torch.zeros(LAYERS, EXPERTS, dtype=torch.int64),
    )


@pytest.fixture
def placement() -> Placement:
    return Placement.initial(Topology(num_ranks=2, slots_per_rank=SLOTS // 2), EXPERTS, num_layers=LAYERS)


@pytest.fixture
def maps(state: ModelState) -> VllmMaps:
    return VllmMaps(state, DeviceLayer.for_device("cpu"), width=WIDTH)


def test_the_first_write_splits_every_expert_evenly(maps: VllmMaps, state: ModelState, placement: Placement) -> None:
    maps.write(placement)
    assert (state.logical_replica_count == WIDTH).all()
    assert np.array_equal(state.logical_to_physical_map[:, :, :WIDTH].numpy(), uniform_table(placement, WIDTH))
    assert (state.logical_to_physical_map[:, :, WIDTH:] == -1).all()


def test_a_commit_writes_its_layers_in_place_and_no_other(
    maps: VllmMaps, state: ModelState, placement: Placement
) -> None:
    maps.write(placement)
    addresses = (state.physical_to_logical_map.data_ptr(), state.logical_to_physical_map.data_ptr())
    before = state.logical_to_physical_map[1].clone()
    rows = placement.physical_to_logical_map[[2, 0]][:, ::-1].copy()
    table = np.random.default_rng(0).integers(0, SLOTS, (2, EXPERTS, WIDTH)).astype(np.int32)
    maps.commit(maps.prepare(MapUpdate(np.array([2, 0]), rows, table, batch=0)))
    assert np.array_equal(state.physical_to_logical_map[[2, 0]].numpy(), rows)
    assert np.array_equal(state.logical_to_physical_map[[2, 0]][:, :, :WIDTH].numpy(), table)
    assert torch.equal(state.logical_to_physical_map[1], before)
    assert addresses == (state.physical_to_logical_map.data_ptr(), state.logical_to_physical_map.data_ptr())


def test_a_forgotten_preparation_leaves_the_maps_alone(
    maps: VllmMaps, state: ModelState, placement: Placement
) -> None:
    maps.write(placement)
    before = state.logical_to_physical_map.clone()
    for fill in range(5):
        table = np.full((1, EXPERTS, WIDTH), fill, np.int32)
        prepared = maps.prepare(MapUpdate(np.array([1]), placement.physical_to_logical_map[:1], table, batch=0))
    assert torch.equal(state.logical_to_physical_map, before)
    maps.commit(prepared)
    assert (state.logical_to_physical_map[1, :, :WIDTH] == 4).all()


def test_vllms_own_form_lists_each_replica_once(maps: VllmMaps, state: ModelState, placement: Placement) -> None:
    maps.write(placement)
    maps.write_for_vllm(placement)
    assert np.array_equal(state.logical_replica_count.numpy(), placement.logical_replica_count())
    assert state.logical_to_physical_map[0, 0, :3].tolist() == [0, 6, -1]


def test_the_kernels_hash_picks_the_column_the_planner_means(
    maps: VllmMaps, state: ModelState, placement: Placement
) -> None:
    maps.write(placement)
    tokens = 200
    ids = torch.full((tokens, 1), 1)
    counts = torch.zeros(SLOTS, dtype=torch.int32)
    chosen = map_and_record(
        ids, counts, state.logical_to_physical_map[0], state.logical_replica_count[0], torch.tensor(True)
    )
    expected = uniform_table(placement, WIDTH)[0, 1][column_of(np.arange(tokens), WIDTH)]
    assert np.array_equal(chosen[:, 0].numpy(), expected)
    assert counts.tolist() == np.bincount(expected, minlength=SLOTS).tolist()
