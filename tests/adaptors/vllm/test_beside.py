"""What kernels read by slot beside an expert's own tensors must be the same for all experts; no vLLM needed."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer_adaptors.vllm.beside import check_products, check_staying, staying

SLOTS = 4
NAN = float("nan")


class Experts(torch.nn.Module):
    """vLLM's `RoutedExperts`, with what its quantisation and its kernel hold."""

    def __init__(
        self, scales: dict[str, torch.Tensor] | None = None, *, kernel: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.w13_weight = torch.nn.Parameter(torch.rand(SLOTS, 6, 4))
        self.w2_weight = torch.nn.Parameter(torch.rand(SLOTS, 4, 3))
        self.w13_weight_scale = torch.nn.Parameter(torch.rand(SLOTS))
        halves: dict[str, SimpleNamespace] = {half: SimpleNamespace() for half in ("_a1", "_a2", "_w1", "_w2")}
        for name, value in (scales or {}).items():
            half, _, scale = name.partition("_")
            setattr(halves[f"_{half}"], scale, value)
        halves["_w1"].scale = self.w13_weight_scale.data.view(SLOTS, 1)
        self.quant_method = SimpleNamespace(
            moe_quant_config=SimpleNamespace(**halves),
            moe_kernel=SimpleNamespace(fused_experts=SimpleNamespace(**(kernel or {}))),
        )

    def kinds(self) -> list[torch.Tensor]:
        """What vLLM's `get_expert_weights` gives."""
        return [weight.data.view(SLOTS, -1) for weight in self.parameters()]


class Runner(torch.nn.Module):
    """vLLM's MoE layer, which holds the experts."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.routed_experts = experts


def check(*ranks: Experts) -> None:
    """As every rank's first pass does."""
    check_staying([[staying(Runner(experts), experts.kinds())] for experts in ranks], model="tiny")


def per_slot(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor(list(values))


def test_scales_that_move_with_their_expert_are_no_trouble() -> None:
    check(Experts(), Experts())


@pytest.mark.parametrize(
    "scale", ["w1_alpha_or_gscale", "w2_scale", "w2_zp", "w1_bias", "a1_scale", "a2_alpha_or_gscale"]
)
def test_a_scale_that_stays_behind_is_refused(scale: str) -> None:
    half, _, name = scale.partition("_")
    with pytest.raises(UnsupportedEngine, match=rf"tiny: MoE layer 0: {half} {name} is not the same.*--moe-backend"):
        check(Experts({scale: per_slot([1, 1, 1, 2])}), Experts({scale: per_slot([1, 1, 1, 1])}))


def test_scales_that_differ_only_between_ranks_are_refused() -> None:
    with pytest.raises(UnsupportedEngine, match="w1 alpha_or_gscale"):
        check(*(Experts({"w1_alpha_or_gscale": per_slot([value] * SLOTS)}) for value in (1, 2)))


def test_a_scale_one_rank_alone_has_is_refused() -> None:
    with pytest.raises(UnsupportedEngine, match="w2 scale"):
        check(Experts({"w2_scale": per_slot([1] * SLOTS)}), Experts())


def test_scales_that_are_the_same_everywhere_may_stay() -> None:
    alike = {"w1_alpha_or_gscale": per_slot([NAN] * SLOTS), "a1_alpha_or_gscale": torch.tensor(0.5)}
    check(*(Experts(alike, kernel={"ones": torch.ones(SLOTS, 2)}) for _ in range(2)))


def test_what_activations_are_quantised_by_must_fit_what_is_folded_into_experts_elsewhere() -> None:
    with pytest.raises(UnsupportedEngine, match="a1 alpha_or_gscale"):
        check(*(Experts({"a1_alpha_or_gscale": torch.tensor(value)}) for value in (0.5, 0.25)))


def test_a_scale_of_a_rank_that_is_folded_into_nothing_may_differ() -> None:
    check(*(Experts({"a1_scale": torch.tensor(value)}) for value in (0.5, 0.25)))


def test_what_a_kernel_keeps_for_itself_counts() -> None:
    with pytest.raises(UnsupportedEngine, match=r"SimpleNamespace\._g1_alphas"):
        check(Experts(kernel={"_g1_alphas": torch.rand(SLOTS)}))


def test_sizes_a_kernel_keeps_do_not_count() -> None:
    check(Experts(kernel={"strides": torch.arange(SLOTS), "workspace": torch.rand(SLOTS + 1), "name": "cutlass"}))


def test_weights_that_vllm_does_not_name_are_refused() -> None:
    experts = Experts()
    check_products(Runner(experts), experts.kinds(), where="layer 1")
    with pytest.raises(UnsupportedEngine, match=r"layer 1: w2_weight is not among .*--moe-backend"):
        check_products(Runner(experts), [experts.kinds()[0]], where="layer 1")


def test_weights_in_a_wrapper_of_the_kernel_are_refused() -> None:
    experts = Experts()
    del experts.w13_weight
    vars(experts)["w13_weight"] = SimpleNamespace(storage=torch.zeros(SLOTS, 24))
    with pytest.raises(UnsupportedEngine, match="w13_weight is not among"):
        check_products(Runner(experts), experts.kinds(), where="layer 0")


def test_an_empty_placeholder_is_no_weight() -> None:
    experts = Experts()
    experts.w2_weight.data = torch.empty(0)
    check_products(Runner(experts), [experts.w13_weight.data], where="layer 0")
