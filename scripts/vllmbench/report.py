"""What runs of the vLLM benchmark measured, as Markdown."""

from __future__ import annotations

import bisect
import json
import statistics
from pathlib import Path
from typing import Any

from scripts.vllmbench.pieces import Piece, computed_ms
from scripts.vllmbench.settings import KINDS, UNMEASURED, sub_windows

SKIPPED_STEPS = 5
"""First steps of a phase, which mix prefill and decode."""
FEWEST_PAIRS = 3
Groups = dict[str, list[dict[str, Any]]]
"""Records of steps, by class or by phase."""
PIECES_MS = (0.02, 0.1, 0.25, 0.5)
MOST_PLACES = 16
NEAR = 5
"""Restful steps on either side of one, with whose median it is compared."""
BOUND_MS = 1.0
"""How much longer than the 99th percentile of idle steps a step beside a rebalance may be."""
FAST = 1.25
"""A core is fast while its fixed piece of work takes at most this multiple of the run's 5th percentile of it."""


def report(out: Path, rank: int) -> None:
    """Prints a Markdown table per run, and how tokens compare."""
    for path in sorted(out.glob(f"*.rank{rank}.json")):
        tag = path.name.split(".rank")[0]
        ranks = {each.name: json.loads(each.read_text()) for each in sorted(out.glob(f"{tag}.rank*.json"))}
        result, every = ranks[path.name], list(ranks.values())
        print(f"\n### {tag} (vLLM {result['vllm']}, rank {rank})\n")
        groups = classes(result)
        print_latencies(groups)
        print_bound(groups, on_fast_cores(every))
        print_pairs(by_phase(groups))
        pieces = all_pieces(every)
        if pieces:
            note_work(result, pieces)
            print_beside_restful(groups)
            print_pieces(groups, pieces)
        print_cycles(result)
        print_tokens(result)


def classes(result: dict[str, Any]) -> Groups:
    """Steps that count, by class. With a scheduler that runs ahead, a step's work shows in the next step's time,
    so a step belongs to the busiest kind of itself and its predecessor. Phases whose names differ in the number at
    their end only are one class."""
    groups: Groups = {}
    batch = result["settings"]["batch"]
    length = {phase["name"]: phase["steps"] for phase in result["settings"]["phases"]}
    before = {"phase": "", "kind": "idle", "reskewed": False, "outputs": 0}
    for record in result["records"]:
        whole = record["outputs"] == batch == before["outputs"] and before["phase"] == record["phase"] != "settle"
        inner = whole and SKIPPED_STEPS <= record["step"] < length[record["phase"]]  # after that, all requests end
        if inner and not record["reskewed"] and not before["reskewed"]:
            kind = max(record["kind"], before["kind"], key=KINDS.index)
            phase = record["phase"].rstrip("0123456789")
            groups.setdefault(f"{phase}, all", []).append(record)
            if result["settings"]["mode"] in ("vllm", "ours"):
                groups.setdefault(f"{phase}, {kind}", []).append(record)
        before = record
    return groups


def by_phase(groups: Groups) -> Groups:
    """The steps of `classes`, by phase."""
    phases: Groups = {}
    for record in (record for name, records in groups.items() if name.endswith(", all") for record in records):
        phases.setdefault(record["phase"], []).append(record)
    return phases


def print_latencies(groups: Groups) -> None:
    """And how long a fixed piece of work took the main thread, which says how fast its core was."""
    print("| steps | n | p50 | p95 | p99 | max ms | hook p50 | hook p99 | hook max ms | core us |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, records in groups.items():
        gaps = [record["gap_ms"] for record in records]
        hooks = [record["hook_ms"] for record in records]
        cells = [f"{percentile(gaps, q):.2f}" for q in (50, 95, 99, 100)]
        cells += [f"{percentile(hooks, q):.3f}" for q in (50, 99, 100)]
        cells.append(f"{statistics.median(record['core_ms'] for record in records) * 1e3:.0f}")
        print(f"| {name} | {len(records)} | {' | '.join(cells)} |")


def on_fast_cores(results: list[dict[str, Any]]) -> set[tuple[str, int]]:
    """Phases and numbers of the steps at whose beginning and end the main threads of all ranks had fast cores."""
    fast: list[set[tuple[str, int]]] = []
    for result in results:
        records = result["records"]
        most = FAST * percentile([record["core_ms"] for record in records], 5)
        ended = {(record["phase"], record["step"]) for record in records if record["core_ms"] <= most}
        fast.append({(phase, step) for phase, step in ended if (phase, step - 1) in ended})
    return set.intersection(*fast)


def print_bound(groups: Groups, fast: set[tuple[str, int]]) -> None:
    """Steps of busy phases against those of all idle ones, and likewise where no rank's core was slow.

    With the balancer off, busy phases are no different: what is longer there is so by chance, or by the host.
    """
    idle = groups.get("calm, all", []) + groups.get("idle, all", [])
    busy = groups.get("busy, all", [])
    if not idle or not busy:
        return
    print("\n| busy over idle | busy, idle steps | p50 | p99 | longer than idle's p99 + 1 ms | idle ones |")
    print("|---|---|---|---|---|---|")
    for name, kept in (("all steps", None), ("all cores fast", fast)):
        gaps = [
            [each["gap_ms"] for each in records if kept is None or (each["phase"], each["step"]) in kept]
            for records in (idle, busy)
        ]
        if not all(gaps):
            continue
        bound = percentile(gaps[0], 99) + BOUND_MS
        more = [f"{percentile(gaps[1], q) / percentile(gaps[0], q) - 1:+.1%}" for q in (50, 99)]
        above, idle_above = (sum(gap > bound for gap in each) for each in (gaps[1], gaps[0]))
        print(f"| {name} | {len(gaps[1])}, {len(gaps[0])} | {' | '.join(more)} | {above} | {idle_above} |")
    print()


def print_pairs(phases: Groups) -> None:
    """Where phases alternate: each busy one against the idle one before it, since engines get faster and slower.

    The mean over pairs of the ratio of percentiles, with its standard error.
    """
    gaps = {phase: [record["gap_ms"] for record in records] for phase, records in phases.items()}
    idle, busy = ([phase for phase in gaps if phase.rstrip("0123456789") == name] for name in ("idle", "busy"))
    if len(idle) != len(busy) or len(idle) < FEWEST_PAIRS:
        return
    for q in (50, 95, 99):
        ratios = [percentile(gaps[b], q) / percentile(gaps[i], q) for i, b in zip(idle, busy, strict=True)]
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        print(f"p{q} of busy phases against the idle ones before: {statistics.mean(ratios) - 1:+.1%} ± {error:.1%}")


def all_pieces(results: list[dict[str, Any]]) -> list[list[Piece]]:
    """Of every rank of the run; none where they were not noted or ranks are not in their drivers' processes."""
    if results[0]["settings"]["layout"] != "one_process":
        return []
    ranks = [result["pieces"] for result in results]
    return [[(began, ended, cpu, place) for began, ended, cpu, place in pieces] for pieces in ranks if pieces]


def note_work(result: dict[str, Any], ranks: list[list[Piece]]) -> None:
    """Gives each record `ours_ms`: what our threads computed beside that step, on the rank where that was most."""
    ordered = [sorted(pieces) for pieces in ranks]
    for record in result["records"]:
        begin_s = record["end_s"] - record["gap_ms"] / 1e3
        record["ours_ms"] = max((computed_ms(pieces, begin_s, record["end_s"]) for pieces in ordered), default=0.0)


def print_beside_restful(groups: Groups) -> None:
    """Each step against the restful ones around it, since engines get faster and slower within a phase, too."""
    for records in by_phase(groups).values():
        note_ratios(records)
    print("\nOf a step to the median of the restful ones around it:\n")
    print("| steps | p50 | p95 | p99 | max |\n|---|---|---|---|---|")
    for name, records in groups.items():
        ratios = [record["ratio"] for record in records]
        print(f"| {name} | {' | '.join(f'{percentile(ratios, q):.3f}' for q in (50, 95, 99, 100))} |")


def note_ratios(records: list[dict[str, Any]]) -> None:
    """Gives each record, of one phase, `ratio`: its time to the median of `NEAR` restful ones on either side."""
    restful = [number for number, record in enumerate(records) if record["ours_ms"] <= PIECES_MS[0]]
    for number, record in enumerate(records):
        at = bisect.bisect_left(restful, number)
        after = bisect.bisect_right(restful, number)
        near = restful[max(at - NEAR, 0) : at] + restful[after : after + NEAR]
        usual = statistics.median(records[other]["gap_ms"] for other in near) if near else record["gap_ms"]
        record["ratio"] = record["gap_ms"] / usual


def print_pieces(groups: Groups, ranks: list[list[Piece]]) -> None:
    """How much longer than their phase's median rebalancing steps take, by what threads computed beside them."""
    usual = {
        phase: statistics.median(record["gap_ms"] for record in records)
        for phase, records in by_phase(groups).items()
    }
    longer: list[list[float]] = [[] for _ in range(len(PIECES_MS) + 1)]
    for record in groups.get("busy, all", []):
        at = bisect.bisect_left(PIECES_MS, record["ours_ms"])
        longer[at].append(record["gap_ms"] - usual[record["phase"]])
    print("\n| our threads beside a step, ms | steps | longer by, mean ms | p95 |\n|---|---|---|---|")
    for label, values in zip([*(f"up to {bound}" for bound in PIECES_MS), "more"], longer, strict=True):
        if values:
            print(f"| {label} | {len(values)} | {statistics.mean(values):.2f} | {percentile(values, 95):.2f} |")
    print_places([piece for pieces in ranks for piece in pieces])


def print_places(pieces: list[Piece]) -> None:
    """Where pieces of work that are too long for one step begin and end."""
    places: dict[str, list[float]] = {}
    for _, _, cpu_ms, place in pieces:
        places.setdefault(place, []).append(cpu_ms)
    print("\n| piece of work, of all ranks | times | mean ms | longer than 0.25 | than 0.5 |\n|---|---|---|---|---|")
    longest = sorted(places.items(), key=lambda item: -sum(ms for ms in item[1] if ms > PIECES_MS[-2]))
    for place, values in longest[:MOST_PLACES]:
        above = " | ".join(str(sum(ms > bound for ms in values)) for bound in PIECES_MS[-2:])
        print(f"| {place} | {len(values)} | {statistics.mean(values):.2f} | {above} |")


def print_cycles(result: dict[str, Any]) -> None:
    if result["stats"]:
        print(f"\nstats: {json.dumps(result['stats'])}")
    steps = steps_to_apply(result)
    if steps:
        print(
            f"placement cycles applied: {len(steps)}; steps from trigger to applied: "
            f"p50 {percentile(steps, 50):.0f}, max {max(steps)}; moves "
            f"{[o['moves'] for o in result['outcomes'] if o['committed'] and o['kind'] == 'placement']}"
        )
    lost = [outcome["reason"] for outcome in result["outcomes"] if not outcome["committed"]]
    if lost:
        print(f"cycles lost: {lost}")
    print_missing(result)
    if result["wrong_slots"] >= 0:
        print(f"slots with other weights than their map says: {result['wrong_slots']}")


def print_missing(result: dict[str, Any]) -> None:
    """Says so if the run was ended before its last phase."""
    seen = {record["phase"] for record in result["records"]} | UNMEASURED
    missing = [phase["name"] for phase in result["settings"]["phases"] if phase["name"] not in seen]
    if missing:
        print(f"the run was ended before these phases, and no slot was compared: {', '.join(missing)}")


def steps_to_apply(result: dict[str, Any]) -> list[int]:
    """Steps from the end of the sub-window that asked for a placement to its last commit.

    Before a commit come moving steps, and the last sub-window to end before those is taken for it.
    """
    kinds = {record["balancer_step"]: record["kind"] for record in result["records"]}
    _, length = sub_windows(result["settings"]["interval"])
    found = []
    for outcome in result["outcomes"]:
        if not outcome["committed"] or outcome["kind"] != "placement":
            continue
        step = outcome["step"]
        while kinds.get(step - 1) in ("moving", "committing"):
            step -= 1
        found.append(outcome["step"] - step // length * length)
    return found


def print_tokens(result: dict[str, Any]) -> None:
    """Compares the phases of a greedy run that decode the same prompts, each with the first of them."""
    first_of: dict[str, str] = {}
    for phase in result["settings"]["phases"] if result["tokens"] else ():
        base = first_of.setdefault(phase["seed"], phase["name"])
        if base == phase["name"] or phase["name"] == "settle":
            continue
        numbers = range(result["settings"]["batch"])
        pairs = [(result["tokens"][f"{phase['name']}-{n}"], result["tokens"][f"{base}-{n}"]) for n in numbers]
        equal = sum(a == b for a, b in pairs)
        first = min((first_difference(a, b) for a, b in pairs if a != b), default=None)
        note = "" if first is None else f"; first difference at token {first}"
        total, distinct = sum(len(b) for _, b in pairs), len({token for _, b in pairs for token in b})
        print(
            f"tokens of {phase['name']} and {base}: {equal} of {len(pairs)} sequences equal "
            f"({total} tokens, {distinct} distinct){note}"
        )


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def percentile(values: list[float] | list[int], q: float) -> float:
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(q / 100 * len(ordered)))])
