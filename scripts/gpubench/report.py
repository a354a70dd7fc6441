"""Results as Markdown tables."""

from __future__ import annotations

from typing import Any

MOVING = (
    "transport", "experts_per_rank", "paced", "plain_p50_ms", "p50_ms", "p99_ms", "inflation_mean", "mib_per_step",
    "bandwidth_gb_s", "extra_memory_mib", "host_p99_ms",
)  # fmt: skip
KIND = ("step_kind", "num", "p50_ms", "p99_ms", "max_ms", "host_us_mean", "host_us_p50", "host_us_p99", "host_us_max")


def markdown(results: dict[str, Any]) -> str:
    """Every part that was run, as tables."""
    parts = [f"# {results['machine']}", f"`{results['command']}`"]
    if results.get("link_gb_s"):
        parts.append(f"One large copy between two devices: {results['link_gb_s']} GB/s.")
    for name in ("kernels", "block_sizes", "verify", "soak", "timeline"):
        if results.get(name):
            parts += [f"## {name}", table(results[name])]
    for name, rows in results.get("moving", {}).items():
        parts += [f"## moving, {name}", table(rows, MOVING)]
    for name, result in results.get("balanced", {}).items():
        rest = {key: value for key, value in result.items() if key not in ("by_kind", "off", "all_on", "at_rest")}
        parts += [f"## balanced, {name}", table([result["off"]]), table(result["by_kind"], KIND), f"`{rest}`"]
        if "at_rest" in result:
            parts += [
                f"At rest, {result['at_rest']['cycles_committed']} cycles:",
                table(result["at_rest"]["rows"], KIND),
            ]
    if results.get("vllms_way"):
        parts += ["## vLLM's way", table(results["vllms_way"]["steps"]), f"`{results['vllms_way']['maps']}`"]
    if results.get("failures"):
        parts += ["## failures", *[f"- {text}" for text in results["failures"]]]
    return "\n\n".join(parts) + "\n"


def table(rows: list[dict[str, Any]], columns: tuple[str, ...] = ()) -> str:
    """`rows` with the given columns, or all there are."""
    names = columns or tuple(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)
