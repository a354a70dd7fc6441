"""How long the main thread waits for the interpreter lock beside a thread that computes:

    python scripts/bench_interpreter_lock.py

A stand-in for the hook lets go of the lock six times for some microseconds, as launches do, and computes in between.
Each row is a run in a process of its own, with the switch interval and the timer slack given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import zlib

from swiftbalancer import interpreter_lock

ROWS = (
    ("CPython's own interval", 0.005, 50_000),
    ("20 us", 0.00002, 50_000),
    ("20 us, no slack", 0.00002, 1),
    ("5 us, no slack", interpreter_lock.SWITCH_INTERVAL_S, interpreter_lock.MAIN_SLACK_NS),
)
SECONDS = 3.0
RELEASES = 6
BETWEEN_S = 8e-6
DATA = bytes(40_000)
"""zlib sums it without the lock, in about as long as a launch takes."""


def main() -> None:
    """The table of all rows; with `--row`, one row's run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row",
        type=json.loads,
        metavar="[S,NS]",
        help="one run, seconds as JSON, with this interval and timer slack",
    )
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(run(*options.row)))
        return
    print("| setting | hooks | p50 us | p90 us | p99 us |\n|---|---|---|---|---|")
    for name, *setting in ROWS:
        out = subprocess.run(
            [sys.executable, __file__, "--row", json.dumps(setting)], check=True, capture_output=True
        )
        took = sorted(json.loads(out.stdout))
        figures = [f"{1e6 * took[int(len(took) * q)]:.0f}" for q in (0.5, 0.9, 0.99)]
        print(f"| {name} | {len(took)} | {' | '.join(figures)} |")


def run(interval_s: float, slack_ns: int) -> list[float]:
    """Seconds of each hook."""
    sys.setswitchinterval(interval_s)
    interpreter_lock.set_timer_slack(slack_ns)
    threading.Thread(target=_compute, daemon=True).start()
    took: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        time.sleep(0.0005)
        began = time.perf_counter()
        for _ in range(RELEASES):
            zlib.crc32(DATA)
            again = time.perf_counter() + BETWEEN_S
            while time.perf_counter() < again:
                pass
        took.append(time.perf_counter() - began)
    return took


def _compute() -> None:
    interpreter_lock.stand_back()
    count = 0
    while True:
        count += 1


if __name__ == "__main__":
    main()
