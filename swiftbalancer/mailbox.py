"""What the engine's threads and the link's thread hand each other: one request, its answer, and some news."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swiftbalancer.dispatch import nothing
from swiftbalancer.errors import BalancerError
from swiftbalancer.wire import Arrays, Frame, NothingToDo, Outcome, PlanReply, PlanRequest, Refused, Status

MAX_NEWS = 64
"""Outcomes and status reports that may wait for the link's thread; more are dropped, they are only news."""


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """The worker's answer to the outstanding request. `frames` are as received, for the broadcast to all ranks."""

    frames: Sequence[Frame]
    message: PlanReply | NothingToDo | Refused
    arrays: Arrays


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """No answer will come to `request`: the worker was lost, or refused this engine."""

    request: int
    error: BalancerError


@dataclass(frozen=True, slots=True, eq=False)
class News:
    """A message that needs no answer."""

    message: Outcome | Status
    arrays: Arrays | None


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A request on its way."""

    message: PlanRequest
    arrays: Arrays


class Mailbox:
    """At most one request at a time; no method ever waits for the other side.

    Closed at first: nothing is taken in before `open`, nor after `shut`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = False
        self._request: Request | None = None
        self._outstanding: int | None = None
        self._news: queue.Queue[News] = queue.Queue(MAX_NEWS)
        self._answers: queue.SimpleQueue[Reply | RequestFailed] = queue.SimpleQueue()
        self.on_answer: Callable[[], None] = nothing
        """Called when there is an answer to `poll`, on the link's thread."""

    @property
    def outstanding(self) -> int | None:
        """Number of the request that has no answer yet."""
        return self._outstanding

    def offer(self, request: Request) -> bool:
        """Takes a request in; False if the box is shut or another request is outstanding."""
        with self._lock:
            if not self._open or self._outstanding is not None:
                return False
            self._request, self._outstanding = request, request.message.request
            return True

    def offer_news(self, news: News) -> bool:
        """Takes news in; False if the box is shut or full."""
        if not self._open:
            return False
        try:
            self._news.put_nowait(news)
        except queue.Full:
            return False
        return True

    def poll(self) -> Reply | RequestFailed | None:
        """The next answer, if there is one."""
        try:
            return self._answers.get_nowait()
        except queue.Empty:
            return None

    def open(self) -> None:
        """From now on requests and news are taken in."""
        with self._lock:
            self._open = True

    def shut(self, error: BalancerError) -> None:
        """Takes nothing in any more; the outstanding request fails with `error`."""
        with self._lock:
            self._open = False
            lost, self._request, self._outstanding = self._outstanding, None, None
        if lost is not None:
            self._answers.put(RequestFailed(lost, error))
            self.on_answer()

    def take_request(self) -> Request | None:
        """The request not yet sent, once."""
        with self._lock:
            request, self._request = self._request, None
        return request

    def take_news(self) -> News | None:
        """The oldest news not yet sent, once."""
        try:
            return self._news.get_nowait()
        except queue.Empty:
            return None

    def answer(self, reply: Reply) -> bool:
        """Hands the answer over; False if it belongs to no outstanding request."""
        with self._lock:
            if reply.message.request != self._outstanding:
                return False
            self._outstanding = None
        self._answers.put(reply)
        self.on_answer()
        return True
