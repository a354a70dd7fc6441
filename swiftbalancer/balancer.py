"""The balancer of one rank: drives the cycle from the engine's forward passes and does what it decides.

Threads: the engine's main thread runs `after_forward`; a rounds thread runs the votes' all-gathers where ranks share
no memory; the bulk lane gathers loads, receives and checks plans and prepares maps; the transport has its own. They
hand events over through one queue that `after_forward` empties; None in it only asks it to look around. Nothing here
waits, but for a round that is late (see `swiftbalancer.agreement`).
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from swiftbalancer import wire
from swiftbalancer.agreement import BoardRounds, GatheredRounds, Round, Rounds
from swiftbalancer.board import Board
from swiftbalancer.border import ModelBinding
from swiftbalancer.bulk import BulkLane, BulkSetup, WindowLoads
from swiftbalancer.config import Config
from swiftbalancer.cycle import (
    BatchStaged,
    Command,
    CommitBatch,
    Cycle,
    DiscardPlan,
    DrainWanted,
    EndCycle,
    Event,
    Failed,
    Fault,
    Phase,
    ReceivePlan,
    RoundLost,
    RoundTaken,
    StageBatch,
    Step,
    StopServing,
    SwitchOff,
    post,
    step,
)
from swiftbalancer.device import DeviceLayer
from swiftbalancer.device import Event as DeviceEvent
from swiftbalancer.dispatch import uniform_table
from swiftbalancer.errors import AgreementLost, TransferFailed
from swiftbalancer.gathering import BoardGathering, Gathering, GroupGathering, LoadBoard
from swiftbalancer.groups import Group, GroupFactory
from swiftbalancer.incoming import InForce
from swiftbalancer.leader import Leader
from swiftbalancer.monitor import Monitor
from swiftbalancer.outcomes import CycleObserver, Ended, Outcomes
from swiftbalancer.recorder import LoadRecorder
from swiftbalancer.stats import Stats, StepKind
from swiftbalancer.steptimes import StepTimes, Stretch
from swiftbalancer.transport import AT_WORK, WAITING, CommitCopies, Lately, TransferBatch, TransferState, Transport
from swiftbalancer.watch import ProgressWatch

logger = logging.getLogger(__name__)
WindowObserver = Callable[[WindowLoads], None]
MOST_QUIET_STEPS = 64
"""What is counted reaches the metrics after so many at the latest."""


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a balancer is made of; `swiftbalancer.attach` builds it, tests replace single parts."""

    rank: int
    layer: DeviceLayer
    committed: DeviceEvent
    """Where in the main stream the last commit ends, or what the engine wrote to live slots before `resume`.

    A commit of weights records it."""
    votes: Group
    bulk: Group
    recorder: LoadRecorder
    times: StepTimes
    """The transport calls its `adapt` and `rest`."""
    transport: Transport
    expert_bytes: int
    """Bytes of one expert of one layer."""
    leader: Leader | None
    """On rank 0 only."""
    board: Board | None = None
    """Where the ranks vote if they have one; else they do in `votes`."""
    load_board: LoadBoard | None = None
    """Where rank 0 finds their loads if they have one; else they are gathered in `bulk`."""
    groups: GroupFactory | None = None
    """What made the groups; closed last."""
    inbox: deque[Event | None] = field(default_factory=deque)
    """Of `Balancer`; the transport puts None there."""


class Balancer:
    """Balances one model on one rank. Create on all ranks of the group between the same two forward passes."""

    def __init__(self, config: Config, binding: ModelBinding, parts: Parts, stats: Stats) -> None:
        self.config = config
        self.stats = stats
        self._binding = binding
        self._parts = parts
        self._rank = parts.rank
        self._leader = parts.leader
        self._in_force = _at_start(binding)
        parts.layer.record(parts.committed)
        self._rounds = _rounds(parts, deadline_s=config.agreement.deadline_s, stats=stats)
        self._inbox = parts.inbox
        self._bulk = BulkLane(self._bulk_setup(), self._inbox)
        self._times, self._throttle, self._pacer = parts.times, parts.times.throttle, parts.times.pacer
        self._cycle = Cycle(rank=parts.rank)
        self._plan: wire.PlanReply | None = None
        self._staged: CommitCopies | None = None
        """Of the batch that this rank voted to commit."""
        self._step = self._window = self._last_post = self._began_step = 0
        self._taken_at = 0
        """The step in which ranks take the round posted last."""
        self._told_at = 0
        """The step in which the lane last got a job, before which it works out what steps took."""
        self._quiet_until = 0
        """Before this step there is nothing to do, unless something lands in the inbox."""
        self._quiet: list[tuple[float, float, float]] = []
        """Of the steps since there was something to do, see `Stretch`; likewise the next two."""
        self._quiet_kind = StepKind.IDLE
        self._quiet_work: Lately | None = None
        self._waited = 0
        """In how many of the last of them it waited for bytes to be allowed."""
        self._last_passes = -1
        self._close_at = config.window.sub_window_steps
        self._staged_at = time.monotonic()
        self._ended: list[Ended] = []
        """Cycles that ended in the last hook."""
        self._to_stage: StageBatch | None = None
        """A batch that the last hook's round began, for the next hook to start."""
        self._watch = ProgressWatch(stats, rank=parts.rank, warn_after_s=config.breaker.stall_warning_s)
        self._last_return = self._host_s = self._transfer_bytes_per_s = 0.0
        self._answer_threads()
        self._kind = StepKind.IDLE
        self._stop_reason = ""
        self.monitor: Monitor | None = None
        """Rank 0: metrics, event log and live view."""
        self._votes = config.mode == "on"
        self._outcomes = Outcomes(
            stats, parts.leader, expert_bytes=parts.expert_bytes, shadow=config.mode == "shadow"
        )
        self.on_cycle: list[CycleObserver] = self._outcomes.observers
        """Called on the bulk lane at the end of every cycle."""
        self.on_window: list[WindowObserver] = []
        """Called on rank 0's bulk lane with the loads of every sub-window."""

    # -- what engines call --------------------------------------------------------------------------------

    def after_forward(self, passes: int = -1) -> None:
        """To be called by every rank after every forward pass, dummy passes included, before the next begins.

        `passes` is the engine's own count of forward passes, in every call if it has one, so that a rank that skipped
        a call is noticed. The caller may be in inference mode. Raises `AgreementLost` if this rank cannot know which
        maps its peers use: stop serving.
        """
        began = perf_counter()
        self._step += 1
        if self._step < self._quiet_until and not self._inbox and passes - self._last_passes <= 1:
            # Most steps. Whatever is touched here has gone cold since the last one, hence so little.
            self._last_passes = passes
            now = perf_counter()
            self._quiet.append((began - self._last_return, now - began, self._throttle.total_s))
            self._last_return = now
            return
        if self._stop_reason:
            raise AgreementLost(self._stop_reason)
        if self._last_return:
            self._note_times(began - self._last_return)
        self._kind = StepKind.IDLE
        self._go_on(passes)
        self.stats.steps = self._step
        now = perf_counter()
        self._last_return = now
        self._host_s = now - began

    def drain(self) -> None:
        """Ends the cycle in flight, if any, on all ranks; none begins until `resume`.

        Call it on every rank between the same two forward passes, before weights are reloaded, moved or put to
        sleep. Blocks until the group agrees, at most two agreement deadlines.
        """
        self._handle(DrainWanted(True))
        if self._leader is not None:
            self._leader.paused = True
        with self._throttle.opened():
            while not self._cycle.drained:
                if self._cycle.posted is None:
                    self._post_round(-1)
                self._take_round()
            if not self._parts.transport.settle(self.config.transport.deadline_s):
                logger.warning("rank=%d an aborted transfer may still read experts of this rank", self._rank)
        self._tell_ended()

    def resume(self) -> None:
        """Balancing goes on after `drain`; the loads seen before are forgotten. Call it on every rank.

        What wrote weights since must have been launched on the calling thread's stream, or be over. Blocks while the
        ranks' transports connect anew, if `drain` had to abort a transfer.
        """
        try:
            self._parts.transport.reopen(self.config.transport.deadline_s)
        except TransferFailed as error:
            logger.warning("rank=%d the next cycle will be lost: %s", self._rank, error)
        self._parts.layer.record(self._parts.committed)
        self._handle(DrainWanted(False))
        if self._leader is not None:
            self._leader.forget_loads()
            self._leader.paused = False

    def wait_for_worker(self, timeout_s: float) -> None:
        """Blocks rank 0 until the worker answers, for engines that want to begin balanced and for tests.

        Raises `WorkerLost` or what the worker refused. Other ranks return at once.
        """
        if self._leader is not None:
            self._leader.wait_ready(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends threads, groups and (rank 0) the worker, each within a share of `timeout_s`; no collective call."""
        self._throttle.open()
        if self._last_return:
            self._note_times(perf_counter() - self._last_return)
        self._last_return = 0.0
        self._times.work_out()
        self.stats.steps = self._step
        self._tell_ended()
        self._rounds.close(timeout_s / 4)
        self._bulk.close(timeout_s / 4)
        self._parts.recorder.close()
        self._parts.transport.close(timeout_s / 2)  # before what may take long: peers wait to free what it writes to
        if self.monitor is not None:
            self.monitor.close(timeout_s / 4)
        if self._leader is not None:
            self._leader.close(timeout_s)
        self._parts.votes.close()
        if self._parts.groups is not None:
            self._parts.groups.close()

    def rest(self) -> None:
        """For observers to call between two pieces of work, see `StepTimes`."""
        self._bulk.rest()

    @property
    def steps(self) -> int:
        """Calls of `after_forward`."""
        return self._step

    @property
    def step_kind(self) -> StepKind:
        """What the last call of `after_forward` did."""
        return self._quiet_kind if self._quiet else self._kind

    @property
    def phase(self) -> Phase:
        """Where the cycle is."""
        return self._cycle.phase

    @property
    def progress_age_s(self) -> float:
        """Seconds since the cycle last changed its phase or batch."""
        return self._watch.age_s

    @property
    def in_force(self) -> InForce:
        """Placement and dispatch table that the forward passes use now."""
        return self._in_force

    # -- each step ----------------------------------------------------------------------------------------

    def _next_busy_step(self) -> int:
        """Before it there is nothing to do, as far as is known; 0: in the next step there is."""
        cycle, leader = self._cycle, self._leader
        if self._ended or self._to_stage is not None:
            return 0
        if cycle.phase is Phase.MOVING:
            self._quiet_kind = StepKind.MOVING
        else:
            waits = leader is not None and leader.busy  # for an answer, which nudges, or for a round
            self._quiet_kind = StepKind.PLANNING if waits else StepKind.IDLE
        in_time = min(self._close_at, self._step + MOST_QUIET_STEPS)
        if cycle.posted is not None:
            return min(in_time, self._taken_at - self._rounds.looks_ahead)
        return min(in_time, self._next_round()) if self._may_vote() else in_time

    def _go_on(self, passes: int) -> None:
        lane = self._bulk.lane
        lane.hold()
        try:
            if self._ended:
                self._tell_ended()
            if passes >= 0:
                self._check_own_passes(passes)
            self._poll()
            # No step does two of these, unless sub-windows are as short as steps: take a round, close a sub-window,
            # begin a batch, post the next round. All ranks do alike.
            begins = self._to_stage
            taken = self._take_round_when_due()
            closes = self._step > self._close_at or (self._step == self._close_at and taken is None)
            if closes:
                self._close_sub_window()
            waits = closes and self.config.window.sub_window_steps > 1
            if begins is not None:
                if not waits:
                    self._stage(begins)
            elif self._carrying:
                if waits:
                    self._inbox.append(None)  # a transfer that has ended, and has told so, can wait for a step, too
                else:
                    self._poll_transport()
            if taken is None and begins is None and not waits:
                self._post_round_when_due(passes)
            if self._step >= self._told_at + MOST_QUIET_STEPS:
                self._told_at = self._step
                lane.put(self._times.work_out)
            self._quiet_until = self._next_busy_step()
        finally:  # last of all, since they compete with this thread for the interpreter lock
            self._quiet_work = None
            if self._carrying:
                self._quiet_work = AT_WORK
                self._advance()
            lane.release()

    def _advance(self) -> None:
        """Allows the batch bytes if it waits for some; while it lacks more, there is nothing to do."""
        transport, pacer = self._parts.transport, self._pacer
        if not transport.waits:
            return
        missing = transport.advance(pacer.allowance(self._waited))
        if missing:
            self._quiet_work = WAITING
            steps = -(-missing // pacer.bytes_per_step)
            self._quiet_until = min(self._quiet_until, self._step + steps)

    def _note_times(self, step_s: float) -> None:
        """Of the steps since the last hook with something to do. The pacer is not to know of one that waits for
        votes, nor of one with the last commit of a cycle: neither busy nor restful."""
        quiet = self._quiet
        self._waited = len(quiet) if self._quiet_work is WAITING else 0
        work, paced = None, self._carrying
        if paced:
            work = self._parts.transport.lately()
        elif self._cycle.phase is not Phase.MOVING:
            paced = bool(quiet) or self._kind is not StepKind.COMMITTING
        threads_s = self._throttle.total_s
        self._times.note(
            Stretch(
                self._kind, self._host_s, quiet, self._quiet_kind, self._quiet_work, step_s, work, paced, threads_s
            )
        )
        self._quiet = []

    @property
    def _carrying(self) -> bool:
        """Whether this rank's part of a batch is under way."""
        cycle = self._cycle
        return cycle.phase is Phase.MOVING and self._to_stage is None and not (cycle.ready or cycle.fault)

    def _poll(self) -> None:
        while self._inbox:
            event = self._inbox.popleft()
            if event is not None:
                self._handle(event)
        if self._cycle.phase is Phase.MOVING:
            self._kind = StepKind.MOVING
        elif self._leader is not None and self._leader.busy:
            self._poll_leader(self._leader)

    def _poll_leader(self, leader: Leader) -> None:
        self._kind = StepKind.PLANNING
        if self._cycle.phase not in (Phase.IDLE, Phase.OFF):
            return
        if self._bulk.pack_error:
            self._discard(self._bulk.pack_error)
            self._bulk.pack_error = ""
        reply = leader.poll()
        if reply is None:
            return
        self._plan, frames = reply
        if self.config.mode == "shadow":
            self._discard("shadow mode: nothing is applied")
        elif leader.off:
            self._discard("balancing is off")
        else:
            self._bulk.pack(frames)

    def _poll_transport(self) -> None:
        cycle = self._cycle
        status = self._parts.transport.poll()
        if status.state is TransferState.FAILED:
            logger.warning("rank=%d batch=%d transfer failed: %s", self._rank, cycle.batch, status.reason)
            self._handle(Failed(cycle.cycle, status.fault or Fault.TRANSFER_FAILED))
        elif status.state is TransferState.DONE and self._maps_ready(cycle.batch):
            took_s = max(time.monotonic() - self._staged_at, 1e-6)
            self._transfer_bytes_per_s = status.bytes_moved / took_s
            self._staged = self._parts.transport.commit_copies()
            self._handle(BatchStaged(cycle.cycle, cycle.batch))

    def _maps_ready(self, batch: int) -> bool:
        incoming = self._bulk.incoming
        return incoming is not None and incoming.cycle == self._cycle.cycle and batch in incoming.batches

    def _check_own_passes(self, passes: int) -> None:
        """A call skipped while a commit is being voted on: peers may have changed their maps a pass before us."""
        skipped = passes - self._last_passes - 1 if self._last_passes >= 0 else 0
        self._last_passes = passes
        if skipped and self._cycle.voted_to_commit:
            self._handle(RoundLost(f"the hook was not called after {skipped} of this rank's passes"))

    def _take_round_when_due(self) -> Round | None:
        """The round, if this is the step in which ranks take one."""
        if self._cycle.posted is None:
            return None
        if self._step >= self._taken_at:
            return self._take_round()
        if self._rounds.looks_ahead and self._step + 1 == self._taken_at:
            self._rounds.look_ahead()
        return None

    def _take_round(self) -> Round | None:
        """None if it was lost."""
        try:
            over = self._rounds.take()
        except AgreementLost as error:
            self._handle(RoundLost(str(error)))
            return None
        if self._rounds.waited_s:
            self.stats.late_rounds += 1
            self.stats.late_round_s += self._rounds.waited_s
        self._watch.votes = over.votes
        if over.ahead is not None and over.posted is self._cycle:
            self._follow(over.ahead)
        else:
            self._handle(RoundTaken(over.votes))
        return over

    def _post_round_when_due(self, passes: int) -> None:
        if self._cycle.posted is None and self._may_vote() and self._step >= self._next_round():
            self._post_round(passes)

    def _may_vote(self) -> bool:
        return self._votes and self._cycle.phase is not Phase.OFF

    def _next_round(self) -> int:
        """The step of the next round."""
        if self._cycle.phase is not Phase.IDLE:
            return self._taken_at
        return max(self._last_post + self.config.agreement.idle_round_steps, self._taken_at)

    def _post_round(self, passes: int) -> None:
        self._cycle = post(self._cycle, self._step, self._window, passes)
        self._last_post = self._step
        self._taken_at = self._step + self.config.agreement.lag_steps
        self._rounds.post(self._cycle)
        self.stats.rounds += 1

    # -- decisions into effects ---------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        self._follow(step(self._cycle, event))

    def _follow(self, decided: Step) -> None:
        before = self._cycle
        self._cycle, commands = decided
        if self._cycle.phase is not before.phase or self._cycle.batch != before.batch:
            self._watch.progressed()
        for command in commands:
            self._act(command)
        if self._stop_reason:
            raise AgreementLost(self._stop_reason)

    def _act(self, command: Command) -> None:
        match command:
            case CommitBatch(_, batch, epoch):
                self._commit(batch, epoch)
            case EndCycle():
                self._end(command)
            case ReceivePlan(cycle, num_bytes):
                self._began_step = self._step
                self._bulk.receive(cycle, num_bytes, self._in_force)
            case StageBatch():  # in the next hook, since this one commits the batch before
                self._to_stage = command
            case DiscardPlan(reason):
                self._discard(reason)
            case SwitchOff(reason):
                self.stats.off_reason = reason
                logger.warning("rank=%d balancing is off, serving goes on as placed: %s", self._rank, reason)
                if self._leader is not None:
                    self._leader.off = True
                    self._discard(reason)
            case StopServing(reason):
                self._stop_reason = reason
                self._quiet_until = 0

    def _stage(self, begun: StageBatch) -> None:
        incoming, batch = self._bulk.incoming, begun.batch
        assert incoming is not None
        assert incoming.cycle == begun.cycle
        self._to_stage = None
        self._staged_at = time.monotonic()
        self._parts.transport.start(TransferBatch(begun.cycle, batch, incoming.moves[batch]), self._parts.committed)
        self._bulk.prepare(incoming, batch, self._in_force)

    def _commit(self, batch: int, epoch: int) -> None:
        """Enqueues the batch on the main stream: staged weights to their slots, maps to the device."""
        incoming = self._bulk.incoming
        assert incoming is not None
        self._kind = StepKind.COMMITTING
        ready = incoming.batches.pop(batch)
        assert ready.after.epoch == epoch
        assert (self._staged is not None) == bool(incoming.plan.moves.size), "maps and weights must change together"
        layer, maps = self._parts.layer, self._binding.maps
        if self._staged is not None:
            self._staged.enqueue(layer)
        if self._staged is None or maps.launches is None:  # else written with the weights
            maps.commit(ready.maps)
            layer.record(self._parts.committed)
        self._staged = None
        self._in_force = ready.after
        self.stats.experts_moved += ready.num_moves
        self.stats.bytes_moved += ready.num_moves * self._parts.expert_bytes

    def _end(self, command: EndCycle) -> None:
        if command.transfer_in_flight:
            self._parts.transport.abort()
        self._close_cycle(command, begun=True)

    def _discard(self, reason: str) -> None:
        """Leader: the plan at hand is not taken up."""
        if self._plan is not None:
            self._close_cycle(EndCycle(self._cycle.cycle, False, reason, False), begun=False)

    def _close_cycle(self, command: EndCycle, *, begun: bool) -> None:
        ended = Ended(
            command=command,
            begun=begun,
            plan=self._plan,
            incoming=self._bulk.incoming,
            epoch=self._in_force.epoch,
            step=self._step,
            steps=self._step - self._began_step,
        )
        self._bulk.forget()
        self._plan = self._staged = self._to_stage = None
        self._ended.append(ended)

    def _tell_ended(self) -> None:
        """A step after a cycle's end, so that none both commits and tells."""
        ended, self._ended = self._ended, []
        for each in ended:
            self._outcomes.count(each)
            self._bulk.report(functools.partial(self._outcomes.report, each, self._bulk.rest))

    def _answer_threads(self) -> None:
        """Tells our threads whom to ask, and how to make the main thread look."""
        if self._leader is not None:
            self._leader.measure = self._measured
            self._leader.rest = self._bulk.rest
            self._leader.nudge_by(functools.partial(self._inbox.append, None))
        self._throttle.last_hook = lambda: (self._step, self._last_return)

    def _measured(self) -> wire.Measured:
        """For the planner's cost model. On the bulk lane."""
        return wire.Measured(
            seconds_per_step=self._pacer.usual_step_s,
            transfer_bytes_per_s=self._transfer_bytes_per_s,
            step_inflation=max(self._pacer.inflation, 0.0),
        )

    # -- loads --------------------------------------------------------------------------------------------

    def _close_sub_window(self) -> None:
        """In the same step on every rank, since rounds are."""
        self._close_at += self.config.window.sub_window_steps
        if self.config.mode == "off":
            return
        snapshot = self._parts.recorder.take(self._window)
        self._window += 1
        if self._bulk.gather(snapshot, in_force=self._in_force, step=self._step):
            self._told_at = self._step
        self._watch.check(self._cycle)

    def _bulk_setup(self) -> BulkSetup:
        parts, deadline_s = self._parts, self.config.agreement.deadline_s
        return BulkSetup(
            rank=parts.rank,
            binding=self._binding,
            layer=parts.layer,
            recorder=parts.recorder,
            committed=parts.committed,
            group=parts.bulk,
            gathering=_gathering(parts, deadline_s=deadline_s),
            staging_experts=parts.transport.staging_experts,
            deadline_s=deadline_s,
            on_window=self._window_landed if parts.leader is not None else None,
            rest=parts.times.rest,
        )

    def _window_landed(self, window: WindowLoads) -> None:
        """On rank 0's bulk lane. Most often there is little to do, and it does not rest between: each time a thread
        wakes a step gets longer, beyond what it computes."""
        self.stats.windows += 1
        if self._leader is not None:
            self._leader.loads_landed(window, in_force=self._in_force)
        for observer in self.on_window:
            observer(window)


def _rounds(parts: Parts, *, deadline_s: float, stats: Stats) -> Rounds:
    if parts.board is None:
        return GatheredRounds(parts.votes, deadline_s=deadline_s, took_s=stats.round_s)
    return BoardRounds(parts.board, size=parts.votes.size, deadline_s=deadline_s, took_s=stats.round_s)


def _gathering(parts: Parts, *, deadline_s: float) -> Gathering:
    if parts.load_board is None:
        return GroupGathering(parts.bulk, deadline_s=deadline_s)
    return BoardGathering(parts.load_board, rank=parts.rank, deadline_s=deadline_s)


def _at_start(binding: ModelBinding) -> InForce:
    table = binding.current_table
    if table is None:
        table = uniform_table(binding.placement, binding.dispatch.width)
    return InForce(epoch=0, placement=binding.placement, table=table)
