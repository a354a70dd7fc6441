"""Expert weights that cannot be moved slot by slot are refused with what to change; no vLLM needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

pytest.importorskip("torch")

import torch

from swiftbalancer.config import Config
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer_adaptors.vllm import binding, hooks, lifecycle

SLOTS, RANKS = 4, 2
CPU = torch.device("cpu")


@dataclass
class Group:
    world_size: int = RANKS


@dataclass
class Model:
    """The part of vLLM's `MixtureOfExperts` that says how experts lie in memory."""

    expert_weights: list[list[torch.Tensor]]
    num_local_physical_experts: int = SLOTS
    num_physical_experts: int = SLOTS * RANKS
    moe_layers: Sequence[object] = (object(),)
    num_moe_layers: int = 1


@dataclass
class ModelState:
    model: Model
    model_name: str = "tiny"


@dataclass
class State:
    """vLLM's `EplbState` of an engine that adds one model."""

    model_states: dict[str, ModelState] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def add_model(self, model: Model, _config: object) -> None:
        assert all(weight.is_contiguous() for weights in model.expert_weights for weight in weights)
        self.model_states["tiny"] = ModelState(model)


class Worker:
    """vLLM's worker whose model cannot be loaded, for the given reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def load_model(self) -> None:
        raise NotImplementedError(self._reason)


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "ep_group", Group)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(8, SLOTS).T, torch.zeros(SLOTS, 8, 6).transpose(1, 2), torch.zeros(SLOTS // 2, 16)],
    ids=["slots not first", "rows not contiguous", "two slots packed in a row"],
)
def test_a_layout_without_a_row_per_slot_is_refused(weight: torch.Tensor) -> None:
    state = ModelState(Model([[torch.zeros(SLOTS, 8), weight]]))
    with pytest.raises(UnsupportedEngine, match=r"tiny: MoE layer 0, expert tensor 1 has shape .*--quantization"):
        binding.check_layout(state, CPU)


def test_scales_beside_weights_are_no_trouble() -> None:
    weights = [torch.zeros(SLOTS, 8, 6, dtype=torch.int8), torch.zeros(SLOTS, 8), torch.zeros(SLOTS)]
    binding.check_layout(ModelState(Model([weights])), CPU)


def test_slots_that_are_not_spread_evenly_are_refused() -> None:
    with pytest.raises(UnsupportedEngine, match="9 slots are not 4 on each of 2 ranks"):
        binding.check_layout(ModelState(Model([[torch.zeros(SLOTS, 8)]], num_physical_experts=9)), CPU)


def test_experts_in_other_memory_than_the_kernels_are_refused() -> None:
    weights = [torch.zeros(SLOTS, 8), torch.zeros(SLOTS, 8, device="meta")]
    with pytest.raises(
        UnsupportedEngine, match=r"layer 0, expert tensor 1 is in memory of meta, not of cpu.*offload"
    ):
        binding.check_layout(ModelState(Model([weights])), CPU)


def test_experts_of_which_vllm_names_nothing_are_refused() -> None:
    with pytest.raises(UnsupportedEngine, match=r"tiny: MoE layer 0: vLLM names no tensor .*--moe-backend"):
        binding.check_layout(ModelState(Model([[]])), CPU)


@pytest.mark.parametrize("engine", ["vllm_ascend.ops.fused_moe", "vllm.model_executor.layers.fused_moe"])
def test_what_only_vllm_ascend_does_not_name_goes_along(engine: str) -> None:
    layer = type("Experts", (torch.nn.Module,), {"__module__": engine})()
    layer.w13_weight = torch.nn.Parameter(torch.rand(SLOTS, 6, 4))
    layer.w2_weight = torch.nn.Parameter(torch.rand(SLOTS, 4, 3))
    state = ModelState(Model([[layer.w13_weight.data.view(SLOTS, -1)]], moe_layers=[layer]))
    if engine.startswith("vllm_ascend."):
        binding.check_layout(state, CPU)
        return
    with pytest.raises(UnsupportedEngine, match="layer 0: w2_weight is not among"):
        binding.check_layout(state, CPU)


def test_what_vllm_cannot_show_slot_by_slot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_config", Config)
    with pytest.raises(UnsupportedEngine, match=r"slot by slot .*--quantization"):
        hooks.add_model(State(), State.add_model, Model([[torch.zeros(8, SLOTS).T]]), object())


def test_vllms_refusal_to_balance_says_what_to_change() -> None:
    worker = Worker("EPLB is not supported OddMoEMethod.")
    with pytest.raises(UnsupportedEngine, match=r"OddMoEMethod\. Use another --quantization .* swiftbalancer flag"):
        lifecycle.load_model(worker, Worker.load_model)


def test_other_trouble_while_loading_is_vllms() -> None:
    with pytest.raises(NotImplementedError, match="no such kernel"):
        lifecycle.load_model(Worker("no such kernel"), Worker.load_model)
