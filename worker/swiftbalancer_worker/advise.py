"""Is balancing worth it, with how many redundant experts, which policy and budget: a sweep of replays, judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from swiftbalancer.errors import ConfigError
from swiftbalancer_worker.replay import ReplaySettings, check_length, replay
from swiftbalancer_worker.replay_summary import time_of
from swiftbalancer_worker.trace import Trace

WORTH_IT = 0.02
"""Gains below 2 % of the expert layers' time are not worth the memory and the moving parts."""
ENOUGH = 0.9
"""The cheapest option with nine tenths of the best gain is where returns diminish."""
LEAST_SHOWN = 0.0005
"""Of a gain: less is 0.0 % where it is printed."""
RANKS = (4, 8, 16, 32, 64)
HEEDS_BUDGET = ("swift",)


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to try. `redundant` are extra slots per layer over all ranks; empty: none, one, two and
    four a rank, up to half as many as experts."""

    ranks: Sequence[int]
    redundant: Sequence[int] = ()
    policies: Sequence[str] = ("swift", "greedy")
    budgets: Sequence[int] = (4, 16)


@dataclass(frozen=True, slots=True)
class Option:
    """One deployment and what it would do. `gain`: share of the expert layers' time saved against contiguous
    blocks on as many ranks, by the cost model; `memory_mib`: redundant experts per rank, all layers."""

    ranks: int
    redundant: int
    policy: str
    budget: int | None
    imbalance_without: float
    imbalance: float
    gain: float
    memory_mib: float
    moves_per_layer: float


@dataclass(frozen=True, slots=True)
class Advice:
    """All options, and for each number of ranks the one to take, or None where none is worth it."""

    options: list[Option]
    recommended: dict[int, Option | None]


Progress = Callable[[], None]


def settings_to_try(trace: Trace, base: ReplaySettings, sweep: Sweep) -> list[tuple[ReplaySettings, str]]:
    """Settings and policy of every replay of a sweep.

    Raises `ConfigError` if nothing fits the experts, and as `replay` does for a trace that is too short.
    """
    experts = trace.shape[2]
    tries = []
    for ranks in sweep.ranks:
        least = -experts % ranks
        wanted = sweep.redundant or [
            least + ranks * extra for extra in (0, 1, 2, 4) if least + ranks * extra <= max(least, experts // 2)
        ]
        for redundant in wanted:
            if (experts + redundant) % ranks or ranks > experts or redundant > experts * (ranks - 1):
                continue
            here = replace(base, num_ranks=ranks, num_redundant=redundant, num_nodes=_nodes(base, ranks), bound=False)
            for policy in sweep.policies:
                budgets = sweep.budgets if policy in HEEDS_BUDGET else (None,)
                tries += [(replace(here, budget=budget), policy) for budget in budgets]
    if not tries:
        raise ConfigError(
            f"nothing to try: {experts} experts with {list(sweep.redundant) or 'any number of'} redundant ones "
            f"do not divide over {list(sweep.ranks)} ranks"
        )
    check_length(trace, base.window)
    return tries


def advise(trace: Trace, tries: Sequence[tuple[ReplaySettings, str]], *, progress: Progress | None = None) -> Advice:
    """Replays every try and judges; `progress` is called after each."""
    options = []
    for settings, policy in tries:
        options.append(_option(trace, settings, policy))
        if progress is not None:
            progress()
    ranks = dict.fromkeys(option.ranks for option in options)
    return Advice(options, {r: recommend([o for o in options if o.ranks == r]) for r in ranks})


def recommend(options: Sequence[Option]) -> Option | None:
    """The cheapest option with nearly the best gain: least memory, then fewest moves; None if no gain is worth it."""
    best = max(option.gain for option in options)
    if best < WORTH_IT:
        return None
    enough = [option for option in options if option.gain >= ENOUGH * best]
    return min(enough, key=lambda option: (option.memory_mib, option.moves_per_layer, -option.gain))


def sentence(ranks: int, chosen: Option | None, options: Sequence[Option], *, of_memory: str = "") -> str:
    """The advice in words; `of_memory` says in brackets what the memory is worked out from."""
    tried = [option for option in options if option.ranks == ranks]
    best = max(tried, key=lambda o: o.gain)
    if chosen is None:
        return (
            f"{ranks} ranks: balancing is not worth it. Without it the busiest rank carries "
            f"{best.imbalance_without:.3f} times the mean; {_too_little(best, len(tried))}."
        )
    return (
        f"{ranks} ranks: use {_described(chosen)}. {_effect(chosen)}: up to {100 * chosen.gain:.1f} % of the expert "
        f"layers' time, for {chosen.memory_mib:.0f} MiB per rank{of_memory}. {_beyond(chosen, best)}"
    )


def _too_little(best: Option, num_tried: int) -> str:
    """What the best option does where none is worth it."""
    if best.gain < LEAST_SHOWN:
        return (
            "the one option tried is no better" if num_tried == 1 else f"all {num_tried} options tried are no better"
        )
    return (
        f"the best option saves {100 * best.gain:.1f} % of the expert layers' time, below the {100 * WORTH_IT:.0f} % "
        "that would pay"
    )


def _effect(option: Option) -> str:
    """What it does to the busiest rank, which may carry more tokens where reads of weights count."""
    before, after = f"{option.imbalance_without:.3f}", f"{option.imbalance:.3f}"
    if option.imbalance <= option.imbalance_without:
        return f"The busiest rank falls from {before} to {after} times the mean"
    return f"The busiest rank carries {after} times the mean, {before} without, but reads less"


def _described(option: Option) -> str:
    budget = "" if option.budget is None else f" with at most {option.budget} moves per layer and plan"
    return f"{option.policy}{budget} and {option.redundant} redundant experts"


def _beyond(chosen: Option, best: Option) -> str:
    """What more memory or moves would bring."""
    if best.gain <= chosen.gain:
        return "Nothing else that was tried does better."
    more_mib = best.memory_mib - chosen.memory_mib
    return (
        f"Returns diminish from there: the best of all tried, {_described(best)}, would save "
        f"{100 * (best.gain - chosen.gain):.1f} % more, for {more_mib:.0f} MiB more per rank "
        f"and {best.moves_per_layer:.1f} instead of {chosen.moves_per_layer:.1f} moves per layer and plan."
    )


def _option(trace: Trace, settings: ReplaySettings, policy: str) -> Option:
    result = replay(trace, settings, policies=[policy])
    run = result.runs[0]
    without = float(result.without[result.judged].mean())
    achieved = float(run.imbalance[result.judged].mean())
    layers = trace.shape[1]
    return Option(
        ranks=settings.num_ranks,
        redundant=settings.num_redundant,
        policy=policy,
        budget=settings.budget,
        imbalance_without=without,
        imbalance=achieved,
        gain=1 - time_of(result, run),
        memory_mib=settings.num_redundant / settings.num_ranks * layers * settings.expert_bytes / 2**20,
        moves_per_layer=sum(run.moves) / max(1, len(run.moves)) / layers,
    )


def _nodes(base: ReplaySettings, ranks: int) -> int:
    return base.num_nodes if ranks % base.num_nodes == 0 else 1
