"""Our updator under vllm-ascend's call sequence, with its real adaptor; and its own updator on the same sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from tests.adaptors.vllm_ascend.harness import run
from tests.adaptors.vllm_ascend.sources import Source, each_source
from tests.edges.main_thread import blocking

EXPERTS = 8
MANY = 3000
"""Passes; a run ends long before, once enough has happened."""
FORCED = {
    "policy": {"name": "random", "max_moves_per_layer": 4, "min_gain": 0.0},
    "window": {"sub_window_steps": 2, "sub_windows": 2, "refresh_sub_windows": 1, "replan_sub_windows": 1},
    "agreement": {"idle_round_steps": 1},
}
EAGER = {"policy": {"min_gain": 0.0, "target_imbalance": 1.0}}


def check(results: list[dict[str, Any]]) -> None:
    """Every rank routes every expert to a slot that holds it, after every pass, and the placement is valid."""
    assert [result["wrong_routes"] for result in results] == [0] * len(results)
    ranks = len(results)
    placement = np.array(results[0]["placement"])
    topology = Topology(num_ranks=ranks, slots_per_rank=placement.shape[1] // ranks)
    Placement.of(topology, EXPERTS, placement)
    assert all(result["placement"] == results[0]["placement"] for result in results)


def check_calls(results: list[dict[str, Any]]) -> None:
    """`forward_before` calls nothing whatever; `forward_end` nothing that waits, but for a late vote's event."""
    for result in results:
        assert result["before_calls"] == []
        assert blocking(result["end_calls"]) == set()


@pytest.mark.parametrize(("ranks", "tp_size"), [(2, 1), (4, 2)])
def test_without_their_source_a_stand_in_for_the_adaptor_shows_the_same(
    ranks: int, tp_size: int, tmp_path: Path
) -> None:
    results = run(
        tmp_path, None, ranks=ranks, ours=True, steps=MANY, until_moved=6, tp_size=tp_size, reload=True, config=FORCED
    )
    check(results)
    check_calls(results)
    assert results[0]["moved"] > 0


@pytest.mark.parametrize("source", each_source())
def test_experts_move_and_every_route_stays_right(source: Source, tmp_path: Path) -> None:
    results = run(tmp_path, source.root, ranks=2, ours=True, steps=MANY, until_moved=6, config=FORCED)
    check(results)
    check_calls(results)
    assert results[0]["moved"] > 0
    assert results[0]["changes"] > 0


@pytest.mark.parametrize("source", each_source()[-1:])
def test_deepseek_with_dense_layers_and_four_ranks(source: Source, tmp_path: Path) -> None:
    results = run(
        tmp_path,
        source.root,
        ranks=4,
        ours=True,
        steps=MANY,
        until_moved=6,
        layers=3,
        dense_layers=2,
        tp_size=2,
        config=FORCED,
    )
    check(results)
    assert results[0]["moved"] > 0


@pytest.mark.parametrize("source", each_source()[-1:])
def test_unquantised_weights_that_are_one_tensor_per_layer(source: Source, tmp_path: Path) -> None:
    results = run(
        tmp_path, source.root, ranks=2, ours=True, steps=MANY, until_moved=6, quantised=False, config=FORCED
    )
    check(results)
    assert results[0]["moved"] > 0


@pytest.mark.parametrize("source", each_source()[-1:])
def test_counters_with_a_history_of_passes_count_plainly(source: Source, tmp_path: Path) -> None:
    results = run(
        tmp_path, source.root, ranks=2, ours=True, steps=MANY, until_moved=2, multi_stage=True, config=EAGER
    )
    check(results)
    assert results[0]["moved"] > 0, "no plan was made of what was counted"


@pytest.mark.parametrize("source", each_source()[-1:])
def test_the_file_of_initial_experts_is_the_initial_placement(source: Source, tmp_path: Path) -> None:
    rows = [[[0, 1, 2, 7, 3, 4], [5, 6, 7, 4, 0, 1]], [[7, 6, 5, 4, 3, 2], [1, 0, 2, 3, 4, 5]]]
    path = tmp_path / "experts.json"
    path.write_text(json.dumps(_record(rows)))
    options: dict[str, Any] = {"ranks": 2, "ours": True, "expert_map_path": str(path)}
    still = run(tmp_path / "still", source.root, steps=4, config={"mode": "observe"}, **options)
    check(still)
    assert still[0]["placement"] == [[*layer[0], *layer[1]] for layer in rows]
    moved = run(tmp_path / "moved", source.root, steps=MANY, until_moved=6, config=FORCED, **options)
    check(moved)
    assert moved[0]["moved"] > 0


@pytest.mark.parametrize("source", each_source()[-1:])
def test_reloaded_weights_bring_the_initial_maps_back_and_balancing_goes_on(source: Source, tmp_path: Path) -> None:
    results = run(tmp_path, source.root, ranks=2, ours=True, steps=MANY, until_moved=6, reload=True, config=FORCED)
    check(results)
    assert results[0]["moved"] > 0, "the balancer attached after the reload moved nothing"


@pytest.mark.parametrize("source", each_source()[-1:])
def test_observing_changes_nothing(source: Source, tmp_path: Path) -> None:
    results = run(tmp_path, source.root, ranks=2, ours=True, steps=40, config={"mode": "observe"})
    check(results)
    assert results[0]["changes"] == 0


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("source", each_source()[-1:])
def test_against_their_own_updator_on_the_same_passes(source: Source, ranks: int, tmp_path: Path) -> None:
    """Both must route right throughout; ours, given the same passes, must not end less balanced than theirs."""
    same: dict[str, Any] = {"ranks": ranks, "steps": 240, "redundant": 0}
    theirs = run(tmp_path / "theirs", source.root, ours=False, lists_only=True, **same)
    ours = run(tmp_path / "ours", source.root, ours=True, step_s=0.02, config=EAGER, **same)
    check(theirs)
    check(ours)
    check_calls(ours)
    assert "get" in theirs[0]["before_calls"], "theirs waits for its planner's queue there"
    assert theirs[0]["changes"] > 0, "their updator never changed a route, so nothing was compared"
    assert ours[0]["imbalances"][0] == theirs[0]["imbalances"][0]
    assert np.mean(ours[0]["imbalances"][-16:]) <= np.mean(theirs[0]["imbalances"][-16:])


def _record(rows: list[list[list[int]]]) -> dict[str, Any]:
    """In the form of vllm-ascend's `expert_map_path`."""
    return {
        "moe_layer_count": len(rows),
        "layer_list": [
            {
                "layer_id": number,
                "device_count": len(layer),
                "device_list": [{"device_id": rank, "device_expert": experts} for rank, experts in enumerate(layer)],
            }
            for number, layer in enumerate(rows)
        ],
    }
