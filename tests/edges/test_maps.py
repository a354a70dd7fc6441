"""Rows of live maps are written whole and in place, whichever layers an update names."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from swiftbalancer.device import DeviceLayer
from swiftbalancer.maps import RowWriter

LAYERS, EXPERTS, WIDTH, SLOTS = 5, 3, 7, 11
layers_of_an_update = st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=LAYERS, unique=True)


@given(st.lists(layers_of_an_update, max_size=6))
def test_an_update_writes_its_layers_and_leaves_the_others(updates: list[list[int]]) -> None:
    """All layers travel in one copy, some of them in others; the memory is the same."""
    table = torch.full((LAYERS, EXPERTS, WIDTH), -1, dtype=torch.int32)
    rows = torch.full((LAYERS, SLOTS), -1, dtype=torch.int64)
    wide = torch.full((LAYERS, EXPERTS, 2 * WIDTH), -1, dtype=torch.int32)
    live = (table, rows, wide[:, :, :WIDTH])  # the last with gaps, as a part of an engine's wider map
    writer = RowWriter(DeviceLayer.for_device("cpu"), live)
    expected = [part.numpy().copy() for part in live]
    for number, layers in enumerate(updates):
        shapes = ((EXPERTS, WIDTH), (SLOTS,), (EXPERTS, WIDTH))
        values = [np.arange(len(layers) * np.prod(shape)).reshape(-1, *shape) + 100 * number for shape in shapes]
        staged = writer.fill(np.array(layers), *(each.astype(np.int32) for each in values))
        assert all(np.array_equal(part.numpy(), each) for part, each in zip(staged, values, strict=True))
        assert all(np.array_equal(part.numpy(), each) for part, each in zip(live, expected, strict=True))
        writer.commit()
        for part, each in zip(expected, values, strict=True):
            part[layers] = each
        assert all(np.array_equal(part.numpy(), each) for part, each in zip(live, expected, strict=True))
    assert (wide[:, :, WIDTH:] == -1).all()
