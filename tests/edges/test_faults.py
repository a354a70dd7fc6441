"""Faults on real processes: gloo ranks, the real worker, real transfers. Every one costs a cycle at most.

All transient faults run one after another in the same two processes; each has a committed cycle before and after.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from swiftbalancer.attach import attach
from swiftbalancer.balancer import Balancer
from swiftbalancer.border import GroupInfo
from swiftbalancer.config import from_dict
from swiftbalancer.errors import ConfigError, TransferFailed
from swiftbalancer.groups import GroupFactory
from swiftbalancer.leader import Leader
from swiftbalancer.link import WorkerLink
from swiftbalancer.transport import Transport
from tests.edges.fault_runs import QUICK, assert_exact, assert_nothing_left, quick_to_give_up, run_ranks
from tests.edges.faults import TRANSIENT
from tests.edges.held import Held, left_since
from tests.edges.processes import Run, Seat
from tests.edges.synthetic_rank import Options, SyntheticEngine

pytestmark = pytest.mark.timeout(600)  # many processes on few cores

EVIDENCE: dict[str, tuple[str, str]] = {
    "worker killed": ("restarts", "was ended by signal 9"),
    "worker killed at work": ("restarts", "was ended by signal 9"),
    "worker killed while receiving": ("nothing", "was ended by signal 9"),
    "worker killed while moving": ("nothing", "was ended by signal 9"),
    "worker stopped": ("restarts", "no answer to request"),
    "worker exits": ("restarts", "exited: 7"),
    "worker out of memory": ("requests_failed", "MemoryError"),
    "worker babbles": ("restarts", "the worker sent rubbish"),
    "worker sends too many frames": ("restarts", "the worker sent rubbish"),
    "worker sends an oversized header": ("restarts", "the worker sent rubbish"),
    "worker silent": ("restarts", "no answer to request"),
    "endpoint removed": ("restarts", "was ended by signal 9"),
    "plan for another topology": ("dropped", "plan_invalid"),
    "plan with a wrong digest": ("dropped", "plan_invalid"),
    "plan for a stale epoch": ("dropped", "plan_invalid"),
    "plan that misroutes": ("dropped", "plan_invalid"),
    "answer to an older request": ("restarts", "no answer to request"),
    "rank slow while idle": ("slow", ""),
    "rank slow while receiving": ("slow", ""),
    "rank slow while moving": ("slow", ""),
    "vote late": ("late", ""),
    "request cannot be made": ("nothing", "a background job failed: scripted: no room"),
    "plan cannot be packed": ("nothing", "a plan cannot be broadcast: scripted: no room"),
    "broadcast damaged": ("dropped", "plan_damaged"),
    "broadcast failed": ("dropped", "broadcast_failed"),
    "another plan on one rank": ("dropped", "ranks hold different plans"),
    "plan check fails": ("dropped", "internal"),
    "maps cannot be prepared": ("dropped", "staging_failed"),
    "bit flipped in a transfer": ("dropped", "checksum"),
    "transfer never completes": ("dropped", "transfer_timeout"),
    "transfer breaks": ("dropped", "transfer_failed"),
}
"""What must have been noticed: a counter that rose, and a reason or a log line."""
VOTES_ON = {"auto": "board", "gloo": "gloo"}
"""What becomes of each channel, since all ranks here are on one host."""
APART = Seat(["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"])
"""With shared memory of its own."""


@pytest.fixture(scope="module")
def transient(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_ranks(tmp_path_factory.mktemp("transient"), list(TRANSIENT))


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_cycle_is_the_most_it_costs_when(fault: str, transient: Run) -> None:
    [cost] = [c for c in transient.ranks[0]["costs"] if c["fault"] == fault]
    assert cost["fired"], "the fault was never injected"
    assert cost["recovered"], f"no cycle succeeded afterwards: {cost}"
    counter, reason = EVIDENCE[fault]
    if counter == "dropped":
        assert list(cost["dropped"]) == [reason] and cost["dropped"][reason] == 1
    elif counter == "slow":
        assert not cost["dropped"] and cost["seconds"] >= 2.0
    elif counter == "nothing":  # the cycle in flight goes on without the worker
        assert not cost["dropped"]
        assert transient.log.count(reason) >= sum(r == reason for _, r in EVIDENCE.values())
    elif counter == "late":
        assert not cost["dropped"] and cost["late_rounds"] > 0
    else:
        assert cost[counter] == 1 and reason in transient.log


def test_outputs_stay_exact_through_all_of_them(transient: Run) -> None:
    assert transient.exit_codes == [0, 0]
    for rank in transient.ranks:
        assert rank["votes_on"] == "board"
        assert rank["watch"]["passes"] > 1000
        assert_exact(rank)
        assert not rank["off_reason"]


def test_nothing_is_left_after_a_run_full_of_faults(transient: Run) -> None:
    for rank in transient.ranks:
        assert_nothing_left(rank)


def assert_a_late_vote_cost_no_cycle(run: Run) -> None:
    assert run.exit_codes == [0, 0]
    [cost] = run.ranks[0]["costs"]
    assert cost["fired"] and cost["recovered"] and not cost["dropped"] and cost["late_rounds"] > 0
    for rank in run.ranks:
        assert rank["votes_on"] == "gloo"
        assert_exact(rank)
        assert_nothing_left(rank)


def test_a_late_vote_costs_no_cycle_where_votes_are_gathered(tmp_path: Path) -> None:
    config = {**QUICK, "agreement": {**QUICK["agreement"], "channel": "gloo"}}
    assert_a_late_vote_cost_no_cycle(run_ranks(tmp_path, ["vote late"], config=config))


def test_ranks_that_share_no_memory_gather_their_votes(tmp_path: Path) -> None:
    if subprocess.run([*APART.before, "true"], check=False).returncode:
        pytest.skip("needs the right to mount, and `unshare`")
    assert_a_late_vote_cost_no_cycle(run_ranks(tmp_path, ["vote late"], seats=[Seat(), APART]))


@pytest.mark.parametrize("channel", VOTES_ON)
def test_losing_an_idle_round_switches_balancing_off_and_serving_goes_on(channel: str, tmp_path: Path) -> None:
    run = run_ranks(tmp_path, ["round lost while idle"], config=quick_to_give_up(channel=channel))
    assert run.exit_codes == [0, 0]
    for rank in run.ranks:
        assert rank["votes_on"] == VOTES_ON[channel]
        assert rank["phase"] == "OFF" and "round" in rank["off_reason"]
        assert_exact(rank)
        assert_nothing_left(rank)
    assert run.log.count("balancing is off, serving goes on as placed") == 2


def test_a_broken_background_group_ends_balancing_on_all_ranks_with_a_reason(tmp_path: Path) -> None:
    run = run_ranks(tmp_path, ["broadcast beyond its deadline"], config=quick_to_give_up())
    assert run.exit_codes == [0, 0]
    assert run.ranks[0]["costs"][0]["fired"]
    for rank in run.ranks:
        assert rank["phase"] == "OFF" and "its group for loads and plans is broken" in rank["off_reason"]
        assert_exact(rank)
        assert_nothing_left(rank)
    assert 1 <= run.log.count("loads cannot be gathered any more") <= 2


@pytest.mark.parametrize("channel", VOTES_ON)
def test_a_rank_in_doubt_about_a_commit_raises_to_the_engine(channel: str, tmp_path: Path) -> None:
    run = run_ranks(tmp_path, ["round lost in doubt"], config=quick_to_give_up(channel=channel))
    assert run.exit_codes == [0, 0]
    for rank in run.ranks:
        assert rank["votes_on"] == VOTES_ON[channel]
        assert rank["watch"]["raised"].startswith("AgreementLost: voted to commit epoch")
        assert_nothing_left(rank)


@pytest.mark.parametrize("channel", VOTES_ON)
def test_a_rank_that_skips_its_hook_while_a_commit_is_voted_on_raises_to_the_engine(
    channel: str, tmp_path: Path
) -> None:
    """Also where there is nothing to do for some passes before the outcome is due."""
    config = {**QUICK, "agreement": {**QUICK["agreement"], "channel": channel, "lag_steps": 5}}
    run = run_ranks(tmp_path, ["hook skipped during a vote"], config=config)
    assert run.exit_codes == [0, 0]
    raised = run.ranks[1]["watch"]["raised"]
    assert raised.startswith("AgreementLost: voted to commit epoch")
    assert raised.endswith("the hook was not called after 1 of this rank's passes")
    for rank in run.ranks:
        assert_nothing_left(rank)


@pytest.mark.parametrize("channel", VOTES_ON)
@pytest.mark.parametrize("phase", ["idle", "moving"])
def test_survivors_of_a_dead_rank_end_within_seconds(phase: str, channel: str, tmp_path: Path) -> None:
    run = run_ranks(tmp_path, [f"rank dies while {phase}"], config=quick_to_give_up(channel=channel))
    assert run.exit_codes == [0, -9]
    [survivor] = run.ranks
    assert survivor["votes_on"] == VOTES_ON[channel]
    assert survivor["watch"]["raised"], "the engine's own collective must have failed"
    assert survivor["watch"]["wrong_outputs"] == survivor["watch"]["wrong_maps"] == 0
    assert_nothing_left(survivor)


@pytest.mark.parametrize("phase", ["IDLE", "RECEIVING", "MOVING"])
def test_shutting_down_in_any_phase_leaves_nothing(phase: str, tmp_path: Path) -> None:
    run = run_ranks(tmp_path, [], close_in=phase)
    assert run.exit_codes == [0, 0]
    for rank in run.ranks:
        assert rank["phase"] == phase
        assert_exact(rank)
        assert_nothing_left(rank)


def test_shutting_down_with_a_stuck_transfer_is_bounded_and_the_process_ends(tmp_path: Path) -> None:
    run = run_ranks(tmp_path, ["transfer never completes"], close_in="MOVING")
    assert run.exit_codes == [0, 0]
    for rank in run.ranks:
        assert rank["phase"] == "MOVING" and rank["close_s"] < 10
        assert not rank["worker_left"] and not rank["folder_left"]


class Alone:
    """The one rank of a synthetic engine, and its store."""

    def __init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        self.engine = SyntheticEngine(Options(out="", ranks=1), rank=0)

    def attach(self, config: dict[str, Any]) -> Balancer:
        group = GroupInfo(rank=0, size=1, store=self.store, device=torch.device("cpu"))
        return attach(from_dict(config), self.engine.binding(), group)


@contextmanager
def alone() -> Iterator[Alone]:
    """A rank to be attached to; in the end nothing may be left of that."""
    rank = Alone()
    before, files = Held.now(store_port=rank.store.port), open_files()
    yield rank
    assert left_since(before, store_port=rank.store.port) == {"sockets_left": [], "native_threads_left": []}
    assert open_files() == files
    assert not [child for child in psutil.Process().children() if "swiftbalancer_worker" in child.cmdline()]


def open_files() -> list[str]:
    """What this process has open of memory that ranks share, which has no name any more."""
    return [name for link in Path("/proc/self/fd").iterdir() if "swiftbalancer-" in (name := _target(link))]


def _target(link: Path) -> str:
    with suppress(FileNotFoundError):  # of the listing itself
        return str(link.readlink())
    return ""


def test_attaching_to_a_port_that_is_taken_leaves_nothing() -> None:
    with (
        alone() as rank,
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match="cannot listen"),
    ):
        rank.attach({"metrics": {"port": taken.getsockname()[1]}})


def test_an_endpoint_that_cannot_be_is_refused_before_any_peer_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupFactory, "create", None)
    with alone() as rank, pytest.raises(ConfigError, match="endpoint"):
        rank.attach({"worker": {"endpoint": "ipc://run/relative.sock"}})


@pytest.mark.parametrize("what", ["LoadRecorder", "choose", "Balancer", "Monitor"])
def test_attaching_that_fails_half_way_leaves_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise TransferFailed("no way")

    monkeypatch.setattr(f"swiftbalancer.attach.{what}", fails)
    with alone() as rank, pytest.raises(TransferFailed, match="no way"):
        rank.attach({})


def test_the_secret_key_is_sent_to_nobody() -> None:
    with alone() as rank:
        balancer = rank.attach({"worker": {"client_secret_key": "s" * 40}})
        assert balancer._leader is not None and isinstance(balancer._leader._link, WorkerLink)
        assert "ssss" not in str(balancer._leader._link._hello)
        balancer.close()


def test_the_transport_ends_before_what_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers wait some seconds for this rank to say that it writes to their memory no more."""
    ended: list[str] = []
    with alone() as rank:
        balancer = rank.attach({})
        for name, owner in (("transport", Transport), ("worker", Leader)):
            close = owner.close

            def closed(part: Any, s: float, name: str = name, close: Callable[..., None] = close) -> None:
                ended.append(name)
                close(part, s)

            monkeypatch.setattr(owner, "close", closed)
        balancer.close()
    assert ended == ["transport", "worker"]


def test_a_stalled_cycle_is_counted_and_the_log_names_rank_and_phase(tmp_path: Path) -> None:
    config = {**QUICK, "transport": {"deadline_s": 5.0}, "breaker": {"stall_warning_s": 1.0}}
    run = run_ranks(tmp_path, ["transfer never completes"], config=config)
    assert run.ranks[0]["costs"][0]["recovered"]
    assert run.ranks[0]["stalls"] == 1
    assert "made no progress for 1 s in phase MOVING, batch 0; not ready: ranks [0, 1]" in run.log
    assert run.log.count("made no progress") <= 6, "the log is flooded"


def test_balancing_that_keeps_failing_pauses_and_tries_again(tmp_path: Path) -> None:
    config = {**QUICK, "breaker": {"max_failures": 3, "retry_after_s": 2.0}}
    run = run_ranks(tmp_path, ["transfer breaks three times"], config=config)
    [cost] = run.ranks[0]["costs"]
    assert cost["dropped"] == {"transfer_failed": 3}
    assert "balancing pauses for 2 s after repeated failures, the last: rank" in run.log
    assert run.ranks[0]["pauses"] == 1 and cost["recovered"] and cost["seconds"] >= 2.0
    for rank in run.ranks:
        assert_exact(rank)


def test_a_full_disk_costs_the_recording_and_nothing_else(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        (disk / "ballast").write_bytes(b"x" * (56 << 10))  # room for a manifest and little more
        # A request brings every window that no earlier one did, so that most of the run is recorded.
        config = {**QUICK, "record": {"directory": str(disk)}, "window": {**QUICK["window"], "sub_windows": 64}}
        run = run_ranks(tmp_path, ["nothing for a while"], config=config)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "64 windows are lost" in run.log, "the disk never filled up"
    assert all(cost["recovered"] for cost in run.ranks[0]["costs"])
    for rank in run.ranks:
        assert_exact(rank)
        assert_nothing_left(rank)
