"""Placement policies: one class in one file each, found by the entry point group `swiftbalancer.policies`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from inspect import signature
from typing import Any, Protocol

import msgspec
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
FIXED = ("name", "gated", "keeps_ranks")
"""What a policy says of itself, which is no option."""


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
    given = dict(options or {})
    try:
        if name not in BUILT_IN:
            return make(**given)
        signature(make).bind(**given)
    except TypeError as error:
        raise ConfigError(_misfit(name, make, given, error)) from error
    try:
        policy: Policy = msgspec.convert(given, make)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$")
        raise ConfigError(f"policy.options{where.rstrip('`')}: {text}") from None
    return policy


def _misfit(name: str, make: Callable[..., Policy], options: Mapping[str, Any], error: TypeError) -> str:
    """What is wrong with the options of a policy, and how they are given."""
    given = "in a configuration policy.options, on the command line --policy-option NAME=VALUE"
    try:
        parameters = signature(make).parameters
    except (TypeError, ValueError):  # a callable that does not say
        return f"policy.options: {name!r} does not take {sorted(options)}: {error}"
    if wrong := sorted(set(options) - set(parameters)):
        takes = ", ".join(key for key in parameters if key not in FIXED) or "none"
        return f"policy.options.{wrong[0]}: {name!r} has no such option; it takes {takes}"
    needed = [key for key, each in parameters.items() if each.default is each.empty and key not in options]
    if needed:
        return f"policy.options.{needed[0]}: {name!r} needs it ({given})"
    return f"policy.options: {name!r} does not take {sorted(options)}: {error}"


def _installed(name: str) -> Callable[..., Policy]:
    for found in entry_points(group=ENTRY_POINT_GROUP):
        if found.name == name:
            made: Callable[..., Policy] = found.load()
            return made
    raise UnknownPolicy(f"policy: unknown {name!r}; known: {', '.join(known_policies())}")
