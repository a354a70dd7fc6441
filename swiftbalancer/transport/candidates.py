"""Which carrier fits: copy engines where all ranks reach each other's memory, else send and receive."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from swiftbalancer.errors import ConfigError, TransferFailed
from swiftbalancer.groups import Group
from swiftbalancer.transport.batch_run import Workplace
from swiftbalancer.transport.copy_engine import CopyEngineCarrier
from swiftbalancer.transport.mover import Transport
from swiftbalancer.transport.p2p import CollectiveCarrier, GlooCarrier, HostStagedCarrier
from swiftbalancer.transport.seam import Carrier

log = logging.getLogger(__name__)

NCCL_TRUSTED = (2, 30)
MakeCarrier = Callable[[], Carrier]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to carry bytes, and its name in logs."""

    name: str
    make: MakeCarrier


def choose(kind: str, place: Workplace, agree: Group, *, one_node: bool) -> Transport:
    """The connected transport of the first candidate that works on every rank. Collective; blocks, for attach.

    `agree` is a gloo group of the same ranks. Raises `ConfigError` for an unknown kind, `TransferFailed` if no
    candidate works.
    """
    candidates = _candidates(kind, place, one_node=one_node)
    problems: list[str] = []
    for candidate in candidates:
        transport = Transport(place, candidate.make, name=candidate.name)
        problem = _connect(transport, place.limits.deadline_s)
        if _all_agree(agree, problem == "", place.limits.deadline_s):
            warn_of_version(candidate.name, place.layer.collective_version)
            if problems:
                log.warning("transport=%s fell back because %s", candidate.name, "; ".join(problems))
            return transport
        problems.append(f"{candidate.name}: {problem or 'another rank could not connect'}")
        transport.close(place.limits.deadline_s)
    raise TransferFailed(f"no transport works: {'; '.join(problems)}")


def warn_of_version(name: str, version: tuple[int, ...]) -> None:
    """Says so where the chosen transport rests on a library version that was seen to hang."""
    if name == "p2p-nccl" and version and version < NCCL_TRUSTED:
        text = ".".join(str(number) for number in version)
        log.warning(
            "transport=%s NCCL %s: versions before 2.30 were reported to hang beside other streams under high load "
            "(pytorch issue 174288); transport.kind copy_engine or gloo does not use NCCL",
            name,
            text,
        )


def _candidates(kind: str, place: Workplace, *, one_node: bool) -> list[Candidate]:
    """In order of preference; the last resort of every accelerator is gloo through host memory."""
    layer = place.layer
    if kind not in ("auto", "p2p", "copy_engine", "gloo"):
        raise ConfigError(f"transport.kind: unknown {kind!r}; known: auto, p2p, copy_engine, gloo")
    if not layer.is_accelerator:
        return [Candidate("p2p-gloo", partial(GlooCarrier, layer.device))]
    staged = Candidate("p2p-gloo-staged", partial(HostStagedCarrier, layer, place.limits.chunk_bytes))
    p2p = Candidate(f"p2p-{layer.backend}", partial(CollectiveCarrier, layer, place.groups, place.limits))
    engine = Candidate("copy-engine", partial(CopyEngineCarrier, layer, place.groups))
    if kind == "gloo":
        return [staged]
    if kind == "p2p" or (kind == "auto" and not (one_node and layer.can_share_memory)):
        return [p2p, staged]
    return [engine, p2p, staged]


def _connect(transport: Transport, deadline_s: float) -> str:
    try:
        transport.connect(deadline_s)
    except TransferFailed as error:
        return str(error)
    return ""


def _all_agree(group: Group, mine: bool, deadline_s: float) -> bool:
    votes = torch.zeros(group.size, 1, dtype=torch.int64)
    group.wait(group.all_gather(votes, torch.tensor([int(mine)])), 2 * deadline_s)
    return bool(votes.all())
