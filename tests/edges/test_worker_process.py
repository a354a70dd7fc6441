"""The worker as a process: its endpoint, its keys, its end, and what it takes of the machine."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from swiftbalancer import endpoint as endpoints
from swiftbalancer.cli.top import view_address
from swiftbalancer.config import WorkerConfig
from swiftbalancer.endpoint import check_folder
from swiftbalancer.errors import ConfigError
from swiftbalancer.link import WorkerLink
from swiftbalancer.mailbox import Reply
from swiftbalancer.wire import Refused, decode, encode
from swiftbalancer_worker.status import decode_view
from tests.edges.engines import LONG_S, StandaloneWorker, ask, environment, hello, is_alive, plan_request, wait_for
from tests.edges.held import native_threads
from tests.edges.processes import free_port

pytestmark = pytest.mark.timeout(170)


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/sb.sock"


@pytest.fixture
def worker(endpoint: str, tmp_path: Path) -> Iterator[StandaloneWorker]:
    started = StandaloneWorker(endpoint, folder=tmp_path).wait_listening()
    yield started
    started.kill()


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swiftbalancer.cli", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONG_S, check=False)


def connected(
    endpoint: str, *, server: str | None = None, secret: str | None = None, key_file: str | None = None
) -> WorkerLink:
    config = WorkerConfig(
        spawn=False,
        endpoint=endpoint,
        restart_backoff_s=0.05,
        start_timeout_s=3.0,
        plan_timeout_s=LONG_S,
        server_public_key=server,
        client_secret_key=secret,
        client_secret_key_file=key_file,
    )
    return WorkerLink(hello(), config)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_and_leaves_no_file(
    worker: StandaloneWorker, tmp_path: Path, number: signal.Signals
) -> None:
    worker.process.send_signal(number)
    assert worker.process.wait(LONG_S) == 0
    assert f"ending: {number.name}" in worker.log
    assert [path.name for path in tmp_path.iterdir() if "sb.sock" in path.name] == []


def test_a_second_one_on_the_endpoint_is_refused_and_the_first_goes_on(
    worker: StandaloneWorker, endpoint: str
) -> None:
    second = run_cli("worker", "--endpoint", endpoint)
    assert second.returncode == 2
    assert "is in use: another worker listens there" in " ".join(second.stderr.split())
    link = connected(endpoint)
    try:
        assert isinstance(ask(link, 1), Reply)
        assert link.worker_pid == worker.process.pid
    finally:
        link.close(5.0)


def test_files_of_a_killed_worker_do_not_stop_the_next(
    worker: StandaloneWorker, endpoint: str, tmp_path: Path
) -> None:
    worker.kill()
    assert (tmp_path / "sb.sock").exists()
    assert (tmp_path / "sb.sock.lock").exists()
    following = StandaloneWorker(endpoint, folder=tmp_path).wait_listening()
    assert following.interrupt() == 0


def test_only_its_user_may_open_the_socket(worker: StandaloneWorker, tmp_path: Path) -> None:
    assert is_alive(worker.process.pid)
    for name in ("sb.sock", "sb.sock.view"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) & 0o077 == 0


def test_a_folder_others_can_write_to_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write"):
        check_folder(shared / "sb.sock")
    shared.chmod(0o1777)
    check_folder(shared / "sb.sock")
    check_folder(tmp_path / "new" / "sb.sock")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path / "folder", "Is a directory"), (tmp_path / "file" / "sb.sock", "exists")):
        result = run_cli("worker", "--endpoint", f"ipc://{path}")
        assert result.returncode == 2
        assert "cannot listen on ipc://" in " ".join(result.stderr.split())
        assert reason in result.stderr
        assert "Traceback" not in result.stderr


def test_a_network_endpoint_without_keys_is_refused() -> None:
    result = run_cli("worker", "--endpoint", "tcp://0.0.0.0:7711")
    assert result.returncode == 2
    assert "needs CURVE keys" in result.stderr


def test_a_port_of_another_program_is_refused() -> None:
    with zmq.Context() as context, context.socket(zmq.REP) as taken:
        port = taken.bind_to_random_port("tcp://127.0.0.1")
        result = run_cli("worker", "--endpoint", f"tcp://127.0.0.1:{port}")
    assert result.returncode == 2
    assert "in use by another process" in " ".join(result.stderr.split())


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """Secret and public keys of a worker, an engine it knows, and one it does not."""
    made = {}
    for name in ("server", "engine", "stranger"):
        assert run_cli("keys", str(tmp_path / name)).returncode == 0
        for kind in ("key", "pub"):
            made[f"{name}.{kind}"] = (tmp_path / f"{name}.{kind}").read_text().strip()
    assert stat.S_IMODE((tmp_path / "server.key").stat().st_mode) == 0o600
    return made


def test_only_authorised_engines_are_served_over_the_network(keys: dict[str, str], tmp_path: Path) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    (tmp_path / "clients.txt").write_text(f"# engines\n{keys['engine.pub']}\n")
    flags = ("--server-key", str(tmp_path / "server.key"), "--clients", str(tmp_path / "clients.txt"))
    worker = StandaloneWorker(endpoint, *flags, folder=tmp_path).wait_listening()
    known = connected(endpoint, server=keys["server.pub"], key_file=str(tmp_path / "engine.key"))
    stranger = connected(endpoint, server=keys["server.pub"], secret=keys["stranger.key"])
    keyless = connected(endpoint)
    try:
        assert isinstance(ask(known, 1), Reply)
        wait_for(lambda: f"{keys['stranger.pub']} turned away" in worker.log)
        wait_for(lambda: "turned away: no CURVE handshake with our key" in worker.log)
        wait_for(lambda: stranger.restarts >= 1 and keyless.restarts >= 1)
        assert not stranger.is_ready
        assert not keyless.is_ready
        assert isinstance(ask(known, 2), Reply)
    finally:
        for link in (known, stranger, keyless):
            link.close(5.0)
        worker.kill()


@pytest.mark.parametrize(("name", "content"), [("server.key", "short\n"), ("clients.txt", "short\n")])
def test_a_key_file_that_holds_no_key_is_refused(
    keys: dict[str, str], tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / "clients.txt").write_text(keys["engine.pub"])
    (tmp_path / name).write_text(content)
    flags = ("--server-key", str(tmp_path / "server.key"), "--clients", str(tmp_path / "clients.txt"))
    result = run_cli("worker", "--endpoint", "tcp://127.0.0.1:1", *flags)
    assert result.returncode == 2
    assert "40 characters" in result.stderr


def test_keys_are_never_overwritten(keys: dict[str, str], tmp_path: Path) -> None:
    assert run_cli("keys", str(tmp_path / "server")).returncode == 2
    assert (tmp_path / "server.key").read_text().strip() == keys["server.key"]


def test_rubbish_on_the_socket_is_refused_and_logged_and_engines_are_still_served(
    worker: StandaloneWorker, endpoint: str
) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as vandal:
        vandal.setsockopt(zmq.LINGER, 0)
        vandal.connect(endpoint)
        for frames in ([b"\xc1"], [b""] * 3000, [b"\x00" * (2 << 20)], encode(*plan_request(1))):
            vandal.send_multipart(frames)
            assert vandal.poll(int(1000 * LONG_S))
            assert isinstance(decode(vandal.recv_multipart())[0], Refused)
    assert "refused engine=" in worker.log
    link = connected(endpoint)
    try:
        assert isinstance(ask(link, 1), Reply)
    finally:
        link.close(5.0)


def test_it_is_nice_and_keeps_to_its_cores(endpoint: str, tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    flags = ("--niceness", "7", "--cpus", str(core))
    worker = StandaloneWorker(endpoint, *flags, folder=tmp_path).wait_listening()
    try:
        assert os.getpriority(os.PRIO_PROCESS, worker.process.pid) == max(7, os.nice(0))
        assert os.sched_getaffinity(worker.process.pid) == {core}
    finally:
        worker.kill()


def test_it_computes_on_one_thread(worker: StandaloneWorker, endpoint: str) -> None:
    link = connected(endpoint)
    try:
        assert isinstance(ask(link, 1), Reply)
    finally:
        link.close(5.0)
    computing = [name for name in native_threads(str(worker.process.pid)).values() if not name.startswith("ZMQbg/")]
    assert len(computing) == 1, f"beside libzmq's own there are {computing}"


def test_top_shows_it_and_its_engines(worker: StandaloneWorker, endpoint: str) -> None:
    link = connected(endpoint)
    try:
        assert isinstance(ask(link, 1), Reply)
        seen = run_cli("top", endpoint, "--json")
        assert seen.returncode == 0, seen.stderr
        view = msgspec.json.decode(seen.stdout)
        assert view["pid"] == worker.process.pid
        assert [engine["engine"] for engine in view["engines"]] == ["engine"]
        drawn = run_cli("top", endpoint, "--once")
        assert "tiny" in drawn.stdout
        assert "plans" in drawn.stdout
    finally:
        link.close(5.0)


def test_top_finds_a_worker_that_was_started_by_hand(worker: StandaloneWorker, endpoint: str) -> None:
    assert endpoint in [found.text for found in endpoints.find_endpoints()]
    worker.kill()
    assert endpoint not in [found.text for found in endpoints.find_endpoints()]


def test_top_says_how_to_watch_a_worker_that_it_cannot_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "find_endpoints", list)
    with pytest.raises(ConfigError, match="top --view ENDPOINT"):
        view_address(None, None)


def test_a_worker_on_the_network_is_watched_on_its_machine_without_keys_and_from_others_with(
    keys: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "clients.txt").write_text(keys["engine.pub"])
    flags = ("--server-key", str(tmp_path / "server.key"), "--clients", str(tmp_path / "clients.txt"))
    private, public = f"ipc://{tmp_path}/sb.view", f"tcp://127.0.0.1:{free_port()}"
    known = ("--server-public-key", str(tmp_path / "server.pub"), "--client-key", str(tmp_path / "engine.key"))
    stranger = (*known[:3], str(tmp_path / "stranger.key"))
    for view, theirs in ((private, ()), (public, known)):
        worker = StandaloneWorker(f"tcp://127.0.0.1:{free_port()}", *flags, "--view", view, folder=tmp_path)
        try:
            worker.wait_listening()
            seen = run_cli("top", "--view", view, "--json", *theirs)
            assert seen.returncode == 0, seen.stderr
            assert msgspec.json.decode(seen.stdout)["pid"] == worker.process.pid
            if view == private:
                assert stat.S_IMODE((tmp_path / "sb.view").stat().st_mode) & 0o077 == 0
                continue
            for wrong in ((), stranger):
                refused = run_cli("top", "--view", view, "--json", "--wait-s", "1.5", *wrong)
                assert refused.returncode == 2
                assert "--server-public-key and --client-key" in " ".join(refused.stderr.split())
        finally:
            worker.kill()


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ("tcp://0.0.0.0:7799", "tcp://0.0.0.0:7799 is beyond this machine and needs CURVE keys"),
        ("udp://x", "--view: 'udp://x' is neither"),
        ("ipc://SHARED/view", "others may write"),
    ],
)
def test_a_view_that_others_could_reach_is_refused(endpoint: str, tmp_path: Path, view: str, message: str) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    result = run_cli("worker", "--endpoint", endpoint, "--view", view.replace("SHARED", str(tmp_path / "shared")))
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())


def test_the_view_takes_nothing_in(worker: StandaloneWorker, endpoint: str) -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as viewer:
        viewer.setsockopt(zmq.LINGER, 0)
        viewer.setsockopt(zmq.SUBSCRIBE, b"")
        viewer.connect(f"{endpoint}.view")
        assert viewer.poll(int(1000 * LONG_S))
        assert decode_view(viewer.recv()).pid == worker.process.pid
        with pytest.raises(zmq.ZMQError):
            viewer.send(b"x")


def test_top_says_so_when_nothing_is_there(tmp_path: Path) -> None:
    result = run_cli("top", f"ipc://{tmp_path}/none.sock", "--once", "--wait-s", "0.2")
    assert result.returncode == 2
    assert "is the worker running?" in " ".join(result.stderr.split())
