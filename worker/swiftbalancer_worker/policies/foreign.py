"""Any class or function with the `rebalance_experts` signature of vLLM, SGLang and DeepSeek, run as a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.compat import call_rebalance
from swiftbalancer.errors import ConfigError
from swiftbalancer_worker.forecast import Forecast
from swiftbalancer_worker.inputs import PlanInput


@dataclass(frozen=True, slots=True)
class ForeignPolicy:
    """`target`: `module:name` of a class with a `rebalance_experts` method, or of such a function.

    It decides for the loads of the whole window. Where it puts an expert twice on a rank, the planner exchanges
    the second one.
    """

    target: str
    num_groups: int = 1
    name: str = "foreign"
    gated: bool = True
    keeps_ranks: bool = False

    def __post_init__(self) -> None:
        """Raises `ConfigError` if `target` names nothing that can be called."""
        load_function(self.target)

    def place(self, given: PlanInput, forecast: Forecast) -> NDArray[np.int32]:  # noqa: ARG002
        """The foreign policy's map; raises `ConfigError` if some rank is excluded, which it cannot know of."""
        topology = given.placement.topology
        if topology.excluded_ranks:
            raise ConfigError(f"policy {self.target} cannot plan around excluded ranks {topology.excluded_ranks}")
        return call_rebalance(
            load_function(self.target),
            given.loads.sum(0),
            topology=topology,
            num_groups=self.num_groups,
            old_map=given.placement.physical_to_logical_map,
        )


def load_function(target: str) -> Callable[..., Any]:
    """The function that `module:name` means; raises `ConfigError` if there is none."""
    module_name, colon, attribute = str(target).partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f"policy.options.target: {target!r} is not like module:name")
    try:
        found = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"policy.options.target: cannot load {target!r}: {error}") from error
    function = getattr(found, "rebalance_experts", found)
    if not callable(function):
        raise ConfigError(f"policy.options.target: {target!r} has no rebalance_experts and is not a function")
    made: Callable[..., Any] = function
    return made
