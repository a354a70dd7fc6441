"""Every tensor that a quantisation's kernels read moves with its expert, in every release; what cannot is refused.

The releases' own methods prepare a layer's weights and their own adaptor names them, on a CPU; a tensor that a pass
reads and that is left behind fails here, and so does a quantisation that a release adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from swiftbalancer.device import DeviceLayer
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer_adaptors.vllm_ascend import hooks, layers
from swiftbalancer_adaptors.vllm_ascend.formats import EngineFormats
from tests.adaptors.vllm_ascend.quantisations import SLOTS, Anything, Method, Release, adaptor_of
from tests.adaptors.vllm_ascend.sources import Source, each_source

PLAIN = EngineFormats(DeviceLayer.for_device("cpu"))
KNOWN = {
    "AscendUnquantizedFusedMoEMethod",
    "AscendW8A8DynamicFusedMoEMethod",
    "AscendW8A8PDMixFusedMoeMethod",
    "AscendW8A8FP8DynamicFusedMoEMethod",
    "AscendW4A8DynamicFusedMoEMethod",
    "AscendW4A16FusedMoEMethod",
    "AscendW8A8MXFP8DynamicFusedMoEMethod",
    "AscendW4A4MXFP4DynamicFusedMoEMethod",
    "AscendW4A8MXFPDynamicFusedMoEMethod",
    "AscendW4A8MXFPDSDynamicFusedMoEMethod",
    "AscendW4A16MXFP4FusedMoEMethod",
}
"""Quantisations of MoE layers whose reading of weights was looked at; the last line of a failure names a new one."""
ALWAYS = {"AscendW8A8DynamicFusedMoEMethod"}
"""What every release's adaptor takes."""
AT_TIMES = {
    "AscendUnquantizedFusedMoEMethod",  # from 0.15 on
    "AscendW8A8PDMixFusedMoeMethod",
    "AscendW4A8DynamicFusedMoEMethod",  # from 0.20 on with fused MC2, from 0.26 on also without
    "AscendW8A8MXFP8DynamicFusedMoEMethod",  # from 0.20 on
    "AscendW4A4MXFP4DynamicFusedMoEMethod",  # from 0.20 on
}
"""What some take; nothing else is taken by any."""
every_release = pytest.mark.parametrize("source", each_source())

settings = pytest.mark.parametrize(
    ("fused", "mega"), [(0, False), (1, False), (1, True)], ids=["plain", "fused", "mega"]
)


@pytest.fixture(autouse=True)
def npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What methods call of torch_npu's additions to torch."""
    monkeypatch.setattr(torch, "npu", Anything(), raising=False)
    monkeypatch.setattr(torch.Tensor, "npu", lambda tensor: tensor, raising=False)
    monkeypatch.setattr(hooks, "version", lambda _name: "x")


def held_and_read(layer: torch.nn.Module, method: Method) -> dict[str, list[torch.Tensor]]:
    """What the layer holds by slot, whatever its name, of all that a pass may read."""
    held = {**vars(layer), **layer._parameters}
    return {
        name: layers.by_slot(held[name], SLOTS, where=name)
        for name in sorted(method.reads() & held.keys())
        if layers._numbers_in(held[name])
    }


def left_behind(read: dict[str, list[torch.Tensor]], moved: Sequence[Any]) -> list[str]:
    """Names of read tensors whose memory no moved kind covers in every slot."""
    known = {(kind[0].data_ptr(), kind[-1].data_ptr()) for kind in moved}
    return [name for name, kind in read.items() if (kind[0].data_ptr(), kind[-1].data_ptr()) not in known]


def refused(call: Callable[[], list[Any]]) -> list[Any] | None:
    """What the call gives; None where it refuses, which it does in one line."""
    try:
        return call()
    except UnsupportedEngine as error:
        if "\n" in str(error):
            raise
        return None


def taken(release: Release, method: Method, layer: torch.nn.Module) -> list[Any] | None:
    """What would move of the layer; None where it is refused."""

    def kinds() -> list[Any]:
        adaptor = hooks.adaptor_or_refusal(lambda: adaptor_of(release, method, layer))
        return layers.expert_weights(adaptor, slots_per_rank=SLOTS, formats=PLAIN)[0]

    return refused(kinds)


@every_release
@settings
def test_all_that_a_pass_reads_moves_or_the_model_is_refused(source: Source, fused: int, mega: bool) -> None:
    release = Release(source, fused=fused, mega=mega)
    balanced = set()
    for method in release.methods():
        layer = method.layer()
        read = held_and_read(layer, method)
        assert len(read) >= 2, method.name
        moved = taken(release, method, layer)
        if moved is not None:
            balanced.add(method.name)
            assert not left_behind(read, moved), method.name
    assert balanced >= ALWAYS
    assert balanced <= ALWAYS | AT_TIMES, "a release takes more than before: say so in docs/ascend.md"


@every_release
def test_no_quantisation_is_new(source: Source) -> None:
    assert {method.name for method in Release(source, fused=0).methods()} - KNOWN == set()


@every_release
def test_without_the_layers_own_tensors_some_release_would_leave_one_behind(source: Source) -> None:
    """The check can fail: of what W8A8 reads, the first kind alone covers one name."""
    release = Release(source, fused=1)
    method = next(m for m in release.methods() if m.name == "AscendW8A8DynamicFusedMoEMethod")
    layer = method.layer()
    read = held_and_read(layer, method)
    kinds = taken(release, method, layer)
    assert kinds is not None
    assert len(left_behind(read, kinds[:1])) == len(read) - 1


@pytest.mark.parametrize("source", each_source(v2=True))
@settings
def test_model_runner_v2_is_given_all_that_a_pass_reads(source: Source, fused: int, mega: bool) -> None:
    """There vLLM asks the method itself for what to move; the layer's other weights are added to that."""
    asked = 0
    for method in Release(source, fused=fused, mega=mega).methods():
        views = getattr(method.made, "get_eplb_weight_views", None)
        if views is None or method.name not in ALWAYS | AT_TIMES:
            continue
        asked += 1
        layer = method.layer(dynamic_eplb=False)
        named = [list(view) for view in views(layer)]
        moved = [*named, *layers.overlooked(layer, named, SLOTS, where=method.name)]
        assert not left_behind(held_and_read(layer, method), moved), method.name
    assert asked >= 3
