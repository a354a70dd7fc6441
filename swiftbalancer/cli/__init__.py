"""The `swiftbalancer` command."""

from __future__ import annotations

from swiftbalancer.cli.app import main

__all__ = ["main"]
