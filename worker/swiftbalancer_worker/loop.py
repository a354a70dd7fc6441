"""The worker's one loop: receive, answer, then record and publish."""

from __future__ import annotations

import time

import zmq

from swiftbalancer.wire import MAX_FRAMES
from swiftbalancer_worker.listen import Listener
from swiftbalancer_worker.process import Lifeline
from swiftbalancer_worker.service import Service
from swiftbalancer_worker.status import encode_view

CHECK_EVERY_MS = 1000
MESSAGES_PER_TURN = 32
"""Messages answered before recording and the lifeline get their turn."""


def serve(service: Service, listener: Listener, lifeline: Lifeline) -> None:
    """Answers until the lifeline says to end."""
    poller = zmq.Poller()
    poller.register(listener.requests, zmq.POLLIN)
    for fd in lifeline.fds:
        poller.register(fd, zmq.POLLIN)
    while True:
        ready = dict(poller.poll(CHECK_EVERY_MS))
        lifeline.check([fd for fd in ready if isinstance(fd, int)])
        if not lifeline.wanted:
            return
        if listener.requests in ready:
            _answer(service, listener)
        now = time.monotonic()
        listener.check_door(now)
        service.settle(now)
        view = service.view(now)
        if view is not None:
            listener.publish(encode_view(view))


def _answer(service: Service, listener: Listener) -> None:
    for _ in range(MESSAGES_PER_TURN):
        received = listener.receive(MAX_FRAMES + 2)
        if received is None:
            return
        reply = service.handle(received[0], received[1:], now=time.monotonic())
        if reply is not None:
            listener.reply(received[0], reply)
