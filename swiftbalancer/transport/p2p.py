"""Carriers by send and receive: gloo between CPUs, gloo through host memory, a device's own library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import override

from swiftbalancer.device import DeviceLayer, PeerOp
from swiftbalancer.errors import TransferFailed
from swiftbalancer.groups import Group, GroupFactory
from swiftbalancer.transport.batch_run import finish
from swiftbalancer.transport.experts import ALIGNMENT
from swiftbalancer.transport.seam import Carrier, ChunkOp, Round, TransferLimits


class GlooCarrier(Carrier):
    """Between CPU ranks, straight from slots into staging.

    A gloo send's `Work` reports completion only to a thread that waits for it, so the mover's thread does.
    """

    receives = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._control: Group | None = None

    @override
    def open(self, name: str, control: Group, staging_bytes: int) -> torch.Tensor:
        self._control = control
        return torch.empty(staging_bytes, dtype=torch.uint8, device=self._device)

    @override
    def carry(self, rounds: Sequence[Round], deadline: float) -> None:
        assert self._control is not None
        ops = [_peer_op(op, op.data) for ops in rounds for op in ops]
        finish(self._control, self._control.exchange(ops), deadline, "carrying weights over gloo")

    @override
    def cut(self) -> None:
        """Nothing to do: gloo's waits end by their deadline, or when a peer closes its end."""

    @override
    def close(self) -> None:
        self._control = None


class HostStagedCarrier(Carrier):
    """Between any devices: down to pinned memory, across by gloo, up again; one round at a time."""

    receives = True

    def __init__(self, layer: DeviceLayer, chunk_bytes: int) -> None:
        self._layer = layer
        self._chunk_bytes = chunk_bytes
        self._control: Group | None = None
        self._blocks: dict[bool, torch.Tensor] = {}

    @override
    def open(self, name: str, control: Group, staging_bytes: int) -> torch.Tensor:
        self._control = control
        return torch.empty(staging_bytes, dtype=torch.uint8, device=self._layer.device)

    @override
    def carry(self, rounds: Sequence[Round], deadline: float) -> None:
        for ops in rounds:
            self._carry_round(ops, deadline)

    def _carry_round(self, ops: Round, deadline: float) -> None:
        assert self._control is not None
        hosts = self._buffers_for(ops)
        for op, host in zip(ops, hosts, strict=True):
            if op.is_send:
                self._layer.copy(host, op.data)
        self._settle()
        works = self._control.exchange([_peer_op(op, host) for op, host in zip(ops, hosts, strict=True)])
        finish(self._control, works, deadline, "carrying weights over gloo")
        for op, host in zip(ops, hosts, strict=True):
            if not op.is_send:
                self._layer.copy(op.data, host)
        self._settle()

    def _buffers_for(self, ops: Round) -> list[torch.Tensor]:
        """For each op `[n]` uint8 of pinned memory; sends and receives each have a block of their own."""
        begins, ends = [], {True: 0, False: 0}
        for op in ops:
            begins.append(ends[op.is_send])
            ends[op.is_send] += -(-op.num_bytes // ALIGNMENT) * ALIGNMENT
        for is_send, size in ends.items():
            if is_send not in self._blocks or self._blocks[is_send].numel() < size:
                self._blocks[is_send] = self._layer.pinned((max(self._chunk_bytes, size),), torch.uint8)
        return [self._blocks[op.is_send][begin : begin + op.num_bytes] for op, begin in zip(ops, begins, strict=True)]

    def _settle(self) -> None:
        """The buffers are read or filled by the host next, so their copies must have run."""
        event = self._layer.event()
        self._layer.record(event)
        event.synchronize()

    @override
    def cut(self) -> None:
        """Nothing to do: gloo's waits end by their deadline, or when a peer closes its end."""

    @override
    def close(self) -> None:
        self._control = None
        self._blocks.clear()


class CollectiveCarrier(Carrier):
    """Between devices by their own library: each round is one batch of a send and a receive on the side stream.

    Both ends of a pair meet in the same wave and order, as such libraries demand. At most `max_ctas` thread blocks
    are taken, where the library can be told.
    """

    receives = True

    def __init__(self, layer: DeviceLayer, groups: GroupFactory, limits: TransferLimits) -> None:
        self._layer = layer
        self._groups = groups
        self._limits = limits
        self._group: Group | None = None

    @override
    def open(self, name: str, control: Group, staging_bytes: int) -> torch.Tensor:
        collective = self._layer.collective
        self._group = self._groups.create(
            f"{name}/{collective.name}",
            collective=collective,
            # Longer than any batch: a stuck one is cut by us, in order, before the library's watchdog would act.
            timeout_s=10 * self._limits.deadline_s,
            max_ctas=self._limits.max_ctas,
        )
        self._warm_up()
        return torch.empty(staging_bytes, dtype=torch.uint8, device=self._layer.device)

    def _warm_up(self) -> None:
        """Connects every pair now, since a library's first contact takes long and allocates."""
        assert self._group is not None
        me, size = self._group.rank, self._group.size
        token = torch.zeros(2, 8, dtype=torch.uint8, device=self._layer.device)
        for shift in range(1, size):
            ops = [PeerOp(True, token[0], (me + shift) % size), PeerOp(False, token[1], (me - shift) % size)]
            for work in self._group.exchange(ops):
                work.wait()
        self._settle()

    @override
    def carry(self, rounds: Sequence[Round], deadline: float) -> None:
        assert self._group is not None
        try:
            for ops in rounds:
                for work in self._group.exchange([_peer_op(op, op.data) for op in ops]):
                    work.wait()
            self._settle()
        except RuntimeError as error:
            raise TransferFailed(f"carrying weights over {self._group.backend}: {error}") from error

    def _settle(self) -> None:
        event = self._layer.event()
        self._layer.record(event)
        event.synchronize()

    @override
    def cut(self) -> None:
        if self._group is not None:
            self._group.abort()

    @override
    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def _peer_op(op: ChunkOp, data: torch.Tensor) -> PeerOp:
    return PeerOp(op.is_send, data, op.peer, op.tag)
