"""The demo: a real MoE model served expert-parallel on this machine, balanced live, compared with no balancing."""
