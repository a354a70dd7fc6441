"""Every name, signature and attribute of vllm-ascend we hook or call, against its source, release by release.

A failure here means vllm-ascend has changed where we touch it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict

import numpy as np
import pytest
import torch

from swiftbalancer_adaptors.vllm_ascend import flag, hooks, updator
from swiftbalancer_adaptors.vllm_ascend.layers import expert_maps, placement_of
from swiftbalancer_adaptors.vllm_ascend.log2phy import replicas_in_turn
from tests.adaptors.vllm_ascend.sources import Source, each_source

RUNNER = "worker.model_runner_v1"
WORKER = "worker.worker"
ADAPTOR = "eplb.adaptor.vllm_adaptor"
UTILS = "eplb.core.eplb_utils"
every_release = pytest.mark.parametrize("source", each_source())
RANKS, EXPERTS, REDUNDANT = 4, 12, 4


def fused_moe(source: Source) -> str:
    """All modules that hold MoE layers of a release."""
    folder = source.root / "vllm_ascend/ops/fused_moe"
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
    return "\n".join(re.sub(r"^from __future__ .*$", "", text, flags=re.M) for text in texts)


def imported_names(tree: ast.Module) -> set[str]:
    return {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}


# -- Model Runner V1: the runner and its updator --------------------------------------------------------------


@every_release
def test_the_runner_builds_what_we_replace_from_names_of_its_module(source: Source) -> None:
    names = imported_names(source.tree(RUNNER))
    assert {"EplbUpdator", "EplbProcess", "Manager", "VllmEplbAdaptor"} <= names
    text = source.text(RUNNER)
    assert re.search(r"self\.manager = Manager\(\)", text)
    assert re.search(r"self\.shared_dict = self\.manager\.dict\(", text)
    assert re.search(r"self\.process = self\.eplb_process\._launch_process\(\)", text)


@every_release
def test_our_stand_ins_take_the_runners_arguments(source: Source) -> None:
    calls = {
        node.func.id: node
        for node in ast.walk(source.tree(RUNNER))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert len(calls["EplbUpdator"].args) == 4
    assert not calls["EplbUpdator"].keywords
    assert not calls["EplbProcess"].args
    assert "shared_dict" in {keyword.arg for keyword in calls["EplbProcess"].keywords}
    assert not calls["Manager"].args


@every_release
def test_our_updator_answers_every_call_of_the_runner(source: Source) -> None:
    called = set()
    for node in ast.walk(source.tree(RUNNER)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if ast.unparse(node.func.value) != "self.eplb_updator":
            continue
        called.add(node.func.attr)
        ours = inspect.signature(getattr(updator.SwiftUpdator, node.func.attr))
        ours.bind(None, *node.args, **{keyword.arg or "": None for keyword in node.keywords})
    assert {"set_adaptor", "warm_up_eplb", "forward_before", "forward_end"} <= called
    others = set(re.findall(r"self\.eplb_updator\.(\w+)", source.text(RUNNER))) - called
    assert others <= {"adaptor"}


@every_release
def test_nothing_else_of_theirs_is_driven_by_the_runner(source: Source) -> None:
    """Of their loader and process the runner only wires the adaptor: neither acts without their updator."""
    text = source.text(RUNNER)
    assert set(re.findall(r"self\.eplb_loader\.(\w+)", text)) <= {"set_adator"}
    assert set(re.findall(r"self\.eplb_process\.(\w+)", text)) <= {"_launch_process"}
    assert not re.findall(r"self\.shared_dict\[", text)


@every_release
def test_a_pass_is_one_before_and_one_end_in_this_order(source: Source) -> None:
    """In `_dummy_run`; `execute_model` spreads over several methods from 0.14 on, with an end for each way out."""
    methods = source.methods(RUNNER, "NPUModelRunner")
    text = ast.unparse(methods["_dummy_run"])
    before, end = text.index("eplb_updator.forward_before"), text.index("eplb_updator.forward_end")
    assert before < end
    assert "not is_profile" in text[before - 120 : before]
    assert "eplb_updator.forward_before" in ast.unparse(methods["execute_model"])


@every_release
def test_the_profile_run_warms_up_with_the_models_adaptor(source: Source) -> None:
    methods = source.methods(RUNNER, "NPUModelRunner")
    warm_up = ast.unparse(methods["eplb_warmup"])
    steps = ["VllmEplbAdaptor(", "eplb_updator.set_adaptor(", "eplb_updator.warm_up_eplb()"]
    assert sorted(steps, key=warm_up.index) == steps
    assert "self.eplb_warmup()" in ast.unparse(methods["profile_run"])


@every_release
def test_worker_methods_we_wrap(source: Source) -> None:
    methods = source.methods(WORKER, "NPUWorker")
    assert {"compile_or_warm_up_model", "sleep", "wake_up"} <= set(methods)
    assert [a.arg for a in methods["sleep"].args.args] == ["self", "level"]
    assert [a.arg for a in methods["wake_up"].args.args] == ["self", "tags"]
    assert re.search(r"self\.model_runner\b.* = NPUModelRunner\(", ast.unparse(methods["init_device"]))
    assert set(hooks.WORKER_HOOKS) >= {"compile_or_warm_up_model", "sleep", "wake_up"}


# -- Model Runner V1: the adaptor and the layers --------------------------------------------------------------


@every_release
def test_the_adaptor_has_what_we_read(source: Source) -> None:
    text = source.text(ADAPTOR)
    for attribute in ("buffer_tensor_list", "expert_param_per_layer", "log2phy_map_per_layer"):
        assert re.search(rf"self\.{attribute}\b", text), attribute
    methods = source.methods(ADAPTOR, "VllmEplbAdaptor")
    assert [a.arg for a in methods["get_global_expert_map"].args.args] == ["self"]
    assert len(methods["do_update_expert_map"].args.args) == 3
    named = "self.expert_weight_names" in text
    assert named or "EPLB_EXPERT_WEIGHT_NAMES" in text
    if named:
        assert re.search(r'mlp\.experts\."? ?\+?|mlp\.experts\.\{name\}', text)
        assert "self.param_dict" in text
        assert not re.search(r"self\.moe_layers\b", text), "the layers are found through the model, by number"
    else:
        assert re.search(r"self\.moe_layers\b", text)


@every_release
def test_layers_count_in_place_what_arrived_in_both_conventions(source: Source) -> None:
    text = fused_moe(source)
    assert re.search(r"self\.moe_load(\.add_\(local_load\)| \+= expert_tokens)", text)
    assert "fused_experts_results.expert_tokens" in text
    assert re.search(r"group_list_type == 1", text)
    assert re.search(r"torch\.cat\(\[expert_tokens\[:1\], expert_tokens\[1:\] - expert_tokens\[:-1\]\]\)", text)
    if "load_counter" in text:
        assert "if self.multi_stage:" in text


@every_release
def test_what_the_adaptor_knows_as_a_layer_is_what_counts_and_routes(source: Source) -> None:
    """Else the counters we put in place would not be those that are added to."""
    classes = [node for node in ast.walk(ast.parse(fused_moe(source))) if isinstance(node, ast.ClassDef)]
    counting = {node.name for node in classes if re.search(r"self\.moe_load(\.add_\(| \+= )", ast.unparse(node))}
    registered = {node.name for node in classes if "VllmEplbAdaptor.register_layer(self)" in ast.unparse(node)}
    routing = {node.name for node in classes if re.search(r"self\.log2phy\b", ast.unparse(node))}
    assert counting, "no class counts"
    assert counting <= routing
    assert registered in (set(), counting)
    if not registered:
        assert counting == {"AscendFusedMoE"}, "found as `mlp.experts`"


@every_release
def test_routers_read_the_log2phy_map_by_indexing(source: Source) -> None:
    assert re.search(r"log2phy\[\w*topk_ids\]", fused_moe(source))


@every_release
def test_gathered_batches_are_masked_by_the_initial_experts(source: Source) -> None:
    """Why redundant experts are refused there; when this changes, the refusal can go."""
    assert re.search(r"mask = \(?expert_map\[topk_ids\] != -1\)?", fused_moe(source))
    context = source.text("ascend_forward_context")
    assert re.search(r"ALLGATHER = \d", context)
    arguments = source.function("ascend_forward_context", "select_moe_comm_method", **STUBS).__code__.co_varnames
    assert arguments[:2] == ("num_tokens", "vllm_config")


STUBS = {"MoECommType": int, "VllmConfig": object, "Optional": defaultdict(lambda: None)}


@every_release
def test_tensors_over_a_given_address_can_be_made(source: Source) -> None:
    assert "def weak_ref_tensor(tensor" in source.text("utils")


# -- Model Runner V1: the rules we restate, against theirs as it runs -----------------------------------------


def initial(source: Source) -> torch.Tensor:
    """`[ranks, experts]`, theirs for redundant experts."""
    place = source.function(UTILS, "generate_global_placement", np=np, torch=torch)
    shared = (0,) if len(inspect.signature(place).parameters) == 4 else ()
    placement = place(EXPERTS, RANKS, REDUNDANT, *shared)
    maps = torch.full((RANKS, EXPERTS), -1, dtype=torch.int32)
    for rank, row in enumerate(placement.to(torch.int64)):
        maps[rank, row] = torch.arange(len(row), dtype=torch.int32)
    return maps


@every_release
@pytest.mark.parametrize("tp_size", [1, 2])
def test_replicas_are_chosen_as_they_choose_them(source: Source, tp_size: int) -> None:
    choose = source.function(UTILS, "generate_log2phy_map", torch=torch, defaultdict=defaultdict)
    knows_tp = "tp_size" in inspect.signature(choose).parameters
    maps = initial(source)
    table = replicas_in_turn(placement_of(maps[None], num_nodes=1), tp_size=tp_size if knows_tp else 1)
    for rank in range(RANKS):
        theirs = choose(maps, rank, tp_size) if knows_tp else choose(maps, rank)
        assert torch.equal(torch.from_numpy(table[0, :, rank]), theirs), rank


@every_release
def test_their_initial_maps_and_ours_are_the_same(source: Source) -> None:
    maps = initial(source)
    placement = placement_of(maps[None], num_nodes=1)
    slots = placement.topology.slots_per_rank
    for rank in range(RANKS):
        ours = expert_maps(placement.physical_to_logical_map, rank=rank, slots_per_rank=slots, num_experts=EXPERTS)
        assert torch.equal(ours[0], maps[rank])


@every_release
def test_the_keys_we_set_are_known(source: Source) -> None:
    text = source.text("ascend_config")
    ours = flag.eplb_config({}, 4)
    assert set(ours) == {"dynamic_eplb", "num_redundant_experts"}
    assert all(re.search(rf"""["']{key}["']""", text) for key in ours)
    assert f'"{flag.SWITCH}"' in text + source.text("envs")
    assert 'additional_config.get("eplb_config"' in text


# -- Model Runner V2 ------------------------------------------------------------------------------------------

v2_releases = pytest.mark.parametrize("source", each_source(v2=True))


@v2_releases
def test_their_state_steps_through_vllms(source: Source) -> None:
    methods = source.methods("distributed.eplb_state", "AscendEplbState")
    assert "super().step(" in ast.unparse(methods["step"])
    text = source.text("distributed.eplb_state")
    assert "class AscendEplbState(_eplb_state.EplbState):" in text
    assert "expert_replica_routing_table" in text
    refresh = source.function("distributed.eplb_state", "refresh_model_routing_tables", Any=object)
    assert next(iter(inspect.signature(refresh).parameters)) == "model_state"


@v2_releases
def test_counters_are_kept_where_vllms_schedule_records(source: Source) -> None:
    step = ast.unparse(source.methods("worker.v2.eplb", "AscendEPLBController")["step"])
    assert "state._should_record_current_step(" in step
    assert "expert_load_pass.zero_()" in step


@v2_releases
def test_the_v2_recorder_understands_both_conventions(source: Source) -> None:
    """Theirs, as it runs: counts of this rank's slots, given per slot or summed up, land in its part of the row."""
    record = source.function("ops.fused_moe.eplb", "record_local_expert_load", torch=torch)
    for group_list_type, tokens in ((1, [3, 0, 5]), (0, [3, 3, 8])):
        row = torch.zeros(6, dtype=torch.int64)
        record(torch.tensor(tokens), group_list_type, row, 1, 2)
        assert row.tolist() == [0, 0, 0, 3, 0, 5]
