"""Every name, signature and attribute of vLLM we hook or read, against its source, release by release.

A failure here means vLLM has changed where we touch it.
"""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

import pytest

from swiftbalancer_adaptors.vllm import hooks, lifecycle
from swiftbalancer_adaptors.vllm.beside import PARTS_OF_CONFIG, SCALES
from swiftbalancer_adaptors.vllm.flag import RANKS_COME_AND_GO, RAY_COPIES
from swiftbalancer_adaptors.vllm.versions import series_of
from tests.adaptors.vllm.sources import VllmSource, each_source

every_release = pytest.mark.parametrize("source", each_source())
STATE = "distributed.eplb.eplb_state"
WORKER = "v1.worker.gpu_worker"
RUNNER = "v1.worker.gpu_model_runner"
PARALLEL = "distributed.parallel_state"
SINCE = {
    "update_mapping": (0, 30),
    "reconfigure_physical_expert_slots": (0, 30),
    "checkpoint_prepare": (0, 30),
    "start_draft_weight_update": (0, 30),
    "enable_fault_tolerance": (0, 30),
    "discard": (0, 31),
    "compute_weight_checksums": (0, 32),
}
"""The first of our releases that has a name."""


def not_yet(source: VllmSource) -> set[str]:
    """What this release lacks, as we know."""
    found = re.match(r"(\d+)\.(\d+)", source.version)
    return {name for name, first in SINCE.items() if found and (int(found[1]), int(found[2])) < first}


def fields(source: VllmSource, module: str, name: str) -> set[str]:
    """The annotated names of a class."""
    for node in ast.walk(source.tree(module)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return set()


def parameters(function: ast.FunctionDef) -> list[str]:
    return [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]


def functions(source: VllmSource, module: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in source.tree(module).body if isinstance(node, ast.FunctionDef)}


# -- the flag -------------------------------------------------------------------------------------------------


@every_release
def test_the_release_is_one_we_know(source: VllmSource) -> None:
    assert series_of(source.version) is not None or source.version == "dev"


@every_release
def test_plugins_are_loaded_before_the_configuration_and_in_every_worker(source: VllmSource) -> None:
    assert re.search(r'^DEFAULT_PLUGINS_GROUP = "vllm\.general_plugins"$', source.text("plugins.__init__"), re.M)
    arguments = source.methods("engine.arg_utils", "EngineArgs")
    assert "load_general_plugins()" in ast.unparse(arguments["__post_init__"])
    worker = source.methods("v1.worker.worker_base", "WorkerWrapperBase")
    assert "load_general_plugins()" in ast.unparse(worker["init_worker"])


@every_release
def test_arguments_we_read_and_set(source: VllmSource) -> None:
    names = fields(source, "engine.arg_utils", "EngineArgs")
    needed = {"additional_config", "enable_eplb", "eplb_config", "enable_expert_parallel", "enable_lora"}
    needed |= {*RANKS_COME_AND_GO}
    assert needed - names == needed & not_yet(source)
    assert "create_engine_config" in source.methods("engine.arg_utils", "EngineArgs")
    ours = {"window_size", "step_interval", "num_redundant_experts", "use_async", "communicator"}
    assert ours | {"policy", "log_balancedness"} <= fields(source, "config.parallel", "EPLBConfig")
    assert '"torch_gloo"' in source.text("config.parallel")
    assert {"additional_config", "offload_config"} <= fields(source, "config.vllm", "VllmConfig")
    assert {"offload_backend", "prefetch"} <= fields(source, "config.offload", "OffloadConfig")
    assert "offload_group_size" in fields(source, "config.offload", "PrefetchOffloadConfig")


@every_release
def test_sizes_we_check_are_the_configurations(source: VllmSource) -> None:
    sizes = {"tensor_parallel_size", "data_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"}
    assert sizes | {"eplb_config"} <= fields(source, "config.parallel", "ParallelConfig")
    assert "get_num_experts" in source.methods("config.model", "ModelConfig")
    assert "draft_model_config" in fields(source, "config.speculative", "SpeculativeConfig")


@every_release
def test_ray_copies_the_variable_it_is_asked_to(source: VllmSource) -> None:
    assert f'"{RAY_COPIES}"' in source.text("envs")
    assert RAY_COPIES in source.text("ray.ray_env")


# -- EplbState ------------------------------------------------------------------------------------------------


@every_release
def test_state_methods_we_wrap_take_what_we_pass_on(source: VllmSource) -> None:
    methods = source.methods(STATE, "EplbState")
    assert set(hooks.STATE_HOOKS) - set(methods) == set(hooks.STATE_HOOKS) & not_yet(source)
    assert parameters(methods["add_model"])[:3] == ["self", "model", "model_config"]
    ours = list(inspect.signature(hooks.step).parameters)
    assert parameters(methods["step"]) == ["self", *ours[2:]]


@every_release
def test_nothing_else_changes_slots_behind_our_back(source: VllmSource) -> None:
    """Whatever vLLM itself calls on an `EplbState` is ours, or harmless."""
    called = set()
    for module in source.modules_with("eplb_state"):
        if not module.startswith("distributed.eplb"):
            called |= set(re.findall(r"\beplb_state\.(\w+)\(", source.text(module)))
            called |= set(re.findall(r"\beplb\.state\.(\w+)\(", source.text(module)))
    harmless = {"drain_async", "prepare_forward", "create_communicator", "update_communicator", "set_layer_state"}
    assert called <= set(hooks.STATE_HOOKS) | harmless | {"_init_should_record_tensor", "_propagate_shared_tensors"}


@every_release
def test_a_models_state_has_what_we_read_and_write(source: VllmSource) -> None:
    maps = {"physical_to_logical_map", "logical_to_physical_map", "logical_replica_count"}
    others = {"expert_load_pass", "model_name", "model", "expert_buffer", "communicator"}
    assert maps | others <= fields(source, STATE, "EplbModelState")
    text = ast.unparse(source.methods(STATE, "EplbState")["__init__"])
    for attribute in ("model_states", "should_record_tensor", "device"):
        assert re.search(rf"self\.{attribute}\b", text), attribute
    model = {"num_physical_experts", "num_local_physical_experts", "num_logical_experts", "num_moe_layers"}
    assert model | {"expert_weights", "moe_layers"} <= fields(
        source, "model_executor.models.interfaces", "MixtureOfExperts"
    )


@every_release
def test_experts_are_sent_home_by_vllms_own_function(source: VllmSource) -> None:
    function = functions(source, "distributed.eplb.rebalance_execute")["rearrange_expert_weights_inplace"]
    names = ["old_global_expert_indices", "new_global_expert_indices", "expert_weights", "expert_buffer"]
    assert parameters(function)[:6] == [*names, "ep_group", "communicator"]
    assert len(function.args.defaults) == len(parameters(function)) - 6


@every_release
def test_the_initial_placement_is_the_one_we_assume(source: VllmSource) -> None:
    methods = source.methods(STATE, "EplbState")
    build = methods["build_initial_global_physical_to_logical_map"]
    build.decorator_list = []
    names: dict[str, Any] = {"Sequence": list}
    exec(compile(ast.Module([build], []), source.name, "exec"), names)
    assert names[build.name](4, 6) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


@every_release
def test_tables_are_read_by_the_tokens_hash_and_by_nothing_else(source: VllmSource) -> None:
    """A repeated slot gets its share only where the column is `hash(token) % count`."""
    kernel = source.text("model_executor.layers.fused_moe.router.base_router")
    assert re.search(r"KNUTH_MULTIPLIER = 2654435769$", kernel, re.M)
    assert "hashed = (token_idx * KNUTH_MULTIPLIER) & 0xFFFFFFFF" in kernel
    assert "replica_idx = hashed % replica_count" in kernel
    for module in source.modules_with(".logical_replica_count"):
        if not module.startswith("distributed.e"):
            assert not _other_readers(source.tree(module)), module


def _other_readers(tree: ast.Module) -> list[str]:
    """Uses of `logical_replica_count` but for passing it to vLLM's one kernel, and asking whether there is one."""
    fine = set()
    for node in ast.walk(tree):
        calls_kernel = isinstance(node, ast.Call) and "eplb_map_to_physical_and_record" in ast.unparse(node.func)
        asks = isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot)
        if calls_kernel or asks:
            fine |= {id(child) for child in ast.walk(node)}
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "logical_replica_count" and id(node) not in fine
    ]


# -- worker and runner ----------------------------------------------------------------------------------------


@every_release
def test_worker_methods_we_wrap(source: VllmSource) -> None:
    methods = source.methods(WORKER, "Worker")
    assert set(lifecycle.WORKER_HOOKS) - set(methods) == set(lifecycle.WORKER_HOOKS) & not_yet(source)
    assert parameters(methods["sleep"]) == ["self", "level"]
    assert parameters(methods["wake_up"]) == ["self", "tags"]
    if "discard" in methods:
        assert parameters(methods["discard"]) == ["self", "tags"]
    for name in ("start_weight_update", "update_weights", "finish_weight_update"):
        inner = methods.get("_" + name, methods[name])
        assert "self._weight_update_active" in ast.unparse(inner)


@every_release
def test_no_other_method_of_the_worker_touches_weights(source: VllmSource) -> None:
    """By name: what sleeps, loads, saves, checkpoints or sums weights is ours, or is known to leave slots alone."""
    touching = re.compile(r"^(sleep|wake|discard|checkpoint|load|save|update|start|finish|reload|reset|compute).*")
    found = {name for name in source.methods(WORKER, "Worker") if touching.match(name)}
    alone = {"update_config", "update_max_model_len", "reset_mm_cache", "reset_encoder_cache", "checkpoint_restore"}
    alone |= {"compile_or_warm_up_model", "sleep_mode_backend", "reset_weights", "start_profile"}
    assert found <= set(lifecycle.WORKER_HOOKS) | alone


@every_release
def test_both_runners_keep_their_state_where_we_look(source: VllmSource) -> None:
    methods = source.methods(RUNNER, "GPUModelRunner")
    assert re.search(r"self\.eplb_state\b", ast.unparse(methods["__init__"]))
    assert set(hooks.RUNNER_HOOKS) <= set(methods)
    assert "return self._pool(" in ast.unparse(methods["execute_model"])
    assert "self.eplb_step()" in source.text(RUNNER)
    assert "IntermediateTensors" in source.text("sequence")
    second = source.text("v1.worker.gpu.model_runner")
    assert re.search(r"self\.eplb = EPLBController\(", second)
    assert re.search(r"self\.state\b", source.text("v1.worker.gpu.eplb_utils"))


@every_release
def test_groups_we_ask_for(source: VllmSource) -> None:
    found = functions(source, PARALLEL)
    assert {"get_eplb_group", "get_dp_group", "get_tp_group", "get_pp_group"} <= set(found)
    assert parameters(found["in_the_same_node_as"]) == ["pg", "source_rank"]
    coordinator = source.text(PARALLEL)
    for attribute in ("cpu_group", "device_group", "rank_in_group", "world_size", "ranks"):
        assert re.search(rf"self\.{attribute}\b", coordinator), attribute


@every_release
def test_layers_say_how_they_route(source: VllmSource) -> None:
    runner = source.text("model_executor.layers.fused_moe.runner.moe_runner")
    assert re.search(r"def do_naive_dispatch_combine\(self\) -> bool", runner)
    assert re.search(r"self\.router = router", runner)
    assert re.search(r"self\.top_k = top_k", source.text("model_executor.layers.fused_moe.router.base_router"))


@every_release
def test_what_kernels_keep_is_where_we_look(source: VllmSource) -> None:
    assert set(PARTS_OF_CONFIG) <= fields(source, "model_executor.layers.fused_moe.config", "FusedMoEQuantConfig")
    assert set(SCALES) <= fields(source, "model_executor.layers.fused_moe.config", "FusedMoEQuantDesc")
    base = source.text("model_executor.layers.fused_moe.fused_moe_method_base")
    assert {"moe_quant_config", "moe_kernel"} <= set(re.findall(r"self\.(\w+): ", base))
    assert "def fused_experts(" in source.text("model_executor.layers.fused_moe.modular_kernel")
    layer = source.text("model_executor.layers.fused_moe.routed_experts")
    assert re.search(r"self\.quant_method\b", layer)


@every_release
def test_drafts_without_a_model_have_the_served_models_configuration(source: VllmSource) -> None:
    assert "self.draft_model_config = self.target_model_config" in source.text("config.speculative")


@every_release
def test_what_cannot_be_balanced_is_refused_in_the_words_we_look_for(source: VllmSource) -> None:
    text = source.text("model_executor.layers.fused_moe.routed_experts")
    assert re.search(r"raise NotImplementedError\(\s*f?\"EPLB is not supported", text)
