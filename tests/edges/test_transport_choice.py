"""Which transport ranks end up with, and that they all end up with the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch._C._distributed_c10d import TCPStore
from typing_extensions import override

from swiftbalancer.device import DeviceLayer, Gloo
from swiftbalancer.device.cuda import Nccl
from swiftbalancer.device.npu import Hccl
from swiftbalancer.errors import ConfigError, TransferFailed
from swiftbalancer.transport import (
    TransferState,
    Workplace,
    choose,
)
from swiftbalancer.transport import candidates as choosing
from swiftbalancer.transport.copy_engine import CopyEngineCarrier
from tests.edges.ranks import run_ranks
from tests.edges.scripted_device import ScriptedLayer
from tests.edges.transport_case import (
    DEADLINE_S,
    LocalPeerMemory,
    batch_of,
    cpu_gloo,
    finish_batch,
    place_on,
)


@pytest.mark.parametrize(("kind", "name"), [("auto", "p2p-gloo"), ("copy_engine", "p2p-gloo"), ("p2p", "p2p-gloo")])
def test_cpu_ranks_always_get_gloo(kind: str, name: str) -> None:
    def body(rank: int, store: TCPStore) -> str:
        place = place_on(rank, store, size=2)
        agree = place.groups.create("agree", timeout_s=DEADLINE_S)
        transport = choose(kind, place, agree, one_node=True)
        transport.close(DEADLINE_S)
        return transport.name

    assert run_ranks(2, body) == [name, name]


def test_all_ranks_fall_back_when_one_cannot_connect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NoPeerAccess(LocalPeerMemory):
        @override
        def map(self, handle: bytes) -> int:
            raise TransferFailed("cudaIpcOpenMemHandle: peer access is not supported (217)")

    def candidates(_kind: str, place: Workplace, *, one_node: bool) -> list[choosing.Candidate]:
        assert one_node
        memory = NoPeerAccess if place.groups.rank == 1 else LocalPeerMemory
        engine = choosing.Candidate("copy-engine", lambda: CopyEngineCarrier(place.layer, place.groups, memory))
        return [engine, choosing.Candidate("p2p-gloo", lambda: cpu_gloo(place))]

    monkeypatch.setattr(choosing, "_candidates", candidates)

    def body(rank: int, store: TCPStore) -> str:
        place = place_on(rank, store, size=2)
        agree = place.groups.create("agree", timeout_s=DEADLINE_S)
        transport = choose("auto", place, agree, one_node=True)
        transport.start(batch_of((0, 0, 3)))
        assert finish_batch(transport).state is TransferState.DONE
        transport.close(DEADLINE_S)
        return transport.name

    assert run_ranks(2, body) == ["p2p-gloo", "p2p-gloo"]
    lines = [record.getMessage() for record in caplog.records if "fell back" in record.getMessage()]
    assert len(lines) == 2, "one line per rank"
    assert any("peer access is not supported" in line for line in lines)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=1)
        agree = place.groups.create("agree", timeout_s=DEADLINE_S)
        with pytest.raises(ConfigError, match="unknown 'rdma'; known: auto, p2p, copy_engine, gloo"):
            choose("rdma", place, agree, one_node=True)

    run_ranks(1, body)


class OldNccl(Nccl):
    """Works here, by gloo, and says it is of the version."""

    def __init__(self, version: tuple[int, ...]) -> None:
        self._version = version

    @override
    def version(self) -> tuple[int, ...]:
        return self._version


@pytest.mark.parametrize(("version", "warned"), [((2, 28, 9), True), ((2, 30, 1), False)])
def test_a_library_version_seen_to_hang_is_named(
    version: tuple[int, ...], warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def candidates(_kind: str, place: Workplace, *, one_node: bool) -> list[choosing.Candidate]:
        assert one_node
        return [choosing.Candidate("p2p-nccl", lambda: cpu_gloo(place), OldNccl(version))]

    monkeypatch.setattr(choosing, "_candidates", candidates)

    def body(rank: int, store: TCPStore) -> None:
        place = place_on(rank, store, size=1)
        agree = place.groups.create("agree", timeout_s=DEADLINE_S)
        choose("p2p", place, agree, one_node=True).close(DEADLINE_S)

    run_ranks(1, body)
    assert ("transport=p2p-nccl NCCL 2.28.9" in caplog.text) == warned


def test_nothing_is_known_against_the_other_libraries() -> None:
    assert Gloo().doubt() == Hccl().doubt() == ""


class Accelerator(ScriptedLayer):
    """A device whose library is HCCL, with or without memory that peers reach."""

    collective = Hccl()

    def __init__(self, *, shares: bool) -> None:
        super().__init__()
        self.can_share_memory = shares


@pytest.mark.parametrize(
    ("kind", "one_node", "shares", "names"),
    [
        ("auto", True, True, ["copy-engine", "p2p-hccl", "p2p-gloo-staged"]),
        ("auto", False, True, ["p2p-hccl", "p2p-gloo-staged"]),
        ("auto", True, False, ["p2p-hccl", "p2p-gloo-staged"]),
        ("p2p", True, True, ["p2p-hccl", "p2p-gloo-staged"]),
        ("copy_engine", True, False, ["copy-engine", "p2p-hccl", "p2p-gloo-staged"]),
        ("gloo", True, True, ["p2p-gloo-staged"]),
    ],
)
def test_an_accelerators_candidates_in_order(kind: str, one_node: bool, shares: bool, names: list[str]) -> None:
    def body(rank: int, store: TCPStore) -> list[str]:
        place = replace(place_on(rank, store, size=1), layer=Accelerator(shares=shares))
        return [candidate.name for candidate in choosing._candidates(kind, place, one_node=one_node)]

    assert run_ranks(1, body) == [names]


def test_memory_that_cannot_be_shared_says_so() -> None:
    with pytest.raises(TransferFailed, match="cpu memory cannot be shared"):
        DeviceLayer.for_device("cpu").peer_memory()
