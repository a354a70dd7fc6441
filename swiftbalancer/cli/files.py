"""`swiftbalancer convert` and `swiftbalancer plan`: to and from other systems' files."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from swiftbalancer.cli.app import app
from swiftbalancer.cli.replay import Given, PolicyOption, settings_for
from swiftbalancer.errors import ConfigError, RecordingError

if TYPE_CHECKING:
    from swiftbalancer.topology import Topology
    from swiftbalancer_worker.trace import Trace


LOADS = (".npy", ".pt", ".csv", ".parquet", ".jsonl")


class PlacementFormat(str, Enum):
    """Files that engines load a placement from."""

    JSON = "json"
    VLLM_ASCEND = "vllm-ascend"
    SGLANG = "sglang"
    TENSORRT_LLM = "tensorrt-llm"


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Loads: .npy .pt .csv .parquet .jsonl, a folder; or a placement.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.npy, or a new folder for a recording.")],
    form: Annotated[PlacementFormat | None, typer.Option("--format", help="Convert a placement, to this.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Of a placement or recording that does not say.")] = None,
    redundant: Annotated[int, typer.Option(min=0, help="Extra slots of a recording that does not say.")] = 0,
) -> None:
    """Reads loads or placements of other systems and writes ours, or the other way round.

    Loads: arrays of steps x layers x experts, SGLang's expert-distribution dumps, TensorRT-LLM's expert statistics,
    tables with the columns step, layer, expert, count. Placements: with --format.

    [bold]Examples[/]

        swiftbalancer convert expert_distribution_recorder_1.pt -o loads.npy

        swiftbalancer convert expert_statistic/ -o loads.npy

        swiftbalancer convert expert_map.json --format sglang -o location.json
    """
    if form is not None:
        from swiftbalancer_worker.placement_files import read_placement, write_placement

        if source.is_dir() or source.suffix in LOADS:
            raise ConfigError(
                f"--format: {source} holds loads, not a placement; `swiftbalancer plan` makes one from them"
            )
        _write(output, write_placement(read_placement(source).placement(ranks), form.value))
        return
    from swiftbalancer_worker.convert import write_npy, write_recording
    from swiftbalancer_worker.trace import open_trace

    trace = open_trace(source)
    if output.suffix == ".npy":
        write_npy(trace, output)
    elif output.suffix:
        raise ConfigError(f"--output: {output} is neither .npy nor a folder")
    else:
        write_recording(trace, output, topology=_topology(trace, ranks, redundant))
    steps, layers, experts = trace.shape
    Console(stderr=True).print(f"{output}: {steps} steps x {layers} layers x {experts} experts")


@app.command()
def plan(
    recording: Annotated[Path, typer.Argument(help="What `replay` reads.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; - for stdout.")],
    ranks: Annotated[int | None, typer.Option(min=1, help="Default: those of the recording.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: those of the recording, or 1.")] = None,
    redundant: Annotated[int | None, typer.Option(min=0, help="Extra slots; default: the recording's.")] = None,
    policy: Annotated[str, typer.Option(help="Any policy; greedy places from scratch.")] = "greedy",
    policy_option: PolicyOption = None,
    form: Annotated[PlacementFormat, typer.Option("--format", help="Engine to write for.")] = PlacementFormat.JSON,
    layer_ids: Annotated[
        str | None, typer.Option(help="The model's numbers of its MoE layers, like 3-60 or 1,3,5; default 0-.")
    ] = None,
) -> None:
    """Writes the placement that suits all of a recording, for an engine to start with.

    vllm-ascend: expert_map_path. SGLang: --init-expert-location. TensorRT-LLM: the load balancer's YAML.

    [bold]Examples[/]

        swiftbalancer plan run/ --format vllm-ascend -o expert_map.json

        swiftbalancer plan loads.npy --ranks 8 --redundant 8 --format tensorrt-llm --layer-ids 3-60 -o eplb.yaml
    """
    from swiftbalancer_worker.compiling import compiling_is_told
    from swiftbalancer_worker.initial import initial_placement
    from swiftbalancer_worker.placement_files import check_layer_ids, write_placement
    from swiftbalancer_worker.trace import open_trace

    trace = open_trace(recording)
    given = Given(ranks=ranks, nodes=nodes, redundant=redundant, options=tuple(policy_option or ()))
    settings = settings_for(trace, given)
    ids = None if layer_ids is None else _layer_ids(layer_ids)
    check_layer_ids(ids, trace.shape[1])
    with compiling_is_told():
        chosen = initial_placement(trace, settings, policy=policy)
    _write(output, write_placement(chosen.placement, form.value, layer_ids=ids))
    Console(stderr=True).print(
        f"imbalance over the whole recording: {chosen.imbalance_before:.3f} in contiguous blocks, "
        f"{chosen.imbalance_after:.3f} as planned"
    )


def _topology(trace: Trace, ranks: int | None, redundant: int) -> Topology:
    from swiftbalancer.topology import Topology

    if ranks is None and trace.topology is not None:
        return trace.topology
    return Topology.for_experts(trace.shape[2], num_redundant=redundant, num_ranks=ranks or 1)


def _layer_ids(text: str) -> list[int]:
    """`3-60` or `1,3,5` as numbers; raises `ConfigError`."""
    ids: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f"--layer-ids: {text!r} is not like 3-60 or 1,3,5")
        ids += range(int(first), int(last or first) + 1)
    return ids


def _write(path: Path, data: bytes) -> None:
    if str(path) == "-":
        sys.stdout.buffer.write(data)
        return
    try:
        path.write_bytes(data)
    except OSError as error:
        raise RecordingError(f"{path}: cannot be written: {error.strerror}") from None
