"""The faults that tests and the soak know, by name."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable

from swiftbalancer.cycle import Phase
from tests.edges.fault import Fault
from tests.edges.faults_of_ranks import (
    AnotherPlan,
    Calm,
    DamagedBroadcast,
    DyingRank,
    FailedBroadcast,
    FailedCheck,
    FailedPreparation,
    LateBroadcast,
    SkippedHook,
    SlowRank,
    UnaskedPlan,
    UnpackablePlan,
)
from tests.edges.faults_of_transfers import BrokenTransfer, FlippedBit, StuckTransfer
from tests.edges.faults_of_votes import CutLink, LateVote, LostRound
from tests.edges.faults_of_workers import KillWorkerAtWork, RemoveEndpoint, ScriptWorker, SignalWorker


def _offence(name: str) -> Callable[[], Fault]:
    return lambda: ScriptWorker(name)


TRANSIENT: dict[str, Callable[[], Fault]] = {
    "worker killed": lambda: SignalWorker(signal.SIGKILL),
    "worker killed at work": KillWorkerAtWork,
    "worker killed while receiving": lambda: SignalWorker(signal.SIGKILL, Phase.RECEIVING),
    "worker killed while moving": lambda: SignalWorker(signal.SIGKILL, Phase.MOVING),
    "worker stopped": lambda: SignalWorker(signal.SIGSTOP),
    "worker exits": _offence("exits"),
    "worker out of memory": _offence("runs_out_of_memory"),
    "worker babbles": _offence("babbles"),
    "worker sends too many frames": _offence("sends_too_many_frames"),
    "worker sends an oversized header": _offence("sends_an_oversized_header"),
    "worker silent": _offence("is_silent"),
    "endpoint removed": RemoveEndpoint,
    "plan for another topology": _offence("plans_for_another_topology"),
    "plan with a wrong digest": _offence("names_a_wrong_digest"),
    "plan for a stale epoch": _offence("names_a_stale_epoch"),
    "plan that misroutes": _offence("sends_tokens_to_a_foreign_slot"),
    "answer to an older request": _offence("answers_an_older_request"),
    "rank slow while idle": lambda: SlowRank(Phase.IDLE, 2.0),
    "rank slow while receiving": lambda: SlowRank(Phase.RECEIVING, 2.0),
    "rank slow while moving": lambda: SlowRank(Phase.MOVING, 2.0),
    "vote late": lambda: LateVote(2.0),
    "request cannot be made": UnaskedPlan,
    "plan cannot be packed": UnpackablePlan,
    "broadcast damaged": DamagedBroadcast,
    "broadcast failed": FailedBroadcast,
    "another plan on one rank": AnotherPlan,
    "plan check fails": FailedCheck,
    "maps cannot be prepared": FailedPreparation,
    "bit flipped in a transfer": FlippedBit,
    "transfer never completes": StuckTransfer,
    "transfer breaks": BrokenTransfer,
}
"""Faults that cost a cycle or less; balancing goes on after them."""

FATAL: dict[str, Callable[[], Fault]] = {
    "round lost while idle": lambda: LostRound(Phase.IDLE),
    "round lost in doubt": lambda: LostRound(Phase.MOVING),
    "hook skipped during a vote": SkippedHook,
    "broadcast beyond its deadline": lambda: LateBroadcast(6.0),
    "rank dies while idle": lambda: DyingRank(Phase.IDLE),
    "rank dies while moving": lambda: DyingRank(Phase.MOVING),
}
"""Faults after which balancing, or serving, ends on purpose."""

KNOWN: dict[str, Callable[[], Fault]] = {**TRANSIENT, **FATAL, "nothing for a while": Calm}
KNOWN["transfer breaks three times"] = functools.partial(BrokenTransfer, 3)
KNOWN |= {f"link cut while {p.name.lower()}": functools.partial(CutLink, p, 1.5) for p in Phase}
KNOWN["link cut for long"] = functools.partial(CutLink, Phase.MOVING, 8.0)
