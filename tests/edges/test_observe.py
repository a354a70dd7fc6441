"""Every sub-window reaches the worker, whether plans are wanted or not: recordings, live view and metrics."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from swiftbalancer import wire
from swiftbalancer.cli.top import views
from swiftbalancer.config import from_dict
from swiftbalancer.dispatch import DispatchForm, uniform_table
from swiftbalancer.errors import WorkerLost
from swiftbalancer.incoming import InForce
from swiftbalancer.leader import Leader, RequestForm
from swiftbalancer.mailbox import Reply, RequestFailed
from swiftbalancer.stats import Stats
from swiftbalancer_worker.recording import OutcomeEvent, PlanEvent, Recording
from swiftbalancer_worker.status import EngineView
from swiftbalancer_worker.trace import open_trace
from tests.edges.engines import EXPERTS, LAYERS, LONG_S, PLACEMENT, wait_for
from tests.edges.processes import free_port
from tests.edges.test_balancer import run_ranks

STEPS, SUB_WINDOW, STEP_S = 240, 8, 0.02
UNDER_WAY = 6
"""Sub-windows, of a second in all, that a busy machine may not have recorded when serving ends."""


@dataclass
class Shown:
    """What a run shows while it lasts."""

    view: EngineView
    metrics: dict[str, float]


def look(folder: Path, port: int) -> Shown:
    """The live view and a scrape, as soon as some sub-windows were reported."""
    address = f"ipc://{folder}/worker.sock.view"
    wait_for((folder / "worker.sock.view").exists)
    for view in views(address, wait_s=LONG_S):
        if view.engines and view.engines[0].rank_share:
            return Shown(view.engines[0], scrape(port))
    raise AssertionError("the view ended")


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONG_S) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        "".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def serve(folder: Path, mode: str) -> tuple[Shown, Recording, list[dict[str, Any]]]:
    """Two ranks in `mode`: what was seen of them meanwhile, what was recorded, what they reported."""
    port = free_port()
    config = {
        "mode": mode,
        "policy": {"name": "random"},
        "record": {"directory": str(folder / "recordings")},
        "metrics": {"port": port},
        "worker": {"endpoint": f"ipc://{folder}/worker.sock"},
    }
    with ThreadPoolExecutor() as pool:
        serving = pool.submit(run_ranks, folder, ranks=2, config=config, steps=STEPS, step_s=STEP_S)
        seen = look(folder, port)
        ranks = serving.result().ranks
    (recorded,) = (folder / "recordings").iterdir()
    return seen, Recording(recorded), ranks


def assert_whole(steps: list[int]) -> None:
    """No sub-window twice, none missing between the first and the last: each ends in time, or one step later."""
    first = steps[0] // SUB_WINDOW
    assert [step // SUB_WINDOW for step in steps] == list(range(first, first + len(steps)))
    assert {step % SUB_WINDOW for step in steps} <= {0, 1}


@pytest.mark.parametrize("mode", ["observe", "shadow", "on"])
def test_every_sub_window_is_recorded_and_the_imbalance_shown(tmp_path: Path, mode: str) -> None:
    seen, recording, ranks = serve(tmp_path, mode)
    steps = [window.step for window in recording.windows]
    assert_whole(steps)
    assert steps[0] < 2 * SUB_WINDOW, "the first sub-window is missing"
    assert len(steps) >= STEPS / SUB_WINDOW - UNDER_WAY, "only the last ones may be under way when serving ends"
    assert all(window.seconds_per_step > STEP_S for window in recording.windows[1:])
    assert seen.view.mode == mode
    assert seen.view.imbalance > 1.0
    assert len(seen.view.rank_share) == 2
    assert seen.metrics["swiftbalancer_imbalancemean"] > 1.0
    kinds = {type(event) for event in recording.events}
    if mode == "observe":
        assert kinds == set()
        assert (seen.view.plans, seen.view.outcomes) == ([], [])
        assert seen.metrics["swiftbalancer_plans_declined_total"] == 0
        assert "swiftbalancer_imbalance_predicted" not in seen.metrics
    else:
        assert kinds == {PlanEvent, OutcomeEvent}
    assert len(recording.placements()) == 1 if mode != "on" else len(recording.placements()) > 1
    for rank in ranks:
        assert rank["wrong_slots"] == 0
        assert (rank["committed"] > 0) == (mode == "on")
    if mode != "on":  # no votes: only the ends of sub-windows, and rank 0 waits for plans
        assert ranks[1]["busy_hooks"] <= 2 * STEPS / SUB_WINDOW
    trace = open_trace(recording.folder)
    assert (len(trace), trace.topology) == (len(steps), recording.manifest.topology)


def kill_the_worker(folder: Path) -> None:
    """SIGKILL, once it has recorded some sub-windows."""
    for view in views(f"ipc://{folder}/worker.sock.view", wait_s=LONG_S):
        if view.engines and view.engines[0].step > 10 * SUB_WINDOW:
            os.kill(view.pid, signal.SIGKILL)
            return


def test_a_killed_worker_costs_what_it_had_not_written_and_the_next_one_goes_on(tmp_path: Path) -> None:
    config = {
        "mode": "observe",
        "record": {"directory": str(tmp_path / "recordings")},
        "worker": {"endpoint": f"ipc://{tmp_path}/worker.sock"},
    }
    steps = 2 * STEPS
    with ThreadPoolExecutor() as pool:
        serving = pool.submit(run_ranks, tmp_path, ranks=2, config=config, steps=steps, step_s=STEP_S)
        wait_for((tmp_path / "worker.sock.view").exists)
        kill_the_worker(tmp_path)
        log = serving.result().log
    assert log.count("worker ready") == 2
    (recorded,) = (tmp_path / "recordings").iterdir()
    recording = Recording(recorded)
    recording.check()
    seen = [window.step for window in recording.windows]
    assert_whole(seen)
    assert seen[-1] >= steps - UNDER_WAY * SUB_WINDOW


# -- the leader, without a worker -------------------------------------------------------------------------------


@dataclass
class ScriptedLink:
    """Takes requests in; the test puts the answers."""

    requests: list[wire.PlanRequest] = field(default_factory=list)
    loads: list[Any] = field(default_factory=list)
    answers: list[Reply | RequestFailed] = field(default_factory=list)
    news: list[wire.Outcome | wire.Status] = field(default_factory=list)
    restarts: int = 0

    def request(self, message: wire.PlanRequest, arrays: wire.Arrays) -> bool:
        self.requests.append(message)
        self.loads.append(arrays["loads"])
        return True

    def poll(self) -> Reply | RequestFailed | None:
        return self.answers.pop(0) if self.answers else None

    def send(self, message: wire.Outcome | wire.Status, arrays: wire.Arrays | None = None) -> bool:
        assert arrays is None
        self.news.append(message)
        return True

    def tell(self, on_answer: Callable[[], None]) -> None:
        raise NotImplementedError

    def wait_ready(self, timeout_s: float) -> wire.Welcome:
        raise NotImplementedError

    def close(self, timeout_s: float) -> None:
        pass

    def declines(self, leader: Leader) -> None:
        """The last request is answered with nothing to do."""
        message = wire.NothingToDo(self.requests[-1].request, "", 1.3, 1.3, 0.0)
        self.answers.append(Reply([], message, {}))
        leader.poll()


class Landed(NamedTuple):
    """See `swiftbalancer.leader.Seen`."""

    window: int
    step: int
    epoch: int

    @property
    def expert_loads(self) -> NDArray[np.float64]:
        return np.full((LAYERS, EXPERTS), float(self.window))


class Scene:
    """A leader and what happens to it; sub-window `n` holds `n` tokens an expert."""

    epoch_seen = 0

    def __init__(self, **settings: Any) -> None:
        settings = {"window": {"sub_windows": 2, "replan_sub_windows": 4}, **settings}
        self.link, self.stats = ScriptedLink(), Stats()
        form = RequestForm(DispatchForm("table", 16), staging_experts=4)
        self.leader = Leader(from_dict(settings), self.link, form, self.stats)
        self._in_force = InForce(0, PLACEMENT, uniform_table(PLACEMENT, 16))

    def land(self, *windows: int) -> None:
        for window in windows:
            seen = Landed(window, (window + 1) * 32, self.epoch_seen)
            self.leader.loads_landed(seen, in_force=self._in_force)

    @property
    def brought(self) -> list[int]:
        """The sub-windows in the last request."""
        return [int(loads[0, 0]) for loads in self.link.loads[-1]]


def test_observing_asks_for_no_plan_and_counts_none() -> None:
    scene = Scene(mode="observe")
    for window in range(6):
        scene.land(window)
        scene.link.declines(scene.leader)
    assert [(request.kind, request.observe_only) for request in scene.link.requests] == [("dispatch", True)] * 6
    assert (scene.stats.plans_declined, scene.stats.plan_s.count, scene.stats.imbalance_predicted) == (0, 0, None)


def test_a_plan_that_nobody_asked_for_is_not_taken() -> None:
    scene = Scene(mode="observe")
    scene.land(0)
    scene.link.answers.append(Reply([], wire.PlanReply(1, "placement", 0, 0, 1.4, 1.1, 0.02, 0, []), {}))
    assert scene.leader.poll() is None
    assert not scene.leader.busy
    assert scene.stats.imbalance_predicted is None


def test_moves_that_plans_ask_for_are_counted_though_nothing_is_applied() -> None:
    scene = Scene(mode="shadow")
    scene.land(0)
    moves = wire.ArraySpec("moves", "<i4", [17, 4])
    reply = wire.PlanReply(1, "placement", 0, 0, 1.4, 1.1, 0.02, 0, [moves])
    scene.link.answers.append(Reply([], reply, {}))
    assert scene.leader.poll() is not None
    assert (scene.stats.moves_planned, scene.stats.experts_moved) == (17, 0)
    assert scene.stats.imbalance_predicted == 1.1


def test_a_request_brings_what_the_worker_has_not_heard_of() -> None:
    scene = Scene()
    scene.land(0, 1, 2, 3, 4, 5)
    assert scene.brought == [0]
    scene.link.declines(scene.leader)
    scene.land(6)
    assert scene.brought == [1, 2, 3, 4, 5, 6]
    scene.link.declines(scene.leader)
    scene.land(7)
    assert scene.brought == [6, 7], "never fewer than a plan looks back on"


def test_loads_are_reported_in_time_where_plans_are_rare() -> None:
    rare = {"sub_windows": 2, "refresh_sub_windows": 0, "replan_sub_windows": 1000}
    scene = Scene(window=rare)
    scene.land(0)
    scene.link.declines(scene.leader)
    for window in range(1, 100):
        scene.land(window)
        if scene.leader.busy:
            scene.link.declines(scene.leader)
    assert [request.observe_only for request in scene.link.requests] == [False, True, True, True]
    assert scene.stats.plans_declined == 1


def test_observing_needs_no_plan_to_be_due() -> None:
    scene = Scene(mode="observe", window={"refresh_sub_windows": 0, "replan_sub_windows": 0})
    scene.land(0)
    scene.link.declines(scene.leader)
    scene.land(1)
    assert len(scene.link.requests) == 2


def test_a_request_says_under_which_placement_and_up_to_which_step_each_sub_window_was_counted() -> None:
    scene = Scene()
    for window, epoch in enumerate((5, 5, 6, 7)):
        scene.epoch_seen = epoch
        scene.land(window)
    scene.link.declines(scene.leader)
    scene.land(4)
    assert scene.brought == [1, 2, 3, 4]
    assert scene.link.requests[-1].window_epochs == [5, 6, 7, 7]
    assert scene.link.requests[-1].window_steps == [64, 96, 128, 160]


def test_a_lost_worker_is_told_again_what_it_took_with_it() -> None:
    scene = Scene(mode="observe")
    scene.land(0, 1, 2)
    scene.link.answers.append(RequestFailed(1, WorkerLost("killed")))
    scene.leader.poll()
    assert scene.stats.requests_failed == 1
    assert not scene.leader.breaker.open
    scene.land(3)
    assert scene.brought == [0, 1, 2, 3]


def test_no_request_grows_beyond_the_bound() -> None:
    scene = Scene(mode="observe")
    scene.land(*range(100))
    scene.link.declines(scene.leader)
    scene.land(100)
    assert scene.brought == list(range(101 - wire.MAX_SUB_WINDOWS, 101))


def test_while_the_breaker_is_open_loads_are_reported_and_plans_are_not_asked_for() -> None:
    scene = Scene(breaker={"max_failures": 1})
    scene.land(0)
    scene.link.answers.append(RequestFailed(1, WorkerLost("killed")))
    scene.leader.poll()
    assert scene.leader.breaker.open
    scene.land(1)
    assert scene.link.requests[-1].observe_only
    scene.link.declines(scene.leader)
    assert scene.leader.breaker.open, "an answer that is no plan does not close it"


def test_once_balancing_is_off_loads_are_still_reported() -> None:
    scene = Scene()
    scene.leader.off = True
    scene.land(0)
    assert scene.link.requests[-1].observe_only
    scene.link.declines(scene.leader)
    scene.land(1)
    assert scene.brought == [0, 1]
