"""The embedded engine: a small real Mixture-of-Experts language model, expert-parallel in plain torch."""
