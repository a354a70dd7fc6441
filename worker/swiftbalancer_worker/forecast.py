"""What the next sub-window will ask for, from the sub-windows seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """`expected` `[layers, experts]` tokens of the next sub-window; `scenarios` `[n, layers, experts]`, what else
    may come (the expected loads first)."""

    expected: FloatArray
    scenarios: FloatArray


def forecast(loads: FloatArray, *, stretch: float = 3.0) -> Forecast:
    """Expects the mean of the last two sub-windows; scenarios stretch what the first and last did to the mean."""
    expected = loads[-2:].mean(0)
    mean = loads.mean(0)
    others = [np.maximum(expected + stretch * (loads[i] - mean), 0.1 * expected) for i in (0, -1)]
    return Forecast(expected, np.stack([expected, *others]))
