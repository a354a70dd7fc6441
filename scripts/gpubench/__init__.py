"""What `scripts/bench_gpu.py` measures, a module for each part."""
