"""How many bytes may travel during the next step, so that steps stay within a bound of their usual length.

Measured, not modelled: steps that carry bytes are compared with steps that do not, medians of a few each, and
the rate is scaled by how far the excess is from the bound. What counts is the mean over the steps of a transfer: a
low rate lets a piece travel only now and then, and the steps between carry nothing. While experts move, two steps of
sixteen are allowed nothing, so that the comparison follows the load.
"""

from __future__ import annotations

from collections import deque
from statistics import median

UNBOUND = 1 << 60
"""Bytes per step when no bound is wanted."""
FIRST_BYTES = 16 << 20
LEAST_BYTES = 64 << 10
"""A transfer always gets on, however loaded the device is."""
MOST_BYTES = 1 << 36
TURN = 16
RESTS = 2
SAMPLES = 7
"""Carrying steps between two changes of the rate, of which a turn thus sees two."""
PATIENCE = 48
"""Steps of a transfer after which fewer carrying ones have to do."""
FEWEST = 3
USUAL_STEPS = 32
AIM = 0.75
"""Part of the bound aimed at: the rate is set by medians, and the mean of steps that carry lies above."""
LARGEST_CUT = 0.5
LARGEST_RAISE = 2.5


class Pacer:
    """Call `observe` with each step's time; while a batch is moving, `allowance` for the bytes of the next one."""

    def __init__(self, max_step_inflation: float) -> None:
        self._bound = max_step_inflation
        self._bytes = FIRST_BYTES
        self._usual: deque[float] = deque(maxlen=USUAL_STEPS)
        self._carrying: list[float] = []
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
        carrying, usual = tuple(self._carrying), tuple(self._usual)  # one look: other threads ask, too
        if not (carrying and usual):
            return 0.0
        return (median(carrying) / median(usual) - 1.0) * len(carrying) / max(self._allowed, len(carrying))

    @property
    def usual_step_s(self) -> float:
        """Median time of a step that carries nothing; 0.0 before any."""
        usual = tuple(self._usual)
        return median(usual) if usual else 0.0

    def observe(self, step_s: float, *, carried: bool) -> None:
        """The step that just ended took `step_s` seconds; `carried` says whether bytes were on their way in it."""
        if not carried:
            self._usual.append(step_s)
            return
        self._carrying.append(step_s)
        enough = SAMPLES if self._allowed < PATIENCE else FEWEST
        if len(self._carrying) >= enough and len(self._usual) >= 2:
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
        self._carrying.clear()
        self._allowed = 0
