"""Imports every command module; importing registers its commands."""

from __future__ import annotations

from swiftbalancer.cli import config, demo, files, replay, top, worker

__all__ = ["config", "demo", "files", "replay", "top", "worker"]
