"""The errors a user can meet, named by what they mean."""

from __future__ import annotations


class BalancerError(Exception):
    """Root of every error swiftbalancer raises on purpose."""


class ConfigError(BalancerError):
    """A setting is unknown, of the wrong type or out of range; the message starts with the key's path."""


class UnknownPolicy(ConfigError):
    """A policy name that nothing registered; the message lists the known ones."""


class TopologyError(BalancerError):
    """Experts, slots, ranks and nodes do not fit together."""


class InvalidLoad(BalancerError):
    """A load is NaN, infinite, negative or of the wrong shape."""


class InvalidPlan(BalancerError):
    """A plan would leave an expert without a slot, put it twice on a rank, or is for another topology."""


class WireError(BalancerError):
    """A message is malformed, too large or of another protocol version."""


class WorkerLost(BalancerError):
    """The worker process could not be started or did not answer in time."""


class EndpointInUse(BalancerError):
    """Another worker already listens on this endpoint."""


class TransferFailed(BalancerError):
    """Weights did not arrive, or arrived damaged; the old placement is still in force."""


class AgreementLost(BalancerError):
    """This rank voted for a change and cannot learn whether its peers applied it.

    Serving on would route tokens by maps that may differ between ranks, so the engine must stop this rank.
    """


class RecordingError(BalancerError):
    """A recording or trace is missing, truncated, foreign or too large."""


class UnsupportedEngine(BalancerError):
    """The engine, its version or its configuration cannot be balanced; the message says what to change."""
