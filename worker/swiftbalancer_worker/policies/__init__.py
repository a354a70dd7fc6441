"""Placement policies: one class in one file each, found by the entry point group `swiftbalancer.policies`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.errors import ConfigError, UnknownPolicy
from swiftbalancer_worker.forecast import Forecast
from swiftbalancer_worker.inputs import PlanInput
from swiftbalancer_worker.policies.foreign import ForeignPolicy
from swiftbalancer_worker.policies.greedy import GreedyPolicy
from swiftbalancer_worker.policies.none import NonePolicy
from swiftbalancer_worker.policies.random import RandomPolicy
from swiftbalancer_worker.policies.swift import SwiftPolicy

ENTRY_POINT_GROUP = "swiftbalancer.policies"


class Policy(Protocol):
    """Decides which expert each slot should hold; the planner does the rest."""

    @property
    def name(self) -> str:
        """What users write."""
        ...

    @property
    def gated(self) -> bool:
        """Whether the planner may leave a layer as it is where moving does not pay."""
        ...

    @property
    def keeps_ranks(self) -> bool:
        """Whether it matters which rank gets what; if not, the planner exchanges whole ranks to save moves."""
        ...

    def place(self, given: PlanInput, forecast: Forecast) -> NDArray[np.int32]:
        """`[layers, slots]` int32, the wanted `physical_to_logical_map`; slots of excluded ranks as they are."""
        ...


BUILT_IN: Mapping[str, Callable[..., Policy]] = {
    "swift": SwiftPolicy,
    "greedy": GreedyPolicy,
    "random": RandomPolicy,
    "none": NonePolicy,
    "foreign": ForeignPolicy,
}


def known_policies() -> list[str]:
    """Names of all policies, built in and installed."""
    return sorted({*BUILT_IN, *(found.name for found in entry_points(group=ENTRY_POINT_GROUP))})


def policy_named(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """The policy registered as `name`, made with `options`.

    Raises `UnknownPolicy` with the known names, and `ConfigError` if the policy takes no such options.
    """
    make = BUILT_IN.get(name) or _installed(name)
    try:
        return make(**dict(options or {}))
    except TypeError as error:
        raise ConfigError(f"policy.options: {name!r} does not take {sorted(options or {})}: {error}") from error


def _installed(name: str) -> Callable[..., Policy]:
    for found in entry_points(group=ENTRY_POINT_GROUP):
        if found.name == name:
            made: Callable[..., Policy] = found.load()
            return made
    raise UnknownPolicy(f"policy: unknown {name!r}; known: {', '.join(known_policies())}")
