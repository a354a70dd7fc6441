"""Every wait of recorder, maps, transport and commits is needed: without any one, a late device shows it.

A wait that is new is found by itself: it has to be listed here, with what it is for, or why nothing shows without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from swiftbalancer.balancer import Balancer
from swiftbalancer.errors import TransferFailed
from swiftbalancer_worker.planner import Planner
from swiftbalancer_worker.warmup import warm_up
from tests.edges.late_engine import Seen, Story, run

STORIES = (Story(pushes=False, sub_window_steps=64), Story(pushes=True, sub_window_steps=64), Story(True, 4))
SEEDS = range(8)
NEEDED = {
    "recorder.land: snapshot.landed.synchronize(": "the host reads what has landed",
    "bulk._ready: self._prepared_at.synchronize(": "a commit comes after its maps",
    "bulk._ready: setup.layer.wait(": "what the last commit read may be staged anew",
    "batch_run.run: self._job.readable.synchronize(": "slots are read, and staging written, after the last commit",
    "batch_run.run: self._settle(": "checksums are compared once they are there",
    "p2p._carry_round: self._settle(": "host buffers are sent once filled, and filled again once read",
    "copy_engine._test_paths: ": "a path is judged once its byte may have arrived",
    "mover._serve: self._place.layer.synchronize(": "staging is let go after the commits that read it",
}
BACKED = {
    "batch_run._carry_some: self._settle(": "tells the pacer what was copied here; `run` waits for the same bytes",
    "copy_engine.carry: self._carried.synchronize(": "tells the pacer what was carried; `run` waits again",
    "checksums.rehearse: ": "compiles kernels; orders nothing",
}
"""Nothing shows without one of these alone."""


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """Ranks plan in place and wait for each other: compiling beside them would take too long."""
    warm_up(Planner("random"))


@cache
def clean(story: Story) -> list[Seen]:
    """What both ranks saw with several seeds, nothing left out."""
    return [seen for seed in SEEDS[:4] for seen in run(story, seed)]


def shows(story: Story, seed: int, drop: set[str]) -> bool:
    try:
        return any(seen.is_wrong for seen in run(story, seed, drop))
    except TransferFailed:
        return True


@pytest.mark.parametrize("story", STORIES, ids=str)
def test_on_a_late_device_slots_maps_and_counts_are_right_throughout(story: Story) -> None:
    for seen in clean(story):
        assert not seen.is_wrong, (seen.wrong_slots, seen.wrong_windows)
        assert seen.committed >= 3
        assert seen.moved >= story.until_moved


@pytest.mark.parametrize("story", STORIES, ids=str)
def test_no_hook_commits_a_batch_and_starts_another(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each, as the end of a sub-window, is about half of what a hook may take."""
    did: dict[int, list[list[str]]] = {}

    def note(what: str, call: Callable[..., None]) -> Callable[..., None]:
        def noted(balancer: Balancer, *given: Any) -> None:
            did[balancer._rank][-1].append(what)
            call(balancer, *given)

        return noted

    def hook(balancer: Balancer, passes: int = -1) -> None:
        did.setdefault(balancer._rank, []).append([])
        after_forward(balancer, passes)

    after_forward = Balancer.after_forward
    monkeypatch.setattr(Balancer, "after_forward", hook)
    monkeypatch.setattr(Balancer, "_stage", note("start", Balancer._stage))
    monkeypatch.setattr(Balancer, "_commit", note("commit", Balancer._commit))
    monkeypatch.setattr(Balancer, "_close_sub_window", note("end", Balancer._close_sub_window))
    run(story, 1)
    for hooks in did.values():
        assert [both for both in hooks if len(both) > 1] == []
        doing = [what for each in hooks for what in each if what != "end"]
        after_commits = [doing[i + 1 : i + 2] for i, what in enumerate(doing) if what == "commit"]
        assert ["start"] in after_commits, "else there was no second batch"
        follow = hooks[hooks.index(["commit"]) + 1 :]
        if follow[0] == ["end"]:
            del follow[0]
        assert follow[0] == ["start"], "in the hook that follows, or the next if a sub-window ends in that"


@pytest.mark.parametrize("story", STORIES, ids=str)
def test_a_batch_that_was_to_begin_is_forgotten_by_a_drain(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    drained: list[int] = []

    def hook(balancer: Balancer, passes: int = -1) -> None:
        after_forward(balancer, passes)
        if balancer._to_stage is not None and balancer._rank not in drained:  # on both ranks after the same pass
            drained.append(balancer._rank)
            balancer.drain()
            assert balancer._to_stage is None
            balancer.resume()

    after_forward = Balancer.after_forward
    monkeypatch.setattr(Balancer, "after_forward", hook)
    for seen in run(story, 2):
        assert not seen.is_wrong, seen
        assert seen.moved >= story.until_moved
    assert sorted(drained) == [0, 1]


@pytest.mark.parametrize("place", NEEDED)
def test_leaving_out_a_wait_shows(place: str) -> None:
    stories = [story for story in STORIES if any(p.startswith(place) for s in clean(story) for p in s.places)]
    assert stories, "nothing waits there any more"
    assert any(shows(story, seed, {place}) for seed in SEEDS for story in stories)


def test_leaving_out_all_waits_for_what_is_carried_shows_even_without_checksums() -> None:
    story = Story(pushes=True, sub_window_steps=64, verify=False)
    carried = {"batch_run.run: self._settle(", *BACKED}
    assert any(shows(story, seed, carried) for seed in SEEDS)


def test_every_wait_is_listed() -> None:
    places = {place for story in STORIES for seen in clean(story) for place in seen.places}
    assert {place for place in places if not place.startswith((*NEEDED, *BACKED))} == set()
