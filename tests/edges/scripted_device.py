"""A device whose work runs late: the ordering bugs of an accelerator, on a CPU and on demand.

`launch` only queues. Work runs when somebody waits for an event, and then in an order drawn by lot that honours
nothing but the streams themselves and the waits between them. Code that forgot a wait reads old bytes.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from typing_extensions import override

from swiftbalancer.device import DeviceLayer, Event, Stream


@dataclass(slots=True, eq=False)
class Marker:
    """One recording of an event."""

    stream: ScriptedStream
    reached: bool = False


@dataclass(slots=True, eq=False)
class Work:
    """An entry of a stream: an operation, a marker to reach, or a marker of another stream to wait for."""

    op: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    reach: Marker | None = None
    wait: Marker | None = None


@dataclass(slots=True, eq=False)
class ScriptedStream:
    layer: ScriptedLayer
    queue: deque[Work] = field(default_factory=deque)

    def synchronize(self) -> None:
        event = self.layer.event()
        self.layer.record(event, self)
        event.synchronize()

    def blocked_by(self) -> Marker | None:
        """The marker its next entry waits for, if that has not been reached."""
        marker = self.queue[0].wait
        return marker if marker is not None and not marker.reached else None


@dataclass(slots=True, eq=False)
class ScriptedEvent:
    layer: ScriptedLayer
    marker: Marker | None = None

    def query(self) -> bool:
        """Each look lets the device do one thing, so that polling gets somewhere."""
        self.layer.run_something()
        return self.marker is None or self.marker.reached

    def synchronize(self) -> None:
        if self.marker is not None:
            self.layer.run_until(self.marker)


class ScriptedLayer(DeviceLayer):
    """`hurry` is the chance that, before each needed piece of work, some other stream gets to run one of its own."""

    def __init__(self, seed: int = 0, *, hurry: float = 0.3) -> None:
        super().__init__(torch.device("cpu"))
        self._random = random.Random(seed)
        self._hurry = hurry
        self._lock = threading.RLock()
        self._streams: list[ScriptedStream] = []
        self._current = threading.local()
        self._main = self.side_stream()
        self.num_run = 0

    @override
    def side_stream(self) -> ScriptedStream:
        stream = ScriptedStream(self)
        with self._lock:
            self._streams.append(stream)
        return stream

    @override
    def current_stream(self) -> ScriptedStream:
        stream: ScriptedStream = getattr(self._current, "stream", self._main)
        return stream

    @override
    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        return self._entered(stream)

    @contextmanager
    def _entered(self, stream: Stream) -> Iterator[Stream]:
        before = self.current_stream()
        self._current.stream = stream
        try:
            yield stream
        finally:
            self._current.stream = before

    @override
    def event(self, *, timing: bool = False) -> Event:
        return ScriptedEvent(self)

    @override
    def record(self, event: Event, stream: Stream | None = None) -> None:
        assert isinstance(event, ScriptedEvent)
        target = self.current_stream() if stream is None else stream
        assert isinstance(target, ScriptedStream)
        event.marker = Marker(target)
        self._queue(target, Work(reach=event.marker))

    @override
    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, ScriptedEvent)
        assert isinstance(stream, ScriptedStream)
        if event.marker is not None:
            self._queue(stream, Work(wait=event.marker))

    @override
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    @override
    def bind_thread(self) -> None:
        return None

    @override
    def launch(self, op: Callable[..., Any], *args: Any) -> None:
        self._queue(self.current_stream(), Work(op=op, args=args))

    @override
    def synchronize(self) -> None:
        with self._lock:
            while any(stream.queue for stream in self._streams):
                self.run_something()

    def run_something(self) -> None:
        """One entry of a stream drawn by lot, if any can run."""
        with self._lock:
            able = [stream for stream in self._streams if stream.queue and stream.blocked_by() is None]
            if able:
                self._run_next(self._random.choice(able))

    def run_until(self, marker: Marker) -> None:
        """What the marker needs, and now and then something it does not need."""
        with self._lock:
            while not marker.reached:
                if self._random.random() < self._hurry:
                    self.run_something()
                elif (blocker := marker.stream.blocked_by()) is not None:
                    self.run_until(blocker)
                else:
                    self._run_next(marker.stream)

    def _queue(self, stream: ScriptedStream, work: Work) -> None:
        with self._lock:
            stream.queue.append(work)

    def _run_next(self, stream: ScriptedStream) -> None:
        work = stream.queue.popleft()
        if work.op is not None:
            work.op(*work.args)
            self.num_run += 1
        if work.reach is not None:
            work.reach.reached = True


class DeafLayer(ScriptedLayer):
    """Drops every wait of one stream for another: what a forgotten `wait_event` does."""

    @override
    def wait(self, stream: Stream, event: Event) -> None:
        return None
