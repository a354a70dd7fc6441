"""What swiftbalancer replaces in a worker process of vllm-ascend with Model Runner V1."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from swiftbalancer.border import GroupInfo
from swiftbalancer.config import Config
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer_adaptors.vllm.flag import read
from swiftbalancer_adaptors.vllm.patching import Around, wrap
from swiftbalancer_adaptors.vllm_ascend.updator import SwiftUpdator, V1Engine

RUNNER = "vllm_ascend.worker.model_runner_v1"
WORKER = "vllm_ascend.worker.worker"


class IdleProcess:
    """In place of `EplbProcess`, and of the process it launches: nothing runs."""

    pid = 0

    def __init__(self, *_args: Any, shared_dict: Any = None, **_named: Any) -> None:
        self.shared_dict = shared_dict

    def _launch_process(self) -> IdleProcess:
        return self

    def is_alive(self) -> bool:
        return False


class LocalManager:
    """In place of `multiprocessing.Manager` in the runner, which starts a process to share one dict with another."""

    def dict(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**values}


def install() -> None:
    """Hooks the step that builds the model runner. Idempotent."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    wrap(WorkerWrapperBase, "init_device", init_device)


def init_device(wrapper: Any, original: Any, *args: Any, **named: Any) -> Any:
    """The runner is about to be built: it gets our updator, if the flag is given."""
    config = read(wrapper.vllm_config.additional_config)
    if config is not None:
        runner: Any = importlib.import_module(RUNNER)
        runner.EplbUpdator = partial(SwiftUpdator, engine_of(wrapper.vllm_config, config))
        runner.VllmEplbAdaptor = partial(adaptor_or_refusal, _original(runner.VllmEplbAdaptor))
        runner.EplbProcess = IdleProcess
        runner.Manager = LocalManager
        worker = importlib.import_module(WORKER).NPUWorker
        for name, around in WORKER_HOOKS.items():
            wrap(worker, name, around)
    return original(wrapper, *args, **named)


def adaptor_or_refusal(upstream: Any, *args: Any, **named: Any) -> Any:
    """vllm-ascend's adaptor; what it cannot take is refused in one line, whatever it says itself.

    Which quantisations it takes differs between releases, and some lack an attribute of the others' layouts.
    """
    try:
        return upstream(*args, **named)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedEngine(
            f"vllm-ascend {version('vllm-ascend')} cannot balance this model's experts ({error!r}): its adaptor does "
            "not know their quantisation with these settings; drop the swiftbalancer flag, or another quantisation"
        ) from error


def _original(adaptor: Any) -> Any:
    """Without our refusal, where it is there already."""
    return adaptor.args[0] if isinstance(adaptor, partial) else adaptor


# -- NPUWorker ------------------------------------------------------------------------------------------------


def compile_or_warm_up_model(worker: Any, original: Any, *args: Any, **named: Any) -> Any:
    result = original(worker, *args, **named)
    updator = updator_of(worker)
    if updator is not None:
        updator.begin_serving()
    return result


def sleep(worker: Any, original: Any, level: int = 1) -> Any:
    """Level 1 keeps the weights on the host; level 2 discards them, and with them every placement but the first."""
    updator = updator_of(worker)
    if updator is not None:
        updator.pause()
        worker._swiftbalancer_weights_lost = level >= 2
    return original(worker, level)


def wake_up(worker: Any, original: Any, tags: list[str] | None = None) -> Any:
    result = original(worker, tags)
    updator = updator_of(worker)
    if updator is not None and (tags is None or "weights" in tags):
        if getattr(worker, "_swiftbalancer_weights_lost", False):
            updator.weights_reloaded()
        else:
            updator.resume()
    return result


def reload_weights(worker: Any, original: Any, *args: Any, **named: Any) -> Any:
    result = original(worker, *args, **named)
    updator = updator_of(worker)
    if updator is not None:
        updator.weights_reloaded()
    return result


def shutdown(worker: Any, original: Any, *args: Any, **named: Any) -> Any:
    updator = updator_of(worker)
    if updator is not None:
        updator.shutdown()
    return original(worker, *args, **named)


WORKER_HOOKS: dict[str, Around] = {
    "compile_or_warm_up_model": compile_or_warm_up_model,
    "sleep": sleep,
    "wake_up": wake_up,
    "reload_weights": reload_weights,
    "shutdown": shutdown,
}


def updator_of(worker: Any) -> SwiftUpdator | None:
    """Ours; None before the runner is built, or without the flag."""
    updator = getattr(getattr(worker, "model_runner", None), "eplb_updator", None)
    return updator if isinstance(updator, SwiftUpdator) else None


# -- what the engine says about itself ------------------------------------------------------------------------


def engine_of(vllm_config: Any, config: Config) -> V1Engine:
    parallel = vllm_config.parallel_config
    return V1Engine(
        config=config,
        model=str(vllm_config.model_config.model),
        tp_size=int(parallel.tensor_parallel_size),
        num_nodes=partial(num_nodes, config),
        group=group_info,
        gathers_tokens=partial(gathers_tokens, vllm_config),
    )


def num_nodes(config: Config) -> int:
    """Hosts the group is spread over, as configured, or where its ranks divide evenly over them; else 1."""
    from vllm.distributed.parallel_state import get_ep_group, in_the_same_node_as

    if config.num_nodes:
        return config.num_nodes
    group = get_ep_group()
    on_first = sum(in_the_same_node_as(group.cpu_group, source_rank=0))
    return int(group.world_size // on_first) if group.world_size % on_first == 0 else 1


def group_info(device: torch.device, name: str) -> GroupInfo:
    """This rank in the group that shares its experts, with torch's default store."""
    from torch.distributed.distributed_c10d import _get_default_store
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group()
    ranks = "-".join(str(rank) for rank in group.ranks)
    return GroupInfo(
        rank=group.rank_in_group,
        size=group.world_size,
        store=_get_default_store(),
        device=device,
        prefix=f"swiftbalancer/{ranks}/ascend/{name}",
    )


def gathers_tokens(vllm_config: Any) -> bool:
    """Whether vllm-ascend would gather the tokens of its smallest or its largest batch."""
    context = importlib.import_module("vllm_ascend.ascend_forward_context")
    largest = int(vllm_config.scheduler_config.max_num_batched_tokens)
    chosen = [context.select_moe_comm_method(tokens, vllm_config) for tokens in (1, largest)]
    return context.MoECommType.ALLGATHER in chosen
