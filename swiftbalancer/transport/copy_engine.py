"""The carrier that pushes: each sender copies from its live slot straight into the receiver's staging memory.

No receive is posted and no multiprocessor is used. A receiver cannot see when its bytes are complete; it hears so
from each sender over the control group, once the sender's own stream has finished them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from typing_extensions import override

from swiftbalancer.device import DeviceLayer, PeerMemory
from swiftbalancer.dispatch import nothing
from swiftbalancer.errors import TransferFailed
from swiftbalancer.groups import Group, GroupFactory
from swiftbalancer.transport.seam import ROUNDS_AT_ONCE, Carrier, Round

log = logging.getLogger(__name__)

DRAIN_DEADLINE_S = 5.0
AT_ONCE_BYTES = 24 << 20
"""0.1 ms or so over NVLink. Waking for them takes a thread several times as long, however many they are."""
MakeMemory = Callable[[], PeerMemory]


class CopyEngineCarrier(Carrier):
    """For ranks of one host whose devices reach each other's memory (NVLink, or PCIe peer access)."""

    receives = False
    at_once = AT_ONCE_BYTES

    def __init__(
        self,
        layer: DeviceLayer,
        groups: GroupFactory,
        make_memory: MakeMemory | None = None,
        rest: Callable[[], None] = nothing,
    ) -> None:
        """`rest` is called between some rounds: nobody waits on a device for what comes later."""
        self._rest = rest
        self._make_memory = make_memory or layer.peer_memory
        self._layer = layer
        self._groups = groups
        self._name = ""
        self._memory: PeerMemory | None = None
        self._bases: list[int] = []
        self._carried = layer.event()

    @override
    def open(self, name: str, control: Group, staging_bytes: int) -> torch.Tensor:
        self._name = name
        self._memory = self._make_memory()
        # One byte per rank behind the staging area, for the test of every path.
        whole = self._memory.allocate(staging_bytes + control.size)
        mine = torch.tensor(list(self._memory.handle()), dtype=torch.uint8)
        handles = torch.empty(control.size, mine.numel(), dtype=torch.uint8)
        control.wait(control.all_gather(handles, mine), control.timeout_s)
        for rank, row in enumerate(handles.tolist()):
            self._bases.append(0 if rank == control.rank else self._memory.map(bytes(row)))
        self._test_paths(control, whole[staging_bytes:])
        return whole[:staging_bytes]

    def _test_paths(self, control: Group, mailbox: torch.Tensor) -> None:
        """Every rank writes a byte to every peer; raises `TransferFailed` unless all arrived here."""
        assert self._memory is not None
        mailbox.zero_()
        self._layer.current_stream().synchronize()
        self._barrier(control)
        mark = torch.full((1,), 171, dtype=torch.uint8, device=self._layer.device)
        size = mailbox.numel()
        for peer in range(size):
            if peer != control.rank:
                offset = int(mailbox.storage_offset()) + control.rank
                self._memory.push(self._bases[peer] + offset, mark.data_ptr(), 1)
        self._layer.current_stream().synchronize()
        self._barrier(control)
        arrived = mailbox.tolist()
        missing = [peer for peer in range(size) if peer != control.rank and arrived[peer] != 171]
        if missing:
            raise TransferFailed(f"bytes pushed by ranks {missing} did not arrive in rank {control.rank}'s memory")

    def _barrier(self, control: Group) -> None:
        out = torch.empty(control.size, 1, dtype=torch.int64)
        control.wait(control.all_gather(out, torch.zeros(1, dtype=torch.int64)), control.timeout_s)

    @override
    def carry(self, rounds: Sequence[Round], deadline: float) -> None:
        assert self._memory is not None
        for number, ops in enumerate(rounds):
            if number and number % ROUNDS_AT_ONCE == 0:
                self._rest()
            for op in ops:
                if op.is_send:
                    self._memory.push(self._bases[op.peer] + op.offset, op.address, op.num_bytes)
        self._layer.record(self._carried)
        self._carried.synchronize()

    @override
    def cut(self) -> None:
        """Nothing to do: a copy that was enqueued runs to its end, and `close` waits for that."""

    @override
    def close(self) -> None:
        """Frees the memory after every peer has said that it writes to it no more; keeps it otherwise."""
        if self._memory is None:
            return
        memory, self._memory = self._memory, None
        memory.unmap()
        if self._all_drained():
            memory.free()
        else:
            log.warning("transport=%s peers did not let go of staging memory: it stays allocated", self._name)

    def _all_drained(self) -> bool:
        store = self._groups.store(f"{self._name}/drained")
        try:
            store.set(str(self._groups.rank), "1")
            store.wait([str(rank) for rank in range(self._groups.size)], timedelta(seconds=DRAIN_DEADLINE_S))
        except RuntimeError:
            return False
        return True
