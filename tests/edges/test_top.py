"""The live view as it is drawn; that it reaches the screen is tested with the worker's process."""

from __future__ import annotations

import io

import msgspec
from rich.console import Console

from swiftbalancer.cli.top import render, sparkline
from swiftbalancer_worker.status import EngineView, OutcomeView, PlanView, PromiseView, View


def drawn(mode: str) -> str:
    """What `top` shows of an engine in this mode, with what such an engine has to show."""
    plan = PlanView(1.0, 3, "placement", 5, 1.41, 1.07, 22.0)
    end = OutcomeView(1.0, 3, "placement", mode == "on", "shadow mode: nothing is applied", 64, 5, 1.0, 1.3, 9)
    engine = EngineView("engine-1", "model", "swift", 2, 8, 2, 12, 0.0, mode=mode, phase="idle", imbalance=1.234)
    if mode != "observe":
        engine = msgspec.structs.replace(engine, plans=[plan], outcomes=[end], promise=PromiseView(1, 0.24, 5, 1.5))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(View(1, "ipc:///x", 3.0, [engine, msgspec.structs.replace(engine, engine="engine-2")])))
    return console.export_text()


def test_top_shows_of_each_mode_what_there_is() -> None:
    observe, shadow, on = drawn("observe"), drawn("shadow"), drawn("on")
    for text in (observe, shadow, on):
        assert "engine-1" in text and "engine-2" in text and "1.234" in text
    assert "plans" not in observe and "committed" not in observe
    assert "1 plans would each have cut the imbalance by 24.0 %, for 5 moves, 1.50 GiB" in shadow
    assert "1.070" in shadow and "dropped: " not in shadow
    assert "1.070" in on and "committed" in on and "would each" not in on


def test_top_names_the_faults_there_were() -> None:
    counted = {"requests_failed": 3.0, "stalls": 0.0, "pauses": 1.0}
    engine = EngineView("engine-1", "model", "swift", 2, 8, 2, 12, 0.0, mode="on", metrics=counted)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(View(1, "ipc:///x", 3.0, [engine])))
    assert "faults so far: 3 requests not answered, 1 pauses after repeated failures" in console.export_text()
    assert "no faults so far" in drawn("on")


def test_a_sparkline_rises_with_the_values() -> None:
    line = sparkline([1.0, 1.5, 2.0])
    assert len(line) == 3
    assert list(line) == sorted(line)
    assert sparkline([]) == ""
