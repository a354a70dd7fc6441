"""What one rank does off the forward path, in order, on one thread: gather loads, receive plans, prepare maps."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from swiftbalancer import sealed
from swiftbalancer.border import ModelBinding
from swiftbalancer.cycle import LEADER, Announced, Event, Failed, Fault, GroupBroken, PlanChecked
from swiftbalancer.device import DeviceLayer
from swiftbalancer.device import Event as DeviceEvent
from swiftbalancer.errors import InvalidPlan, WireError
from swiftbalancer.gathering import Gathering
from swiftbalancer.groups import Group
from swiftbalancer.incoming import (
    Block,
    IncomingPlan,
    InForce,
    Preparer,
    ReadyBatch,
    check_block,
    prepare_batch,
    receive_block,
)
from swiftbalancer.lane import Lane, Rest
from swiftbalancer.load import expert_loads, rank_loads
from swiftbalancer.recorder import LoadRecorder, Snapshot
from swiftbalancer.wire import Frame

logger = logging.getLogger(__name__)
IntArray = NDArray[np.int64]
MOST_LOST = 2
"""Broadcasts that fail in a row: a group whose deadline was missed once carries nothing any more."""


@dataclass(frozen=True, eq=False)
class WindowLoads:
    """A sub-window's tokens on rank 0: `slots` `[layers, slots]` int64, and the placement they were counted under."""

    window: int
    step: int
    slots: IntArray
    in_force: InForce

    @property
    def epoch(self) -> int:
        """Of the placement."""
        return self.in_force.epoch

    @functools.cached_property
    def expert_loads(self) -> NDArray[np.float64]:
        """`[layers, experts]` tokens."""
        return expert_loads(self.slots, self.in_force.placement)

    @functools.cached_property
    def rank_loads(self) -> NDArray[np.float64]:
        """`[layers, ranks]` tokens."""
        return rank_loads(self.slots, self.in_force.placement)


@dataclass(frozen=True, slots=True, eq=False)
class BulkSetup:
    """What the lane works with. `on_window` is called on the lane, on rank 0 only.

    `committed` marks the end of the last commit on the main stream, or a later place.
    """

    rank: int
    binding: ModelBinding
    layer: DeviceLayer
    recorder: LoadRecorder
    committed: DeviceEvent
    group: Group
    gathering: Gathering
    staging_experts: int
    deadline_s: float
    on_window: Callable[[WindowLoads], None] | None
    rest: Rest
    """Called between pieces of work, see `StepTimes`."""


class BulkLane:
    """Jobs of one rank. Every rank must ask for collective ones (`gather`, `receive`) after the same steps.

    Results arrive as events in `inbox`, which the main thread empties.
    """

    def __init__(self, setup: BulkSetup, inbox: deque[Event | None]) -> None:
        self._setup = setup
        self._inbox = inbox
        self._stream = setup.layer.side_stream()
        self._prepared_at = setup.layer.event()
        self.lane = Lane("bulk", on_error=self._job_failed, on_start=setup.layer.bind_thread, rest=setup.rest)
        """Where the jobs run. The hook holds it, so that threads wake when the main thread is done."""
        self.rest = self.lane.rest
        self._preparer = Preparer(setup.rank, setup.binding, setup.layer, setup.recorder, self.rest)
        self.lockstep_broken = ""
        """Why no cycle may run: ranks have not run the same passes."""
        self.broken = False
        """Whether the group is lost."""
        self.incoming: IncomingPlan | None = None
        """The checked plan of the cycle in flight."""
        self.packed: Block | None = None
        """Leader: the plan to broadcast."""
        self.pack_error = ""
        """Leader: why the last plan cannot be broadcast; for the main thread to clear."""
        self._lost_broadcasts = 0
        """In a row."""

    def gather(self, snapshot: Snapshot, *, in_force: InForce, step: int) -> bool:
        """Brings a sub-window's counts of all ranks together; rank 0 gets them by `on_window`.

        False if this rank has nothing to do for it, since its device writes them to where rank 0 reads them.
        """
        if snapshot.number is not None and self._setup.rank != LEADER:
            return False
        self.lane.put(lambda: self._gather(snapshot, in_force, step))
        return True

    def pack(self, frames: Sequence[Frame]) -> None:
        """Leader: readies the worker's plan for the broadcast, and announces it."""
        self.lane.put(lambda: self._pack(frames))

    def receive(self, cycle: int, num_bytes: int, in_force: InForce) -> None:
        """Takes part in the broadcast of a plan, checks it, and prepares it if it moves nothing."""
        block = self.packed
        self.lane.put(lambda: self._receive(cycle, num_bytes, block, in_force))

    def prepare(self, incoming: IncomingPlan, batch: int, base: InForce) -> None:
        """Prepares the maps of one batch; it is in `incoming.batches` when ready."""
        self.lane.put(lambda: self._prepared(incoming, batch, base))

    def report(self, job: Callable[[], None]) -> None:
        """Runs `job` off the forward path, after what was asked for before."""
        self.lane.put(job)

    def forget(self) -> None:
        """The cycle is over."""
        self.incoming, self.packed = None, None

    def close(self, timeout_s: float) -> None:
        self.lane.put(self._setup.gathering.close)
        if not self.lane.close(timeout_s):
            self.broken = True  # what waits still is not gathered any more
        self._setup.group.close()

    # -- on the lane --------------------------------------------------------------------------------------

    def _gather(self, snapshot: Snapshot, in_force: InForce, step: int) -> None:
        recorder, on_window, window = self._setup.recorder, self._setup.on_window, snapshot.window
        gathered = self._gathered(window, recorder.land(snapshot) if snapshot.number is None else None)
        recorder.release(snapshot)
        if gathered is None:
            return
        self._check_lockstep(gathered[:, 0].tolist(), gathered[:, -1].tolist())
        if on_window is None or self.lockstep_broken:
            return
        slots = self._slot_loads(gathered[:, 1:-1], in_force.placement.num_layers)
        on_window(WindowLoads(window, step, slots, in_force))

    def _gathered(self, window: int, own: torch.Tensor | None) -> IntArray | None:
        """`[ranks, n]`, until it is asked for again, on ranks that get it.

        None once loads cannot be gathered any more, by a deadline missed or a peer gone.
        """
        if self.broken:
            return None
        try:
            return self._setup.gathering.gather(window, own, self.rest)
        except RuntimeError as error:
            logger.warning("rank=%d loads cannot be gathered any more: %s", self._setup.rank, error)
            self._give_up()
            return None

    def _give_up(self) -> None:
        """Nothing is gathered or received any more, on any rank."""
        self.broken = True
        self._inbox.append(GroupBroken())

    def _slot_loads(self, counts: IntArray, num_layers: int) -> IntArray:
        """`[ranks, layers * n]` -> `[layers, slots]`, tokens of the whole group."""
        by_rank = counts.reshape(len(counts), num_layers, -1)
        if self._setup.binding.counts == "local":
            return np.concatenate(by_rank, axis=1)
        total: IntArray = by_rank.sum(0)
        return total

    def _check_lockstep(self, windows: list[int], passes: list[int]) -> None:
        """A rank whose hook was skipped would change its maps one pass late: no cycle may run, nor go on."""
        broken = ""
        for name, values in (("sub-window", windows), ("device pass count", passes)):
            if len(set(values)) > 1:
                broken = f"{name} differs between ranks: {values}"
        if broken and not self.lockstep_broken:
            logger.warning("rank=%d no cycle until ranks run in lockstep again: %s", self._setup.rank, broken)
        self.lockstep_broken = broken
        in_flight = self.incoming
        if broken and in_flight is not None:
            self._inbox.append(Failed(in_flight.cycle, Fault.PLAN_INVALID))

    def _pack(self, frames: Sequence[Frame]) -> None:
        try:
            self.packed = sealed.pack(frames)
        except Exception as error:  # whatever it is, the next plan must be asked for
            logger.warning("rank=%d a plan cannot be broadcast: %s", self._setup.rank, error)
            self.pack_error = f"the plan cannot be broadcast: {error}"
            self._inbox.append(None)
        else:
            self._inbox.append(Announced(len(self.packed)))

    def _receive(self, cycle: int, num_bytes: int, block: Block | None, in_force: InForce) -> None:
        setup = self._setup
        try:
            block = receive_block(setup.group, num_bytes=num_bytes, block=block, deadline_s=setup.deadline_s)
            self._lost_broadcasts = 0
            if self.lockstep_broken:
                raise InvalidPlan(f"ranks are not in lockstep: {self.lockstep_broken}")
            self.rest()
            incoming = check_block(
                block,
                cycle=cycle,
                in_force=in_force,
                staging_experts=setup.staging_experts,
                whole=cycle % setup.group.size == setup.rank,
                rest=self.rest,
            )
        except InvalidPlan as error:
            self._fail(cycle, Fault.PLAN_INVALID, error)
        except WireError as error:
            self._fail(cycle, Fault.PLAN_DAMAGED, error)
        except RuntimeError as error:
            self._fail(cycle, Fault.BROADCAST_FAILED, error)
            self._lost_broadcasts += 1
            if self._lost_broadcasts == MOST_LOST:
                self._give_up()
        except Exception as error:  # whatever it is, the cycle must end
            self._fail(cycle, Fault.INTERNAL, error)
        else:
            self._accept(incoming, in_force)

    def _accept(self, incoming: IncomingPlan, in_force: InForce) -> None:
        plan = incoming.plan
        has_moves = bool(plan.moves.size)
        if not has_moves:
            self._prepared(incoming, 0, in_force)
        self.incoming = incoming
        self._inbox.append(PlanChecked(incoming.cycle, incoming.digest, plan.num_batches, has_moves))

    def _prepared(self, incoming: IncomingPlan, batch: int, base: InForce) -> None:
        try:
            incoming.batches[batch] = self._ready(incoming, batch, base)
            self._inbox.append(None)  # the transfer may have ended before
        except Exception as error:  # an engine's sink may raise anything; the cycle is dropped, serving goes on
            self._fail(incoming.cycle, Fault.STAGING_FAILED, error)

    def _ready(self, incoming: IncomingPlan, batch: int, base: InForce) -> ReadyBatch:
        """On a stream of its own, behind the last commit: what that commit read may be written again.

        Waits until all is on the device, so that the main stream need not.
        """
        setup = self._setup
        with setup.layer.on(self._stream):
            setup.layer.wait(self._stream, setup.committed)
            ready = prepare_batch(incoming, batch, base=base, by=self._preparer)
            setup.layer.record(self._prepared_at)
        self._prepared_at.synchronize()
        return ready

    def _fail(self, cycle: int, fault: Fault, error: Exception) -> None:
        logger.warning("rank=%d cycle=%d %s: %s", self._setup.rank, cycle, fault.name.lower(), error)
        self._inbox.append(Failed(cycle, fault))

    def _job_failed(self, error: BaseException) -> None:
        logger.warning("rank=%d a background job failed: %s", self._setup.rank, error)
        cycle = self.incoming.cycle if self.incoming is not None else -1
        self._inbox.append(Failed(cycle, Fault.INTERNAL))
