"""Writes loads as `.npy` or as a recording, whatever they were read from."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from swiftbalancer.errors import RecordingError
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer.wire import ModelSpec
from swiftbalancer_worker.recording import MANIFEST, Manifest, WindowIndex
from swiftbalancer_worker.recording_writer import RecordingWriter
from swiftbalancer_worker.trace import Trace


def write_npy(trace: Trace, path: Path) -> None:
    """`[steps, layers, experts]` float32, written piece by piece: memory stays small."""
    header = {"descr": "<f4", "fortran_order": False, "shape": trace.shape}
    try:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for piece in trace.pieces:
                for first in range(0, len(piece), 256):
                    file.write(np.ascontiguousarray(piece[first : first + 256], "<f4").tobytes())
    except OSError as error:
        raise RecordingError(f"{path}: cannot be written: {error.strerror}") from None


def write_recording(trace: Trace, folder: Path, *, topology: Topology) -> None:
    """A recording of `trace` as if seen on `topology`; raises `RecordingError` if `folder` already holds one."""
    if (folder / MANIFEST).exists():
        raise RecordingError(f"{folder}: already holds a recording")
    _, layers, experts = trace.shape
    placement = Placement.initial(topology, experts, num_layers=layers)
    model = ModelSpec(trace.model or trace.name, layers, experts, top_k=1, expert_bytes=trace.expert_bytes)
    manifest = Manifest(
        engine=f"converted from {trace.name}",
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        model=model,
        topology=topology,
        steps_per_sub_window=trace.steps_per_entry,
    )
    writer = RecordingWriter(folder, manifest, max_bytes=2**62)
    for step, loads in enumerate(trace):
        entry = WindowIndex(step=(step + 1) * trace.steps_per_entry, time=0.0, epoch=0)
        writer.window(entry, loads.astype(np.float32), placement.physical_to_logical_map)
    writer.close()
    if writer.lost_chunks:
        raise RecordingError(f"{folder}: {writer.lost_chunks} chunks could not be written")
