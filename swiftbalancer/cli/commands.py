"""Imports every command module; importing registers its commands."""

from __future__ import annotations

from swiftbalancer.cli import advise, config, demo, doctor, files, replay, top, worker

__all__ = ["advise", "config", "demo", "doctor", "files", "replay", "top", "worker"]
