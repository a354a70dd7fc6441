"""Ascend NPUs, with HCCL, by torch_npu, which is imported only here and only when an NPU is asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from swiftbalancer.device.accelerator import AcceleratorLayer, device_module
from swiftbalancer.device.collective import Collective, Membership, PeerOp
from swiftbalancer.errors import ConfigError

BUFFER_MB = 64
"""HCCL takes it twice for each communicator; its own default is 200."""
BASE_FORMATS = frozenset({-1, 0, 1, 2, 30})
"""ACL's undefined, NCHW, NHWC, ND and NCDHW: bytes in the order of the strides."""


class Hccl(Collective):
    """HCCL as torch_npu builds a group outside torch's registry."""

    name = "hccl"

    @override
    def join(self, membership: Membership) -> Any:
        c10d = importlib.import_module("torch_npu._C._distributed_c10d")
        options = c10d.ProcessGroupHCCL.Options()
        options.is_high_priority_stream = False
        options._timeout = membership.timeout
        options.global_ranks_in_group = []
        options.group_id = membership.name
        options.hccl_config = {"hccl_buffer_size": BUFFER_MB}
        group = c10d.ProcessGroupHCCL(membership.store, membership.rank, membership.size, options)
        group._set_sequence_number_for_group()
        return group

    @override
    def exchange(self, raw: Any, ops: Sequence[PeerOp]) -> list[dist.Work]:
        """HCCL's own batch. torch_npu's coalescing is no substitute: old releases post one by one, so that ranks
        which all send first wait forever, and from 2.10.0.post2 it takes a wrong device for groups like ours."""
        kinds = ["isend" if op.is_send else "irecv" for op in ops]
        return [raw.batch_isend_irecv(kinds, [op.tensor for op in ops], [op.peer for op in ops])]

    @override
    def abort(self, raw: Any) -> None:
        raw.abort_hccl_comm("given up by swiftbalancer")


class NpuLayer(AcceleratorLayer):
    """Devices that torch calls `npu` once torch_npu is loaded."""

    collective = Hccl()

    def __init__(self, device: str) -> None:
        self._extension = load_extension()  # before torch.device, which does not know the name otherwise
        super().__init__(torch.device(device), device_module("npu"))

    @override
    def has_private_format(self, _tensor: torch.Tensor) -> bool:
        return int(self._extension.get_npu_format(_tensor)) not in BASE_FORMATS


def load_extension() -> Any:
    """torch_npu; raises `ConfigError` with one line on what is missing. Torch may load it itself at import."""
    try:
        return importlib.import_module("torch_npu")
    except ModuleNotFoundError as error:
        raise ConfigError(f"device: npu needs torch_npu ({error.name} is not installed)") from error
    except (ImportError, OSError, RuntimeError) as error:
        home = os.environ.get("ASCEND_HOME_PATH", "not set")
        raise ConfigError(
            f"device: torch_npu does not load ({error}); is CANN there? ASCEND_HOME_PATH is {home}"
        ) from error
