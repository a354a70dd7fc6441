"""Process groups of our own, beside the engine's, so that our collectives never meet theirs.

Each group is one backend object (gloo, NCCL or HCCL) built straight on a prefix of torch's store. Nothing is
registered with `torch.distributed`, and a broken group is replaced by one under a fresh prefix.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from swiftbalancer.errors import ConfigError

Backend = Literal["gloo", "nccl", "hccl"]
HCCL_BUFFER_MB = 64


@dataclass(frozen=True, slots=True)
class PeerOp:
    """One half of a transfer: `tensor` is sent to `peer`, or received from it. `tag` pairs the halves on gloo."""

    is_send: bool
    tensor: torch.Tensor
    peer: int
    tag: int = 0


class Group:
    """A closed set of ranks that talk. Calls return at once with a `Work`; on gloo `Work.wait` completes it.

    On an accelerator a call runs after the current stream, and `Work.wait` makes the current stream wait. Keep
    tensors alive and untouched until then.
    """

    def __init__(self, raw: Any, *, rank: int, size: int, backend: Backend, timeout_s: float) -> None:
        self._raw = raw
        self.rank = rank
        self.size = size
        self.backend = backend
        self.timeout_s = timeout_s

    def all_gather(self, out: torch.Tensor, value: torch.Tensor) -> dist.Work:
        """`value` `[n]` of every rank into `out` `[size, n]`, same dtype, both contiguous."""
        work: dist.Work = self._raw._allgather_base(out.view(-1), value.view(-1))
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
        if self.backend == "gloo":
            return [self._post(op) for op in ops]
        if self.backend == "hccl":
            return [self._exchange_hccl(ops)]
        self._raw._start_coalescing()
        for op in ops:
            self._post(op)
        return [self._raw._end_coalescing()]

    def _exchange_hccl(self, ops: Sequence[PeerOp]) -> dist.Work:
        """HCCL's own batch. torch_npu's coalescing is no substitute: old releases post one by one, so that ranks
        which all send first wait forever, and from 2.10.0.post2 it takes a wrong device for groups like ours."""
        kinds = ["isend" if op.is_send else "irecv" for op in ops]
        work: dist.Work = self._raw.batch_isend_irecv(kinds, [op.tensor for op in ops], [op.peer for op in ops])
        return work

    def _post(self, op: PeerOp) -> dist.Work:
        return (self.send if op.is_send else self.recv)(op.tensor, op.peer, op.tag)

    def wait(self, work: dist.Work, deadline_s: float) -> None:
        """Blocks the calling thread until `work` is done; raises `RuntimeError` on failure or after `deadline_s`.

        On gloo a missed deadline breaks the group: close it and create the next.
        """
        work.wait(timedelta(seconds=deadline_s))

    def abort(self) -> None:
        """Ends what is in flight where the backend can; the group is useless afterwards."""
        if self._raw is None:
            return
        if self.backend == "hccl":
            self._raw.abort_hccl_comm("given up by swiftbalancer")
        else:
            self._raw.abort()

    def close(self) -> None:
        """Lets go of the connections; peers still waiting for this rank see them closed."""
        if self._raw is not None and self.backend != "gloo":
            self.abort()  # an orderly shutdown would wait for peers that may be gone
        self._raw = None


class GroupFactory:
    """Creates groups of the same ranks under ever new prefixes of one store. Usable from any thread.

    Every rank must create the same names; a name is used once.
    """

    def __init__(self, store: Store, *, rank: int, size: int, prefix: str = "swiftbalancer") -> None:
        # A thread blocked in a store call holds its connection, so ours is a connection of our own.
        clone = getattr(store, "clone", None)
        self._own = clone is not None
        self._store: Store = store if clone is None else clone()
        self._prefix = prefix
        self.rank = rank
        self.size = size

    def store(self, name: str) -> Store:
        """The store under this factory's prefix and `name`."""
        return PrefixStore(f"{self._prefix}/{name}", self._store)

    def create(self, name: str, *, backend: Backend = "gloo", timeout_s: float, max_ctas: int = 0) -> Group:
        """The group called `name`. Blocks until every rank has created it; raises `RuntimeError` otherwise.

        `timeout_s` bounds this call and is the default of the group's operations. `max_ctas` bounds the
        streaming multiprocessors NCCL takes; 0 leaves it to NCCL.
        """
        store = self.store(name)
        if self._own:
            store.set_timeout(timedelta(seconds=timeout_s))
        if backend == "gloo":
            raw = dist.ProcessGroupGloo(store, self.rank, self.size, timedelta(seconds=timeout_s))
        elif backend == "nccl":
            raw = self._nccl(store, timeout_s, max_ctas)
        elif backend == "hccl":
            raw = self._hccl(store, f"{self._prefix}/{name}", timeout_s)
        else:
            raise ConfigError(f"group backend: unknown {backend!r}; known: gloo, nccl, hccl")
        return Group(raw, rank=self.rank, size=self.size, backend=backend, timeout_s=timeout_s)

    def _nccl(self, store: Store, timeout_s: float, max_ctas: int) -> Any:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=False)
        options._timeout = timedelta(seconds=timeout_s)
        if max_ctas:
            options.config.min_ctas = 1
            options.config.max_ctas = max_ctas
        group = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
        group._set_sequence_number_for_group()
        return group

    def _hccl(self, store: Store, group_id: str, timeout_s: float) -> Any:
        """As torch_npu builds a group outside torch's registry; HCCL takes twice the buffer size, in MB."""
        c10d = importlib.import_module("torch_npu._C._distributed_c10d")
        options = c10d.ProcessGroupHCCL.Options()
        options.is_high_priority_stream = False
        options._timeout = timedelta(seconds=timeout_s)
        options.global_ranks_in_group = []
        options.group_id = group_id
        options.hccl_config = {"hccl_buffer_size": HCCL_BUFFER_MB}
        group = c10d.ProcessGroupHCCL(store, self.rank, self.size, options)
        group._set_sequence_number_for_group()
        return group
