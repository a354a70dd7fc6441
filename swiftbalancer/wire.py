"""What an engine and a worker say to each other: msgpack headers and raw array frames, versioned, bounded.

A message is a list of frames: the msgpack header (one of `Message`), then the raw bytes of each array that the
header's `arrays` describes. Nothing is ever pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from swiftbalancer.errors import WireError
from swiftbalancer.plan import Plan, PlanKind
from swiftbalancer.topology import Topology

PROTOCOL_VERSION = 1
MAX_HEADER_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 512 << 20
"""Far above any real plan: 94 layers x 512 experts x 1,024 columns of int32 take 197 MB."""
MAX_FRAMES = 16
MAX_SUB_WINDOWS = 64
"""Sub-windows in one request."""
DTYPES = ("<i4", "<i8", "<f4", "<f8")
HELLO_FIRST = "say hello first: this worker does not know the engine"
"""Reason of the refusal that a restarted worker gives an engine it has not met."""
WORKER_FAILED = "the worker failed"
"""First words of a refusal that is the worker's fault, not the engine's; another worker may do better."""

Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
Natural = Annotated[int, Meta(ge=0, le=2**62)]
Dimension = Annotated[int, Meta(ge=0, le=1 << 24)]


class ArraySpec(msgspec.Struct, frozen=True):
    """Name, dtype and shape of one raw frame."""

    name: Name
    dtype: Name
    shape: Annotated[list[Dimension], Meta(max_length=4)]


class ModelSpec(msgspec.Struct, frozen=True):
    """The model being balanced, as far as planning needs it."""

    name: Name
    num_layers: Annotated[int, Meta(ge=1, le=4096)]
    num_experts: Annotated[int, Meta(ge=1, le=65536)]
    top_k: Annotated[int, Meta(ge=1, le=1024)]
    expert_bytes: Natural
    """Bytes of all tensors of one expert in one layer."""


class Measured(msgspec.Struct, frozen=True):
    """What the engine measured; 0 where it has not yet."""

    seconds_per_step: float = 0.0
    transfer_bytes_per_s: float = 0.0
    step_inflation: float = 0.0
    """Longer step time while moving, as a fraction."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Engine to worker: who asks, and for which model."""

    engine: Name
    model: ModelSpec
    topology: Topology
    config: dict[str, Any]
    """`config.to_dict` of the engine's configuration."""
    protocol: int = PROTOCOL_VERSION


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Worker to engine: ready; `pid` of the worker."""

    pid: int
    policy: Name
    protocol: int = PROTOCOL_VERSION


class PlanRequest(msgspec.Struct, frozen=True, tag="plan_request"):
    """Engine to worker: plan for this state. Holds all a plan needs, so a restarted worker can answer.

    Arrays: `placement` [layers, slots] int32; `loads` [sub_windows, layers, experts] float32, tokens, oldest
    first; `table` [layers, experts, width] int32, the dispatch in force. `loads` may hold more sub-windows than
    `window.sub_windows`: those the worker has not heard of yet. It plans from the last ones.
    """

    request: Natural
    kind: PlanKind
    epoch: Natural
    step: Natural
    dispatch_kind: Name
    dispatch_width: Annotated[int, Meta(ge=1, le=1024)]
    staging_experts: Annotated[int, Meta(ge=1)]
    steps_per_sub_window: Annotated[int, Meta(ge=1)]
    measured: Measured
    arrays: Annotated[list[ArraySpec], Meta(max_length=MAX_FRAMES)]
    window_epochs: Annotated[list[Natural], Meta(max_length=MAX_SUB_WINDOWS)] = []
    """Placement epoch of each of `loads`; empty: all `epoch`."""
    window_steps: Annotated[list[Natural], Meta(max_length=MAX_SUB_WINDOWS)] = []
    """Step after which each of `loads` ended, the last one `step`; empty: at even distances."""
    observe_only: bool = False
    """No plan is wanted: the worker records, and answers `NothingToDo`."""


class PlanReply(msgspec.Struct, frozen=True, tag="plan_reply"):
    """Worker to engine, and broadcast from rank 0 to all ranks: a plan. Arrays are those of `Plan`."""

    request: Natural
    kind: PlanKind
    base_epoch: Natural
    base_digest: Natural
    imbalance_now: float
    """Mean over layers, predicted for the coming loads if nothing changes."""
    imbalance_predicted: float
    plan_seconds: float
    cross_node_bytes: Natural
    arrays: Annotated[list[ArraySpec], Meta(max_length=MAX_FRAMES)]


class NothingToDo(msgspec.Struct, frozen=True, tag="nothing_to_do"):
    """Worker to engine: no change is worth its cost; says why."""

    request: Natural
    reason: Text
    imbalance_now: float
    imbalance_predicted: float
    plan_seconds: float


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Worker to engine: the request cannot be answered; says why."""

    request: Natural
    reason: Text


class Outcome(msgspec.Struct, frozen=True, tag="outcome"):
    """Engine to worker: how a cycle ended, for the recording and the live view."""

    request: Natural
    kind: PlanKind
    committed: bool
    reason: Text
    epoch: Natural
    step: Natural
    moves: Natural
    moved_bytes: Natural
    imbalance: float
    """Measured over the last sub-window, mean over layers."""
    phase_steps: dict[str, int]


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Engine to worker, a few times a minute: what the live view shows. Arrays: `rank_loads` [layers, ranks]."""

    engine: Name
    step: Natural
    epoch: Natural
    phase: Name
    mode: Name
    imbalance: float
    metrics: dict[str, float]
    arrays: Annotated[list[ArraySpec], Meta(max_length=MAX_FRAMES)]


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """Engine to worker: no more requests from this engine."""

    engine: Name


Message = Hello | Welcome | PlanRequest | PlanReply | NothingToDo | Refused | Outcome | Status | Goodbye
Arrays = dict[str, NDArray[Any]]
Frame = bytes | memoryview
"""A view where `bytes` would be a copy of megabytes under the interpreter's lock, which forward passes need, too."""
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


def specs(arrays: Arrays) -> list[ArraySpec]:
    """The descriptions that go into a header."""
    return [ArraySpec(name, _dtype(array), list(array.shape)) for name, array in arrays.items()]


def encode(message: Message, arrays: Arrays | None = None) -> list[bytes]:
    """Frames of `message`; its `arrays` field must be `specs(arrays)`."""
    return [bytes(frame) for frame in encode_views(message, arrays)]


def encode_views(message: Message, arrays: Arrays | None = None) -> list[Frame]:
    """As `encode`; arrays are copied by numpy, which lets go of the interpreter's lock meanwhile."""
    frames: list[Frame] = [_encoder.encode(message)]
    for array in (arrays or {}).values():
        copied: Any = np.array(array, _dtype(array), order="C")
        frames.append(memoryview(copied).cast("B") if copied.size else b"")
    return frames


def decode(frames: Sequence[Frame]) -> tuple[Message, Arrays]:
    """Message and its arrays (read-only views of the frames); raises `WireError` saying what is wrong."""
    if not frames or len(frames) > MAX_FRAMES + 1:
        raise WireError(f"a message of {len(frames)} frames; between 1 and {MAX_FRAMES + 1} are allowed")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(frames[0])} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if sum(len(f) for f in frames) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
    try:
        message = _decoder.decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a message of protocol {PROTOCOL_VERSION}: {error}") from None
    except (ValueError, TypeError) as error:
        raise WireError(f"a message with impossible values: {error}") from None
    except Exception as error:  # a value type refuses itself, e.g. a topology that does not divide
        raise WireError(f"a message with impossible values: {error}") from None
    return message, _arrays(getattr(message, "arrays", []), frames[1:])


def plan_arrays(plan: Plan) -> Arrays:
    """The arrays of a `PlanReply`."""
    return {
        "layers": plan.layers,
        "rows": plan.rows,
        "moves": plan.moves,
        "layer_batch": plan.layer_batch,
        "move_batch": plan.move_batch,
        "table": plan.table,
    }


def num_moves(reply: PlanReply) -> int:
    """How many experts a plan moves, by what its header says."""
    return next((spec.shape[0] for spec in reply.arrays if spec.name == "moves"), 0)


def plan_of(reply: PlanReply, arrays: Arrays) -> Plan:
    """The plan in a reply; raises `WireError` if an array is missing or of another kind."""
    ranks = {"layers": 1, "rows": 2, "moves": 2, "layer_batch": 1, "move_batch": 1, "table": 3}
    for name, ndim in ranks.items():
        array = arrays.get(name)
        if array is None or array.dtype != np.int32 or array.ndim != ndim:
            raise WireError(f"plan {reply.request}: array {name!r} is missing or not int32 of {ndim} dimensions")
    return Plan(
        kind=reply.kind,
        base_epoch=reply.base_epoch,
        base_digest=reply.base_digest,
        **{n: arrays[n] for n in ranks},
    )


def _dtype(array: NDArray[Any]) -> str:
    text = array.dtype.newbyteorder("<").str
    if text not in DTYPES:
        raise WireError(f"arrays of {array.dtype} are not sent; allowed are {', '.join(DTYPES)}")
    return text


def _arrays(described: Sequence[ArraySpec], frames: Sequence[Frame]) -> Arrays:
    if len(described) != len(frames):
        raise WireError(f"{len(described)} arrays are announced, {len(frames)} frames follow")
    out: Arrays = {}
    for spec, frame in zip(described, frames, strict=True):
        if spec.dtype not in DTYPES:
            raise WireError(f"array {spec.name!r} has dtype {spec.dtype!r}; allowed are {', '.join(DTYPES)}")
        dtype = np.dtype(spec.dtype)
        if prod(spec.shape) * dtype.itemsize != len(frame):
            raise WireError(f"array {spec.name!r} of shape {spec.shape} does not fit its {len(frame)} bytes")
        out[spec.name] = np.frombuffer(memoryview(frame).toreadonly(), dtype).reshape(spec.shape)
    return out
