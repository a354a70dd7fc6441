"""Rank 0's line to the worker: one thread that owns the socket, the worker process and every wait for them.

The engine's threads only put requests in and take replies out; neither ever blocks. A worker that dies, hangs,
stops (SIGSTOP) or answers rubbish costs the request it was working on: it is killed and, after a pause that
doubles up to a minute, a new one takes its place.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import zmq

from swiftbalancer import endpoint as endpoints
from swiftbalancer import wire
from swiftbalancer.config import WorkerConfig
from swiftbalancer.errors import BalancerError, ConfigError, WireError, WorkerLost
from swiftbalancer.interpreter_lock import stand_back
from swiftbalancer.mailbox import Mailbox, News, Reply, Request, RequestFailed
from swiftbalancer.sockets import Bell, check_keys, connect, poll_ms, send
from swiftbalancer.supervisor import WorkerProcess

log = logging.getLogger(__name__)
MAX_BACKOFF_S = 60.0
LONGEST_HELLO_S = 180.0
"""For a worker that others started: connecting to it anew interrupts nothing it may be compiling."""


class LinkState(str, Enum):
    """What the link is doing."""

    STARTING = "starting"
    READY = "ready"
    LOST = "lost"
    RESTARTING = "restarting"
    REFUSED = "refused"
    CLOSED = "closed"


@dataclass(slots=True)
class _Life:
    """One worker (or one connection to a worker we did not start) and what we wait for from it."""

    socket: zmq.Socket[bytes]
    deadline: float
    """Monotonic time by which the worker must have answered; infinite while nothing is asked."""
    process: WorkerProcess | None = None


class WorkerLink:
    """Connects rank 0 with its worker; starts and supervises the worker unless `config.spawn` is false.

    `request`, `send` and `poll` may be called from any thread and never block. `close` is bounded.
    """

    def __init__(self, hello: wire.Hello, config: WorkerConfig) -> None:
        """Starts the link's thread; raises `ConfigError` for an endpoint or keys that cannot work."""
        self._hello, self._config = hello, config
        self._endpoint = None if config.endpoint is None else endpoints.parse(config.endpoint)
        check_keys(config, self._endpoint)
        self.state = LinkState.STARTING
        self.restarts = 0
        """Workers started (or connections opened) beyond the first."""
        self.welcome: wire.Welcome | None = None
        self.last_error: BalancerError | None = None
        self._mailbox = Mailbox()
        self._settled = threading.Event()
        self._closing = threading.Event()
        self._close_timeout_s = 5.0
        self._life: _Life | None = None
        self._backoff_s = config.restart_backoff_s
        self._bell = Bell()
        self._thread = threading.Thread(target=self._main, name="swiftbalancer-link", daemon=True)
        self._thread.start()

    # -- the engine's threads ---------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str | None:
        """Where the worker listens; None before a private endpoint has been made."""
        return None if self._endpoint is None else self._endpoint.text

    @property
    def is_ready(self) -> bool:
        """Whether the worker answers, as far as we know."""
        return self.state is LinkState.READY

    @property
    def worker_pid(self) -> int | None:
        """Process id the worker gave in its welcome."""
        return None if self.welcome is None else self.welcome.pid

    def wait_ready(self, timeout_s: float) -> wire.Welcome:
        """Waits for the first welcome (for start-up only); raises what kept the worker from it, or `WorkerLost`."""
        self._settled.wait(timeout_s)
        if self.welcome is not None:
            return self.welcome
        raise self.last_error or WorkerLost(f"the worker did not answer the hello within {timeout_s:g} s")

    def request(self, message: wire.PlanRequest, arrays: wire.Arrays) -> bool:
        """Hands a request over; False if the worker is not ready or still has one. Arrays must not change after."""
        taken = self._mailbox.offer(Request(message, arrays))
        if taken:
            self._bell.ring()
        return taken

    def send(self, message: wire.Outcome | wire.Status, arrays: wire.Arrays | None = None) -> bool:
        """Hands news over that needs no answer; False (and forgotten) if the worker is not there to hear it."""
        taken = self._mailbox.offer_news(News(message, arrays))
        if taken:
            self._bell.ring()
        return taken

    def poll(self) -> Reply | RequestFailed | None:
        """The answer to the outstanding request once it is there, or why there will be none."""
        return self._mailbox.poll()

    def tell(self, on_answer: Callable[[], None]) -> None:
        """`on_answer` is called whenever `poll` has something, on the link's thread."""
        self._mailbox.on_answer = on_answer

    def close(self, timeout_s: float) -> None:
        """Ends link and worker within about `timeout_s`; the worker is killed if it does not end by itself."""
        self._close_timeout_s = timeout_s
        self._closing.set()
        self._bell.ring()
        self._thread.join(timeout_s + 1.0)
        life = self._life
        if self._thread.is_alive() and life is not None and life.process is not None:
            life.process.kill()
        self.state = LinkState.CLOSED

    # -- the link's thread ------------------------------------------------------------------------------------

    def _main(self) -> None:
        stand_back()
        context = zmq.Context()
        try:
            while not self._closing.is_set():
                self._live_once(context)
                self._rest()
        finally:
            self.state = LinkState.CLOSED
            self._mailbox.shut(WorkerLost("the link was closed"))
            context.destroy(linger=0)
            self._remove_private_folder()
            self._bell.close()

    def _live_once(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """One worker from start to end; its end is in `last_error`, or nothing was wrong and we are closing."""
        try:
            self._life = self._begin(context)
            self._serve(self._life)
        except BalancerError as error:
            self._lose(error)
        except Exception as error:
            log.exception("the link to the worker failed")
            self._lose(WorkerLost(f"the link failed: {error!r}"))
        finally:
            self._end_life()

    def _begin(self, context: zmq.Context[zmq.Socket[bytes]]) -> _Life:
        if self._endpoint is None:
            self._endpoint = endpoints.private_endpoint()
        socket = connect(context, self._endpoint, self._config)
        life = _Life(socket, deadline=time.monotonic() + self._hello_s)
        try:
            life.process = WorkerProcess(self._endpoint.text, self._config) if self._config.spawn else None
        except BalancerError:
            socket.close(linger=0)
            raise
        socket.send_multipart(wire.encode(self._hello))
        return life

    def _serve(self, life: _Life) -> None:
        """Until we are closing; raises `WorkerLost` when the worker is."""
        poller = zmq.Poller()
        poller.register(life.socket, zmq.POLLIN)
        poller.register(self._bell.fd, zmq.POLLIN)
        if life.process is not None:
            poller.register(life.process.life_fd, zmq.POLLERR)
            poller.register(life.process.stderr_fd, zmq.POLLIN)
        while not self._closing.is_set():
            ready = dict(poller.poll(poll_ms(life.deadline)))
            if life.socket in ready:
                self._receive(life)
            if life.process is not None:
                self._watch(life.process, ready, poller)
            if self._bell.fd in ready:
                self._bell.silence()
            self._send_all(life)
            if time.monotonic() > life.deadline:
                raise WorkerLost(self._silence())

    @property
    def _hello_s(self) -> float:
        config = self._config
        return config.start_timeout_s if config.spawn else min(config.start_timeout_s, LONGEST_HELLO_S)

    def _watch(self, process: WorkerProcess, ready: dict[object, int], poller: zmq.Poller) -> None:
        if process.stderr_fd in ready and not process.read_stderr():
            poller.unregister(process.stderr_fd)
        if process.life_fd in ready:
            raise WorkerLost(process.end_reason())

    def _silence(self) -> str:
        if self._mailbox.outstanding is None:
            return f"no answer to the hello within {self._hello_s:g} s ({self.endpoint})"
        return f"no answer to request {self._mailbox.outstanding} within {self._config.plan_timeout_s:g} s"

    def _send_all(self, life: _Life) -> None:
        request = self._mailbox.take_request()
        if request is not None:
            life.deadline = time.monotonic() + self._config.plan_timeout_s
            if not send(life.socket, request.message, request.arrays):
                raise WorkerLost("the worker does not take any more messages")
        news = self._mailbox.take_news()
        while news is not None:
            send(life.socket, news.message, news.arrays)
            news = self._mailbox.take_news()

    def _receive(self, life: _Life) -> None:
        while True:
            try:
                frames: list[wire.Frame] = [f.buffer for f in life.socket.recv_multipart(zmq.DONTWAIT, copy=False)]
            except zmq.Again:
                return
            try:
                message, arrays = wire.decode(frames)
            except WireError as error:
                raise WorkerLost(f"the worker sent rubbish: {error}") from None
            self._take(life, Reply(frames, message, arrays) if isinstance(message, _ANSWERS) else message)

    def _take(self, life: _Life, received: Reply | wire.Message) -> None:
        if isinstance(received, wire.Welcome):
            self._welcomed(life, received)
        elif not isinstance(received, Reply):
            raise WorkerLost(f"the worker sent a {type(received).__name__}, which only engines send")
        elif isinstance(received.message, wire.Refused) and self.state is not LinkState.READY:
            lost = received.message.reason.startswith(wire.WORKER_FAILED)
            raise (WorkerLost if lost else _Refusal)(received.message.reason)
        elif isinstance(received.message, wire.Refused) and received.message.reason == wire.HELLO_FIRST:
            raise WorkerLost("the worker was restarted and does not know this engine yet")
        elif self._mailbox.answer(received):
            life.deadline = float("inf")
            self._backoff_s = self._config.restart_backoff_s

    def _welcomed(self, life: _Life, welcome: wire.Welcome) -> None:
        log.info("worker ready pid=%d policy=%s endpoint=%s", welcome.pid, welcome.policy, self.endpoint)
        life.deadline = float("inf")
        self.welcome, self.last_error = welcome, None
        self.state = LinkState.READY
        self._mailbox.open()
        self._settled.set()

    def _lose(self, error: BalancerError) -> None:
        refused = isinstance(error, _Refusal)
        self.state = LinkState.REFUSED if refused else LinkState.LOST
        self.last_error = ConfigError(str(error)) if refused else error
        self._mailbox.shut(self.last_error)
        self._settled.set()
        what = "refused this engine" if refused else f"lost, next try in {self._backoff_s:.1f} s"
        log.warning("worker %s: %s", what, error)

    def _rest(self) -> None:
        """Pauses before the next life; for ever after a refusal, which another try would not change."""
        if self._closing.is_set():
            return
        end = float("inf") if self.state is LinkState.REFUSED else time.monotonic() + self._backoff_s
        poller = zmq.Poller()
        poller.register(self._bell.fd, zmq.POLLIN)
        while not self._closing.is_set() and time.monotonic() < end:
            if poller.poll(poll_ms(end)):
                self._bell.silence()
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
        self.restarts += 1
        self.state = LinkState.RESTARTING

    def _end_life(self) -> None:
        life, self._life = self._life, None
        if life is None:
            return
        if self._closing.is_set():
            with contextlib.suppress(zmq.ZMQError):
                life.socket.send_multipart(wire.encode(wire.Goodbye(self._hello.engine)), zmq.DONTWAIT)
        life.socket.close(linger=200 if self._closing.is_set() else 0)
        if life.process is not None and self._closing.is_set():
            life.process.stop(self._close_timeout_s)
        elif life.process is not None:
            life.process.kill()

    def _remove_private_folder(self) -> None:
        if self._config.endpoint is None and self._endpoint is not None and self._endpoint.path is not None:
            shutil.rmtree(self._endpoint.path.parent, ignore_errors=True)


class _Refusal(BalancerError):
    """The worker answered the hello with a no."""


_ANSWERS = (wire.PlanReply, wire.NothingToDo, wire.Refused)
