"""How many bytes may travel during the next step, so that steps stay within a bound of their usual length.

Measured, not modelled: steps in which a transfer does something are compared with steps in which it rests, and the
rate is scaled by how far the excess is from the bound. What counts is the mean over the steps of a transfer: a low
rate lets a piece travel only now and then, and the steps between are restful. While experts move, two steps of
sixteen are allowed nothing, so that the comparison follows the load.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean

UNBOUND = 1 << 60
"""Bytes per step when no bound is wanted."""
FIRST_BYTES = 16 << 20
LEAST_BYTES = 64 << 10
"""A transfer always gets on, however loaded the device is."""
MOST_BYTES = 1 << 36
TURN = 16
RESTS = 2
SAMPLES = 7
"""Busy steps between two changes of the rate, of which a turn thus sees two."""
PATIENCE = 48
"""Steps of a transfer after which fewer busy ones have to do."""
FEWEST = 3
USUAL_STEPS = 32
AIM = 2 / 3
"""Part of the bound aimed at: the rate is set without the longest steps, and the mean lies above."""
LARGEST_CUT = 0.5
LARGEST_RAISE = 2.5


class Pacer:
    """Call `observe` with each step's time; while a batch is moving, `allowance` for the bytes of the next one."""

    def __init__(self, max_step_inflation: float) -> None:
        self._bound = max_step_inflation
        self._bytes = FIRST_BYTES
        self._usual: deque[float] = deque(maxlen=USUAL_STEPS)
        self._busy: list[float] = []
        self._allowed = 0
        """Steps of transfers since the last change."""
        self._turn = 0

    @property
    def bytes_per_step(self) -> int:
        """What a step is allowed at present, unless it rests."""
        return UNBOUND if self._bound >= 1.0 else self._bytes

    @property
    def inflation(self) -> float:
        """Mean excess of the steps of a transfer over the usual ones, since the last change; 0.0 before any."""
        busy, usual = tuple(self._busy), tuple(self._usual)  # one look: other threads ask, too
        if not (busy and usual):
            return 0.0
        return (middle(busy) / middle(usual) - 1.0) * len(busy) / max(self._allowed, len(busy))

    @property
    def usual_step_s(self) -> float:
        """Time of a step in which nothing travels; 0.0 before any."""
        usual = tuple(self._usual)
        return middle(usual) if usual else 0.0

    def observe(self, step_s: float, *, busy: bool) -> None:
        """The step that just ended took `step_s` seconds; `busy` says whether a transfer did something in it."""
        if not busy:
            self._usual.append(step_s)
            return
        self._busy.append(step_s)
        enough = SAMPLES if self._allowed < PATIENCE else FEWEST
        if len(self._busy) >= enough and len(self._usual) >= 2:
            self._adapt()

    def allowance(self) -> int:
        """Bytes the next step may carry, 0 while resting."""
        self._turn = (self._turn + 1) % TURN
        self._allowed += 1
        return self.bytes_per_step if self._turn >= RESTS or self._bound >= 1.0 else 0

    def _adapt(self) -> None:
        excess = max(self.inflation, 1e-9)
        factor = min(max(AIM * self._bound / excess, LARGEST_CUT), LARGEST_RAISE)
        self._bytes = min(max(int(self._bytes * factor), LEAST_BYTES), MOST_BYTES)
        self._busy.clear()
        self._allowed = 0


def middle(values: Sequence[float]) -> float:
    """Mean of the middle half: as steady as a mean, and a prefill among decodes does not count."""
    cut = len(values) // 4
    return fmean(sorted(values)[cut : len(values) - cut])
