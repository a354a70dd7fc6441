"""The parts of `scripts/bench_vllm.py`."""
