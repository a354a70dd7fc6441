"""The graph of what can happen without a fault, for walking it backwards."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Edges:
    """The healthy transitions, for walking them backwards."""

    sources: array[int] = field(default_factory=lambda: array("l"))
    targets: array[int] = field(default_factory=lambda: array("l"))
    commit_marks: array[int] = field(default_factory=lambda: array("b"))

    def add(self, source: int, target: int, *, commits: bool) -> None:
        self.sources.append(source)
        self.targets.append(target)
        self.commit_marks.append(commits)

    def commits(self) -> NDArray[np.bool_]:
        return np.frombuffer(self.commit_marks, np.int8).astype(bool)

    def have_exit(self, num_states: int) -> NDArray[np.bool_]:
        """`[states]` bool, whether a healthy transition leads away from a state."""
        source, target = self._arrays()
        out = np.zeros(num_states, bool)
        out[source[source != target]] = True
        return out

    def commit_sources(self, num_states: int) -> NDArray[np.bool_]:
        out = np.zeros(num_states, bool)
        out[self._arrays()[0][self.commits()]] = True
        return out

    def can_reach(self, goal: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`[states]` bool, from which states healthy transitions lead to `goal`."""
        source, target = self._arrays()
        reached = goal.copy()
        while True:
            more = source[reached[target] & ~reached[source]]
            if not more.size:
                return reached
            reached[more] = True

    def _arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.frombuffer(self.sources, np.int64), np.frombuffer(self.targets, np.int64)
