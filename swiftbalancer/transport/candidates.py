"""Which carrier fits: copy engines where all ranks reach each other's memory, else send and receive."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from swiftbalancer.device import Collective
from swiftbalancer.errors import ConfigError, TransferFailed
from swiftbalancer.groups import Group
from swiftbalancer.transport.batch_run import Workplace
from swiftbalancer.transport.copy_engine import CopyEngineCarrier
from swiftbalancer.transport.mover import Transport
from swiftbalancer.transport.p2p import CollectiveCarrier, GlooCarrier, HostStagedCarrier
from swiftbalancer.transport.seam import Carrier

log = logging.getLogger(__name__)

MakeCarrier = Callable[[], Carrier]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to carry bytes, its name in logs, and the device's library if it rests on that."""

    name: str
    make: MakeCarrier
    collective: Collective | None = None


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
        if _all_agree(agree, transport, problem, 2 * place.limits.deadline_s):
            if candidate.collective is not None and (doubt := candidate.collective.doubt()):
                log.warning("transport=%s %s", candidate.name, doubt)
            if problems:
                log.warning("transport=%s fell back because %s", candidate.name, "; ".join(problems))
            return transport
        problems.append(f"{candidate.name}: {problem or 'another rank could not connect'}")
        transport.close(place.limits.deadline_s)
    raise TransferFailed(f"no transport works: {'; '.join(problems)}")


def _candidates(kind: str, place: Workplace, *, one_node: bool) -> list[Candidate]:
    """In order of preference; the last resort of every accelerator is gloo through host memory."""
    layer = place.layer
    if kind not in ("auto", "p2p", "copy_engine", "gloo"):
        raise ConfigError(f"transport.kind: unknown {kind!r}; known: auto, p2p, copy_engine, gloo")
    if not layer.is_accelerator:
        return [Candidate("p2p-gloo", partial(GlooCarrier, layer.device))]
    staged = Candidate("p2p-gloo-staged", partial(HostStagedCarrier, layer, place.limits.chunk_bytes))
    carrier = partial(CollectiveCarrier, layer, place.groups, place.limits)
    p2p = Candidate(f"p2p-{layer.backend}", carrier, layer.collective)
    engine = Candidate("copy-engine", partial(CopyEngineCarrier, layer, place.groups, rest=place.rest))
    if kind == "gloo":
        return [staged]
    if kind == "p2p" or (kind == "auto" and not (one_node and layer.can_share_memory)):
        return [p2p, staged]
    return [engine, p2p, staged]


def _all_agree(agree: Group, transport: Transport, problem: str, deadline_s: float) -> bool:
    try:
        return agree.all_agree(not problem, deadline_s)
    except RuntimeError as error:
        transport.close(deadline_s)
        raise TransferFailed(
            f"transport {transport.name}: a rank has not said whether it connected: {error}"
        ) from None


def _connect(transport: Transport, deadline_s: float) -> str:
    try:
        transport.connect(deadline_s)
    except TransferFailed as error:
        return str(error)
    return ""
