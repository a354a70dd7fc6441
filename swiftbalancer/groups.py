"""Process groups of our own, beside the engine's, so that our collectives never meet theirs.

Each group is one backend object of a collective library, built straight on a prefix of torch's store. Nothing is
registered with `torch.distributed`, and a broken group is replaced by one under a fresh prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from swiftbalancer.device import Collective, Gloo, Membership, PeerOp

GLOO = Gloo()


class Group:
    """A closed set of ranks that talk. Calls return at once with a `Work`; on gloo `Work.wait` completes it.

    On an accelerator a call runs after the current stream, and `Work.wait` makes the current stream wait. Keep
    tensors alive and untouched until then.
    """

    def __init__(self, raw: Any, collective: Collective, *, rank: int, size: int, timeout_s: float) -> None:
        self._raw = raw
        self._collective = collective
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s

    @property
    def backend(self) -> str:
        """The collective library by torch's name for it."""
        return self._collective.name

    def all_gather(self, out: torch.Tensor, value: torch.Tensor) -> dist.Work:
        """`value` `[n]` of every rank into `out` `[size, n]` or `[size * n]`, same dtype, both contiguous."""
        flat = out if out.dim() == 1 else out.view(-1)
        work: dist.Work = self._raw._allgather_base(flat, value)
        return work

    def broadcast(self, tensor: torch.Tensor, root: int) -> dist.Work:
        """`tensor` of rank `root` into every rank's."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        work: dist.Work = self._raw.broadcast([tensor], options)
        return work

    def send(self, tensor: torch.Tensor, peer: int, tag: int = 0) -> dist.Work:
        work: dist.Work = self._raw.send([tensor], peer, tag)
        return work

    def recv(self, tensor: torch.Tensor, peer: int, tag: int = 0) -> dist.Work:
        work: dist.Work = self._raw.recv([tensor], peer, tag)
        return work

    def exchange(self, ops: Sequence[PeerOp]) -> list[dist.Work]:
        """Starts all `ops` as one batch, in the given order, which must match at both ends of every pair."""
        return self._collective.exchange(self._raw, ops)

    def all_agree(self, mine: bool, deadline_s: float) -> bool:
        """Whether every rank says yes; blocks. On groups of CPU tensors."""
        every = torch.zeros(self.size, 1, dtype=torch.int64)
        self.wait(self.all_gather(every, torch.tensor([int(mine)])), deadline_s)
        return bool(every.all())

    def wait(self, work: dist.Work, deadline_s: float) -> None:
        """Blocks the calling thread until `work` is done; raises `RuntimeError` on failure or after `deadline_s`.

        On gloo a missed deadline breaks the group: close it and create the next.
        """
        work.wait(timedelta(seconds=deadline_s))

    def abort(self) -> None:
        """Ends what is in flight where the library can; the group is useless afterwards."""
        if self._raw is not None:
            self._collective.abort(self._raw)

    def close(self) -> None:
        """Lets go of the connections; peers still waiting for this rank see them closed."""
        if self._raw is not None:
            self._collective.leave(self._raw)
        self._raw = None


class GroupFactory:
    """Creates groups of the same ranks under ever new prefixes of one store. Usable from any thread.

    Every rank must create the same names; a name is used once.
    """

    def __init__(self, store: Store, *, rank: int, size: int, prefix: str = "swiftbalancer") -> None:
        # A thread blocked in a store call holds its connection, so ours is a connection of our own.
        clone = getattr(store, "clone", None)
        self._own = clone is not None
        self._store: Store | None = store if clone is None else clone()
        self._prefix = prefix
        self.rank = rank
        self.size = size

    def store(self, name: str) -> Store:
        """The store under this factory's prefix and `name`; raises `RuntimeError` after `close`."""
        if self._store is None:
            raise RuntimeError(f"no more groups: {self._prefix} was closed")
        return PrefixStore(f"{self._prefix}/{name}", self._store)

    def create(self, name: str, *, collective: Collective = GLOO, timeout_s: float, max_ctas: int = 0) -> Group:
        """The group called `name`. Blocks until every rank has created it; raises `RuntimeError` otherwise.

        `timeout_s` bounds this call and is the default of the group's operations. `max_ctas` bounds the thread
        blocks that a device's library may occupy; 0 leaves it to the library.
        """
        store = self.store(name)
        if self._own:
            store.set_timeout(timedelta(seconds=timeout_s))
        full = f"{self._prefix}/{name}"
        raw = collective.join(Membership(store, full, self.rank, self.size, timeout_s, max_ctas))
        return Group(raw, collective, rank=self.rank, size=self.size, timeout_s=timeout_s)

    def close(self) -> None:
        """Lets go of the connection to the store, if it is our own; groups that exist live on."""
        self._store = None
