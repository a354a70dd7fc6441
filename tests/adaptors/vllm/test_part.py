"""Pipeline stages and draft models: what each has to itself; no vLLM needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from swiftbalancer.config import Config, from_dict
from swiftbalancer.errors import ConfigError, UnsupportedEngine
from swiftbalancer_adaptors.vllm import hooks
from swiftbalancer_adaptors.vllm.attachment import SLOT
from swiftbalancer_adaptors.vllm.flag import check_parts
from swiftbalancer_adaptors.vllm.part import Part, draft_of

STAGES = [Part(stage, 3) for stage in range(3)]
DRAFT = Part(2, 3, draft=True)


@dataclass
class ModelSpec:
    experts: int

    def get_num_experts(self) -> int:
        return self.experts


@dataclass
class Speculative:
    draft_model_config: ModelSpec | None


@dataclass
class Parallel:
    pipeline_parallel_size: int = 1


@dataclass
class EngineSpec:
    """What `check_parts` reads of vLLM's configuration."""

    model_config: ModelSpec = field(default_factory=lambda: ModelSpec(16))
    speculative_config: Speculative | None = None
    parallel_config: Parallel = field(default_factory=Parallel)


@dataclass
class State:
    model_states: dict[str, object]


@dataclass
class Runner:
    eplb_state: State | None
    steps: int = 0

    def eplb_step(self) -> None:
        self.steps += 1

    def _pool(self, output: str) -> str:
        assert not self.steps
        return output


def config(**sections: Any) -> Config:
    return from_dict(sections)


def test_a_model_alone_keeps_its_name_and_options() -> None:
    options = config(metrics={"port": 9000, "event_log": "/var/log/cycles.jsonl"})
    assert Part().named("m") == "m"
    assert Part().own(options) is options


def test_no_two_parts_share_a_name_a_port_or_an_event_log() -> None:
    options = config(metrics={"port": 9000, "event_log": "/var/log/cycles.jsonl"})
    owned = [part.own(options).metrics for part in [*STAGES, DRAFT]]
    assert [metrics.port for metrics in owned] == [9000, 9001, 9002, 9003]
    assert [metrics.event_log for metrics in owned] == [
        "/var/log/cycles.jsonl",
        "/var/log/cycles.stage1.jsonl",
        "/var/log/cycles.stage2.jsonl",
        "/var/log/cycles.draft.jsonl",
    ]
    assert [part.named("m") for part in [*STAGES, DRAFT]] == ["m", "m (stage1)", "m (stage2)", "m (draft)"]


def test_vllms_own_name_of_a_draft_is_kept() -> None:
    assert DRAFT.named("m (draft)") == "m (draft)"


def test_what_is_off_stays_off() -> None:
    assert DRAFT.own(config()).metrics == config().metrics


@pytest.mark.parametrize(
    "engine",
    [EngineSpec(parallel_config=Parallel(2)), EngineSpec(speculative_config=Speculative(ModelSpec(16)))],
)
def test_parts_that_start_workers_may_not_share_an_endpoint(engine: EngineSpec) -> None:
    endpoint = {"endpoint": "ipc:///run/sb.sock"}
    with pytest.raises(ConfigError, match=r"worker\.endpoint: 2 parts .* leave it empty"):
        check_parts(engine, config(worker=endpoint))
    check_parts(engine, config(worker=endpoint | {"spawn": False}))
    check_parts(EngineSpec(), config(worker=endpoint))


def test_a_draft_with_other_experts_is_refused() -> None:
    with pytest.raises(UnsupportedEngine, match="draft model has 8 experts, the served one 16"):
        check_parts(EngineSpec(speculative_config=Speculative(ModelSpec(8))), config())


@pytest.mark.parametrize("draft", [None, ModelSpec(0)])
def test_a_draft_without_experts_is_none_of_ours(draft: ModelSpec | None) -> None:
    check_parts(EngineSpec(speculative_config=Speculative(draft)), config(worker={"endpoint": "ipc:///run/sb.sock"}))


def test_a_draft_made_without_a_model_is_no_part() -> None:
    """To ngram's, vLLM gives the served model's own configuration."""
    served = ModelSpec(16)
    engine = EngineSpec(served, Speculative(served))
    assert draft_of(engine) is None
    check_parts(engine, config(worker={"endpoint": "ipc:///run/sb.sock"}))
    assert draft_of(EngineSpec(served, Speculative(draft := ModelSpec(16)))) is draft
    assert draft_of(EngineSpec(served)) is None


def test_ports_beyond_the_last_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.port: 4 parts use the ports up to 65536"):
        check_parts(EngineSpec(parallel_config=Parallel(4)), config(metrics={"port": 65533}))


@pytest.mark.parametrize(
    ("state", "steps"), [(State({}), 0), (State({"model": object()}), 1), (None, 1)], ids=["empty", "one", "none"]
)
def test_a_stage_without_moe_layers_is_not_stepped(state: State | None, steps: int) -> None:
    runner = Runner(state)
    hooks.eplb_step(runner, Runner.eplb_step)
    assert runner.steps == steps


@pytest.mark.parametrize("balanced", [True, False])
def test_a_pooling_model_steps_after_every_pass(balanced: bool) -> None:
    state = State({"model": object()})
    if balanced:
        setattr(state, SLOT, object())
    runner = Runner(state)
    assert hooks.RUNNER_HOOKS["_pool"](runner, Runner._pool, "pooled") == "pooled"
    assert runner.steps == balanced
