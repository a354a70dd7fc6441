"""What the worker answers to anything engines, or others, may send; without sockets."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swiftbalancer.dispatch import uniform_table
from swiftbalancer.errors import UnknownPolicy
from swiftbalancer.plan import PlanKind
from swiftbalancer.topology import Topology
from swiftbalancer.wire import (
    HELLO_FIRST,
    Arrays,
    Goodbye,
    Message,
    ModelSpec,
    NothingToDo,
    Outcome,
    PlanReply,
    Refused,
    Status,
    Welcome,
    decode,
    encode,
    plan_of,
    specs,
)
from swiftbalancer_worker.peers import BURST, MAX_ENGINES, MAX_PEERS
from swiftbalancer_worker.recording import OutcomeEvent, PlanEvent, Recording
from swiftbalancer_worker.service import Service, ServiceOptions
from tests.edges.engines import EXPERTS, LAYERS, PLACEMENT, TOPOLOGY, hello, plan_request

A, B = b"peer a", b"peer b"
OUTCOME = Outcome(2, "placement", True, "", 1, 96, 3, 3 << 20, 1.2, {"total": 12})


def say(service: Service, peer: bytes, message: Message, *, now: float = 0.0) -> Message | None:
    """What `peer` is answered."""
    reply = service.handle(peer, encode(message), now=now)
    return None if reply is None else decode(reply)[0]


def ask(service: Service, peer: bytes, number: int, *, now: float = 0.0, step: int = 96) -> list[bytes]:
    request, arrays = plan_request(number, step=step)
    reply = service.handle(peer, encode(request, arrays), now=now)
    assert reply is not None
    return reply


@pytest.fixture
def service() -> Service:
    return Service()


def test_several_engines_are_served_each_by_its_own_policy(service: Service) -> None:
    first = say(service, A, hello("a", policy={"name": "random"}))
    second = say(service, B, hello("b", policy={"name": "none"}))
    assert isinstance(first, Welcome)
    assert isinstance(second, Welcome)
    assert (first.policy, second.policy) == ("random", "none")
    message, arrays = decode(ask(service, A, 1))
    assert isinstance(message, PlanReply)
    plan = plan_of(message, arrays)
    plan.validate(PLACEMENT, staging_experts=4)
    assert len(plan.moves) > 0
    still, _ = decode(ask(service, B, 2))
    assert isinstance(still, PlanReply)
    assert still.kind == "dispatch"


def test_a_plan_that_changes_nothing_is_no_plan(service: Service) -> None:
    say(service, A, hello(policy={"name": "none"}))
    message, arrays = decode(ask(service, A, 1))
    assert isinstance(message, PlanReply)
    request, given_arrays = plan_request(1)
    again = service.handle(A, encode(request, given_arrays | {"table": arrays["table"]}), now=0.0)
    assert again is not None
    answer, _ = decode(again)
    assert isinstance(answer, NothingToDo)
    assert answer.imbalance_now == pytest.approx(answer.imbalance_predicted)


@pytest.mark.parametrize("kind", ["placement", "dispatch"])
def test_a_plan_says_what_it_changes_against_what_is_in_force(service: Service, kind: PlanKind) -> None:
    """Not against the best that the placement in force could do: in shadow mode its tables are never renewed."""
    say(service, A, hello(policy={"name": "greedy"}))
    loads = np.ones((3, LAYERS, EXPERTS), np.float32)
    loads[:, :, 0] = 1e4
    request, arrays = plan_request(1, kind=kind)
    first_only = uniform_table(PLACEMENT, 16)
    first_only[:, 0] = 0
    arrays |= {"loads": loads, "table": first_only}
    reply = service.handle(A, encode(request, arrays), now=0.0)
    assert reply is not None
    answer, _ = decode(reply)
    assert isinstance(answer, PlanReply)
    assert answer.imbalance_now == pytest.approx(2.0, rel=0.01), "all of it on one of two ranks"
    assert answer.imbalance_predicted < 1.1


def test_the_workers_own_policy_overrules_the_engines() -> None:
    answer = say(Service(ServiceOptions(policy="greedy")), A, hello(policy={"name": "random"}))
    assert isinstance(answer, Welcome)
    assert answer.policy == "greedy"
    with pytest.raises(UnknownPolicy, match=r"known: .*swift"):
        Service(ServiceOptions(policy="swifft"))


def test_a_request_without_a_hello_is_told_to_say_hello(service: Service) -> None:
    assert decode(ask(service, A, 7))[0] == Refused(7, HELLO_FIRST)
    say(service, A, hello())
    say(service, A, Goodbye("engine"))
    assert decode(ask(service, A, 8))[0] == Refused(8, HELLO_FIRST)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": 99}, "protocol 99"),
        ({"config": {"polcy": {}}}, "polcy: unknown key"),
        ({"config": {"policy": {"name": "best"}}}, "unknown 'best'; known"),
        ({"topology": Topology(1 << 14, 1 << 6), "model": ModelSpec("m", 4096, 8, 2, 1)}, "beyond the bound"),
    ],
)
def test_a_hello_that_makes_no_sense_is_refused_with_the_reason(
    service: Service, change: dict[str, object], reason: str
) -> None:
    answer = say(service, A, msgspec.structs.replace(hello(), **change))
    assert isinstance(answer, Refused)
    assert reason in answer.reason
    assert len(service.peers) == 0


BAD_ARRAYS: dict[str, Arrays] = {
    "placement is of another shape": {"placement": PLACEMENT.physical_to_logical_map[:, :-1]},
    "an expert has no slot": {"placement": np.zeros((LAYERS, TOPOLOGY.num_slots), np.int32)},
    "an expert does not exist": {"placement": PLACEMENT.physical_to_logical_map + 1},
    "loads are of another shape": {"loads": np.ones((2, LAYERS, EXPERTS + 1), np.float32)},
    "there are no loads": {"loads": np.ones((0, LAYERS, EXPERTS), np.float32)},
    "there are too many sub-windows": {"loads": np.ones((65, LAYERS, EXPERTS), np.float32)},
    "loads are flat": {"loads": np.ones(8, np.float32)},
    "a load is NaN": {"loads": np.full((2, LAYERS, EXPERTS), np.nan, np.float32)},
    "a load is infinite": {"loads": np.full((2, LAYERS, EXPERTS), np.inf, np.float32)},
    "a load is negative": {"loads": np.full((2, LAYERS, EXPERTS), -1, np.float32)},
    "loads are integers": {"loads": np.ones((2, LAYERS, EXPERTS), np.int32)},
    "the table names a foreign slot": {"table": np.zeros((LAYERS, EXPERTS, 16), np.int32)},
    "the table is of another shape": {"table": uniform_table(PLACEMENT, 16)[:1]},
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_a_request_is_refused_and_the_next_one_answered_when(service: Service, name: str) -> None:
    say(service, A, hello())
    request, arrays = plan_request(5)
    arrays = arrays | BAD_ARRAYS[name]
    bad = encode(msgspec.structs.replace(request, arrays=specs(arrays)), arrays)
    reply = service.handle(A, bad, now=0.0)
    assert reply is not None
    answer, _ = decode(reply)
    assert isinstance(answer, Refused)
    assert answer.request == 5
    assert not answer.reason.startswith("the worker failed"), answer.reason
    assert isinstance(decode(ask(service, A, 6))[0], PlanReply)


def test_a_request_for_a_huge_table_is_refused_before_it_is_made(service: Service) -> None:
    big = msgspec.structs.replace(hello().model, num_layers=4096, num_experts=4096)
    say(service, A, msgspec.structs.replace(hello(), model=big, topology=Topology(2, 4096)))
    request, arrays = plan_request(5)
    asked = msgspec.structs.replace(request, dispatch_width=1024)
    reply = service.handle(A, encode(asked, arrays), now=0.0)
    assert reply is not None
    answer, _ = decode(reply)
    assert isinstance(answer, Refused)
    assert "dispatch_width 1024 is too large" in answer.reason


def test_messages_that_workers_send_are_refused_from_engines(service: Service) -> None:
    say(service, A, hello())
    answer = say(service, A, Welcome(1, "swift"))
    assert isinstance(answer, Refused)
    assert "what workers send" in answer.reason


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.binary(max_size=200), max_size=20))
def test_rubbish_is_refused_and_never_the_end(service: Service, frames: list[bytes]) -> None:
    reply = service.handle(A, frames, now=0.0)
    assert reply is None or isinstance(decode(reply)[0], Refused)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_request_with_a_damaged_byte_is_answered_or_refused(service: Service, data: st.DataObject) -> None:
    say(service, A, hello(policy={"name": "none"}))
    request, arrays = plan_request(3)
    frames = encode(request, arrays)
    which = data.draw(st.integers(0, len(frames) - 1))
    where = data.draw(st.integers(0, len(frames[which]) - 1))
    damaged = bytearray(frames[which])
    damaged[where] ^= 1 << data.draw(st.integers(0, 7))
    frames[which] = bytes(damaged)
    reply = service.handle(A, frames, now=1e6 * data.draw(st.integers(0, 1000)))
    if reply is not None:
        answer, answer_arrays = decode(reply)
        assert isinstance(answer, Refused | PlanReply | NothingToDo)
        if isinstance(answer, PlanReply):
            plan_of(answer, answer_arrays)


def test_a_peer_that_floods_is_ignored_until_it_slows_down_and_others_are_not(service: Service) -> None:
    say(service, A, hello("a"))
    say(service, B, hello("b"))
    answered = [service.handle(A, [b"\xc1"], now=1.0) for _ in range(int(2 * BURST))]
    assert 0 < sum(reply is not None for reply in answered) <= BURST
    assert isinstance(decode(ask(service, B, 1, now=1.0))[0], PlanReply)
    assert isinstance(decode(ask(service, A, 2, now=60.0))[0], PlanReply)


def test_strangers_in_any_number_take_no_engines_place(service: Service) -> None:
    say(service, A, hello("a"))
    for number in range(2 * MAX_PEERS):
        say(service, b"stranger %d" % number, Goodbye("x"), now=1.0)
    assert isinstance(decode(ask(service, A, 1, now=1.0))[0], PlanReply)
    for number in range(MAX_ENGINES + 1):
        say(service, b"engine %d" % number, hello(f"e{number}", policy={"name": "none"}), now=2.0)
    assert len(service.peers) == MAX_ENGINES


def test_every_sub_window_is_recorded_once_though_requests_overlap(tmp_path: Path) -> None:
    service = Service(ServiceOptions(record=tmp_path))
    say(service, A, hello("engine/1"))
    for number, step in ((1, 96), (2, 128), (3, 128), (4, 256)):
        ask(service, A, number, step=step)
        service.settle(0.0)
    say(service, A, OUTCOME)
    say(service, A, Goodbye("engine/1"))
    (folder,) = tmp_path.iterdir()
    recording = Recording(folder)
    assert [window.step for window in recording.windows] == [32, 64, 96, 128, 192, 224, 256]
    newest = plan_request(4)[1]["loads"]
    np.testing.assert_array_equal(recording.chunks[0].loads[-3:], newest)
    np.testing.assert_array_equal(
        recording.placements()[0].physical_to_logical_map, PLACEMENT.physical_to_logical_map
    )
    kinds = [type(event) for event in recording.events]
    assert kinds == [PlanEvent] * 4 + [OutcomeEvent]


def test_a_sub_window_that_ended_a_step_late_is_recorded_once_and_its_neighbours_too(tmp_path: Path) -> None:
    service = Service(ServiceOptions(record=tmp_path))
    say(service, A, hello())
    for number, steps in enumerate(([32, 64, 96], [64, 96, 129], [96, 129, 160]), 1):
        request, arrays = plan_request(number, step=steps[-1])
        request = msgspec.structs.replace(request, window_steps=steps)
        service.handle(A, encode(request, arrays), now=0.0)
        service.settle(0.0)
    service.close()
    (folder,) = tmp_path.iterdir()
    recording = Recording(folder)
    assert [window.step for window in recording.windows] == [32, 64, 96, 129, 160]


def test_sub_windows_are_recorded_under_the_placement_they_were_seen_under(tmp_path: Path) -> None:
    service = Service(ServiceOptions(record=tmp_path))
    say(service, A, hello())
    moved = PLACEMENT.physical_to_logical_map[:, ::-1].copy()
    for number, epoch, seen, placement in (
        (1, 3, [3, 3, 3], PLACEMENT.physical_to_logical_map),
        (2, 9, [3, 7, 9], moved),
    ):
        request, arrays = plan_request(number, step=96 * number)
        arrays = {"placement": placement, "loads": arrays["loads"]}
        request = msgspec.structs.replace(request, epoch=epoch, window_epochs=seen, arrays=specs(arrays))
        service.handle(A, encode(request, arrays), now=0.0)
        service.settle(0.0)
    service.close()
    (folder,) = tmp_path.iterdir()
    recording = Recording(folder)
    assert [window.epoch for window in recording.windows] == [3, 3, 3, 3, 7, 9]
    known = recording.placements()
    assert sorted(known) == [3, 9], "nobody has told the placement of a moment in between"
    np.testing.assert_array_equal(known[9].physical_to_logical_map, moved)


def test_what_is_only_recorded_is_checked_too(service: Service) -> None:
    say(service, A, hello(window={"sub_windows": 1, "replan_sub_windows": 1}))
    request, arrays = plan_request(1)
    loads = arrays["loads"].copy()
    loads[0, 0, 0] = np.nan
    reply = service.handle(A, encode(request, arrays | {"loads": loads}), now=0.0)
    assert reply is not None
    assert isinstance(decode(reply)[0], Refused)


@pytest.mark.parametrize("name", ["epochs", "steps"])
def test_epochs_or_steps_that_do_not_fit_the_loads_are_refused(service: Service, name: str) -> None:
    say(service, A, hello())
    request, arrays = plan_request(1)
    short = msgspec.structs.replace(request, **{f"window_{name}": [1]})
    reply = service.handle(A, encode(short, arrays), now=0.0)
    assert reply is not None
    answer, _ = decode(reply)
    assert isinstance(answer, Refused)
    assert f"1 {name} for 3 sub-windows" in answer.reason


def test_an_engine_elsewhere_cannot_choose_where_to_record(tmp_path: Path) -> None:
    service = Service(ServiceOptions(engines_may_record=False))
    say(service, A, hello(record={"directory": str(tmp_path / "there")}))
    ask(service, A, 1)
    service.settle(0.0)
    service.close()
    assert not (tmp_path / "there").exists()


def test_a_folder_that_cannot_be_written_costs_the_recording_and_no_plan(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    service = Service(ServiceOptions(record=tmp_path / "file"))
    say(service, A, hello())
    for number in (1, 2):
        assert isinstance(decode(ask(service, A, number))[0], PlanReply)
        service.settle(0.0)


def test_the_view_shows_what_engines_did(service: Service) -> None:
    say(service, A, hello("a", policy={"name": "random"}))
    ask(service, A, 1)
    service.settle(1.0)
    loads = np.array([[1.0, 3.0], [2.0, 2.0]], np.float32)
    status = Status("a", 96, 1, "moving", "on", 1.25, {"stalls": 1.0}, specs({"rank_loads": loads}))
    assert service.handle(A, encode(status, {"rank_loads": loads}), now=2.0) is None
    assert say(service, A, OUTCOME, now=3.0) is None
    view = service.view(4.0)
    assert view is not None
    (engine,) = view.engines
    assert (engine.phase, engine.imbalance, engine.metrics) == ("moving", 1.25, {"stalls": 1.0})
    assert engine.rank_share == pytest.approx([0.75, 1.25])
    assert [layer for layer, _ in engine.worst_layers] == [0, 1]
    assert engine.worst_layers[0][1] == pytest.approx(1.5)
    assert [plan.request for plan in engine.plans] == [1]
    assert (engine.promise.plans, engine.promise.moves) == (1, engine.plans[0].moves)
    assert engine.promise.moves > 0
    assert engine.outcomes[0].committed
    assert engine.outcomes[0].age_s == pytest.approx(1.0)
    assert service.view(4.5) is None, "at most one view a second"


def test_rank_loads_of_another_topology_are_not_shown(service: Service) -> None:
    say(service, A, hello())
    arrays = {"rank_loads": np.ones((2, 7), np.float32)}
    status = Status("engine", 1, 0, "idle", "on", 1.0, {}, specs(arrays))
    assert service.handle(A, encode(status, arrays), now=0.0) is None
    view = service.view(1.0)
    assert view is not None
    assert view.engines[0].rank_share == []


def test_an_engine_that_connects_anew_is_recorded_on_and_shown_once(tmp_path: Path) -> None:
    """After an answer that came too late; it does not take leave on the connection it gives up."""
    service = Service(ServiceOptions(record=tmp_path))
    for peer, step in ((A, 96), (B, 192)):
        say(service, peer, hello("engine/1"))
        ask(service, peer, 1, step=step)
        service.settle(0.0)
    assert [engine.hello.engine for engine in service.peers] == ["engine/1"]
    service.close()
    (folder,) = tmp_path.iterdir()
    assert [window.step for window in Recording(folder).windows] == [32, 64, 96, 128, 160, 192]
