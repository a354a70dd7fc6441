"""The whole pipeline on real processes: gloo ranks of a synthetic engine, the real worker, real transfers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from msgspec.structs import replace
from torch._C._distributed_c10d import TCPStore

from swiftbalancer.agreement import BoardRounds, Round
from swiftbalancer.attach import attach
from swiftbalancer.balancer import MOST_QUIET_STEPS, Balancer
from swiftbalancer.border import GroupInfo
from swiftbalancer.config import from_dict
from swiftbalancer.cycle import Failed, Fault, Phase, StageBatch, StopServing
from swiftbalancer.errors import AgreementLost
from swiftbalancer.gathering import BoardGathering, Gathering, GroupGathering
from swiftbalancer.incoming import IncomingPlan
from swiftbalancer.link import WorkerLink
from swiftbalancer.recorder import RING
from swiftbalancer.stats import StepKind
from swiftbalancer.steptimes import Stretch
from swiftbalancer.transport import CommitCopies, Lately, TransferState, TransferStatus, Transport
from tests.edges.engines import wait_for
from tests.edges.processes import Run, Seat, run_script
from tests.edges.synthetic_rank import Options, SyntheticEngine

STEPS = 80
SCRIPT = Path(__file__).with_name("synthetic_rank.py")
FAST = {
    "window": {"sub_window_steps": 8, "sub_windows": 2, "replan_sub_windows": 2},
    "agreement": {"idle_round_steps": 4},
}


def run_ranks(folder: Path, *, ranks: int, config: dict[str, Any], **options: Any) -> Run:
    """One process per rank, all of which must end well; `options` are those of `synthetic_rank`."""
    wanted = {"out": str(folder / "out"), "ranks": ranks, "config": {**FAST, **config}, **options}
    run = run_script(SCRIPT, wanted, seats=[Seat()] * ranks)
    assert run.exit_codes == [0] * ranks, run.log
    return run


@pytest.mark.parametrize("ranks", [2, 3])
def test_weights_and_maps_agree_after_every_one_of_many_commits(tmp_path: Path, ranks: int) -> None:
    until = {"steps": 20_000, "until_epoch": 30}
    run = run_ranks(tmp_path, ranks=ranks, config={"policy": {"name": "random"}}, experts=9, redundant=3, **until)
    first = run.ranks[0]
    assert first["epochs"][-1][1] == until["until_epoch"]
    assert first["placements"] >= 10
    assert first["moved"] >= 50
    assert first["cycles"][-1][1] >= 10
    for rank in run.ranks:
        assert rank["wrong_slots"] == 0
        assert rank["epochs"] == first["epochs"], "epochs changed after different steps"
        assert rank["cycles"] == first["cycles"], "cycles were counted after different steps"
        assert rank["dropped"] == 0


def test_experts_move_even_if_a_sub_window_ends_in_every_step(tmp_path: Path) -> None:
    window = {"sub_window_steps": 1, "sub_windows": 8, "refresh_sub_windows": 0, "replan_sub_windows": 16}
    config = {"window": window, "policy": {"name": "random"}, "transport": {"max_step_inflation": 1.0}}
    run = run_ranks(tmp_path, ranks=2, config=config, steps=2000, step_s=0.005, until_epoch=3)
    for rank in run.ranks:
        assert rank["moved"] > 0
        assert rank["wrong_slots"] == 0


def test_both_loops_lower_the_imbalance(tmp_path: Path) -> None:
    window = {"sub_window_steps": 8, "sub_windows": 2, "refresh_sub_windows": 1, "replan_sub_windows": 4}
    sizes = {"layers": 3, "experts": 16, "redundant": 2, "width": 16}
    policy = {"min_gain": 0.0, "target_imbalance": 1.0}
    run = run_ranks(
        tmp_path,
        ranks=2,
        config={"window": window, "policy": policy},
        steps=800,
        step_s=0.01,
        shift_every=400,
        **sizes,
    )
    first = run.ranks[0]
    assert first["dispatches"] >= 1
    assert first["placements"] >= 1
    assert first["wrong_slots"] == 0
    served, unmoved = first["imbalance_late"]
    assert served - 1 < (unmoved - 1) / 2


def test_shadow_mode_plans_and_touches_nothing(tmp_path: Path) -> None:
    run = run_ranks(tmp_path, ranks=2, config={"mode": "shadow", "policy": {"name": "random"}}, steps=1200)
    assert "shadow mode" in run.log
    for rank in run.ranks:
        assert rank["committed"] == 0
        assert [epoch for _, epoch in rank["epochs"]] == [0, 0]
        assert rank["wrong_slots"] == 0


@pytest.mark.parametrize("bound", [0.02, 1.0])
def test_drain_ends_the_cycle_on_all_ranks_and_resume_lets_the_next_begin(bound: float, tmp_path: Path) -> None:
    """With threads that rest, a drain may come before the end of any cycle."""
    steps = {"steps": 1500, "step_s": 0.003, "drain_every": 100}
    config = {"policy": {"name": "random"}, "transport": {"max_step_inflation": bound}}
    run = run_ranks(tmp_path, ranks=2, config=config, **steps)
    for rank in run.ranks:
        assert rank["drains"] >= 10
        assert rank["busy_after_drain"] == rank["closed_after_resume"] == 0
        assert rank["wrong_slots"] == 0
        assert rank["epochs"] == run.ranks[0]["epochs"]
    if bound == 1.0:
        assert run.ranks[0]["committed"] >= 3


def test_a_rank_that_skips_its_hook_stops_all_cycles_and_is_reported(tmp_path: Path) -> None:
    config = {"policy": {"name": "random"}, "transport": {"max_step_inflation": 1.0}}
    run = run_ranks(tmp_path, ranks=2, config=config, steps=1200, skip_at=[1, 700])
    assert "no cycle until ranks run in lockstep again: device pass count differs between ranks" in run.log
    for rank in run.ranks:
        assert rank["wrong_slots"] == 0
        assert max(step for step, epoch in rank["epochs"][:-1]) < 760, "a cycle ran after the ranks drifted apart"
    assert run.ranks[0]["committed"] >= 1


@pytest.mark.parametrize(("windows", "passes"), [([3, 4], [9, 9]), ([3, 3], [9, 10]), ([3, 3], [9, 9])])
def test_a_cycle_in_flight_is_given_up_once_a_rank_is_known_to_have_skipped_its_hook(
    windows: list[int], passes: list[int], tmp_path: Path
) -> None:
    with alone(no_worker(tmp_path)) as balancer:
        lane = balancer._bulk
        lane._check_lockstep(windows, passes)
        assert not balancer._inbox, "there is none"
        lane.incoming = cast("IncomingPlan", SimpleNamespace(cycle=7))
        lane._check_lockstep(windows, passes)
        lane.incoming = None
        broken = len(set(windows)) + len(set(passes)) > 2
        assert list(balancer._inbox) == ([Failed(7, Fault.PLAN_INVALID)] if broken else [])
        balancer._inbox.clear()


def no_worker(folder: Path) -> dict[str, Any]:
    """Nobody answers rank 0."""
    return {"worker": {"spawn": False, "endpoint": f"ipc://{folder / 'nobody'}"}}


@contextmanager
def alone(config: dict[str, Any]) -> Iterator[Balancer]:
    """The balancer of a group of one rank, in this process."""
    engine = SyntheticEngine(Options(out="", ranks=1), 0)
    store = TCPStore("127.0.0.1", 0, 1, True)
    group = GroupInfo(rank=0, size=1, store=store, device=torch.device("cpu"))
    balancer = attach(from_dict(config), engine.binding(), group)
    try:
        yield balancer
    finally:
        balancer.close()


@pytest.mark.parametrize("sub_window_steps", [1, 2, 8])
@pytest.mark.parametrize("idle_round_steps", [1, 6, 16])
def test_rounds_and_sub_windows_end_in_steps_of_their_own(
    idle_round_steps: int, sub_window_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a rank that never has a plan."""
    config = {
        "window": {"sub_window_steps": sub_window_steps, "refresh_sub_windows": 0, "replan_sub_windows": 0},
        "agreement": {"idle_round_steps": idle_round_steps},
        **no_worker(tmp_path),
    }
    with alone(config) as balancer:
        rounds = balancer._rounds
        assert isinstance(rounds, BoardRounds)
        took: list[int] = []
        take = rounds.take

        def taken() -> Round:
            took.append(balancer._step)
            return take()

        monkeypatch.setattr(rounds, "take", taken)
        posted, ended = [], []
        for step in range(1, STEPS + 1):
            before = balancer.stats.rounds, balancer._window
            balancer.after_forward()
            posted += [step] * (balancer.stats.rounds - before[0])
            ended += [step] * (balancer._window - before[1])
        lag = balancer.config.agreement.lag_steps
        assert took == [step + lag for step in posted if step + lag <= STEPS], "all take a round after the same step"
        assert not set(posted) & set(took)
        if sub_window_steps > 2:
            assert not set(ended) & {*posted, *took}
        assert len(posted) >= STEPS // (max(idle_round_steps, lag) + 2) - 1
        assert len(ended) >= STEPS // max(sub_window_steps, 2) - 1


def test_the_worker_s_answer_ends_the_wait_for_it_and_the_transfer_s_thread_sets_the_pace(tmp_path: Path) -> None:
    """What `attach` has to connect: nothing goes wrong without, it only takes long."""
    config = no_worker(tmp_path)
    with alone(config) as balancer:
        place = balancer._parts.transport._place
        assert place.adapt == balancer._times.adapt
        assert not place.is_dear()
        balancer._throttle.share /= 2
        assert place.is_dear()
        for _ in range(3):
            balancer.after_forward()
        assert balancer._quiet, "nothing is due"
        link = balancer._leader._link if balancer._leader else None
        assert isinstance(link, WorkerLink)
        for nudge in (link._mailbox.on_answer, place.nudge):
            nudge()
            balancer.after_forward()
            assert not balancer._quiet
            balancer.after_forward()
            assert balancer._quiet


def test_a_rank_told_to_stop_says_so_at_every_pass_from_then_on() -> None:
    """Also where it had expected nothing to do for some passes."""
    with alone({"mode": "off"}) as balancer:
        for _ in range(3):
            balancer.after_forward()
        assert balancer._step < balancer._quiet_until - 3
        balancer._act(StopServing("votes are lost"))
        for _ in range(3):
            with pytest.raises(AgreementLost, match="votes are lost"):
                balancer.after_forward()


@pytest.mark.parametrize("mode", ["off", "on"])
def test_every_step_is_counted_and_most_of_them_soon(tmp_path: Path, mode: str) -> None:
    """Also of an engine whose sub-windows are long, or not looked at."""
    steps, config = 5 * MOST_QUIET_STEPS, no_worker(tmp_path)
    with alone(config | {"mode": mode, "window": {"sub_window_steps": 10_000}}) as balancer:
        for _ in range(steps):
            balancer.after_forward()
        host_s = balancer.stats.host_s
        wait_for(lambda: sum(ring.count for ring in host_s) > steps - 2 * MOST_QUIET_STEPS - 2)
        assert balancer.stats.steps > steps - MOST_QUIET_STEPS
    assert sum(ring.count for ring in host_s) == balancer.stats.steps == steps


def test_a_balancer_may_be_closed_twice(tmp_path: Path) -> None:
    with alone(no_worker(tmp_path)) as balancer:
        assert isinstance(balancer._rounds, BoardRounds)
        balancer.after_forward()
        balancer.close()


class FakeTransport(Transport):
    """A batch under way, of which the test says what it does."""

    def __init__(self) -> None:
        self.state = TransferState.MOVING
        self.missing = 0
        self.waiting = False
        self.allowed: list[int] = []

    @property
    def waits(self) -> bool:
        return self.waiting

    def advance(self, bytes_allowed: int = 0) -> int:
        self.allowed.append(bytes_allowed)
        self.missing = max(self.missing - bytes_allowed, 0)
        self.waiting = self.missing > 0
        return self.missing

    def poll(self) -> TransferStatus:
        return TransferStatus(self.state)

    def commit_copies(self) -> CommitCopies:
        return CommitCopies()

    def lately(self) -> Lately:
        return Lately(rested=self.waiting, carried=not self.waiting, held_back=self.waiting)


@contextmanager
def moving(folder: Path) -> Iterator[tuple[Balancer, FakeTransport]]:
    """A balancer amid a batch, with rounds and sub-windows far away."""
    config = {
        **no_worker(folder),
        "window": {"sub_window_steps": 10_000},
        "agreement": {"idle_round_steps": 1000, "lag_steps": 64},
    }
    with alone(config) as balancer:
        transport, real = FakeTransport(), balancer._parts.transport
        for _ in range(40):
            balancer.after_forward()
        object.__setattr__(balancer._parts, "transport", transport)
        try:
            balancer._cycle = replace(balancer._cycle, phase=Phase.MOVING)
            balancer._pacer._turn = 3
            balancer._inbox.append(None)
            balancer.after_forward()
            yield balancer, transport
        finally:
            balancer._cycle = replace(balancer._cycle, phase=Phase.IDLE)
            object.__setattr__(balancer._parts, "transport", real)


def test_steps_of_a_batch_that_neither_waits_nor_is_over_have_nothing_to_do(tmp_path: Path) -> None:
    with moving(tmp_path) as (balancer, transport):
        for _ in range(20):
            balancer.after_forward()
        assert len(balancer._quiet) == 20
        assert balancer.step_kind is StepKind.MOVING
        assert not transport.allowed, "it asked for nothing"
        balancer._times.work_out()
        before = balancer._pacer._steps
        transport.waiting, transport.missing = True, 1
        balancer._parts.inbox.append(None)
        balancer.after_forward()
        assert transport.allowed, "it asked"
        balancer._times.work_out()
        assert balancer._pacer._steps == before + 21, "the pacer knows of the quiet ones"
        balancer.after_forward()
        assert len(balancer._quiet) == 1
        transport.state = TransferState.FAILED
        balancer._parts.inbox.append(None)
        balancer.after_forward()
        assert not balancer._quiet
        assert not balancer._carrying


def test_the_throttle_learns_which_step_is_under_way_and_beside_which_our_threads_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moving(tmp_path) as (balancer, _):
        throttle = balancer._throttle
        told: list[tuple[float, float]] = []
        monkeypatch.setattr(throttle, "steps_took", lambda steps, **_: told.extend(steps))
        balancer.after_forward()
        assert throttle.last_hook is not None
        before, began = throttle.last_hook()
        throttle.total_s = 100.0
        balancer.after_forward()
        assert len(balancer._quiet) == 2
        assert throttle.last_hook()[0] == before + 1
        assert began < throttle.last_hook()[1] <= time.perf_counter()
        throttle.total_s = 200.0
        balancer._parts.inbox.append(None)
        balancer.after_forward()
        balancer._times.work_out()
        assert [total_s for _, total_s in told][-2:] == [100.0, 200.0]


def test_a_batch_begins_in_the_hook_after_the_one_that_decided_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is due, and whenever."""
    begun = StageBatch(0, 1)
    with moving(tmp_path) as (balancer, _):
        started: list[StageBatch] = []
        monkeypatch.setattr(balancer, "_stage", started.append)
        balancer.after_forward()
        assert balancer._step + 1 < balancer._quiet_until, "nothing was due"
        balancer._act(begun)
        balancer._quiet_until = balancer._next_busy_step()
        assert not balancer._carrying, "what the transport says is of the batch before"
        assert not started
        balancer.after_forward()
        assert started == [begun]
        balancer._to_stage = None


@pytest.mark.parametrize(
    ("kind", "quiet", "phase", "paced"),
    [
        (StepKind.IDLE, 0, Phase.IDLE, True),
        (StepKind.COMMITTING, 0, Phase.IDLE, False),
        (StepKind.COMMITTING, 3, Phase.IDLE, True),
        (StepKind.COMMITTING, 3, Phase.MOVING, False),
    ],
)
def test_the_pacer_is_told_of_usual_steps_and_not_of_a_cycle_s_last_commit(
    monkeypatch: pytest.MonkeyPatch, kind: StepKind, quiet: int, phase: Phase, *, paced: bool
) -> None:
    """MOVING without a batch on its way: its votes are waited for."""
    with alone({"mode": "off"}) as balancer:
        noted: list[Stretch] = []
        monkeypatch.setattr(balancer._times, "note", noted.append)
        balancer._kind, balancer._quiet = kind, [(0.01, 0.0, 0.0)] * quiet
        balancer._cycle = replace(balancer._cycle, phase=phase, ready=phase is Phase.MOVING)
        balancer._note_times(0.01)
        assert [stretch.paced for stretch in noted] == [paced]
        assert balancer._quiet == []


def test_a_batch_that_lacks_bytes_for_some_steps_gets_them_when_they_are_enough(tmp_path: Path) -> None:
    with moving(tmp_path) as (balancer, transport):
        each = balancer._pacer.bytes_per_step
        transport.waiting, transport.missing = True, 7 * each
        balancer._parts.inbox.append(None)
        balancer.after_forward()
        assert transport.allowed == [each]
        balancer._times.work_out()
        usual = len(balancer._pacer._usual)
        for _ in range(5):
            balancer.after_forward()
        assert transport.allowed == [each]
        balancer.after_forward()
        assert transport.allowed == [each, 6 * each], "as much as step by step"
        assert not transport.waiting
        balancer._times.work_out()
        assert len(balancer._pacer._usual) == min(usual + 6, 32), "it rested meanwhile"
        balancer.after_forward()
        assert transport.allowed == [each, 6 * each]


def test_a_batch_that_ended_in_a_step_that_did_not_look_is_seen_in_the_next(tmp_path: Path) -> None:
    with moving(tmp_path) as (balancer, transport):
        balancer._close_at = balancer._step + 1
        transport.state = TransferState.FAILED
        balancer._parts.inbox.append(None)
        balancer.after_forward()
        assert balancer._carrying, "it closed a sub-window instead"
        balancer.after_forward()
        assert not balancer._carrying


def test_maps_that_come_after_a_transfer_s_end_are_seen_in_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moving(tmp_path) as (balancer, transport):
        transport.state = TransferState.DONE
        balancer._parts.inbox.append(None)
        for _ in range(3):
            balancer.after_forward()
        assert len(balancer._quiet) == 2, "a transfer without its maps is not complete"
        bulk, incoming = balancer._bulk, SimpleNamespace(cycle=0, batches={})
        monkeypatch.setattr(bulk, "incoming", incoming)
        monkeypatch.setattr(bulk, "_ready", lambda *_: "maps")
        bulk.prepare(incoming, 0, balancer.in_force)  # type: ignore[arg-type]
        wait_for(lambda: bool(balancer._parts.inbox))
        assert incoming.batches == {0: "maps"}
        balancer.after_forward()
        assert not balancer._carrying


def gathering_each_step(folder: Path) -> dict[str, Any]:
    return {
        "window": {"sub_window_steps": 1, "refresh_sub_windows": 0, "replan_sub_windows": 0},
        **no_worker(folder),
    }


def has_landed(balancer: Balancer, windows: int) -> bool:
    return balancer.stats.windows == windows


def test_snapshots_that_were_gathered_are_used_again(tmp_path: Path) -> None:
    with alone(gathering_each_step(tmp_path)) as balancer:
        for number in range(1, 3 * RING + 1):
            while balancer._window < number:
                balancer.after_forward()
            wait_for(partial(has_landed, balancer, number))
        assert balancer._parts.recorder.overruns == 0


@pytest.mark.parametrize("mode", ["on", "observe", "shadow"])
@pytest.mark.parametrize(("channel", "kind"), [("auto", BoardGathering), ("gloo", GroupGathering)])
def test_ranks_of_one_host_gather_loads_in_memory_they_share_unless_told_otherwise(
    channel: str, kind: type[Gathering], mode: str, tmp_path: Path
) -> None:
    config = gathering_each_step(tmp_path) | {"mode": mode, "agreement": {"channel": channel}}
    before = shared_mappings()
    with alone(config) as balancer:
        assert isinstance(balancer._bulk._setup.gathering, kind)
        balancer.after_forward()
        wait_for(partial(has_landed, balancer, 1))
        assert shared_mappings() == before + (channel == "auto") * (1 + (mode == "on"))
    assert shared_mappings() == before


def shared_mappings() -> int:
    """Files of ours that this process has in its memory."""
    return Path("/proc/self/maps").read_text().count("/swiftbalancer-")


def test_what_waits_to_be_gathered_at_the_end_is_let_go_of_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with alone(gathering_each_step(tmp_path)) as balancer:
        go_on, gathering = threading.Event(), balancer._bulk._setup.gathering
        gather = gathering.gather

        def late(*given: Any) -> Any:
            assert go_on.wait(60)
            return gather(*given)

        monkeypatch.setattr(gathering, "gather", late)
        while balancer._window < 10:
            balancer.after_forward()
        balancer._bulk.close(0.1)
        go_on.set()
        wait_for(lambda: not balancer._bulk.lane._thread.is_alive())
    assert caplog.text.count("a background job failed") <= 1, "the one that was at it"
