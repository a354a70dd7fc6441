"""Bytes from outside: every decoder answers with a value or one of our errors, in bounded time and memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from swiftbalancer import config, plain_yaml, sealed, wire
from swiftbalancer.dispatch import uniform_table
from swiftbalancer.errors import ConfigError, InvalidPlan, WireError
from swiftbalancer.placement import Placement
from swiftbalancer.plan import Plan
from swiftbalancer.topology import Topology
from tests.core.strategies import plan_reply, plans

many = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
pytestmark = pytest.mark.timeout(120)

BASE = Placement.of(Topology(2, 3), 4, [[0, 1, 2, 3, 0, 1]] * 2)
ROW = np.asarray([[0, 1, 3, 2, 0, 1]], np.int32)
MOVING = Plan(
    kind="placement",
    base_epoch=3,
    base_digest=BASE.digest(),
    layers=np.asarray([1], np.int32),
    rows=ROW,
    moves=np.asarray([[1, 3, 3, 2], [1, 2, 2, 3]], np.int32),
    layer_batch=np.zeros(1, np.int32),
    move_batch=np.zeros(2, np.int32),
    table=uniform_table(BASE.with_layers([1], ROW), 4),
)


def plan_request() -> list[bytes]:
    arrays: wire.Arrays = {
        "placement": BASE.physical_to_logical_map,
        "loads": np.ones((2, 2, 4), np.float32),
        "table": uniform_table(BASE, 4),
    }
    request = wire.PlanRequest(
        request=7,
        kind="placement",
        epoch=3,
        step=100,
        dispatch_kind="table",
        dispatch_width=4,
        staging_experts=2,
        steps_per_sub_window=8,
        measured=wire.Measured(0.01, 1e9, 0.02),
        arrays=wire.specs(arrays),
    )
    return wire.encode(request, arrays)


def hello() -> list[bytes]:
    model = wire.ModelSpec(name="m", num_layers=2, num_experts=4, top_k=2, expert_bytes=100)
    settings = config.to_dict(config.Config())
    return wire.encode(wire.Hello(engine="e", model=model, topology=BASE.topology, config=settings))


def outcome() -> list[bytes]:
    return wire.encode(wire.Outcome(1, "placement", True, "", 4, 200, 2, 64, 1.1, {"total": 9}))


def status() -> list[bytes]:
    arrays: wire.Arrays = {"rank_loads": np.ones((2, 2), np.float32)}
    message = wire.Status("e", 1, 2, "IDLE", "on", 1.0, {"steps": 1.0}, wire.specs(arrays))
    return wire.encode(message, arrays)


MESSAGES: dict[str, Callable[[], list[bytes]]] = {
    "hello": hello,
    "welcome": lambda: wire.encode(wire.Welcome(pid=5, policy="swift")),
    "plan_request": plan_request,
    "plan_reply": lambda: plan_reply(MOVING),
    "nothing_to_do": lambda: wire.encode(wire.NothingToDo(1, "balanced", 1.0, 1.0, 0.1)),
    "refused": lambda: wire.encode(wire.Refused(1, "no")),
    "outcome": outcome,
    "status": status,
    "goodbye": lambda: wire.encode(wire.Goodbye("e")),
}


def test_every_message_type_has_a_sample() -> None:
    types = {type(wire.decode(make())[0]) for make in MESSAGES.values()}
    assert types == set(get_args(wire.Message))


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_survives_the_wire(name: str) -> None:
    message, arrays = wire.decode(MESSAGES[name]())
    again, arrays_again = wire.decode(wire.encode(message, arrays))
    assert again == message
    assert {n: a.tolist() for n, a in arrays.items()} == {n: a.tolist() for n, a in arrays_again.items()}


@many
@given(st.lists(st.binary(max_size=200), max_size=20))
def test_random_frames_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        wire.decode(frames)


leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9)
header_values: st.SearchStrategy[Any] = st.recursive(
    leaves | st.binary(max_size=9) | st.sampled_from(sorted(MESSAGES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
header_keys = st.sampled_from(["type", "request", "engine", "arrays", "config", "topology"])


@many
@given(st.dictionaries(header_keys, header_values))
def test_a_well_formed_header_of_the_wrong_kind_is_refused_or_typed(header: dict[str, Any]) -> None:
    _decoded([msgspec.msgpack.encode(header)])


@many
@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_a_damaged_message_is_refused_or_still_typed(name: str, data: st.DataObject) -> None:
    frames = MESSAGES[name]()
    for _ in range(data.draw(st.integers(1, 4))):
        frames = _damaged(frames, data)
    _decoded(frames)


@many
@given(st.data())
def test_a_damaged_plan_never_passes_as_another_plan_that_is_wrong(data: st.DataObject) -> None:
    frames = _damaged(plan_reply(MOVING), data)
    try:
        message, arrays = wire.decode(frames)
        assume(isinstance(message, wire.PlanReply))
        assert isinstance(message, wire.PlanReply)
        plan = wire.plan_of(message, arrays)
        plan.validate(BASE, staging_experts=4)
    except (WireError, InvalidPlan):
        return
    plan.target(BASE).validate()


@given(plans())
def test_a_plan_survives_the_wire_and_the_broadcast(case: tuple[Placement, Plan]) -> None:
    base, plan = case
    message, arrays = wire.decode(sealed.unpack(sealed.pack(plan_reply(plan))))
    assert isinstance(message, wire.PlanReply)
    received = wire.plan_of(message, arrays)
    received.validate(base)
    for name, array in wire.plan_arrays(plan).items():
        assert np.array_equal(getattr(received, name), array)


@many
@given(st.data())
def test_a_broadcast_block_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    block = sealed.pack(plan_reply(MOVING)).tobytes()
    changed = _damaged([block], data)[0]
    assume(changed != block)
    with pytest.raises(WireError):
        sealed.unpack(changed)


@many
@given(st.binary(max_size=300))
def test_a_block_with_a_true_digest_and_any_content_is_refused_or_frames(content: bytes) -> None:
    block = content + sealed.digest(content).to_bytes(8, "little")
    try:
        frames = sealed.unpack(block)
    except WireError:
        return
    assert sum(len(f) for f in frames) <= len(content)


@pytest.mark.parametrize(
    "header",
    [
        {"type": "hello", "config": {"a": [0]}},
        {"type": "plan_request", "arrays": [0]},
        {"type": "plan_request", "arrays": [{"name": "x", "shape": [0]}]},
        {"type": "hello", "topology": {"rank_speed": [0]}},
        {"type": "status", "metrics": [0]},
    ],
)
@pytest.mark.parametrize("claim", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
def test_a_header_that_claims_four_billion_items_costs_no_memory(header: dict[str, Any], claim: bytes) -> None:
    bomb = msgspec.msgpack.encode(header)[:-2] + claim
    assert _peak_of(lambda: _refused([bomb])) < 1 << 20


def test_a_deeply_nested_header_is_refused() -> None:
    start = msgspec.msgpack.encode({"type": "hello", "config": {"a": 0}})[:-1]
    assert _peak_of(lambda: _refused([start + b"\x91" * (wire.MAX_HEADER_BYTES - 100)])) < 8 << 20


def test_an_array_that_claims_more_than_its_frame_is_refused_without_allocating() -> None:
    spec = wire.ArraySpec("rank_loads", "<f8", [2**24, 2**24, 2**24, 2**24])
    header = wire.Status("e", 1, 2, "IDLE", "on", 1.0, {}, [spec])
    assert _peak_of(lambda: _refused([*wire.encode(header), b"12345678"])) < 1 << 20


def test_a_huge_topology_in_a_hello_is_refused_without_allocating() -> None:
    frame = hello()[0]
    values = msgspec.msgpack.decode(frame)
    values["topology"].update(num_ranks=2**40, num_nodes=1)
    assert _peak_of(lambda: _refused([msgspec.msgpack.encode(values)])) < 1 << 20


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"x"] * (wire.MAX_FRAMES + 2),
        [b"\x80" * (wire.MAX_HEADER_BYTES + 1)],
    ],
    ids=["none", "many", "large header"],
)
def test_limits_on_frames_are_checked_before_anything_is_read(frames: list[bytes]) -> None:
    _refused(frames)


def test_a_message_beyond_the_size_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = plan_request()
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", sum(map(len, frames)) - 1)
    with pytest.raises(WireError, match="more than"):
        wire.decode(frames)


def test_an_object_that_needs_pickle_is_refused() -> None:
    with pytest.raises(WireError, match="object"):
        wire.specs({"x": np.asarray([object()])})
    spec = wire.ArraySpec("x", "|O", [1])
    _refused([*wire.encode(wire.Status("e", 1, 2, "IDLE", "on", 1.0, {}, [spec])), b"12345678"])


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
known_keys = st.sampled_from([key for key, _, _ in config.describe()])


@many
@given(known_keys, json_values)
def test_any_value_for_any_option_is_taken_or_refused_by_name(key: str, value: Any) -> None:
    values: Any = value
    for part in reversed(key.split(".")):
        values = {part: values}
    try:
        taken = config.from_dict(values)
    except ConfigError as error:
        message = str(error)
    else:
        assert config.from_dict(config.to_dict(taken)) == taken
        return
    assert key in message


@many
@given(st.sampled_from([".json", ".yaml", ".toml"]), st.binary(max_size=120))
def test_any_bytes_as_a_config_file_are_values_or_refused(tmp_path_factory: Any, ending: str, content: bytes) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / f"config{ending}"
    path.write_bytes(content)
    try:
        config.from_file(path)
    except ConfigError:
        return


@many
@given(
    st.dictionaries(known_keys.map(lambda k: "SWIFTBALANCER_" + k.upper().replace(".", "__")), st.text(max_size=9))
)
def test_any_environment_is_values_or_refused(environ: dict[str, str]) -> None:
    try:
        config.load(environ=environ)
    except ConfigError:
        return


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b"{a: " * 10_000,
        b"- " * 10_000,
        b"policy: {options: &a {again: *a}}",
        b"policy: {options: {a: &a [1], b: *a}}",
        b"a" * (plain_yaml.MAX_BYTES + 1),
    ],
    ids=["lists", "maps", "sequences", "recursion", "alias", "size"],
)
def test_yaml_that_unfolds_or_nests_without_bound_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "deep.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"nested deeper|maximum nesting depth|aliases|bytes of YAML"):
        config.from_file(path)


@pytest.mark.parametrize("value", ["[" * 100_000, "\udcff"], ids=["nested", "no UTF-8"])
def test_an_environment_variable_that_cannot_be_read_is_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigError, match="SWIFTBALANCER_POLICY__OPTIONS: cannot be read"):
        config.load(environ={"SWIFTBALANCER_POLICY__OPTIONS": value})


def test_an_environment_variable_whose_name_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="plain ASCII"):
        config.load(environ={"SWIFTBALANCER_WORKER\udcd2__CPUS": "[1]"})


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"policy": {"options": {"a": [1 << 64]}}}, "policy.options"),
        ({"policy": {"options": {"a": "\ud800"}}}, "policy.options"),
        ({"policy": {"options": {"a": object()}}}, "policy.options"),
    ],
)
def test_what_no_message_can_carry_is_refused_by_name(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: cannot be sent"):
        config.from_dict(values)


def test_a_yaml_config_runs_no_code(tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    path = tmp_path / "evil.yaml"
    path.write_text(
        f"mode: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{fired}']]\n"
    )
    with pytest.raises(ConfigError):
        config.from_file(path)
    assert not fired.exists()


def _refused(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        wire.decode(frames)


def _decoded(frames: list[bytes]) -> None:
    """Decodes, or sees `WireError`; what is decoded is what its types say."""
    try:
        message, arrays = wire.decode(frames)
    except WireError:
        return
    assert isinstance(message, get_args(wire.Message))
    assert all(not array.flags.writeable for array in arrays.values())
    assert sum(a.nbytes for a in arrays.values()) <= sum(len(f) for f in frames)


def _damaged(frames: list[bytes], data: st.DataObject) -> list[bytes]:
    """One of the frames changed, cut, lengthened, dropped or doubled."""
    if not frames:
        return [b""]
    which = data.draw(st.integers(0, len(frames) - 1))
    frame = bytearray(frames[which])
    at = data.draw(st.integers(0, len(frame)))
    kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "drop", "double"]))
    if kind == "drop" and len(frames) > 1:
        return frames[:which] + frames[which + 1 :]
    if kind == "double":
        return [*frames[:which], frames[which], *frames[which:]]
    if kind == "flip" and at < len(frame):
        frame[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "set":
        frame[at : at + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80"]))
    elif kind == "insert":
        frame[at:at] = data.draw(st.binary(min_size=1, max_size=6))
    else:
        del frame[at:]
    return [*frames[:which], bytes(frame), *frames[which + 1 :]]


def _peak_of(run: Callable[[], None]) -> int:
    """Bytes Python allocated at most while `run` ran."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
