"""What a fault is: armed on every rank after the same pass, it acts on the rank it is meant for, and says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftbalancer.balancer import Balancer
from swiftbalancer.cycle import LEADER
from swiftbalancer.link import WorkerLink


@dataclass(frozen=True)
class Place:
    """Where a fault acts."""

    rank: int
    balancer: Balancer
    control: Path
    """The file a scripted worker looks at."""

    @property
    def link(self) -> WorkerLink:
        assert self.balancer._leader is not None
        link = self.balancer._leader._link
        assert isinstance(link, WorkerLink)
        return link


class Fault:
    """Nothing goes wrong; the base of all."""

    rank = LEADER

    def __init__(self) -> None:
        self.fired = False
        self.skips_hook = False
        """Whether the rank is not to call the balancer after this pass."""
        self._undo: list[Callable[[], None]] = []

    def arm(self, place: Place) -> None:
        """On every rank."""
        if place.rank == self.rank:
            self.begin(place)

    def begin(self, place: Place) -> None:
        """On the rank it is meant for, once."""

    def tick(self, place: Place) -> None:
        """On the rank it is meant for, before each call of the hook while armed."""

    def disarm(self) -> None:
        """On every rank."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def patch(self, owner: Any, name: str, value: Any) -> Any:
        """Sets an attribute until `disarm`; the old value."""
        old = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, old))
        return old
