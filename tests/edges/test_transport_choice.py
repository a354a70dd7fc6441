"""Which transport ranks end up with, and that they all end up with the same."""

from __future__ import annotations

import pytest
from torch._C._distributed_c10d import TCPStore
from typing_extensions import override

from swiftbalancer.errors import ConfigError, TransferFailed
from swiftbalancer.transport import (
    TransferState,
    Workplace,
    choose,
)
from swiftbalancer.transport import candidates as choosing
from swiftbalancer.transport.copy_engine import CopyEngineCarrier
from tests.edges.ranks import run_ranks
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


@pytest.mark.parametrize(
    ("name", "version", "warned"),
    [
        ("p2p-nccl", (2, 28, 9), True),
        ("p2p-nccl", (2, 30, 1), False),
        ("copy-engine", (2, 28, 9), False),
        ("p2p-hccl", (), False),
    ],
)
def test_a_library_version_seen_to_hang_is_named(
    name: str, version: tuple[int, ...], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    choosing.warn_of_version(name, version)
    assert ("NCCL 2.28.9" in caplog.text) == warned
