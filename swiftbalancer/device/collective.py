"""Collective libraries: how ranks of one become a group, exchange a batch, and give up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from typing_extensions import override


@dataclass(frozen=True, slots=True)
class PeerOp:
    """One half of a transfer: `tensor` is sent to `peer`, or received from it. `tag` pairs the halves on gloo."""

    is_send: bool
    tensor: torch.Tensor
    peer: int
    tag: int = 0

    def post(self, raw: Any) -> dist.Work:
        """Starts it on a group of torch's."""
        work: dist.Work = (raw.send if self.is_send else raw.recv)([self.tensor], self.peer, self.tag)
        return work


@dataclass(frozen=True, slots=True)
class Membership:
    """One rank's part in a new group. `store` is the group's own, `name` unique among all groups of the job.

    `timeout_s` is the default of the group's operations; `max_ctas` bounds the thread blocks that the library may
    occupy on a device, 0 leaves it to the library.
    """

    store: Store
    name: str
    rank: int
    size: int
    timeout_s: float
    max_ctas: int = 0

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self.timeout_s)


class Collective(ABC):
    """One library. Groups are torch's backend objects, built straight and never registered with torch."""

    name: str

    @abstractmethod
    def join(self, membership: Membership) -> Any:
        """The group; may block until all ranks have come."""

    def exchange(self, raw: Any, ops: Sequence[PeerOp]) -> list[dist.Work]:
        """Starts all `ops` as one batch, in the given order, which must match at both ends of every pair."""
        return [op.post(raw) for op in ops]

    def abort(self, raw: Any) -> None:
        """Ends what is in flight where the library can; the group is useless afterwards."""
        raw.abort()

    def leave(self, raw: Any) -> None:
        """Before the group is let go. An orderly shutdown of a device's library would wait for peers that may be
        gone."""
        self.abort(raw)

    def doubt(self) -> str:
        """Why this version of the library should not be relied on; empty if nothing is known against it."""
        return ""


class Gloo(Collective):
    """Between hosts' memories, everywhere."""

    name = "gloo"

    @override
    def join(self, membership: Membership) -> Any:
        return dist.ProcessGroupGloo(membership.store, membership.rank, membership.size, membership.timeout)

    @override
    def leave(self, raw: Any) -> None:
        """Nothing to do: its connections close with the last reference."""
