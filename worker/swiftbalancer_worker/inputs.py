"""What a plan is made from: the values every policy gets."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.dispatch import DispatchForm
from swiftbalancer.errors import ConfigError, InvalidLoad
from swiftbalancer.load import checked_load
from swiftbalancer.placement import Placement
from swiftbalancer_worker.cost import CostModel


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What one plan may do, and when it should do nothing."""

    max_moves_per_layer: int | None = 8
    """Experts that may move per layer and plan; None: no limit. Bounds `swift`; policies that place from scratch
    ignore it, as their authors published them."""
    staging_experts: int = 2
    """Experts of one layer or several that a rank can receive in one batch."""
    target_imbalance: float = 1.02
    """Layers at or below this predicted max/mean are left alone."""
    hysteresis: float = 1.0
    """How many standard errors, over the sub-windows seen, a layer's gain must be above 0."""
    min_gain: float = 0.002
    """Smallest drop of a layer's predicted imbalance worth any move."""
    min_refresh_gain: float = 0.002
    """Smallest drop of the predicted imbalance, mean over layers, worth new tables for the same placement."""
    pay_back: float = 1.0
    """The time a layer's plan is predicted to save must exceed this multiple of its transfer's cost."""
    gated: bool = True
    """False: apply what the policy says, pay or not (tests and comparisons)."""

    def __post_init__(self) -> None:
        if self.max_moves_per_layer is not None and self.max_moves_per_layer < 0:
            raise ConfigError(f"max_moves_per_layer: {self.max_moves_per_layer} is below 0")
        if self.staging_experts < 1:
            raise ConfigError(f"staging_experts: {self.staging_experts} is below 1")
        if self.target_imbalance < 1.0:
            raise ConfigError(f"target_imbalance: {self.target_imbalance} is below 1.0")
        for name in ("hysteresis", "min_gain", "min_refresh_gain", "pay_back"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: {getattr(self, name)} is below 0")


@dataclass(frozen=True, slots=True, eq=False)
class PlanInput:
    """Everything a plan needs; planners keep nothing between requests.

    `loads` `[sub_windows, layers, experts]` tokens, oldest first. `table` `[layers, experts, width]` int32, the
    dispatch table in force, if known. Build with `checked` where loads come from outside.
    """

    placement: Placement
    loads: NDArray[np.float64]
    dispatch: DispatchForm
    epoch: int
    limits: PlanLimits = field(default_factory=PlanLimits)
    cost: CostModel = field(default_factory=CostModel)
    table: NDArray[np.int32] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `InvalidLoad` if loads have another shape than the placement, or are NaN or negative."""
        wanted = (self.placement.num_layers, self.placement.num_experts)
        if self.loads.ndim != 3 or self.loads.shape[1:] != wanted or not len(self.loads):
            raise InvalidLoad(
                f"loads have shape {self.loads.shape}, expected [sub_windows >= 1, {wanted[0]}, {wanted[1]}]"
            )
        object.__setattr__(self, "loads", checked_load(self.loads, name="loads"))
