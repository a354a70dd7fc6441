"""Targets and running of `scripts/fuzz.py`."""
