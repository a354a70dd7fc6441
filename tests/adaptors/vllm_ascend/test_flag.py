"""The flag on Ascend: what is set for the user, what is refused, and what a worker process replaces."""

from __future__ import annotations

import enum
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from swiftbalancer import config as options
from swiftbalancer.errors import ConfigError, TopologyError, UnsupportedEngine
from swiftbalancer_adaptors.vllm import flag as vllm_flag
from swiftbalancer_adaptors.vllm_ascend import flag, hooks
from swiftbalancer_adaptors.vllm_ascend.updator import SwiftUpdator

FLAG = {"swiftbalancer": {"enable": True}}


def args(**additional: Any) -> SimpleNamespace:
    return SimpleNamespace(additional_config={**FLAG, **additional}, enable_eplb=False, enable_expert_parallel=True)


def config(**values: Any) -> options.Config:
    return options.from_dict(values)


def test_their_settings_are_set_and_the_users_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(flag.SWITCH, raising=False)
    given = args(eplb_config={"expert_map_path": "/maps.json"}, refresh=True)
    before = given.additional_config["eplb_config"]
    flag.apply(given, config())
    flag.apply(given, config())
    assert given.additional_config["refresh"] is True
    assert given.additional_config["eplb_config"] == {
        "expert_map_path": "/maps.json",
        "dynamic_eplb": True,
        "num_redundant_experts": 0,
    }
    assert before == {"expert_map_path": "/maps.json"}
    assert os.environ[flag.SWITCH] == "true"


def test_redundant_experts_may_be_given_in_either_place() -> None:
    assert flag.eplb_config({"num_redundant_experts": 16}, None)["num_redundant_experts"] == 16
    assert flag.eplb_config({}, 16)["num_redundant_experts"] == 16
    assert flag.eplb_config({"num_redundant_experts": 16}, 16)["num_redundant_experts"] == 16


@pytest.mark.parametrize(
    ("given", "num_redundant", "words"),
    [
        ({"num_redundant_experts": 16}, 32, "differ; give one"),
        ({"expert_map_record_path": "/out.json"}, None, "expert_map_record_path"),
        ({"expert_map_path": "/in.json"}, 16, "drop one of them"),
    ],
)
def test_contradictions_are_refused_with_what_to_change(
    given: dict[str, Any], num_redundant: int | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        flag.eplb_config(given, num_redundant)


def test_settings_that_cannot_run_beside_us_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flag.SWITCH, "false")
    with pytest.raises(ConfigError, match="--enable-eplb"):
        flag.apply(SimpleNamespace(additional_config=FLAG, enable_eplb=True), config())
    alone = args()
    alone.enable_expert_parallel = False
    with pytest.raises(UnsupportedEngine, match="--enable-expert-parallel"):
        flag.apply(alone, config())
    with pytest.raises(ConfigError, match="mix_placement"):
        flag.apply(args(mix_placement=True), config())
    with pytest.raises(ConfigError, match=r"eplb_config: must be a mapping"):
        flag.apply(args(eplb_config=3), config())


@pytest.mark.parametrize(("version", "known"), [("0.23.0", True), ("0.13.0rc1", True), ("0.11.0", False)])
def test_an_unknown_release_is_left_alone(version: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _name: version)
    assert (flag.unknown_release() == "") is known


def test_without_vllm_ascend_nothing_is_ascend() -> None:
    assert not flag.on_ascend()
    assert not flag.on_v1_runner()
    assert not flag.knows_v2("0.27.1")


def test_slots_that_do_not_divide_are_refused_with_a_number_that_would() -> None:
    engine = SimpleNamespace(
        additional_config={"eplb_config": {"num_redundant_experts": 3}},
        parallel_config=SimpleNamespace(tensor_parallel_size=2, data_parallel_size=4),
        model_config=SimpleNamespace(get_num_experts=lambda: 128),
    )
    with pytest.raises(TopologyError, match="8 redundant experts would"):
        flag.check(engine)
    engine.additional_config["eplb_config"]["expert_map_path"] = "/maps.json"
    flag.check(engine)


class Args(SimpleNamespace):
    """As much of vLLM's `EngineArgs` as the flag uses."""

    def create(self) -> SimpleNamespace:
        return SimpleNamespace(
            additional_config=self.additional_config,
            parallel_config=SimpleNamespace(tensor_parallel_size=2, data_parallel_size=1),
            model_config=SimpleNamespace(get_num_experts=lambda: 8),
        )


@pytest.mark.usefixtures("engine")
def test_the_one_flag_is_enough_on_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (flag.SWITCH, vllm_flag.ACTIVE, vllm_flag.RAY_COPIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(flag, "on_ascend", lambda: True)
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "0.23.0")
    given = Args(additional_config=FLAG, enable_eplb=False, enable_expert_parallel=True)
    made = vllm_flag.create_engine_config(given, Args.create)
    assert made.additional_config["eplb_config"]["dynamic_eplb"] is True
    assert os.environ[vllm_flag.ACTIVE] == flag.HOOKS
    assert os.environ[vllm_flag.RAY_COPIES].split(",") == [vllm_flag.ACTIVE, flag.SWITCH]


class CommType(enum.Enum):
    """Of vllm-ascend's `MoECommType`."""

    ALLGATHER = 0
    MC2 = 1


@pytest.mark.parametrize(("capacity", "gathers"), [(16, True), (8192, False)])
def test_batches_too_large_for_mc2_are_asked_for(
    capacity: int, gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an A2 chooses: small batches by MC2, larger ones gathered."""
    context: Any = ModuleType("vllm_ascend.ascend_forward_context")
    context.MoECommType = CommType
    context.select_moe_comm_method = lambda tokens, _config: (
        context.MoECommType.MC2 if tokens <= capacity else context.MoECommType.ALLGATHER
    )
    monkeypatch.setitem(sys.modules, "vllm_ascend", ModuleType("vllm_ascend"))
    monkeypatch.setitem(sys.modules, context.__name__, context)
    engine = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=4096))
    assert hooks.gathers_tokens(engine) is gathers


class Adaptor:
    """In the place of `VllmEplbAdaptor`: takes one model, and of others says what some release says."""

    def __init__(self, model: Any) -> None:
        if model != "known":
            raise AttributeError(f"'{model}' object has no attribute 'w13_weight_list'")


class Worker:
    """As much of `NPUWorker` as the hooks wrap."""

    def __init__(self) -> None:
        self.model_runner: Any = None
        self.calls: list[str] = []

    def compile_or_warm_up_model(self) -> float:
        self.calls.append("warm up")
        return 1.5

    def sleep(self, level: int = 1) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake {tags}")


class Wrapper:
    """As much of vLLM's `WorkerWrapperBase` as is wrapped."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.worker: Any = None

    def init_device(self) -> None:
        module: Any = sys.modules[hooks.RUNNER]
        self.worker = sys.modules[hooks.WORKER].NPUWorker()
        process = module.EplbProcess(shared_dict=module.Manager().dict({"moe_load": None}), policy_type=1)
        updator = module.EplbUpdator(object(), None, process, process._launch_process())
        self.worker.model_runner = SimpleNamespace(eplb_updator=updator)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process with vllm-ascend's modules and vLLM's worker wrapper in it."""
    runner, worker, base = (ModuleType(name) for name in (hooks.RUNNER, hooks.WORKER, "vllm.v1.worker.worker_base"))
    worker.NPUWorker = type("NPUWorker", (Worker,), {})  # type: ignore[attr-defined]
    runner.VllmEplbAdaptor = Adaptor  # type: ignore[attr-defined]
    base.WorkerWrapperBase = type("WorkerWrapperBase", (Wrapper,), {})  # type: ignore[attr-defined]
    for module in (runner, worker, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    hooks.install()
    return base.WorkerWrapperBase


def vllm_config(additional: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(
        additional_config=additional,
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        model_config=SimpleNamespace(model="m"),
    )


def test_a_worker_with_the_flag_builds_our_updator_and_starts_nothing_of_theirs(engine: Any) -> None:
    wrapper = engine(vllm_config(FLAG))
    wrapper.init_device()
    updator = wrapper.worker.model_runner.eplb_updator
    assert isinstance(updator, SwiftUpdator)
    updator.forward_before()
    updator.forward_end(True)
    assert not hooks.IdleProcess().is_alive()
    updator.shutdown()


def test_a_model_their_adaptor_does_not_know_is_refused_in_one_line(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "version", lambda _name: "0.15.0rc1")
    for _ in range(2):  # a second worker in the same process
        engine(vllm_config(FLAG)).init_device()
        runner: Any = sys.modules[hooks.RUNNER]
        assert isinstance(runner.VllmEplbAdaptor(model="known"), Adaptor)
        with pytest.raises(UnsupportedEngine, match=r"0\.15\.0rc1 cannot .* 'w13_weight_list'") as caught:
            runner.VllmEplbAdaptor(model="Experts")
        assert "\n" not in str(caught.value)
        assert str(caught.value).count("cannot balance") == 1


def test_worker_calls_reach_the_updator_around_the_engines_own(engine: Any) -> None:
    wrapper = engine(vllm_config(FLAG))
    wrapper.init_device()
    worker, seen = wrapper.worker, []
    updator = worker.model_runner.eplb_updator
    for name in ("begin_serving", "pause", "resume", "weights_reloaded"):
        setattr(updator, name, lambda name=name: seen.append((name, len(worker.calls))))
    assert worker.compile_or_warm_up_model() == 1.5
    worker.sleep(1)
    worker.wake_up()
    worker.sleep(level=2)
    worker.wake_up(["kv_cache"])
    worker.wake_up(["weights"])
    assert seen == [("begin_serving", 1), ("pause", 1), ("resume", 3), ("pause", 3), ("weights_reloaded", 6)]


def test_a_worker_without_the_flag_is_left_alone(engine: Any) -> None:
    wrapper = engine(vllm_config({}))
    with pytest.raises(AttributeError, match=r"Manager|EplbProcess"):
        wrapper.init_device()
