"""How many bytes may travel during the next step, so that steps stay within a bound of their usual length.

Measured, not modelled: steps in which a transfer does something are compared with steps in which it rests, a few of
each, and the rate is scaled by how far the excess is from the bound. What counts is the mean over the steps
of a transfer: a low rate lets a piece travel only now and then, and the steps between are restful. While experts
move, two of sixteen asks get no bytes for a step, so that the comparison follows the load.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from swiftbalancer.transport.seam import Lately

UNBOUND = 1 << 60
"""Bytes per step when no bound is wanted."""
FIRST_BYTES = 16 << 20
LEAST_BYTES = 64 << 10
"""A transfer always gets on, however loaded the device is."""
MOST_BYTES = 1 << 36
TURN = 16
RESTS = 2
SAMPLES = 7
"""Busy steps between two changes of the rate."""
PATIENCE = 48
"""Steps of a transfer after which fewer busy ones have to do."""
FEWEST = 3
USUAL_STEPS = 32
AIM = 2 / 3
"""Part of the bound aimed at: what is measured of few steps is off by as much now and then."""
FARTHEST = 4.0
LARGEST_CUT = 0.5
LARGEST_RAISE = 2.5


class Pacer:
    """Call `observe` with each step's time; when a batch waits for bytes, `allowance` for what it may carry next.

    The latter is part of the forward path. What steps add up to is worked out by `adapt`, on the transfer's thread,
    while others may `observe`: so either side only adds to what the other reads, or takes away what it has read
    itself.
    """

    def __init__(self, max_step_inflation: float) -> None:
        self._bound = max_step_inflation
        self._bytes = FIRST_BYTES
        self._usual: deque[float] = deque(maxlen=USUAL_STEPS)
        self._busy: list[float] = []
        """Seconds of busy steps since the last change."""
        self._steps = self._carried = self._held_back = 0
        """Steps of transfers; in how many something was carried, or had to wait for its allowance. Only ever more."""
        self._seen = (0, 0, 0)
        """What these were at the last change."""
        self._inflation = 0.0
        self._turn = 0

    @property
    def bytes_per_step(self) -> int:
        """What a step is allowed at present, unless it rests."""
        return UNBOUND if self._bound >= 1.0 else self._bytes

    @property
    def inflation(self) -> float:
        """Mean excess of the steps of a transfer over the usual ones, as last known; 0.0 before any."""
        busy = tuple(self._busy)  # one look: other threads ask, too
        return self._mean_of(busy) if len(busy) >= FEWEST else self._inflation

    @property
    def usual_step_s(self) -> float:
        """Median time of a step in which nothing travels; 0.0 before any."""
        usual = tuple(self._usual)
        return median(usual) if usual else 0.0

    def observe(self, step_s: float, lately: Lately | None = None) -> None:
        """The step that just ended took `step_s` seconds; `lately`: what a transfer did in it, if there was one."""
        self.observe_all((step_s,), lately)

    def observe_all(self, steps_s: Sequence[float], lately: Lately | None) -> None:
        """Likewise some steps, in all of which a transfer did the same."""
        if lately is not None:
            self._steps += len(steps_s)
            self._carried += len(steps_s) * lately.carried
            self._held_back += len(steps_s) * lately.held_back
        if lately is None or lately.rested:
            self._usual.extend(steps_s)
        elif len(self._usual) >= 2:
            self._busy.extend(steps_s)

    def allowance(self, waited: int = 0) -> int:
        """Bytes the next step may carry, and what `waited` steps before it might have; none for one that rests."""
        self._turn = (self._turn + 1) % TURN
        rests = self._turn < RESTS and self._bound < 1.0
        return self.bytes_per_step * (waited + (not rests))

    def adapt(self) -> None:
        """Changes the rate once there are steps enough to judge it by; on one thread only.

        A rate that did not matter is left as it is: this rank may have had nothing to send, or too little.
        """
        busy, now = tuple(self._busy), (self._steps, self._carried, self._held_back)
        steps, carried, held_back = (total - seen for total, seen in zip(now, self._seen, strict=True))
        if len(busy) < (SAMPLES if steps < PATIENCE else FEWEST):
            return
        self._inflation = self._mean_of(busy)
        factor = min(max(AIM * self._bound / max(self._inflation, 1e-9), LARGEST_CUT), LARGEST_RAISE)
        if held_back if factor > 1.0 else carried:
            self._bytes = min(max(int(self._bytes * factor), LEAST_BYTES), MOST_BYTES)
        self._seen = now
        del self._busy[: len(busy)]

    def _mean_of(self, busy: tuple[float, ...]) -> float:
        """Excess of a transfer's steps, `busy` ones and those between, over the usual ones."""
        excess = self._typical(busy) / self._typical(tuple(self._usual)) - 1.0
        return excess * len(busy) / max(self._steps - self._seen[0], len(busy))

    def _typical(self, steps_s: Sequence[float]) -> float:
        """Their mean, none counting as further than `FARTHEST` bounds from the median: some steps of a transfer are
        much longer than most, which the bound is meant for, and so is a step with a prefill, which it is not."""
        middle = median(steps_s)
        reach = FARTHEST * self._bound * middle
        return sum(min(max(step_s, middle - reach), middle + reach) for step_s in steps_s) / len(steps_s)
