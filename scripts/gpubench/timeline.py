"""A picture of what ran where in a few steps, from torch's profiler."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from scripts.gpubench.decode import Decode
from scripts.gpubench.measure import timed_steps
from scripts.gpubench.moving import Traffic, rigged, transport_options

STEPS = 3
SKIPPED = 2
"""Steps profiled before those in the picture: ranks do not begin to profile at the same moment."""
MOVING = 8
COLOURS = {"all-to-all": "#e8a33d", "experts": "#3b6fb6", "experts moving": "#c0392b", "other": "#9aa5b1"}


@dataclass(frozen=True, slots=True)
class Bar:
    """One device activity: microseconds from the beginning of the picture."""

    stream: int
    start_us: float
    length_us: float
    what: str


def draw_moving_steps(decode: Decode, kind: str, folder: Path) -> list[dict[str, Any]]:
    """Profiles steps beside `MOVING` experts on their way; rank 0 draws a picture, and gives what carried them."""
    with rigged(decode, kind) as rig:
        name = rig.transport.name
        traffic = Traffic(rig, MOVING, None)
        timed_steps(decode, 5, after=traffic.after_step)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            timed_steps(decode, SKIPPED + STEPS, after=traffic.after_step)
        traffic.finish()
    if decode.rank:
        return []
    trace = folder / f"trace-{name}.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    trace.unlink()
    max_ctas = transport_options(kind).get("max_ctas")
    picture = folder / f"timeline-{name}{f'-{max_ctas}' if max_ctas else ''}.png"
    title = f"{STEPS} decode steps of {decode.shape.layers} layers, experts moving by {name}"
    draw(read_bars(events), picture, title=title)
    return carriers(events)


def carriers(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels of a chrome trace that carry experts: how many of how many thread blocks, and how long they ran."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    main = _main_streams(kernels)
    for event in kernels:
        if _kind(event["name"], on_main=_stream(event) in main) == "experts moving":
            blocks = prod(event["args"].get("grid", [0]))
            times[event["name"].split("(")[0], blocks].append(event["dur"])
    return [
        {"kernel": name, "thread_blocks": blocks, "num": len(us), "mean_us": round(sum(us) / len(us), 1)}
        for (name, blocks), us in sorted(times.items())
    ]


def read_bars(events: list[dict[str, Any]]) -> list[Bar]:
    """Kernels and copies of a chrome trace after the first steps' graph launches, in order of time."""
    launches = sorted(e["ts"] for e in events if e.get("name") == "cudaGraphLaunch")
    first = launches[SKIPPED] if len(launches) > SKIPPED else 0.0
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in e]
    late = sorted((e for e in device if e["ts"] >= first), key=lambda e: e["ts"])
    main = _main_streams(late)
    return [Bar(_stream(e), e["ts"] - first, e["dur"], _kind(e["name"], on_main=_stream(e) in main)) for e in late]


def _stream(event: dict[str, Any]) -> int:
    return int(event["args"].get("stream", 0))


def _main_streams(events: list[dict[str, Any]]) -> set[int]:
    """Where the forward passes run; they have all-to-alls of their own."""
    return {_stream(event) for event in events if _is_product(event["name"])}


def _is_product(name: str) -> bool:
    return any(word in name.lower() for word in ("gemm", "cutlass", "nvjet", "matmul"))


def _kind(name: str, *, on_main: bool) -> str:
    if _is_product(name):
        return "experts"
    if "ptop" in name.lower() or (not on_main and "nccl" in name.lower()):
        return "experts moving"
    return "all-to-all" if "nccl" in name.lower() else "other"


def draw(bars: list[Bar], picture: Path, *, title: str) -> None:
    """A row for each stream, the busiest first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows: dict[int, list[Bar]] = defaultdict(list)
    for bar in bars:
        rows[bar.stream].append(bar)
    order = sorted(rows, key=lambda stream: -sum(bar.length_us for bar in rows[stream]))
    figure, axes = pyplot.subplots(figsize=(14, 1.2 + 0.6 * len(order)))
    for row, stream in enumerate(order):
        for what, colour in COLOURS.items():
            spans = [(bar.start_us / 1e3, bar.length_us / 1e3) for bar in rows[stream] if bar.what == what]
            axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=colour)
    axes.set_yticks(range(len(order)), [f"stream {stream}" for stream in order])
    axes.set_xlabel("ms")
    axes.set_title(title)
    axes.legend(handles=[Patch(color=colour, label=what) for what, colour in COLOURS.items()], ncols=5, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
