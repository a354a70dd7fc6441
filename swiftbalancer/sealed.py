"""A message's frames as one block of bytes with its digest, for the broadcast between ranks.

Nothing here copies megabytes under the interpreter's lock, which the forward path needs, too: frames are views of
the block, and numpy lets go of the lock where it copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from swiftbalancer.errors import WireError
from swiftbalancer.wire import Frame

ALIGNMENT = 64
"""Frames begin at multiples of this many bytes, as arrays like it."""
SEAL_BYTES = 8
_encoder = msgspec.msgpack.Encoder()
_lengths: msgspec.msgpack.Decoder[list[int]] = msgspec.msgpack.Decoder(list[Annotated[int, msgspec.Meta(ge=0)]])


def pack(frames: Sequence[Frame]) -> NDArray[np.uint8]:
    """`[n]`: the lengths of the frames, the frames, and the seal."""
    head = _encoder.encode([len(frame) for frame in frames])
    pieces = [len(head).to_bytes(4, "little") + head, *frames]
    starts = list(_starts([len(piece) for piece in pieces]))
    block = np.zeros(starts[-1] + SEAL_BYTES, np.uint8)
    for start, piece in zip(starts, pieces, strict=False):
        block[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
    block[-SEAL_BYTES:] = np.frombuffer(digest(block[:-SEAL_BYTES]).to_bytes(SEAL_BYTES, "little"), np.uint8)
    return block


def unpack(block: Frame | NDArray[np.uint8]) -> list[Frame]:
    """The frames of `pack`, read-only views; raises `WireError` if the block is cut or damaged."""
    view = _view(block)
    if len(view) < 4 + SEAL_BYTES or digest(view[:-SEAL_BYTES]) != seal(view):
        raise WireError(f"a block of {len(view)} bytes does not match its digest")
    head = 4 + int.from_bytes(view[:4], "little")
    try:
        lengths = _lengths.decode(view[4:head])
    except msgspec.DecodeError as error:
        raise WireError(f"a block's frame lengths are unreadable: {error}") from None
    *starts, end = _starts([head, *lengths])
    if end + SEAL_BYTES != len(view):
        raise WireError("a block's frame lengths do not add up")
    return [view[start : start + length] for start, length in zip(starts[1:], lengths, strict=True)]


def seal(block: Frame | NDArray[np.uint8]) -> int:
    """The digest at the end of a block; that of the block where `unpack` did not refuse it."""
    return int.from_bytes(_view(block)[-SEAL_BYTES:], "little")


def digest(data: Frame | NDArray[np.uint8]) -> int:
    """62-bit fingerprint of bytes: against damage, not against an attacker."""
    return xxhash.xxh3_64_intdigest(_view(data)) >> 2


def _view(data: Frame | NDArray[np.uint8]) -> memoryview:
    buffer: Any = data  # an array is one, too, which its types do not say
    return memoryview(buffer).toreadonly()


def _starts(lengths: Sequence[int]) -> Iterator[int]:
    """Where each piece begins, and where the last one ends."""
    end = 0
    for length in lengths:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        yield start
        end = start + length
    yield end
