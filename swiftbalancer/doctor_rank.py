"""One rank of the doctor's exchange: `python -m swiftbalancer.doctor_rank TASK`, where TASK is a `Task` in JSON.

Prints one line of JSON: what carried the experts, how fast, and how many arrived damaged on any rank.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from torch._C._distributed_c10d import TCPStore

from swiftbalancer.device import DeviceLayer
from swiftbalancer.errors import TransferFailed
from swiftbalancer.groups import Group, GroupFactory
from swiftbalancer.transport import (
    UNPACED,
    ExpertWeights,
    TransferBatch,
    TransferLimits,
    TransferState,
    Transport,
    Workplace,
    choose,
)

DEADLINE_S = 60.0
REPEATS = 5
SLACK_BYTES = 4096
"""Staging may round an expert up."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one rank is to do; `port` is of this host, `mib` the size of each of the `experts` it sends."""

    device: str
    rank: int
    size: int
    port: int
    transport: str
    mib: int
    experts: int


def main(task: Task) -> None:
    rank, size, num, num_bytes = task.rank, task.size, task.experts, task.mib << 20
    layer = DeviceLayer.for_device(task.device)
    layer.bind_thread()
    store = TCPStore("127.0.0.1", task.port, size, rank == 0, timedelta(seconds=DEADLINE_S))
    groups = GroupFactory(store, rank=rank, size=size, prefix="doctor")
    votes = groups.create("votes", timeout_s=DEADLINE_S)
    slots = torch.zeros(2 * num, num_bytes, dtype=torch.uint8, device=layer.device)
    own, arriving = slots[:num], slots[num:]
    own.copy_((torch.arange(num_bytes, device=layer.device) % 241 + rank)[None, :])
    own += torch.arange(num, dtype=torch.uint8, device=layer.device)[:, None]
    weights = ExpertWeights([[slots]], slots_per_rank=2 * num)
    limits = TransferLimits(staging_bytes=num * (num_bytes + SLACK_BYTES), deadline_s=DEADLINE_S)
    transport = choose(task.transport, Workplace(weights, layer, groups, limits), votes, one_node=True)
    ends = [(2 * num * r + i, 2 * num * ((r + 1) % size) + num + i) for r in range(size) for i in range(num)]
    moves = np.array([[0, source, source, target] for source, target in ends], np.int32)
    seconds = [_move(transport, layer, TransferBatch(1, number, moves)) for number in range(REPEATS)]
    wrong = _everywhere(votes, int((arriving != own + ((rank - 1) % size - rank)).any(1).sum()))
    report = {"carrier": transport.name, "ranks": size, "mib": task.mib, "experts": num, "wrong": wrong}
    print(json.dumps({**report, "gb_per_s": num * num_bytes / min(seconds) / 1e9}), flush=True)
    transport.close(DEADLINE_S)


def _move(transport: Transport, layer: DeviceLayer, batch: TransferBatch) -> float:
    """Seconds until the batch is staged on this rank; commits it."""
    began = time.perf_counter()
    transport.start(batch)
    transport.advance(UNPACED)
    while (status := transport.poll()).state is TransferState.MOVING:
        time.sleep(0.0005)
    if status.state is not TransferState.DONE:
        raise TransferFailed(status.reason)
    seconds = time.perf_counter() - began
    transport.commit_copies().enqueue(layer)
    layer.synchronize()
    return seconds


def _everywhere(group: Group, value: int) -> int:
    """The sum over all ranks; also keeps them here until all are done."""
    values = torch.zeros(group.size, 1, dtype=torch.int64)
    group.wait(group.all_gather(values, torch.tensor([value])), DEADLINE_S)
    return int(values.sum())


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
