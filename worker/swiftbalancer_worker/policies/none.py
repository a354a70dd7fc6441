"""The policy that never moves an expert; dispatch tables are still renewed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftbalancer_worker.forecast import Forecast
from swiftbalancer_worker.inputs import PlanInput


@dataclass(frozen=True, slots=True)
class NonePolicy:
    """Leaves every expert where it is."""

    name: str = "none"
    gated: bool = True
    keeps_ranks: bool = True

    def place(self, given: PlanInput, forecast: Forecast) -> NDArray[np.int32]:  # noqa: ARG002
        """The placement in force."""
        return given.placement.physical_to_logical_map
