"""Files of other systems, made and read by their own code.

Where their source is at hand: `SWIFTBALANCER_SGLANG_SOURCE` and `SWIFTBALANCER_TENSORRT_LLM_SOURCE` name a checkout
or an unpacked wheel (an installed package is found without), and `SWIFTBALANCER_VLLM_ASCEND_SOURCE` one or several
releases of vllm-ascend.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest

from swiftbalancer.placement import Placement
from swiftbalancer_worker.placement_files import read_placement, write_placement
from swiftbalancer_worker.trace import open_trace
from tests.adaptors.vllm_ascend.sources import Source, each_source
from tests.edges.engines import LONG_S, environment
from tests.edges.processes import free_port
from tests.edges.sglang_rank import EXPERTS, LAYERS, MODES, RANKS, SLOTS
from tests.edges.test_convert import SLOTS as MAP
from tests.edges.test_convert import TOPOLOGY, placement

torch = pytest.importorskip("torch")
LAYER_IDS = [3, 4, 5]


def folder_of(package: str, variable: str) -> Path:
    """The folder that holds the source of `package`; skips the test if there is none."""
    if os.environ.get(variable):
        return Path(os.environ[variable]).expanduser()
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"no source of {package}: set {variable} to a checkout or an unpacked wheel")
    return Path(spec.origin).parents[1]


def definition(path: Path, name: str, **names: Any) -> Any:
    """One class or function of a module, compiled alone: it sees only `names`. Skips if the file is not there."""
    if not path.exists():
        pytest.skip(f"{path} is not part of this source")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            exec(compile(ast.Module([node], []), str(path), "exec", dont_inherit=True), names)
            return names[name]
    raise AssertionError(f"{path} has no {name}")


# -- SGLang -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks of SGLang's own loader and recorder made of a location that we wrote."""
    source = folder_of("sglang", "SWIFTBALANCER_SGLANG_SOURCE")
    for inside in ("", "python"):
        if (source / inside / "sglang").is_dir():
            source = source / inside
    out = tmp_path_factory.mktemp("sglang")
    location = out / "location.json"
    location.write_bytes(write_placement(placement(), "sglang"))
    command = [sys.executable, str(Path(__file__).with_name("sglang_rank.py")), str(source), str(location), str(out)]
    env = {**environment(), "MASTER_PORT": str(free_port())}
    ranks = [subprocess.Popen([*command, str(rank)], env=env, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    logs = [rank.communicate(timeout=3 * LONG_S)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(logs)
    return out


@pytest.mark.parametrize("mode", MODES)
def test_sglangs_own_dumps_hold_what_was_routed(sglang: Path, mode: str) -> None:
    expected = sum(np.load(sglang / f"expected-{mode}-{rank}.npy") for rank in range(RANKS))
    trace = open_trace(sglang / mode)
    np.testing.assert_array_equal(trace.between(0, len(trace)), expected)


def test_one_file_of_sglangs_mode_stat_is_enough(sglang: Path) -> None:
    (dump,) = (sglang / "stat").glob("*.pt")
    assert open_trace(dump).shape == open_trace(sglang / "stat").shape


def test_sglangs_own_loader_takes_our_location(sglang: Path) -> None:
    for rank in range(RANKS):
        loaded = np.load(sglang / f"location-{rank}.npz")
        np.testing.assert_array_equal(loaded["physical_to_logical_map"], MAP)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                slots = loaded["logical_to_all_physical_map"][layer, expert]
                assert sorted(slots[slots >= 0]) == np.nonzero(MAP[layer] == expert)[0].tolist()
                assert MAP[layer, loaded["dispatch"][layer, expert]] == expert
    assert loaded["physical_to_logical_map"].shape == (LAYERS, SLOTS)


# -- vllm-ascend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", each_source())
def test_vllm_ascends_own_reader_takes_our_expert_map(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "expert_map.json"
    path.write_bytes(write_placement(placement(), "vllm-ascend"))
    read = source.function("eplb.core.eplb_utils", "expert_file_to_tensor", json=json, torch=torch, logger=None)
    for layer in range(LAYERS):
        by_rank, num_slots = read(str(path), layer)
        np.testing.assert_array_equal(by_rank.numpy().reshape(-1), MAP[layer])
        assert num_slots == SLOTS


@pytest.mark.parametrize("source", each_source())
def test_vllm_ascends_own_expert_map_is_read(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "expert_map.json"
    write = source.methods("eplb.adaptor.vllm_adaptor", "VllmEplbAdaptor")["_export_tensor_to_file"]
    names: dict[str, Any] = {"json": json, "Any": Any}
    exec(compile(ast.Module([write], []), source.name, "exec", dont_inherit=True), names)
    names["_export_tensor_to_file"](SimpleNamespace(rank_id=0), local_slots(placement()), str(path))
    read = read_placement(path).placement()
    assert read.topology == TOPOLOGY
    np.testing.assert_array_equal(read.physical_to_logical_map, MAP)


def local_slots(of: Placement) -> Any:
    """As vllm-ascend holds it: `[layers, ranks, experts]`, the slot of each expert on each rank, -1 for none."""
    maps = torch.full((of.num_layers, of.topology.num_ranks, of.num_experts), -1, dtype=torch.int32)
    for (layer, slot), expert in np.ndenumerate(of.physical_to_logical_map):
        rank, local = divmod(slot, of.topology.slots_per_rank)
        maps[layer, rank, int(expert)] = local
    return maps


# -- TensorRT-LLM -----------------------------------------------------------------------------------------------


@pytest.fixture
def tensorrt_llm() -> Path:
    return folder_of("tensorrt_llm", "SWIFTBALANCER_TENSORRT_LLM_SOURCE")


def record_statistics(source: Path, out: Path) -> np.ndarray[Any, Any]:
    """What TensorRT-LLM's own recorder writes for two ranks; `[iterations, layers, experts]`, the tokens."""
    pytest.importorskip("safetensors")
    import safetensors.torch

    recorder = definition(
        source / "tensorrt_llm" / "_torch" / "expert_statistic.py",
        "ExpertStatistic",
        torch=torch,
        os=os,
        json=json,
        safetensors=safetensors,
        envs=SimpleNamespace(get_env={"EXPERT_STATISTIC_PATH": str(out)}.get),
        logger=SimpleNamespace(info=str),
    )
    rng, first, last = np.random.default_rng(0), 100, 104
    counts = np.zeros((last - first, LAYERS, EXPERTS), np.int64)
    for rank in range(RANKS):
        one = recorder(rank, first, last)
        for iteration in range(first - 1, last + 1):
            one._set_iter(iteration)
            for layer in range(LAYERS):
                one._set_layer(LAYER_IDS[layer])
                chosen = rng.integers(0, EXPERTS, (9, 2))
                one._maybe_add_info(EXPERTS, torch.from_numpy(chosen))
                if first <= iteration < last:
                    counts[iteration - first, layer] += np.bincount(chosen.reshape(-1), minlength=EXPERTS)
    return counts


def test_tensorrt_llms_own_statistics_hold_what_was_routed(tensorrt_llm: Path, tmp_path: Path) -> None:
    counts = record_statistics(tensorrt_llm, tmp_path)
    trace = open_trace(tmp_path)
    np.testing.assert_array_equal(trace.between(0, len(trace)), counts)


def test_tensorrt_llms_own_reader_of_statistics_sees_the_same(tensorrt_llm: Path, tmp_path: Path) -> None:
    record_statistics(tensorrt_llm, tmp_path)
    import glob

    import safetensors.torch

    path = tensorrt_llm / "examples" / "wide_ep" / "ep_load_balancer" / "utils.py"
    read = definition(path, "load_expert_statistic", json=json, glob=glob, safetensors=safetensors, torch=torch)
    about, theirs = read(str(tmp_path))
    ours = open_trace(tmp_path)
    assert about["layers"] == LAYER_IDS
    for (iteration, layer), counts in theirs.items():
        np.testing.assert_array_equal(
            ours.at(iteration - about["iter_start"])[LAYER_IDS.index(layer)], counts.numpy()
        )


def test_tensorrt_llms_own_settings_take_our_assignments(tensorrt_llm: Path) -> None:
    import yaml

    pydantic = pytest.importorskip("pydantic")
    strict = pydantic.create_model("Strict", __config__=pydantic.ConfigDict(extra="forbid"))
    settings = definition(
        tensorrt_llm / "tensorrt_llm" / "llmapi" / "llm_args.py",
        "MoeLoadBalancerConfig",
        StrictBaseModel=strict,
        Field=pydantic.Field,
        PrivateAttr=pydantic.PrivateAttr,
        Optional=Optional,
        Dict=dict,
        List=list,
    )
    written = write_placement(placement(), "tensorrt-llm", layer_ids=LAYER_IDS)
    read = settings(**yaml.safe_load(written))
    read.setup(ep_rank=1, ep_size=TOPOLOGY.num_ranks)
    assert (read.slot_start, read.slot_end) == (3, 6)
    for index, layer in enumerate(LAYER_IDS):
        assert read.get_layer_initial_global_assignments(layer) == MAP[index].tolist()
