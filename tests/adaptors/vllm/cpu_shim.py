"""What vLLM's CPU build lacks for expert parallelism with balancing: a test vehicle, not part of the product.

`install` patches the process it is called in. It is also the entry point of a throw-away `vllm.general_plugins`
distribution, so that the worker processes of a server get it too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

HASH_MULTIPLIER = 2654435769


class EplbPlatform:
    """`vllm.config.parallel`'s platform, saying yes to the one question that gates expert balancing."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def is_cuda_alike(self) -> bool:
        return True


class CpuEvent:
    """`torch.Event` without a device: it has happened as soon as it is recorded."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        self._at_s = 0.0

    def record(self, *_stream: Any) -> None:
        self._at_s = time.perf_counter()

    def wait(self, *_stream: Any) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: CpuEvent) -> float:
        return (other._at_s - self._at_s) * 1e3


class CpuStream:
    """A stream whose work is done when its call returns."""

    device = torch.device("cpu")

    def synchronize(self) -> None:
        return None

    def wait_stream(self, _stream: Any) -> None:
        return None

    def wait_event(self, _event: Any) -> None:
        return None

    def record_event(self, event: Any = None) -> Any:
        event = event or CpuEvent()
        event.record()
        return event


def map_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """vLLM's Triton kernel in torch: expert -> slot by the token's hash, and one count for each real token."""
    ids = topk_ids.long()
    token = torch.arange(ids.shape[0]).unsqueeze(-1)
    column = ((token * HASH_MULTIPLIER) & 0xFFFFFFFF) % logical_replica_count[ids].clamp(min=1)
    slots = logical_to_physical_map[ids, column]
    counted = (slots >= 0) & record_enabled
    if num_unpadded_tokens is not None:
        counted = counted & (token < num_unpadded_tokens)
    ones = counted.flatten().to(expert_load_view.dtype)
    expert_load_view.scatter_add_(0, slots.clamp(min=0).flatten(), ones)
    return slots.to(topk_ids.dtype)


def local_experts_only(original: Callable[..., Any]) -> Callable[..., Any]:
    """CPU expert kernels ignore `expert_map`: tokens of other ranks' slots get weight 0 here."""

    signature = inspect.signature(original)

    @functools.wraps(original)
    def apply(*args: Any, **named: Any) -> Any:
        bound = signature.bind(*args, **named)
        expert_map = bound.arguments.get("expert_map")
        if expert_map is not None:
            local = expert_map[bound.arguments["topk_ids"].long()]
            absent = local < 0
            weights = bound.arguments["topk_weights"]
            bound.arguments["topk_ids"] = local.masked_fill(absent, 0).to(torch.int32).contiguous()
            bound.arguments["topk_weights"] = weights.masked_fill(absent, 0.0).contiguous()
        return original(*bound.args, **bound.kwargs)

    return apply


def load_with_eplb(original: Callable[..., Any]) -> Callable[..., Any]:
    """CPU's model runner steps an `EplbState` it never builds: build it, as the GPU's runner does."""

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        _allocate_stage_inputs(self)
        if not self.parallel_config.enable_eplb:
            return
        from vllm.distributed.eplb.eplb_state import EplbState
        from vllm.model_executor.models.interfaces import is_mixture_of_experts

        self._moe_model = self.model if is_mixture_of_experts(self.model) else None
        self.eplb_state = EplbState(self.parallel_config, self.device)
        drafter = getattr(self, "drafter", None)
        if drafter is not None and is_mixture_of_experts(getattr(drafter, "model", None)):
            self.eplb_state.add_model(drafter.model, self.speculative_config.draft_model_config)
            drafter.set_eplb_state(self.eplb_state)
        if self._moe_model is not None:
            self.eplb_state.add_model(self.model, self.model_config)
        if self.eplb_state.is_async:
            self.eplb_state.start_async_loop()

    return load_model


def _allocate_stage_inputs(runner: Any) -> None:
    """Later pipeline stages get their input buffers in a profile pass, which an eager CPU engine does not make."""
    from vllm.distributed.parallel_state import get_pp_group

    if not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )


@contextlib.contextmanager
def cpu_events_and_streams() -> Iterator[None]:
    """CPU's model runner swaps torch's events for a placeholder without times; this one has them."""
    stream = torch.cuda.Stream
    torch.Event = CpuEvent  # type: ignore[assignment,misc]
    torch.cuda.Stream = lambda *_args, **_named: CpuStream()  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.cuda.Stream = stream  # type: ignore[misc]


def all_gatherv(self: Any, inputs: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """`[n_r, ...]` of every rank `r`, concatenated; one tensor or a list of them."""
    if isinstance(inputs, list):
        return [all_gatherv(self, one, dim, sizes) for one in inputs]
    counts = sizes or [inputs.shape[0]] * self.world_size
    padded = inputs.new_zeros((max(counts), *inputs.shape[1:]))
    padded[: inputs.shape[0]] = inputs
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def reduce_scatterv(self: Any, inputs: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """This rank's rows of the sum over ranks."""
    assert dim in (0, -1)
    total = inputs.contiguous().clone()
    dist.all_reduce(total, group=self.device_group)
    counts = sizes or [inputs.shape[0] // self.world_size] * self.world_size
    first = sum(counts[: self.rank_in_group])
    return total[first : first + counts[self.rank_in_group]]


def group_name_of_this_run(original: Callable[..., str]) -> staticmethod[..., str]:
    """Shared memory of in-process engines is named after nothing but ranks: runs side by side would collide."""

    def make_group_name(communicator: Any) -> str:
        return f"/sb{os.environ.get('MASTER_PORT', '')}{original(communicator).strip('/')}"

    return staticmethod(make_group_name)


def install() -> None:
    """Patches vLLM in this process. Idempotent."""
    from vllm.config import parallel
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or isinstance(parallel.current_platform, EplbPlatform):
        return
    parallel.current_platform = EplbPlatform(parallel.current_platform)
    _patch_layers()
    _patch_sleep()
    _patch_runner()
    import vllm.distributed.device_communicators.cpu_communicator as communicator

    communicator.CpuCommunicator.all_gatherv = all_gatherv
    communicator.CpuCommunicator.reduce_scatterv = reduce_scatterv
    shared = communicator._CPUSHMDistributed
    shared.make_group_name = group_name_of_this_run(shared.make_group_name)


def _patch_layers() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.router import base_router

    base_router.eplb_map_to_physical_and_record = map_and_record
    CPUUnquantizedExperts.apply = local_experts_only(CPUUnquantizedExperts.apply)


def _patch_runner() -> None:
    from vllm.v1.worker import cpu_model_runner

    runner = cpu_model_runner.CPUModelRunner
    runner.load_model = load_with_eplb(runner.load_model)
    cpu_model_runner._torch_cuda_wrapper = cpu_events_and_streams
    torch.Event = torch.cuda.Event = CpuEvent  # type: ignore[assignment,misc]
    stream = CpuStream()
    torch.accelerator.current_stream = lambda *_args, **_named: stream  # type: ignore[assignment]


def _patch_sleep() -> None:
    """CPU's worker ignores sleep: it shall do what the GPU's does, with a backend that a test gives it.

    Importing that worker puts vLLM's own placeholders where torch's events are.
    """
    from vllm.v1.worker.cpu_worker import CPUWorker

    for name in ("sleep", "wake_up"):
        delattr(CPUWorker, name)
    torch.accelerator.synchronize = lambda *_args, **_named: None
    torch.accelerator.get_memory_info = lambda *_args, **_named: (1 << 30, 1 << 31)
