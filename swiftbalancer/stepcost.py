"""Whether steps get longer by what our threads compute beside them: told from the engine's own steps.

Each step with work of ours is compared with the last ones without. One comparison says little, since steps vary by as
much as the work takes; so evidence is added up until it is enough, however many steps that takes (a sequential
probability ratio test, A. Wald, 1945).
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from statistics import median


class Cost(Enum):
    """Of what our threads compute."""

    FREE = "steps are as short beside it"
    DEAR = "steps are longer by it"


FREE, DEAR = 0.1, 0.8
"""Seconds by which a step gets longer per second of ours, where steps wait for the device, and where they wait for
their own Python: between the two the evidence weighs."""
ENOUGH = {Cost.FREE: 4.0, Cost.DEAR: 8.0}
"""Logarithm of how much likelier what was seen must be with one than with the other. `FREE` needs less: cycles are
long until then, and what is wrongly free is not for long."""
FARTHEST = 1.5
"""Standard deviations by which a step counts as longer or shorter than expected; a prefill makes it much more."""
MOST_OF_ONE = 0.7
"""Evidence of a single step, for each of these."""
RESTFUL = 5
"""The last steps without work of ours, which each is compared with: the engine's own speed wanders, over hundreds of
steps."""
RECENT = 16
"""Steps in which these must have been."""
SPREADS = 24
"""Restful steps from which it is known how much one differs from those before."""
LEAST_SPREAD = 0.005
"""Of a step. No clock and no engine is more exact than that."""
DEVIATION = 1.48
"""Standard deviations of a normal distribution in its median absolute deviation."""
SHARED = 0.3
"""Variance of the median of `RESTFUL` steps, in that of one: steps with work in a row are compared with the same."""


class StepCost:
    """Is told of every step, in order, by one thread at a time."""

    def __init__(self) -> None:
        self._restful: deque[float] = deque(maxlen=RESTFUL)
        """Seconds."""
        self._spread: deque[float] = deque(maxlen=SPREADS)
        """Seconds by which restful steps differed from the median of those before."""
        self._since = 0
        """Steps with work of ours, in a row."""
        self._evidence = 0.0
        """For `Cost.DEAR`; below 0 for `Cost.FREE`."""

    def others(self, number: int) -> None:
        """Steps that say nothing: weights move beside them, which makes them longer, too, or nobody looked."""
        self._since += number

    def restful(self, step_s: float) -> None:
        """A step beside which our threads did next to nothing."""
        if self._since > RECENT:
            self._restful.clear()
        if len(self._restful) == RESTFUL:
            self._spread.append(abs(step_s - self._usual_s()))
        self._restful.append(step_s)
        self._since = 0

    def beside(self, step_s: float, used_s: float) -> Cost | None:
        """A step beside which they computed for `used_s`; says what that costs once it is known, and starts anew."""
        self._since += 1
        if self._since > RECENT or len(self._restful) < RESTFUL or len(self._spread) < SPREADS:
            return None
        usual_s = self._usual_s()
        spread_s = max(DEVIATION * median(self._spread), LEAST_SPREAD * usual_s)
        deviations = (step_s - usual_s - (DEAR + FREE) / 2 * used_s) / spread_s
        each = min((DEAR - FREE) * used_s / spread_s, MOST_OF_ONE)
        # n comparisons with the same steps are worth n / (1 + SHARED * n): this is what the nth adds
        worth = 1 / (1 + SHARED * (self._since - 1)) ** 2
        self._evidence += worth * each * max(-FARTHEST, min(deviations, FARTHEST))
        cost = Cost.DEAR if self._evidence > 0 else Cost.FREE
        if abs(self._evidence) < ENOUGH[cost]:
            return None
        self._evidence = 0.0
        return cost

    def _usual_s(self) -> float:
        return sorted(self._restful)[RESTFUL // 2]
