"""Replays a long, made-up stream: `python -m scripts.long_replay [--windows 4000] [--file FILE.npy]`.

Makes `windows` windows of 8 sub-windows, each `[58, 288]` float32 tokens, on disk (2.1 GB for 4,000), replays it
with `swiftbalancer replay --json` in a process of its own, and prints the replay's figures with time and peak memory.
The stream repeats loads that drift between domains, with new sampling noise in every sub-window.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.load_streams import Length, Shape, domain_mixture

SUB_WINDOWS = 8
SHAPE = Shape(layers=58, experts=288, ranks=32, slots=320)
DRIFT_WINDOWS = 32


def make(path: Path, windows: int) -> None:
    """Writes `[windows * 8, 58, 288]` float32; memory stays that of `DRIFT_WINDOWS` windows."""
    rates = domain_mixture(SHAPE, Length(windows=DRIFT_WINDOWS, sub_windows=SUB_WINDOWS))
    rates = rates.reshape(-1, SHAPE.layers, SHAPE.experts)
    there_and_back = np.concatenate([rates, rates[::-1]])
    shape = (windows * SUB_WINDOWS, SHAPE.layers, SHAPE.experts)
    rng = np.random.default_rng(2)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for step in range(shape[0]):
            file.write(rng.poisson(there_and_back[step % len(there_and_back)]).astype("<f4").tobytes())


def replayed(path: Path, arguments: Sequence[str]) -> dict[str, object]:
    """The replay's figures, with seconds and the peak of its resident memory, file pages included."""
    command = [sys.executable, "-m", "swiftbalancer.cli", "replay", str(path), "--ranks", str(SHAPE.ranks)]
    command += ["--redundant", str(SHAPE.slots - SHAPE.experts), "--json", *arguments]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures: dict[str, object] = json.loads(done.stdout)
    figures["seconds"] = time.monotonic() - started
    figures["cpu_seconds"] = usage.ru_utime + usage.ru_stime
    figures["peak_mib"] = usage.ru_maxrss / 1024
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=4000)
    parser.add_argument("--file", type=Path, default=Path("long_replay.npy"), help="Made if it is not there.")
    options, rest = parser.parse_known_args()
    if not options.file.exists():
        make(options.file, options.windows)
    print(json.dumps(replayed(options.file, rest), indent=1))


if __name__ == "__main__":
    main()
