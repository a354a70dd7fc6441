"""A rank that dies in the middle of a transfer, as a process: the others learn it, keep their weights, and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch._C._distributed_c10d import TCPStore

from swiftbalancer.device import DeviceLayer
from swiftbalancer.groups import GroupFactory
from swiftbalancer.transport import ExpertWeights, TransferLimits, TransferState, Transport, Workplace
from swiftbalancer.transport.p2p import GlooCarrier
from tests.edges.transport_case import DEADLINE_S, batch_of

SIZE = 3


def serve(rank: int, port: int) -> None:
    """One rank: rank 1 carries a part and dies; the others print what became of the batch."""
    store = TCPStore("127.0.0.1", port, None, is_master=False)
    kind = torch.full((2, 64 << 10), float(rank))
    place = Workplace(
        ExpertWeights([[kind]], slots_per_rank=2),
        DeviceLayer.for_device("cpu"),
        GroupFactory(store, rank=rank, size=SIZE),
        TransferLimits(staging_bytes=1 << 20, deadline_s=DEADLINE_S, chunk_bytes=4096),
    )
    transport = Transport(place, lambda: GlooCarrier(place.layer.device), name="t")
    transport.connect(DEADLINE_S)
    transport.start(batch_of((0, 0, 2), (0, 2, 4), (0, 4, 0)))
    end = time.monotonic() + DEADLINE_S
    while transport.poll().state is TransferState.MOVING and time.monotonic() < end:
        transport.advance(4096)
        if rank == 1 and transport.poll().bytes_moved > 16 << 10:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.005)
    status = transport.poll()
    transport.close(DEADLINE_S)
    print(status.state.value, bool((kind == rank).all()), f"{end - time.monotonic():.1f}", flush=True)


def test_survivors_of_a_killed_rank_fail_the_batch_at_once_and_exit_cleanly() -> None:
    server = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    root = Path(__file__).parents[2]
    script = "import sys; from tests.edges.test_transport_killed import serve; serve(*map(int, sys.argv[1:]))"
    commands = [[sys.executable, "-c", script, str(rank), str(server.port)] for rank in range(SIZE)]
    processes = [subprocess.Popen(c, cwd=root, stdout=subprocess.PIPE, text=True) for c in commands]
    outputs = [process.communicate(timeout=90)[0].split() for process in processes]
    assert processes[1].returncode == -signal.SIGKILL
    for rank in (0, 2):
        assert processes[rank].returncode == 0
        state, weights_untouched, seconds_left = outputs[rank]
        assert state == "failed"
        assert weights_untouched == "True"
        assert float(seconds_left) > 1.0, "noticed by the closed connection, not by the deadline"
