"""Percentiles of what clients saw, and how answers compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from scripts.gpubench.report import table
from scripts.servebench.client import Answer

COLUMNS = (
    "mode",
    "tokens_s",
    "first_p50_ms",
    "first_p99_ms",
    "next_p50_ms",
    "next_p95_ms",
    "next_p99_ms",
    "next_max_ms",
)


def summarize(modes: list[dict[str, Any]]) -> dict[str, Any]:
    """`times`: a row of `COLUMNS` per mode, over all rounds but the first. `answers`: a row per mode and round, how
    many differ from those of the very first round, and the earliest token that does. `balancer`: what ours did."""
    reference = modes[0]["rounds"][0]["answers"]
    times, answers = [], []
    for mode in modes:
        for number, each in enumerate(mode["rounds"]):
            differing = [
                first_difference(a.tokens, b.tokens)
                for a, b in zip(reference, each["answers"], strict=True)
                if a.tokens != b.tokens
            ]
            answers.append(
                {
                    "mode": mode["mode"],
                    "round": number,
                    "answers": len(each["answers"]),
                    "tokens": sum(len(answer.tokens) for answer in each["answers"]),
                    "differ": len(differing),
                    "earliest": min(differing, default=None),
                }
            )
        times.append(times_of(mode["mode"], mode["rounds"][1:] or mode["rounds"]))
    return {
        "times": times,
        "answers": answers,
        "balancer": {m["mode"]: m["balancer"] for m in modes if m["balancer"]},
    }


def first_difference(one: list[int], other: list[int]) -> int:
    """Index of the first token that differs; lengths are equal."""
    return next(number for number, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)


def times_of(mode: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    answers: list[Answer] = [answer for each in rounds for answer in each["answers"]]
    first = np.array([answer.times_s[0] for answer in answers]) * 1e3
    following = np.concatenate([np.diff(answer.times_s) for answer in answers]) * 1e3
    tokens = sum(len(answer.tokens) for answer in answers)
    values = [tokens / sum(each["took_s"] for each in rounds)]
    values += [*np.percentile(first, (50, 99)), *np.percentile(following, (50, 95, 99, 100))]
    return {"mode": mode} | dict(zip(COLUMNS[1:], (round(float(value), 2) for value in values), strict=True))


def write_report(out: Path, asked: dict[str, Any], seen: dict[str, Any]) -> None:
    """`serve.json` with everything, `serve.md` to read."""
    (out / "serve.json").write_text(json.dumps(asked | seen, indent=1))
    answers = [{name: value for name, value in row.items() if value is not None} for row in seen["answers"]]
    lines = [f"`{json.dumps(asked)}`", ""]
    lines += [table(seen["times"]), "", table(answers), ""]
    lines += [f"{mode}: `{json.dumps(counts)}`" for mode, counts in seen["balancer"].items()]
    (out / "serve.md").write_text("\n".join(lines) + "\n")
