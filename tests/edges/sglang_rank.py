"""One rank of SGLang's own expert-location loader and expert-distribution recorder, run as a script.

`python sglang_rank.py SOURCE LOCATION.json OUT RANK` with MASTER_PORT in the environment. `SOURCE` holds the package
`sglang`; its `srt/eplb/expert_location.py` and `expert_distribution.py` run as they are. What they import of the
serving engine (settings of the server, models, metrics) is stood in for here.

Writes for each recorder mode the dumps to `OUT/MODE`, and what they must hold to `OUT/expected-MODE-RANK.npy`; what
the loader made of the location to `OUT/location-RANK.npz`.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, Optional, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

RANKS, LAYERS, EXPERTS, SLOTS, TOP_K, PASSES = 2, 3, 8, 12, 2, 5
MODES = ("stat", "per_pass", "per_token")


def settings(location: str, mode: str) -> SimpleNamespace:
    """The server's settings, as far as the two modules ask for them."""
    moe = SimpleNamespace(
        init_expert_location=location,
        expert_distribution_recorder_mode=mode,
        expert_distribution_recorder_buffer_size=-1,
        ep_num_redundant_experts=SLOTS - EXPERTS,
        ep_dispatch_algorithm="static",
        ep_join_mode=None,
        moe_a2a_backend="none",
    )
    return SimpleNamespace(moe=moe, overlap=SimpleNamespace(enable_two_batch_overlap=False))


def stand_in(name: str, **values: Any) -> None:
    """A module of this name that holds these values."""
    module = ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module


def class_of(source: Path, name: str, **names: Any) -> Any:
    """One class of a module, compiled alone."""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            exec(compile(ast.Module([node], []), str(source), "exec", dont_inherit=True), names)
            return names[name]
    raise AssertionError(f"{source} has no class {name}")


def prepare(source: Path, server: SimpleNamespace, out: Path) -> None:
    """Makes the two modules importable without the rest of the engine."""
    package = source / "sglang"
    for name in ("sglang", "sglang.srt", "sglang.srt.eplb", "sglang.srt.elastic_ep"):
        stand_in(name, __path__=[str(package.parent / name.replace(".", "/"))])
    names = {"T": TypeVar("T"), "Generic": Generic, "contextmanager": contextmanager, "Optional": Optional}
    withable = class_of(package / "srt/utils/common.py", "Withable", **names)
    cpu = SimpleNamespace(device="cpu")
    parallel = SimpleNamespace(ep_size=RANKS, nnodes=1, elastic_ep_initial_size=None)
    stand_in("einops")
    stand_in("sglang.srt.environ", envs=SimpleNamespace(SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=SimpleNamespace()))
    stand_in("sglang.srt.model_executor")
    stand_in("sglang.srt.model_executor.forward_batch_info", ForwardBatch=object, ForwardMode=object)
    stand_in("sglang.srt.observability")
    collector = {"STAT_LOGGER_ROLE_EXPERT_DISPATCH": "", "ExpertDispatchCollector": object}
    stand_in("sglang.srt.observability.metrics_collector", resolve_collector_class=None, **collector)
    stand_in("sglang.srt.elastic_ep.elastic_ep", elastic_expanded_world_enabled=bool)
    stand_in("sglang.srt.utils", Withable=withable, get_device=lambda: "cpu", get_int_env_var=int)
    stand_in(
        "sglang.srt.runtime_context",
        get_exec=lambda: server,
        get_parallel=lambda: parallel,
        get_device=lambda: cpu,
        get_platform=lambda: SimpleNamespace(is_hip=False),
        get_schedule=lambda: SimpleNamespace(chunked_prefill_size=16),
        get_resources=SimpleNamespace,
        logs_expert_balancedness_to_server_log=bool,
        reports_expert_balancedness=bool,
    )
    stand_in("sglang.srt.layers")
    stand_in("sglang.srt.layers.moe", get_moe_a2a_backend=None)
    torch.get_device_module = lambda: SimpleNamespace(empty_cache=int)  # type: ignore[assignment]
    sys.modules["sglang.srt.environ"].envs.SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.get = lambda: str(
        out / server.moe.expert_distribution_recorder_mode
    )


class Model:
    """What the loader wants to know of a model."""

    @staticmethod
    def get_model_config_for_expert_location(_: Any) -> Any:
        module = importlib.import_module("sglang.srt.eplb.expert_location")
        return module.ModelConfigForExpertLocation(num_layers=LAYERS, num_logical_experts=EXPERTS)


def record(recorder: Any, location: Any, rank: int) -> np.ndarray[Any, Any]:
    """Some forward passes with made-up routing; `[passes, layers, experts]` int64 tokens of this rank."""
    rng = np.random.default_rng(rank)
    counts = np.zeros((PASSES, LAYERS, EXPERTS), np.int64)
    maps = location.physical_to_logical_map.numpy()
    recorder.start_record()
    for number in range(PASSES):
        tokens = 5 + number + rank
        positions = torch.arange(tokens)
        mode = SimpleNamespace(value=1)
        batch = SimpleNamespace(input_ids=positions, positions=positions, extend_seq_lens_cpu=[], forward_mode=mode)
        with recorder.with_forward_pass(number, batch):
            for layer in range(LAYERS):
                slots = rng.integers(0, SLOTS, (tokens, TOP_K))
                counts[number, layer] += np.bincount(maps[layer][slots].reshape(-1), minlength=EXPERTS)
                with recorder.with_current_layer(layer):
                    recorder.on_select_experts(torch.from_numpy(slots))
    recorder.stop_record()
    recorder.dump_record()
    return counts


def main(arguments: Sequence[str]) -> None:
    source, location_file, out, rank = Path(arguments[0]), arguments[1], Path(arguments[2]), int(arguments[3])
    store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), RANKS, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    server = settings(location_file, MODES[0])
    prepare(source, server, out)
    stand_in("sglang.srt.model_loader", get_model_architecture=lambda _: (Model, None))
    loader = importlib.import_module("sglang.srt.eplb.expert_location")
    recorders = importlib.import_module("sglang.srt.eplb.expert_distribution")
    location = loader.compute_initial_expert_location_metadata(SimpleNamespace(hf_config=None), rank)
    np.savez(
        out / f"location-{rank}.npz",
        physical_to_logical_map=location.physical_to_logical_map.numpy(),
        logical_to_all_physical_map=location.logical_to_all_physical_map.numpy(),
        dispatch=location.logical_to_rank_dispatch_physical_map.numpy(),
    )
    for mode in MODES:
        server.moe.expert_distribution_recorder_mode = mode
        recorder = recorders.ExpertDistributionRecorder.init_new(location, rank)
        np.save(out / f"expected-{mode}-{rank}.npy", record(recorder, location, rank))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
