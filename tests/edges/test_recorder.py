"""Snapshots of counters are taken on the main thread and land on another."""

from __future__ import annotations

import threading

import numpy as np
import torch

from swiftbalancer.device import DeviceLayer
from swiftbalancer.recorder import RING, LoadRecorder
from tests.edges.main_thread import blocking, calls_of


def test_a_ring_too_small_loses_no_count_even_in_inference_mode() -> None:
    """Engines call the hook in inference mode, whose tensors other threads may not write."""
    counters = torch.zeros(2, 3, dtype=torch.int32)
    recorder = LoadRecorder(DeviceLayer.for_device("cpu"), counters, None)
    with torch.inference_mode():
        taken = []
        for window in range(3 * RING):
            counters += window
            taken.append(recorder.take(window))
    landed: list[list[int]] = []
    thread = threading.Thread(target=lambda: landed.extend(recorder.land(each).tolist() for each in taken))
    thread.start()
    thread.join()
    assert recorder.overruns == 2 * RING
    assert [row[0] for row in landed] == list(range(1, 3 * RING + 1))
    assert np.array_equal(np.array(landed)[:, 1:-1], np.repeat(np.arange(3 * RING)[:, None], 6, axis=1))


def test_a_ring_too_small_calls_nothing_that_may_wait() -> None:
    recorder = LoadRecorder(DeviceLayer.for_device("cpu"), torch.zeros(2, 3, dtype=torch.int32), None)
    for window in range(RING):
        recorder.take(window)

    calls = calls_of(lambda: recorder.take(RING))
    assert recorder.overruns == 1
    assert blocking(calls) == set()
