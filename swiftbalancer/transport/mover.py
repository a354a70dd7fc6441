"""The transport the balancer uses, and the threads that do its work, one generation after another.

A mover that failed or was cancelled is never used again; a fresh one, with fresh groups and fresh staging
memory, takes its place. The old thread holds the old memory until its own operations have ended, so that
nothing else can come to lie where a late write would land.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

from swiftbalancer.cycle import Fault
from swiftbalancer.device import Event, Stream
from swiftbalancer.errors import TransferFailed
from swiftbalancer.groups import Group
from swiftbalancer.interpreter_lock import stand_back
from swiftbalancer.lane import join_at_exit
from swiftbalancer.transport.batch_run import BatchRun, Job, Links, Workplace
from swiftbalancer.transport.block_copy import BlockCopy
from swiftbalancer.transport.checksums import ChecksumReader
from swiftbalancer.transport.ledger import Ledger
from swiftbalancer.transport.seam import Carrier, Lately, TransferBatch, TransferState, TransferStatus
from swiftbalancer.transport.segment_table import SegmentTable
from swiftbalancer.transport.staging import CommitCopies, Staging

log = logging.getLogger(__name__)

UNPACED = 1 << 60
"""A grant that no batch uses up."""
MAX_LINGERING = 2
"""Cancelled generations that may still wait for their operations to end, each holding its staging memory."""


class Transport:
    """Brings experts into staging on a thread and a stream of its own. All methods are for the main thread.

    `abort` must be called on every rank or on none, as after a common vote. The next `start` then connects anew,
    beside the forward passes, or `reopen` does before.
    """

    def __init__(self, place: Workplace, make_carrier: Callable[[], Carrier], *, name: str) -> None:
        self._place = place
        self._make_carrier = make_carrier
        self._name = name
        self._lingering: list[Mover] = []
        self._free_sides: list[Stream] = []
        """Side streams that no mover uses any more. torch keeps a stream's free memory for that stream, so that with
        a new one for each generation its staging memory would be taken from the device again and again."""
        self._mover: Mover | None = None
        self._job: Job | None = None
        self._refusal = TransferStatus(TransferState.IDLE)
        self._reopened = 0
        self._end_of_stream = place.layer.event()

    @property
    def name(self) -> str:
        return self._name

    @property
    def staging_experts(self) -> int:
        """How many experts a batch may bring to one rank."""
        return Staging.num_entries(self._place.weights, self._place.limits.staging_bytes)

    def connect(self, deadline_s: float) -> None:
        """Opens groups and staging memory on all ranks at once; blocks. Raises `TransferFailed`."""
        if BlockCopy.usable(self._place.layer):
            self._place.beside_commit()  # loads its kernels; later that would commit what an aborted batch prepared
        self._mover = self._new_mover("first", at_rest=True)
        self._mover.wait_open(deadline_s)

    def reopen(self, deadline_s: float) -> None:
        """Connects anew if the last transfer was aborted, on all ranks at once and while the engine rests; blocks.

        Making groups and memory takes the device's library for milliseconds at a time, which would show in steps.
        Raises `TransferFailed`; the next batch then fails.
        """
        self._forget_ended()
        if self._mover is None:
            self._reopened += 1
            self._mover = self._new_mover(f"reopened.{self._reopened}", at_rest=True)
            self._mover.wait_open(deadline_s)

    def start(self, batch: TransferBatch, readable: Event | None = None) -> None:
        """Takes a batch, which begins with the next `advance`.

        It reads and writes nothing before `readable`, which the caller has recorded behind all that wrote live slots;
        None: the present end of the main stream.
        """
        self._forget_ended()
        if self._mover is None:
            if len(self._lingering) >= MAX_LINGERING:
                reason = f"{len(self._lingering)} earlier transfers have not ended; not starting another"
                self._refusal = TransferStatus(TransferState.FAILED, Fault.TRANSFER_FAILED, reason)
                return
            self._mover = self._new_mover(f"{batch.cycle}.{batch.batch}")
        if readable is None:
            readable = self._end_of_stream
            self._place.layer.record(readable)
        self._job = Job(batch, readable, time.monotonic() + self._place.limits.deadline_s)
        self._mover.expect(self._job)

    @property
    def waits(self) -> bool:
        """Whether the batch waits for bytes to be allowed, as it does at its beginning."""
        return self._job is not None or (self._mover is not None and self._mover.ledger.waits)

    def advance(self, bytes_allowed: int = UNPACED) -> int:
        """Lets the batch carry so many more bytes; a new batch starts with none allowed. Wakes the thread.

        Gives how many bytes it waits for still, 0 if for none.
        """
        if self._mover is None:
            return 0
        missing = self._mover.ledger.grant(bytes_allowed)
        if self._job is not None:
            self._mover.submit(self._job)
            self._job = None
        return missing

    def poll(self) -> TransferStatus:
        """Where the batch is. Never waits."""
        return self._refusal if self._mover is None else self._mover.status()

    def lately(self) -> Lately:
        """What the batch did on this rank since this was asked last. Never waits."""
        return Lately() if self._mover is None else self._mover.ledger.lately()

    def commit_copies(self) -> CommitCopies:
        """The copies from staging to the slots of the batch that is DONE."""
        assert self._mover is not None, "nothing is staged"
        return self._mover.ledger.commit_copies()

    def abort(self) -> None:
        """Drops what is in flight; live weights stay as they are. Returns at once."""
        self._refusal = TransferStatus(TransferState.IDLE)
        self._job = None
        if self._mover is not None:
            self._mover.cancel()
            self._lingering.append(self._mover)
            self._mover = None

    def settle(self, deadline_s: float) -> bool:
        """Waits until no aborted transfer reads live weights any more; False if one still may after `deadline_s`."""
        end = time.monotonic() + deadline_s
        return all(mover.join(max(end - time.monotonic(), 0.0)) for mover in self._lingering)

    def close(self, deadline_s: float) -> None:
        """Ends all threads, waiting at most `deadline_s`; what still runs then is left to the process's end."""
        self.abort()
        end = time.monotonic() + deadline_s
        alive = [mover for mover in self._lingering if not mover.join(max(end - time.monotonic(), 0.0))]
        for mover in alive:
            join_at_exit(mover.thread)
        if alive:
            log.warning("transport=%s unfinished_threads=%d left to end with the process", self._name, len(alive))

    def _forget_ended(self) -> None:
        ended = [mover for mover in self._lingering if mover.join(0.0)]
        self._lingering = [mover for mover in self._lingering if mover not in ended]
        self._free_sides += [mover.side for mover in ended]

    def _new_mover(self, generation: str, *, at_rest: bool = False) -> Mover:
        side = self._free_sides.pop() if self._free_sides else self._place.layer.side_stream()
        return Mover(self._place, self._make_carrier(), side, name=f"{self._name}/{generation}", at_rest=at_rest)


class Mover:
    """One generation: a thread that connects, then stages the batches it is given."""

    def __init__(self, place: Workplace, carrier: Carrier, side: Stream, *, name: str, at_rest: bool) -> None:
        """`side` is the mover's own until it has ended. `at_rest`: the engine does nothing just now, so that launches
        can be recorded."""
        self.side = side
        self.ledger = Ledger(place.nudge)
        self._place = place
        self._carrier = carrier
        self._name = name
        self._at_rest = at_rest
        self._deadline = float("inf")
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._opened = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"swiftbalancer/{name}", daemon=True)
        self.thread.start()

    def wait_open(self, deadline_s: float) -> None:
        if not self._opened.wait(deadline_s):
            raise TransferFailed(f"transport {self._name}: peers did not connect within {deadline_s} s")
        status = self.ledger.status()
        if status.state is TransferState.FAILED:
            raise TransferFailed(status.reason)

    def expect(self, job: Job) -> None:
        """The batch counts as under way; the thread gets it with `submit`."""
        self._deadline = job.deadline
        self.ledger.begin()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def status(self) -> TransferStatus:
        """As the thread reports it; FAILED also when the thread itself is stuck past the deadline."""
        status = self.ledger.status()
        if status.state is TransferState.MOVING and time.monotonic() > self._deadline:
            reason = f"not complete after {self._place.limits.deadline_s} s"
            return TransferStatus(TransferState.FAILED, Fault.TRANSFER_TIMEOUT, reason, status.bytes_moved)
        return status

    def cancel(self) -> None:
        busy = self.ledger.status().state is TransferState.MOVING or not self._opened.is_set()
        self.ledger.cancel()
        self._jobs.put(None)
        if busy:  # on a thread of its own: a collective library may take long to give up
            threading.Thread(target=self._carrier.cut, name=f"swiftbalancer/{self._name}/cut", daemon=True).start()

    def join(self, deadline_s: float) -> bool:
        """True if the thread has ended within `deadline_s`."""
        self.thread.join(deadline_s)
        return not self.thread.is_alive()

    def _run(self) -> None:
        stand_back()
        try:
            self._place.layer.bind_thread()
            self._serve()
        except Exception as error:  # the thread's top: whatever it was becomes this generation's status
            log.debug("transport=%s failed", self._name, exc_info=error)
            self.ledger.fail(error)
        finally:
            self._opened.set()

    def _serve(self) -> None:
        limits = self._place.limits
        control = self._place.groups.create(f"{self._name}/control", timeout_s=limits.deadline_s)
        try:
            with self._place.layer.on(self.side):  # torch's memory of this stream is not the forward pass's
                links = self._connect(control)
            self._opened.set()
            while (job := self._jobs.get()) is not None and not self.ledger.is_cancelled:
                with self._place.layer.on(self.side):
                    if not self._stage(links, job):
                        break
        finally:
            self._place.layer.synchronize()  # also the commits that read the staging memory
            control.close()  # first: a peer that waits for a message from here could not let go of our memory
            self._carrier.close()

    def _stage(self, links: Links, job: Job) -> bool:
        """False if the batch failed. Connections are kept then until all ranks have agreed to abort: who waits for a
        message from here is not to fail for that, and to name it as the reason."""
        try:
            self.ledger.done(BatchRun(self._place, links, job).run(self.ledger))
        except Exception as error:
            log.debug("transport=%s a batch failed", self._name, exc_info=error)
            self.ledger.fail(error)
            with contextlib.suppress(queue.Empty):
                self._jobs.get(timeout=self._place.limits.deadline_s)
            return False
        return True

    def _connect(self, control: Group) -> Links:
        place, carrier = self._place, self._carrier
        memory = carrier.open(self._name, control, place.limits.staging_bytes)
        blocks = None
        if BlockCopy.usable(place.layer):
            blocks = BlockCopy(place.layer, self._table(), beside=place.beside_commit, record=self._at_rest)
        staging = Staging(memory, place.weights, beside=place.beside_commit, blocks=blocks)
        sent = self._checksums(self._table() if blocks else None)
        arrived = self._checksums(blocks.table if blocks else None)
        sent.rehearse()
        return Links(control, carrier, staging, sent, arrived, place.layer.event())

    @property
    def _room(self) -> int:
        return Staging.num_entries(self._place.weights, self._place.limits.staging_bytes)

    def _table(self) -> SegmentTable:
        return SegmentTable(self._place.layer, num_experts=self._room, num_tensors=self._place.weights.num_kinds)

    def _checksums(self, table: SegmentTable | None) -> ChecksumReader:
        return ChecksumReader(self._place.layer, num_experts=self._room, table=table, record=self._at_rest)
