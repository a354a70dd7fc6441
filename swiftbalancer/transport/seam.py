"""The words transports share: what is asked of one, what it answers, and how bytes are carried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray

from swiftbalancer.cycle import Fault
from swiftbalancer.errors import TransferFailed
from swiftbalancer.groups import Group


class TransferTimedOut(TransferFailed):
    """A peer or the device did not finish its part within the batch's deadline."""


class ChecksumMismatch(TransferFailed):
    """An expert in staging differs from the one in the slot it was read from."""


class TransferState(Enum):
    """Where a transport is with the batch it was last given."""

    IDLE = "idle"
    MOVING = "moving"
    DONE = "done"
    FAILED = "failed"


class TransferStatus(Struct, frozen=True):
    """DONE means: everything this rank sends has left, everything it receives is in staging and verified."""

    state: TransferState
    fault: Fault = Fault.NONE
    reason: str = ""
    bytes_moved: int = 0
    """Bytes this rank has carried so far in this batch; of a send beside a receive, the larger."""


class Lately(Struct, frozen=True):
    """What a batch did on this rank since that was asked last.

    `rested`: nothing but wait for bytes to be allowed. `carried`: bytes went off. `held_back`: it had to wait for
    bytes to be allowed.
    """

    rested: bool = False
    carried: bool = False
    held_back: bool = False


AT_WORK = Lately()
WAITING = Lately(rested=True, held_back=True)


class TransferBatch(Struct, frozen=True, eq=False):
    """The moves of one batch, the same array on every rank.

    `moves` `[k, 4]` int32: layer, expert, source slot, target slot, slots counted over all ranks.
    """

    cycle: int
    batch: int
    moves: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """Bounds of one transport."""

    staging_bytes: int
    deadline_s: float
    chunk_bytes: int = 16 << 20
    verify: bool = True
    max_ctas: int = 4


class ChunkOp(Struct, frozen=True, eq=False):
    """One rank's half of one chunk: bytes `[start, stop)` of `block`, `[n]` uint8.

    A block is a tensor of a live slot, to send from, or of staging, to receive into.
    `offset` is where the chunk lies in the receiver's staging memory, in bytes, and `tag` numbers the chunk in
    the batch; both ends compute the same ones.
    """

    is_send: bool
    block: torch.Tensor
    start: int
    stop: int
    peer: int
    offset: int
    tag: int

    @property
    def data(self) -> torch.Tensor:
        """The chunk as a view."""
        return self.block[self.start : self.stop]

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def address(self) -> int:
        """Where the chunk lies on this rank's device."""
        return self.block.data_ptr() + self.start


Round = Sequence[ChunkOp]
"""What a rank does in one round: pieces of at most one expert sent, and of at most one received."""


ROUNDS_AT_ONCE = 4
"""Rounds that a thread launches without a rest."""


class Carrier(Protocol):
    """How bytes get from a slot to a peer's staging memory. All methods but `cut` run on the transport's thread."""

    receives: bool
    """Whether a receiver has a part in carrying; if not, it only hears from the sender that all was sent."""

    at_once: int = 0
    """Bytes that a batch waits to be allowed, if it has as many, where it matters how often its thread wakes."""

    def open(self, name: str, control: Group, staging_bytes: int) -> torch.Tensor:
        """Connects all ranks under a fresh `name`, with the control group's deadline, and gives staging memory.

        The memory is `[staging_bytes]` uint8 on the weights' device, where peers can bring bytes to; it must be
        kept until `close`.
        """

    def carry(self, rounds: Sequence[Round], deadline: float) -> None:
        """Carries `rounds` in order; returns when this rank's share is complete, or raises `TransferFailed`.

        `deadline` is in `time.monotonic()` seconds. Runs with the side stream current.
        """

    def cut(self) -> None:
        """From any thread: makes a `carry` in progress fail soon where the device allows it."""

    def close(self) -> None:
        """Releases what `open` made, once nothing can write through it any more."""
