"""The real worker, which commits one offence when a file asks for it.

Run in place of `python -m swiftbalancer_worker`, with its arguments; `SCRIPTED_WORKER` names the file. Whoever
wants a fault writes its name there; the worker removes the file as it commits it.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from swiftbalancer import wire
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker import __main__ as command
from swiftbalancer_worker import service
from swiftbalancer_worker.inputs import PlanInput
from swiftbalancer_worker.planner import Planner

Answer = Callable[[Planner, wire.PlanRequest, PlanInput], list[bytes]]
real_answer: Answer = vars(service)["answer"]
last_frames: list[list[bytes]] = []


def answer(planner: Planner, request: wire.PlanRequest, given: PlanInput) -> list[bytes]:
    """What the engine gets for a request: the planner's answer, or the offence asked for."""
    asked = Path(os.environ["SCRIPTED_WORKER"])
    frames = real_answer(planner, request, given)
    is_plan = isinstance(wire.decode(frames)[0], wire.PlanReply)
    if asked.exists() and (is_plan or asked.read_text() in ANY_TIME):
        name = asked.read_text()
        asked.unlink()
        print(f"WARNING scripted: {name}", file=sys.stderr, flush=True)
        frames = OFFENCES[name](frames)
    if is_plan:
        last_frames[:] = [frames]
    return frames


def exits(_: list[bytes]) -> list[bytes]:
    os._exit(7)


def runs_out_of_memory(_: list[bytes]) -> list[bytes]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    try:
        return [np.ones(1 << 31).tobytes()]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def babbles(_: list[bytes]) -> list[bytes]:
    return [b"\xc1 this is not a message", b"\0" * 100]


def sends_too_many_frames(frames: list[bytes]) -> list[bytes]:
    return frames + [b"x"] * wire.MAX_FRAMES


def sends_an_oversized_header(_: list[bytes]) -> list[bytes]:
    return [b"\x81" * (wire.MAX_HEADER_BYTES + 1)]


def plans_for_another_topology(frames: list[bytes]) -> list[bytes]:
    header, arrays = plan_reply(frames)
    other = Placement.initial(Topology(4, 8), 16, num_layers=2)
    arrays |= {"rows": other.physical_to_logical_map, "layers": np.arange(2, dtype=np.int32)}
    return sealed(header, arrays)


def names_a_wrong_digest(frames: list[bytes]) -> list[bytes]:
    header, arrays = plan_reply(frames)
    return sealed(msgspec.structs.replace(header, base_digest=header.base_digest ^ 1), arrays)


def names_a_stale_epoch(frames: list[bytes]) -> list[bytes]:
    header, arrays = plan_reply(frames)
    return sealed(msgspec.structs.replace(header, base_epoch=header.base_epoch + 1), arrays)


def sends_tokens_to_a_foreign_slot(frames: list[bytes]) -> list[bytes]:
    header, arrays = plan_reply(frames)
    table = arrays["table"].copy()
    table[0, 0] = table[0, 1]
    return sealed(header, arrays | {"table": table})


def answers_an_older_request(frames: list[bytes]) -> list[bytes]:
    """The answer before last again; the right one never comes."""
    return last_frames[0] if last_frames else babbles(frames)


def is_silent(_: list[bytes]) -> list[bytes]:
    time.sleep(3600)
    return []


OFFENCES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    f.__name__: f
    for f in (
        exits,
        runs_out_of_memory,
        babbles,
        sends_too_many_frames,
        sends_an_oversized_header,
        plans_for_another_topology,
        names_a_wrong_digest,
        names_a_stale_epoch,
        sends_tokens_to_a_foreign_slot,
        answers_an_older_request,
        is_silent,
    )
}
ANY_TIME = {"exits", "runs_out_of_memory", "babbles", "is_silent"}


def plan_reply(frames: list[bytes]) -> tuple[wire.PlanReply, wire.Arrays]:
    message, arrays = wire.decode(frames)
    assert isinstance(message, wire.PlanReply)
    return message, arrays


def sealed(header: wire.PlanReply, arrays: wire.Arrays) -> list[bytes]:
    return wire.encode(msgspec.structs.replace(header, arrays=wire.specs(arrays)), arrays)


def main() -> int:
    vars(service)["answer"] = answer
    return command.main()


if __name__ == "__main__":
    sys.exit(main())
