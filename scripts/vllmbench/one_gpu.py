"""Several ranks of vLLM on one GPU, which NCCL refuses, for hosts with a single one.

Ranks share the GPU's multiprocessors, so steps take longer than on a GPU each, and nothing is said about links. What
steps cost on the host is as it is elsewhere. Start NVIDIA's multi-process service before (`nvidia-cuda-mps-control
-d`): without it, ranks take turns on the GPU by time slices, and each of a step's all-reduces lasts for some.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker

CHUNK_BYTES = 4 << 20
"""Of a gather; vLLM's own all-reduce takes less than 8 MiB."""


class OneGpuWorker(Worker):  # type: ignore[misc]
    """Takes the first GPU whatever its rank, gloo in NCCL's place, and vLLM's own all-reduce for tensors."""

    def init_device(self) -> None:
        share_one_gpu()
        self.local_rank = 0
        super().init_device()


def share_one_gpu() -> None:
    """Lets vLLM's communicators be made by ranks of the same GPU."""
    os.environ["VLLM_DISABLE_PYNCCL"] = "1"
    from vllm.distributed.device_communicators import custom_all_reduce
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    platform.dist_backend = "gloo"
    platform.is_fully_connected = classmethod(lambda _, __: True)
    custom_all_reduce._can_p2p = lambda _, __: True  # its own memory is within its reach
    CudaCommunicator.all_gather = _gather_by_sums


def _gather_by_sums(communicator: Any, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """An all-gather, which gloo has not for a GPU's memory, as sums of what is zero but for the own part."""
    parts = tensor.new_zeros((communicator.world_size, *tensor.shape))
    parts[communicator.rank_in_group] = tensor
    chunks = torch.split(parts.flatten(), CHUNK_BYTES // tensor.element_size())
    gathered = torch.cat([communicator.all_reduce(chunk) for chunk in chunks])
    return torch.cat(gathered.view(parts.shape).unbind(), dim=dim)
