"""Sleep, discarded memory, weight updates and checkpoints, by the order of what happens; no vLLM needed."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from swiftbalancer.config import Config
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer_adaptors.vllm import attachment, lifecycle
from swiftbalancer_adaptors.vllm.attachment import SLOT, Attachment, Hold
from swiftbalancer_adaptors.vllm.part import Part


class RecordedModel:
    """A balanced model, and its balancer, that write down what is asked of them."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.balancer: RecordedModel | None = self

    def drain(self) -> None:
        self._log.append("drain")

    def resume(self) -> None:
        self._log.append("resume")

    def after_forward(self) -> None:
        self._log.append("pass")

    def start(self) -> None:
        self._log.append("start")
        self.balancer = self

    def restore(self) -> None:
        self._log.append("restore")
        self.balancer = None

    def forget(self) -> None:
        self._log.append("forget")
        self.balancer = None

    def close(self) -> None:
        self._log.append("close")


class Worker:
    """vLLM's worker: its own methods only write down that they ran."""

    def __init__(self, *, balanced: bool = True, preserved: Iterable[str] = ()) -> None:
        self.log: list[str] = []
        self.state = SimpleNamespace(device=torch.device("cpu"), should_record_tensor=torch.tensor(False))
        self.model_runner = SimpleNamespace(eplb_state=self.state)
        self.model_config = SimpleNamespace(sleep_preserve_parameter_names=list(preserved))
        self._weight_update_active = False
        if balanced:
            self.attachment = Attachment(self.state, Config())
            self.attachment.models["tiny"] = RecordedModel(self.log)  # type: ignore[assignment]
            setattr(self.state, SLOT, self.attachment)

    def sleep(self, level: int) -> None:
        self.log.append(f"sleep {level}")

    def discard(self, tags: tuple[str, ...]) -> None:
        self.log.append(f"discard {','.join(tags)}")

    def wake_up(self, _tags: list[str] | None) -> None:
        self.log.append("wake up")

    def start_weight_update(self) -> None:
        self.log.append("begin")
        self._weight_update_active = True

    def update_weights(self, _info: dict[str, Any]) -> None:
        self.log.append("piece")

    def finish_weight_update(self) -> None:
        self.log.append("finish")
        self._weight_update_active = False

    def checkpoint_prepare(self) -> None:
        self.log.append("checkpoint")


class Loadable(torch.nn.Module):
    """A model of vLLM's, as far as weights are loaded into it."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def load_weights(self, names: Iterable[str]) -> set[str]:
        self._log.append("load")
        return set(names)


def call(worker: Worker, name: str, *args: Any) -> None:
    lifecycle.WORKER_HOOKS[name](worker, getattr(Worker, name), *args)


def a_pass(worker: Worker) -> None:
    worker.attachment.after_forward()


def test_level_1_drains_first_and_goes_on_when_the_weights_are_back() -> None:
    worker = Worker()
    call(worker, "sleep", 1)
    a_pass(worker)
    call(worker, "wake_up", ["kv_cache"])
    a_pass(worker)
    call(worker, "wake_up", ["weights"])
    a_pass(worker)
    assert worker.log == ["drain", "sleep 1", "wake up", "wake up", "resume", "pass"]


@pytest.mark.parametrize(("name", "argument"), [("sleep", 2), ("discard", ("weights", "kv_cache"))])
def test_lost_weights_start_balancing_anew(name: str, argument: Any) -> None:
    worker = Worker()
    call(worker, name, argument)
    call(worker, "wake_up", None)
    a_pass(worker)
    assert [what for what in worker.log if what in ("drain", "forget", "start", "pass")] == [
        "drain",
        "forget",
        "start",
    ]


def test_weights_preserved_through_level_2_go_home_first() -> None:
    worker = Worker(preserved=["*experts*"])
    call(worker, "sleep", 2)
    assert worker.log == ["restore", "sleep 2"]


def test_discarding_other_memory_is_none_of_ours() -> None:
    worker = Worker()
    call(worker, "discard", ("kv_cache",))
    a_pass(worker)
    assert worker.log == ["discard kv_cache", "pass"]


def test_weights_that_arrive_in_pieces_find_nobody_moving() -> None:
    worker = Worker()
    call(worker, "start_weight_update")
    for _ in range(2):
        a_pass(worker)
        call(worker, "update_weights", {})
    call(worker, "finish_weight_update")
    a_pass(worker)
    assert worker.log == ["restore", "begin", "piece", "piece", "finish", "start"]


def test_balancing_waits_until_every_reason_to_pause_is_gone() -> None:
    worker = Worker()
    call(worker, "sleep", 1)
    worker.attachment.pause(Hold.WEIGHT_UPDATE)
    call(worker, "wake_up", None)
    assert "resume" not in worker.log
    worker.attachment.resume(Hold.WEIGHT_UPDATE)
    assert worker.log[-1] == "resume"


def test_a_trainer_that_loads_into_the_model_itself_finds_experts_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    balanced = worker.attachment.models.pop("tiny")
    monkeypatch.setattr(attachment, "BalancedModel", lambda *_, **__: balanced)
    model = Loadable(worker.log)
    worker.state.model_states = {"tiny": SimpleNamespace(model=model)}
    worker.attachment.add("tiny", Part())
    a_pass(worker)
    assert model.load_weights(["w13"]) == {"w13"}
    a_pass(worker)
    assert worker.log == ["pass", "restore", "load", "start"]


def test_a_checkpoint_of_the_process_is_refused_before_anything_is_done() -> None:
    worker = Worker()
    with pytest.raises(UnsupportedEngine, match="without the swiftbalancer flag to checkpoint it"):
        call(worker, "checkpoint_prepare")
    assert worker.log == []


@pytest.mark.parametrize(
    ("name", "args"), [("sleep", (1,)), ("discard", (("weights",),)), ("checkpoint_prepare", ())]
)
def test_without_a_balancer_every_method_is_vllms(name: str, args: tuple[Any, ...]) -> None:
    worker = Worker(balanced=False)
    call(worker, name, *args)
    assert len(worker.log) == 1
