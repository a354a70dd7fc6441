"""Policies against other projects' algorithms, and in each other's place."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from swiftbalancer import compat
from swiftbalancer.dispatch import DispatchForm
from swiftbalancer.errors import ConfigError, InvalidPlan
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker.forecast import forecast
from swiftbalancer_worker.planner import PlanInput, PlanLimits, Planner
from swiftbalancer_worker.policies.greedy import GreedyPolicy, hierarchical, pack, replicate

UNIFORM = DispatchForm("uniform", 8)


def lognormal_loads(seed: int, *, layers: int = 6, experts: int = 64) -> NDArray[np.float64]:
    return np.random.default_rng(seed).lognormal(0, 1, (layers, experts)) * 1000


def file_module(variable: str, default: str = "") -> ModuleType:
    """A module from the file an environment variable names; skips where there is none."""
    path = Path(os.environ.get(variable, default))
    if not path.is_file():
        pytest.skip(f"{variable} names no file")
    spec = importlib.util.spec_from_file_location(variable.lower(), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imbalance_if_even(rows: NDArray[Any], loads: NDArray[np.float64], ranks: int) -> NDArray[np.float64]:
    """`[layers]` max/mean if every replica gets an equal part."""
    out = []
    for row, load in zip(np.asarray(rows), loads, strict=True):
        count = np.bincount(row, minlength=len(load))
        per_rank = (load / count)[row].reshape(ranks, -1).sum(1)
        out.append(per_rank.max() / per_rank.mean())
    return np.array(out)


def test_pack_fills_every_pack_equally_and_heaviest_first() -> None:
    packs = pack(np.array([[5.0, 4.0, 3.0, 2.0, 2.0, 2.0]]), 2)
    assert packs.tolist() == [[0, 1, 1, 0, 0, 1]]


def test_replicate_gives_spare_slots_to_the_heaviest_per_replica() -> None:
    assert replicate(np.array([[9.0, 4.0, 1.0]]), 6, most=3).tolist() == [[0, 1, 2, 0, 0, 1]]


def test_replicate_gives_nobody_more_replicas_than_there_are_ranks_for_them() -> None:
    assert replicate(np.array([[9.0, 4.0, 1.0], [9.0, 0.0, 0.0]]), 6, most=2).tolist() == [[0, 1, 2, 0, 1, 2]] * 2


@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (8, 2), (8, 4)])
def test_groups_stay_on_their_node(groups: int, nodes: int) -> None:
    rows = hierarchical(lognormal_loads(1), num_slots=72, num_groups=groups, num_nodes=nodes, num_ranks=8)
    for row in rows:
        node_of: dict[int, int] = {}
        for slot, expert in enumerate(row):
            group, node = expert // (64 // groups), slot // (72 // nodes)
            assert groups == 1 or node_of.setdefault(group, node) == node
        assert len(np.unique(row)) == 64


@pytest.mark.parametrize("seed", range(10))
def test_groups_stay_on_their_node_when_ranks_must_not_hold_an_expert_twice(seed: int) -> None:
    topology = Topology(4, 3, num_nodes=2)
    loads = lognormal_loads(seed, layers=3, experts=8) ** 3
    given = PlanInput(Placement.initial(topology, 8, num_layers=3), loads[None], UNIFORM, epoch=0)
    rows = GreedyPolicy(num_groups=4).place(given, forecast(given.loads))
    for row in rows:
        here, there = row.reshape(2, 6) // 2
        assert not set(here.tolist()) & set(there.tolist())
        assert all(len(set(rank.tolist())) == 3 for rank in row.reshape(4, 3))


@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (8, 2), (8, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_as_good_as_deepseeks_own_code(groups: int, nodes: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    peer = file_module("SWIFTBALANCER_DEEPSEEK_EPLB")
    loads = lognormal_loads(seed)
    theirs, _, _ = peer.rebalance_experts(torch.from_numpy(loads), 72, groups, nodes, 8)
    ours = hierarchical(loads, num_slots=72, num_groups=groups, num_nodes=nodes, num_ranks=8)
    assert np.allclose(imbalance_if_even(ours, loads, 8), imbalance_if_even(theirs, loads, 8), rtol=1e-5)


def _vllm_policy() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("vllm.distributed.eplb.policy.default").DefaultEplbPolicy


def _sglang_function() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("sglang.srt.eplb.eplb_algorithms.deepseek").rebalance_experts


def test_vllms_class_runs_as_a_policy() -> None:
    _vllm_policy()
    _check_foreign("vllm.distributed.eplb.policy.default:DefaultEplbPolicy")


def test_sglangs_function_runs_as_a_policy() -> None:
    function = _sglang_function()
    loads = lognormal_loads(2)
    topology = Topology(8, 9)
    rows = compat.call_rebalance(
        lambda weight, slots, groups, nodes, ranks: function(weight, slots, groups, nodes, ranks, False),
        loads,
        topology=topology,
    )
    assert imbalance_if_even(rows, loads, 8).mean() < 1.1


def test_ours_answers_as_well_as_vllms_class() -> None:
    torch = pytest.importorskip("torch")
    peer = _vllm_policy()
    loads = torch.from_numpy(lognormal_loads(3))
    theirs = peer.rebalance_experts(loads, 72, 1, 1, 8)
    ours = compat.SwiftEplbPolicy.rebalance_experts(loads, 72, 1, 1, 8)
    assert isinstance(ours, torch.Tensor)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    quality = [imbalance_if_even(rows, loads.numpy(), 8).mean() for rows in (ours, theirs)]
    assert quality[0] <= quality[1] + 1e-9


def _check_foreign(target: str) -> None:
    placement = Placement.initial(Topology(8, 9), 64, num_layers=6)
    loads = lognormal_loads(2)
    limits = PlanLimits(staging_experts=9)
    result = Planner("foreign", {"target": target}).plan(
        PlanInput(placement, loads[None], UNIFORM, epoch=0, limits=limits)
    )
    result.plan.validate(placement, staging_experts=9)
    assert result.imbalance_after.mean() < 1.1 < result.imbalance_before.mean()


class ThreeTensors:
    """A policy as SGLang and DeepSeek write them: three answers."""

    @staticmethod
    def rebalance_experts(weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int) -> Any:
        rows = hierarchical(
            np.asarray(weight),
            num_slots=num_replicas,
            num_groups=num_groups,
            num_nodes=num_nodes,
            num_ranks=num_ranks,
        )
        return rows, None, None


def one_map(weight: Any, replicas: int, groups: int, nodes: int, ranks: int, old: Any = None) -> Any:
    """One map, like vLLM; insists on the old one."""
    assert old is not None
    return ThreeTensors.rebalance_experts(weight, replicas, groups, nodes, ranks)[0]


@pytest.mark.parametrize("name", ["ThreeTensors", "one_map"])
def test_foreign_policies_run_whatever_they_return(name: str) -> None:
    sys.modules["foreign_policies_of_this_test"] = sys.modules[__name__]
    _check_foreign(f"foreign_policies_of_this_test:{name}")


@pytest.mark.parametrize("target", ["no_such_module:thing", "json:no_such_name", "json", "json:__name__"])
def test_foreign_targets_that_do_not_exist_are_refused(target: str) -> None:
    placement = Placement.initial(Topology(8, 9), 64, num_layers=6)
    with pytest.raises(ConfigError, match=r"policy\.options\.target"):
        Planner("foreign", {"target": target}).plan(PlanInput(placement, lognormal_loads(1)[None], UNIFORM, epoch=0))


def test_foreign_answers_of_another_shape_are_refused() -> None:
    with pytest.raises(InvalidPlan, match="expected"):
        compat.call_rebalance(lambda *_: np.zeros((1, 3)), lognormal_loads(1), topology=Topology(8, 9))


def test_ours_gives_consistent_maps() -> None:
    loads = lognormal_loads(4)
    rows, slots, count = compat.rebalance_experts_with_maps(loads, 72, 1, 1, 8)
    for layer in range(len(loads)):
        for expert in range(64):
            held = slots[layer, expert, : count[layer, expert]]
            assert (rows[layer, held] == expert).all()
            assert (slots[layer, expert, count[layer, expert] :] == -1).all()
    assert imbalance_if_even(rows, loads, 8).mean() < 1.05


def test_ours_keeps_what_ranks_hold_if_told() -> None:
    loads = lognormal_loads(5)
    old = compat.rebalance_experts(loads, 72, 1, 1, 8)
    again = compat.rebalance_experts(loads * 1.01, 72, 1, 1, 8, old)
    assert (old != again).mean() < 0.2
