"""Two hosts of two ranks each, joined by a wire with delay and loss, which is also cut. Needs root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.edges.fault_runs import Run, Seat, assert_exact, assert_nothing_left, quick_to_give_up, run_ranks
from tests.edges.long_wire import ADDRESSES, LongWire, Weather

pytestmark = pytest.mark.timeout(600)  # many processes on few cores


def run_on_two_hosts(folder: Path, wire: LongWire, faults: list[str], **options: Any) -> Run:
    seats = [Seat(wire.command(host, []), wire.environment(host)) for host in (0, 0, 1, 1)]
    return run_ranks(folder, faults, seats=seats, nodes=2, host=ADDRESSES[0], **options)


def joined(folder: Path, weather: Weather) -> LongWire:
    """The two hosts; skips the test where they cannot be made."""
    wire = LongWire(Weather(weather.delay_s, weather.loss, folder / "out.cut"))
    try:
        wire.__enter__()
    except OSError as error:
        pytest.skip(f"needs root and network namespaces: {error}")
    return wire


def test_two_hosts_balance_over_a_slow_and_lossy_wire_that_is_cut(tmp_path: Path) -> None:
    cuts = [f"link cut while {phase}" for phase in ("idle", "receiving", "moving")]
    wire = joined(tmp_path, Weather(delay_s=0.002, loss=0.01))
    try:
        run = run_on_two_hosts(tmp_path, wire, ["nothing for a while", *cuts])
    finally:
        wire.__exit__()
    assert wire.lost > 10 and wire.lost_to_cut > 3, "the wire was perfect"
    assert run.exit_codes == [0] * 4, run.log[-3000:]
    assert [c["fault"] for c in run.ranks[0]["costs"] if c["fired"] and c["recovered"]] == [
        "nothing for a while",
        *cuts,
    ]
    for rank in run.ranks:
        assert_exact(rank)
        assert_nothing_left(rank)
        assert rank["watch"]["moves"] > 20
        assert rank["watch"]["far_moves"] == 0, "an expert came from another host although one was near"


def test_a_wire_cut_for_long_ends_balancing_or_serving_but_never_splits_the_maps(tmp_path: Path) -> None:
    wire = joined(tmp_path, Weather(delay_s=0.001))
    try:
        run = run_on_two_hosts(tmp_path, wire, ["link cut for long"], config=quick_to_give_up())
    finally:
        wire.__exit__()
    assert wire.lost_to_cut > 3, "the wire was never cut"
    assert len(run.ranks) == 4, run.log[-3000:]
    for rank in run.ranks:
        assert rank["phase"] == "OFF" or rank["watch"]["raised"]
        assert rank["watch"]["wrong_outputs"] == rank["watch"]["wrong_maps"] == rank["watch"]["epochs_apart"] == 0
        assert_nothing_left(rank)
