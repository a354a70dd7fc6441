"""What the vLLM benchmark says that threads of ours computed beside a step."""

from __future__ import annotations

import threading
import time

import pytest

from scripts.vllmbench.pieces import Pieces, computed_ms
from swiftbalancer.lane import Lane
from swiftbalancer.throttle import Throttle
from swiftbalancer.transport.batch_run import BatchRun

COMPUTED_S = 0.02


def compute() -> None:
    end = time.thread_time() + COMPUTED_S
    while time.thread_time() < end:
        pass


def test_what_a_job_computes_is_noted_and_its_rests_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((Throttle, "rest"), (Lane, "put"), (BatchRun, "run")):
        monkeypatch.setattr(owner, name, vars(owner)[name])  # as they were, afterwards
    pieces, throttle, done = Pieces(), Throttle(1.0), threading.Event()
    pieces.watch()

    def job() -> None:
        compute()
        throttle.rest()
        compute()
        done.set()

    lane = Lane("test", on_error=lambda error: pytest.fail(str(error)))
    lane.put(job)
    assert done.wait(60)
    assert lane.close(60)
    assert [round(cpu_ms / 1e3 / COMPUTED_S) for _, _, cpu_ms, _ in pieces.seen] == [1, 1]
    (_, ended_s, _, _), (began_s, _, _, _) = pieces.seen
    assert ended_s <= began_s


def test_a_piece_counts_for_a_step_as_far_as_it_lies_beside_it() -> None:
    pieces = [(1.0, 1.1, 4.0, ""), (1.05, 1.15, 2.0, ""), (1.2, 1.2, 1.0, "")]
    assert computed_ms(pieces, 0.5, 1.0) == pytest.approx(0.0)
    assert computed_ms(pieces, 1.0, 1.05) == pytest.approx(2.0)
    assert computed_ms(pieces, 1.05, 1.1) == pytest.approx(3.0)
    assert computed_ms(pieces, 0.9, 1.15) == pytest.approx(6.0)
