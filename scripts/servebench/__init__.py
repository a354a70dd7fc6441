"""What `scripts/bench_serve.py` consists of."""
