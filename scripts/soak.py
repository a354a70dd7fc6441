"""Serves minimoe for a set time under random faults, and prints what they cost.

`python -m scripts.soak --minutes 60`, in a checkout with the package installed.

Two or more ranks on this machine's cores over gloo, a real worker that misbehaves on demand, faults one after
another, drawn by a seed. Every predicted byte's scores are compared, to the bit, with those of one process that
has no balancer. Exit status 0 only if none differs and every fault injected was survived.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.edges.fault_runs import run_ranks
from tests.edges.faults import TRANSIENT
from tests.edges.processes import Run, Seat

MAX_GROWTH = 0.10
"""Resident memory may differ by this fraction between the first tenth and the end, allocators being what they are."""


def main() -> int:
    options = parse()
    names = sorted(TRANSIENT)
    draw = random.Random(options.seed)
    # Every kind once, then at random; far more than there is time for.
    faults = draw.sample(names, len(names)) + draw.choices(names, k=200 * int(options.minutes + 1))
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        seats = [Seat()] * options.ranks
        serving = {"engine": "minimoe", "seconds": seconds, "step_s": options.pause_ms / 1e3}
        run = run_ranks(Path(folder), faults, seats=seats, timeout_s=seconds + 600.0, **serving)
    if any(run.exit_codes) or len(run.ranks) < options.ranks:
        print(run.log[-5000:], file=sys.stderr)
        print(f"ranks ended with {run.exit_codes}")
        return 1
    print_costs(run.ranks[0]["costs"])
    print()
    return int(not print_totals(run))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause-ms", type=float, default=1.0, help="idle time after each pass, to spare the machine")
    return parser.parse_args()


def print_costs(costs: list[dict[str, Any]]) -> None:
    """One line per kind of fault."""
    print(f"{'fault':<36}{'injected':>9}{'survived':>9}{'cycles lost':>12}{'restarts':>9}{'longest s':>10}")
    for name in sorted({cost["fault"] for cost in costs}):
        same = [cost for cost in costs if cost["fault"] == name]
        injected, survived = sum(c["fired"] for c in same), sum(c["recovered"] for c in same)
        lost = sum(sum(c["dropped"].values()) + c["requests_failed"] for c in same)
        restarts, longest = sum(c["restarts"] for c in same), max(c["seconds"] for c in same)
        print(f"{name:<36}{injected:>9}{survived:>9}{lost:>12}{restarts:>9}{longest:>10.1f}")


def print_totals(run: Run) -> bool:
    """The sums over ranks; whether all is well."""
    costs, watches = run.ranks[0]["costs"], [rank["watch"] for rank in run.ranks]
    reasons: Counter[str] = Counter()
    for cost in costs:
        reasons.update(cost["dropped"])
    wrong = sum(w["wrong_outputs"] + w["wrong_maps"] + w["epochs_apart"] for w in watches)
    growth = [w["late_rss_bytes"] / w["early_rss_bytes"] - 1 for w in watches if w["early_rss_bytes"]]
    injected = [cost for cost in costs if cost["fired"]]
    survived = sum(cost["recovered"] for cost in injected)
    whole = survived == len(injected) > 0
    print(f"faults injected        {len(injected)}; {len(costs) - len(injected)} armed without finding their moment")
    print(f"faults survived        {survived}: a cycle was committed afterwards")
    print(f"forward passes         {watches[0]['passes']} on each of {len(watches)} ranks")
    print(f"cycles committed       {run.ranks[0]['committed']}, experts moved: {run.ranks[0]['experts_moved']}")
    print(f"cycles dropped         {sum(reasons.values())}: {dict(reasons)}")
    print(f"tokens compared        {sum(w['tokens_compared'] for w in watches)}")
    print(f"mismatches             {wrong}")
    print(f"memory growth          {', '.join(f'{g:+.1%}' for g in growth) or 'run too short to say'}")
    return whole and not wrong and all(g < MAX_GROWTH for g in growth)


if __name__ == "__main__":
    sys.exit(main())
