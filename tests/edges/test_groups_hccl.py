"""What an HCCL group asks of torch_npu, on a stand-in that knows only names torch_npu has."""

from __future__ import annotations

import sys
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from swiftbalancer.device import PeerOp
from swiftbalancer.device.npu import Hccl
from swiftbalancer.groups import Group, GroupFactory


class Options:
    """`ProcessGroupHCCL.Options`: its fields, and no others."""

    __slots__ = ("_timeout", "global_ranks_in_group", "group_id", "hccl_config", "is_high_priority_stream")


class ScriptedHccl:
    """`ProcessGroupHCCL` as far as a group may use it; any other name is an AttributeError."""

    def __init__(self, _store: Any, rank: int, size: int, options: Options) -> None:
        self.rank, self.size, self.options = rank, size, options
        self.calls: list[Any] = []

    def _set_sequence_number_for_group(self) -> None:
        self.calls.append("sequence")

    def batch_isend_irecv(self, kinds: list[str], tensors: list[torch.Tensor], peers: list[int]) -> Any:
        self.calls.append((kinds, [tensor.tolist() for tensor in tensors], peers))
        return SimpleNamespace(wait=lambda: True)

    def abort_hccl_comm(self, reason: str) -> None:
        self.calls.append(reason)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    module: Any = ModuleType("torch_npu._C._distributed_c10d")
    module.ProcessGroupHCCL = type("ProcessGroupHCCL", (ScriptedHccl,), {"Options": Options})
    for name in ("torch_npu", "torch_npu._C"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    factory = GroupFactory(HashStore(), rank=1, size=4, prefix="p")
    return factory.create("weights", collective=Hccl(), timeout_s=30.0)


def test_the_communicator_is_our_own_with_a_bounded_buffer(group: Group) -> None:
    options = group._raw.options
    assert (group._raw.rank, group._raw.size) == (1, 4)
    assert options.hccl_config == {"hccl_buffer_size": 64}
    assert options.group_id == "p/weights"
    assert options._timeout == timedelta(seconds=30)
    assert options.is_high_priority_stream is False
    assert group._raw.calls == ["sequence"]


def test_a_round_is_one_batch_in_its_order(group: Group) -> None:
    ops = [PeerOp(True, torch.tensor([1]), 2), PeerOp(False, torch.tensor([2]), 0)]
    (work,) = group.exchange(ops)
    assert work.wait()
    assert group._raw.calls[-1] == (["isend", "irecv"], [[1], [2]], [2, 0])


def test_closing_aborts_and_does_so_once(group: Group) -> None:
    raw = group._raw
    group.close()
    group.abort()
    group.close()
    assert raw.calls[1:] == ["given up by swiftbalancer"]
