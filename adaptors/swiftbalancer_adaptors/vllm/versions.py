"""Which vLLM releases the adaptor knows, and how they differ where it matters."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Series:
    """One minor release of vLLM whose expert balancing code was read and fits the hooks.

    `counts_padding`: the counters include the padding tokens of captured graphs, because this release does not
    tell its kernel how many tokens are real.
    """

    name: str
    counts_padding: bool = False


KNOWN = {
    series.name: series
    for series in (
        Series("0.24", counts_padding=True),
        Series("0.30"),
        Series("0.31"),
        Series("0.32"),
        Series("0.33"),
    )
}


def series_of(version: str) -> Series | None:
    """The known series of a vLLM version such as `0.32.0+cpu`; None for every other."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return KNOWN.get(f"{match[1]}.{match[2]}") if match else None


def unknown_version_warning(version: str) -> str:
    return (
        f"swiftbalancer: vLLM {version} is not one this release knows ({', '.join(KNOWN)}); vLLM is left alone "
        "and serves without swiftbalancer. Install a known vLLM, or a newer swiftbalancer."
    )


def padding_warning(version: str) -> str:
    return (
        f"swiftbalancer: vLLM {version} counts the padding of captured graphs as load, so balancing is less exact "
        "while batches are much smaller than the graphs they run in; 0.30 and later count real tokens only"
    )
