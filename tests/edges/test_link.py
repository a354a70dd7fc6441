"""Rank 0's line to the worker, with real worker processes and real sockets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from swiftbalancer import endpoint as endpoints
from swiftbalancer.config import WorkerConfig
from swiftbalancer.errors import ConfigError, WorkerLost
from swiftbalancer.link import LinkState, WorkerLink
from swiftbalancer.mailbox import MAX_NEWS, Mailbox, News, Reply, Request, RequestFailed
from swiftbalancer.wire import (
    Goodbye,
    Hello,
    NothingToDo,
    PlanReply,
    Refused,
    Status,
    Welcome,
    decode,
    encode,
    plan_of,
)
from tests.edges.engines import (
    LONG_S,
    PLACEMENT,
    StandaloneWorker,
    ask,
    environment,
    hello,
    is_alive,
    plan_request,
    wait_for,
)

pytestmark = pytest.mark.timeout(170)
QUICK = WorkerConfig(plan_timeout_s=2.0, start_timeout_s=LONG_S, restart_backoff_s=0.05, niceness=0)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "NUMBA_DISABLE_JIT"):
        monkeypatch.setenv(name, environment()[name])


@pytest.fixture
def link() -> Iterator[WorkerLink]:
    made = WorkerLink(hello(policy={"name": "random"}), QUICK)
    yield made
    made.close(5.0)


def test_a_spawned_worker_plans_and_its_frames_can_be_passed_on(link: WorkerLink) -> None:
    welcome = link.wait_ready(LONG_S)
    answer = ask(link, 1)
    assert isinstance(answer, Reply)
    assert isinstance(answer.message, PlanReply)
    message, arrays = decode(answer.frames)
    assert message == answer.message
    assert isinstance(message, PlanReply)
    plan_of(message, arrays).validate(PLACEMENT, staging_experts=4)
    assert welcome.policy == "random"
    assert link.worker_pid == welcome.pid
    assert is_alive(welcome.pid)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Popen cannot make a process group")
def test_the_engines_ctrl_c_is_not_its_workers_and_niceness_counts_between_them(link: WorkerLink) -> None:
    worker = link.wait_ready(LONG_S).pid
    assert os.getpgid(worker) == worker, "a terminal would interrupt it with the engine"
    assert os.getsid(worker) == os.getsid(0), "it would be scheduled against the engine's whole session"


def test_only_one_request_is_outstanding_and_asking_never_waits(link: WorkerLink) -> None:
    assert not link.request(*plan_request(1)), "the worker cannot be ready yet"
    os.kill(link.wait_ready(LONG_S).pid, signal.SIGSTOP)
    assert link.request(*plan_request(1))
    assert not link.request(*plan_request(2))
    assert link.poll() is None


def test_a_worker_killed_at_work_costs_that_request_and_is_replaced(link: WorkerLink) -> None:
    first = link.wait_ready(LONG_S).pid
    os.kill(first, signal.SIGSTOP)
    assert link.request(*plan_request(1))
    os.kill(first, signal.SIGKILL)
    lost = wait_for(link.poll)
    assert isinstance(lost, RequestFailed)
    assert lost.request == 1
    assert "signal 9" in str(lost.error)
    assert isinstance(ask(link, 2), Reply)
    assert link.worker_pid not in (None, first)
    assert link.restarts == 1


def test_a_worker_killed_while_idle_is_replaced_before_anyone_asks(link: WorkerLink) -> None:
    first = link.wait_ready(LONG_S).pid
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: link.is_ready and link.worker_pid != first)
    assert isinstance(ask(link, 1), Reply)


def test_a_stopped_worker_is_killed_after_the_plan_timeout(link: WorkerLink) -> None:
    first = link.wait_ready(LONG_S).pid
    os.kill(first, signal.SIGSTOP)
    lost = ask(link, 1)
    assert isinstance(lost, RequestFailed)
    assert "no answer to request 1 within 2 s" in str(lost.error)
    wait_for(lambda: not is_alive(first))
    assert isinstance(ask(link, 2), Reply)


def test_an_unknown_policy_is_refused_with_the_known_ones_and_not_tried_again() -> None:
    link = WorkerLink(hello(policy={"name": "swifft"}), QUICK)
    try:
        with pytest.raises(ConfigError, match=r"unknown 'swifft'; known: .*greedy.*swift"):
            link.wait_ready(LONG_S)
        assert link.state is LinkState.REFUSED
        assert not link.request(*plan_request(1))
        time.sleep(3 * QUICK.restart_backoff_s)
        assert link.restarts == 0
    finally:
        link.close(5.0)


def test_a_worker_that_cannot_start_says_why_and_is_tried_again_ever_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ERROR no such library' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    link = WorkerLink(hello(), QUICK)
    try:
        with pytest.raises(WorkerLost, match=r"exited: 3.*no such library"):
            link.wait_ready(LONG_S)
        began = time.monotonic()
        wait_for(lambda: link.restarts >= 4)
        assert time.monotonic() - began > QUICK.restart_backoff_s * (2 + 4 + 8) * 0.9
    finally:
        link.close(5.0)


def test_closing_leaves_no_process_thread_file_or_folder() -> None:
    link = WorkerLink(hello(), QUICK)
    pid = link.wait_ready(LONG_S).pid
    assert link.endpoint is not None
    folder = Path(link.endpoint.removeprefix("ipc://")).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    link.close(10.0)
    assert link.state is LinkState.CLOSED
    assert not is_alive(pid)
    assert not folder.exists()
    assert "swiftbalancer-link" not in {thread.name for thread in threading.enumerate()}
    assert not link.request(*plan_request(1))


def test_closing_gives_every_descriptor_back_and_may_be_done_twice() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        link = WorkerLink(hello(), WorkerConfig(spawn=False, endpoint="ipc:///tmp/nobody-listens-here.sock"))
        link.close(5.0)
        link.close(5.0)
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_closing_kills_a_worker_that_does_not_end(link: WorkerLink) -> None:
    pid = link.wait_ready(LONG_S).pid
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    link.close(0.5)
    assert time.monotonic() - began < LONG_S
    assert not is_alive(pid)


ORPHAN = """
import signal, sys
from swiftbalancer.link import WorkerLink
from tests.edges.engines import hello
from tests.edges.test_link import QUICK
link = WorkerLink(hello(), QUICK)
print(link.wait_ready(60).pid, link.endpoint, flush=True)
signal.pause()
"""


def test_the_worker_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, env=environment())
    assert parent.stdout is not None
    pid, endpoint = parent.stdout.readline().split()
    assert is_alive(int(pid))
    parent.kill()
    parent.wait(LONG_S)
    wait_for(lambda: not is_alive(int(pid)))
    wait_for(lambda: not Path(endpoint.removeprefix("ipc://")).parent.exists())


def test_what_a_killed_engine_and_worker_left_is_removed_by_the_next(
    link: WorkerLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    link.wait_ready(LONG_S)
    assert link.endpoint is not None
    served = Path(link.endpoint.removeprefix("ipc://"))
    leftover = Path(endpoints.private_endpoint().text.removeprefix("ipc://"))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as dead:
        dead.bind(f"ipc://{leftover}")
        endpoints.lock_path(leftover).touch()
        assert [e.path for e in endpoints.find_endpoints() if e.path in (served, leftover)] == [served]
        monkeypatch.setattr(endpoints, "LEFTOVER_AGE_S", -1.0)
        endpoints.private_endpoint().path.parent.rmdir()  # type: ignore[union-attr]
        assert not leftover.parent.exists()
        assert served.exists()


def test_a_link_finds_a_worker_that_is_started_later(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/sb.sock"
    link = WorkerLink(hello(), WorkerConfig(spawn=False, endpoint=endpoint, restart_backoff_s=0.05))
    try:
        with pytest.raises(WorkerLost, match=r"no worker of this user listens on .*swiftbalancer worker"):
            link.wait_ready(LONG_S)
        worker = StandaloneWorker(endpoint, folder=tmp_path).wait_listening()
        assert isinstance(ask(link, 1), Reply)
        assert link.worker_pid == worker.process.pid
        worker.kill()
    finally:
        link.close(5.0)


def test_a_restarted_standalone_worker_is_greeted_again(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/sb.sock"
    config = WorkerConfig(spawn=False, endpoint=endpoint, restart_backoff_s=0.05, plan_timeout_s=3.0)
    first = StandaloneWorker(endpoint, folder=tmp_path).wait_listening()
    link = WorkerLink(hello(), config)
    try:
        assert isinstance(ask(link, 1), Reply)
        first.kill()
        second = StandaloneWorker(endpoint, folder=tmp_path).wait_listening()
        answers = [ask(link, number) for number in range(2, 5)]
        assert any(isinstance(answer, Reply) for answer in answers)
        assert link.worker_pid == second.process.pid
        second.kill()
    finally:
        link.close(5.0)


class ScriptedWorker:
    """A worker made of a socket and a script: what it answers each plan request with, in turn."""

    def __init__(self, endpoint: str, answers: list[list[bytes]]) -> None:
        self.heard: list[str] = []
        self._answers = answers
        self._endpoint = endpoint
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(self._endpoint)
            while not self._ending.is_set():
                if socket.poll(20):
                    self._hear(socket)

    def _hear(self, socket: zmq.Socket[bytes]) -> None:
        peer, *frames = socket.recv_multipart()
        message, _ = decode(frames)
        self.heard.append(type(message).__name__)
        if isinstance(message, Hello):
            socket.send_multipart([peer, *encode(Welcome(1, message.config["policy"]["name"]))])
        elif not isinstance(message, Status | Goodbye):
            socket.send_multipart([peer, *self._answers.pop(0)])

    def close(self) -> None:
        self._ending.set()
        self._thread.join(LONG_S)


@pytest.mark.parametrize(
    "rubbish",
    [[b"\xc1rubbish"], [b"x"] * 40, encode(Goodbye("engine")), [b"\x81" * (1 << 21)]],
    ids=["no message", "too many frames", "an engine's message", "a huge header"],
)
def test_rubbish_costs_the_request_and_the_next_one_is_answered(tmp_path: Path, rubbish: list[bytes]) -> None:
    good = encode(Refused(2, "not today"))
    endpoint = f"ipc://{tmp_path}/sb.sock"
    worker = ScriptedWorker(endpoint, [rubbish, good])
    link = WorkerLink(hello(), WorkerConfig(spawn=False, endpoint=endpoint, restart_backoff_s=0.05))
    try:
        lost = ask(link, 1)
        assert isinstance(lost, RequestFailed)
        assert isinstance(lost.error, WorkerLost)
        answer = ask(link, 2)
        assert isinstance(answer, Reply)
        assert answer.message == Refused(2, "not today")
        assert worker.heard.count("Hello") == 2
    finally:
        link.close(5.0)
        worker.close()


def test_an_answer_to_an_older_request_is_dropped(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/sb.sock"
    worker = ScriptedWorker(endpoint, [encode(Refused(7, "stale")), encode(Refused(2, "right"))])
    config = WorkerConfig(spawn=False, endpoint=endpoint, restart_backoff_s=0.05, plan_timeout_s=0.5)
    link = WorkerLink(hello(), config)
    try:
        assert isinstance(ask(link, 1), RequestFailed)
        answer = ask(link, 2)
        assert isinstance(answer, Reply)
        assert answer.message.request == 2
    finally:
        link.close(5.0)
        worker.close()


def test_news_for_nobody_is_forgotten_and_a_worker_that_is_there_hears_it(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/sb.sock"
    news = Status("engine", 1, 0, "idle", "on", 1.0, {}, [])
    link = WorkerLink(hello(), WorkerConfig(spawn=False, endpoint=endpoint, restart_backoff_s=0.05))
    try:
        assert not link.send(news)
        worker = ScriptedWorker(endpoint, [])
        wait_for(lambda: link.is_ready)
        assert link.send(news)
        wait_for(lambda: "Status" in worker.heard)
        worker.close()
    finally:
        link.close(5.0)


def test_an_answer_is_told_of_once_it_can_be_had_and_so_is_that_none_will_come() -> None:
    box, heard = Mailbox(), []
    box.on_answer = lambda: heard.append(box.poll())
    box.open()
    answer = Reply([], NothingToDo(1, "", 1.0, 1.0, 0.0), {})
    assert box.offer(Request(*plan_request(1)))
    assert not heard
    assert box.answer(answer)
    assert not box.answer(answer)
    assert box.offer(Request(*plan_request(2)))
    lost = WorkerLost("it died")
    box.shut(lost)
    box.shut(lost)
    assert heard == [answer, RequestFailed(2, lost)]


def test_news_in_excess_is_dropped_and_a_request_is_taken_all_the_same() -> None:
    box = Mailbox()
    box.open()
    news = [News(Status("engine", step, 0, "idle", "on", 1.0, {}, []), None) for step in range(MAX_NEWS + 3)]
    assert [box.offer_news(item) for item in news] == [True] * MAX_NEWS + [False] * 3
    assert box.offer(Request(*plan_request(1)))
    assert [box.take_news() for _ in range(MAX_NEWS + 1)] == [*news[:MAX_NEWS], None]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WorkerConfig(spawn=False, endpoint="http://x"), "neither ipc"),
        (WorkerConfig(spawn=False, endpoint="tcp://10.0.0.1:99999"), "port in 1..65535"),
        (WorkerConfig(spawn=False, endpoint="tcp://10.0.0.1:7000"), "beyond this machine"),
        (WorkerConfig(spawn=True, endpoint="tcp://127.0.0.1:7000"), "ipc:// only"),
        (WorkerConfig(spawn=False, endpoint="ipc://relative"), "absolute path"),
        (WorkerConfig(spawn=False, endpoint="ipc:///" + "x" * 120), "fit a socket address"),
        (WorkerConfig(server_public_key="short"), "40 characters"),
        (WorkerConfig(client_secret_key_file="/dev/null"), "client_secret_key_file: /dev/null holds 0 keys"),
        (WorkerConfig(client_secret_key_file="/gone.key"), "/gone.key: cannot be read"),
    ],
)
def test_an_endpoint_or_key_that_cannot_work_is_refused_at_once(config: WorkerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkerLink(hello(), config)
