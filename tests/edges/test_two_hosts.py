"""Two hosts of two ranks each, joined by a wire with delay and loss, which is also cut. Needs root."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.edges.fault_runs import QUICK, assert_exact, assert_nothing_left, quick_to_give_up, run_ranks
from tests.edges.long_wire import ADDRESSES, LongWire, Weather
from tests.edges.processes import Run, Seat

pytestmark = pytest.mark.timeout(600)  # many processes on few cores


def run_on_two_hosts(folder: Path, wire: LongWire, faults: list[str], **options: Any) -> Run:
    seats = [Seat(wire.command(host, []), wire.environment(host)) for host in (0, 0, 1, 1)]
    return run_ranks(folder, faults, seats=seats, nodes=2, host=ADDRESSES[0], **options)


@contextlib.contextmanager
def joined(folder: Path, weather: Weather) -> Iterator[LongWire]:
    """The two hosts; skips the test where they cannot be made."""
    with contextlib.ExitStack() as stack:
        try:
            wire = stack.enter_context(LongWire(replace(weather, cut_file=folder / "out.cut")))
        except OSError as error:
            pytest.skip(f"needs root, `ip` and network namespaces with veth: {error}")
        yield wire


def assert_all_recovered(run: Run, faults: list[str]) -> None:
    assert run.exit_codes == [0] * 4, run.log[-3000:]
    assert [c["fault"] for c in run.ranks[0]["costs"] if c["fired"] and c["recovered"]] == faults
    for rank in run.ranks:
        assert rank["votes_on"] == "gloo"
        assert_exact(rank)
        assert_nothing_left(rank)


def assert_experts_come_from_near(run: Run) -> None:
    for rank in run.ranks:
        watch = rank["watch"]
        assert watch["far_moves"] == 0, "an expert came from another host although one was near"
        assert watch["chosen_moves"] > 5, "there never was a choice"


def test_two_hosts_balance_over_a_slow_and_lossy_wire_that_is_cut_and_heals(tmp_path: Path) -> None:
    faults = ["link cut while moving"]
    with joined(tmp_path, Weather(delay_s=0.002, loss=0.01)) as wire:
        run = run_on_two_hosts(tmp_path, wire, faults)
        assert wire.cuts == 1 and wire.retransmitted() > 10, "the wire was perfect"
    assert_all_recovered(run, faults)
    assert_experts_come_from_near(run)


@pytest.mark.slow
def test_two_hosts_balance_over_a_bad_wire_that_is_cut_in_every_phase(tmp_path: Path) -> None:
    faults = [f"link cut while {phase}" for phase in ("idle", "receiving", "moving")]
    with joined(tmp_path, Weather(delay_s=0.01, loss=0.03)) as wire:
        run = run_on_two_hosts(tmp_path, wire, faults)
        assert wire.cuts == 3 and wire.retransmitted() > 100, "the wire was perfect"
    assert_all_recovered(run, faults)
    assert_experts_come_from_near(run)


def test_groups_of_experts_that_move_settle_on_a_host_each(tmp_path: Path) -> None:
    config = {**QUICK, "policy": {"name": "greedy", "options": {"num_groups": 4}}}
    with joined(tmp_path, Weather(delay_s=0.001)) as wire:
        run = run_on_two_hosts(tmp_path, wire, ["worker killed"], config=config, experts=8, redundant=4)
    assert_all_recovered(run, ["worker killed"])
    rows = np.asarray(run.ranks[0]["physical_to_logical_map"])
    moved = rows[(rows != np.arange(12) % 8).any(1)]
    assert len(moved) > 0
    for here, there in moved.reshape(len(moved), 2, -1) // 2:
        assert not set(here.tolist()) & set(there.tolist()), f"a group is spread over both hosts: {moved}"


def test_a_wire_cut_for_long_ends_balancing_or_serving_but_never_splits_the_maps(tmp_path: Path) -> None:
    with joined(tmp_path, Weather()) as wire:
        run = run_on_two_hosts(tmp_path, wire, ["link cut for long"], config=quick_to_give_up())
        assert wire.cuts == 1 and wire.retransmitted() > 0, "the wire was never cut"
    assert run.exit_codes == [0] * 4, run.log[-3000:]
    for rank in run.ranks:
        assert rank["phase"] == "OFF" or rank["watch"]["raised"]
        assert rank["watch"]["wrong_outputs"] == rank["watch"]["wrong_maps"] == rank["watch"]["epochs_apart"] == 0
        assert_nothing_left(rank)
