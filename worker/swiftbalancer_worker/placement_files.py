"""Placements in the files engines load at start, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from swiftbalancer import plain_yaml
from swiftbalancer.errors import BalancerError, ConfigError, RecordingError
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology

MAX_FILE_BYTES = 1 << 28
DAMAGES = (
    msgspec.DecodeError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)
FORMATS = ("json", "vllm-ascend", "sglang", "tensorrt-llm")


@dataclass(frozen=True, slots=True, eq=False)
class PlacementFile:
    """What a file says: `physical_to_logical_map` `[layers, slots]` int32, and ranks where the format knows them."""

    physical_to_logical_map: NDArray[np.int32]
    num_ranks: int | None = None
    num_nodes: int = 1

    def placement(self, num_ranks: int | None = None) -> Placement:
        """The placement on the file's ranks, or on `num_ranks`; raises if it does not fit or is not valid."""
        ranks = self.num_ranks if num_ranks is None else num_ranks
        table = self.physical_to_logical_map
        if ranks is None:
            raise ConfigError("--ranks: this format does not say how many ranks the slots are spread over")
        num_experts = int(table.max()) + 1
        topology = Topology.for_experts(
            num_experts, num_redundant=table.shape[1] - num_experts, num_ranks=ranks, num_nodes=self.num_nodes
        )
        return Placement.of(topology, num_experts, table)


def write_placement(placement: Placement, form: str, *, layer_ids: list[int] | None = None) -> bytes:
    """The file's content in one of `FORMATS`; `layer_ids` are the model's numbers of the MoE layers (default 0..)."""
    writers: Mapping[str, Callable[[Placement, list[int]], bytes]] = {
        "json": _write_json,
        "vllm-ascend": _write_vllm_ascend,
        "sglang": _write_sglang,
        "tensorrt-llm": _write_tensorrt_llm,
    }
    if form not in writers:
        raise ConfigError(f"--format: unknown {form!r}; known: {', '.join(FORMATS)}")
    check_layer_ids(layer_ids, placement.num_layers)
    return writers[form](placement, list(range(placement.num_layers)) if layer_ids is None else layer_ids)


def check_layer_ids(layer_ids: list[int] | None, num_layers: int) -> None:
    """Raises `ConfigError` unless there is a number for each MoE layer; None stands for 0, 1, 2, ..."""
    if layer_ids is not None and len(layer_ids) != num_layers:
        raise ConfigError(f"--layer-ids: {len(layer_ids)} numbers for {num_layers} MoE layers")


def read_placement(path: Path) -> PlacementFile:
    """The placement in a file of any of `FORMATS`; raises `RecordingError` if it is damaged or foreign."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RecordingError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; not a placement")
        text = path.read_bytes()
        values = plain_yaml.decode(text) if path.suffix in (".yaml", ".yml") else msgspec.json.decode(text)
        return _parse(values)
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read: {error.strerror}") from None
    except BalancerError as error:
        raise RecordingError(f"{path}: {error}") from None
    except DAMAGES as error:
        raise RecordingError(f"{path}: damaged or foreign: {error!r}") from None


def _parse(values: Any) -> PlacementFile:
    if not isinstance(values, dict):
        raise RecordingError(f"expected an object at the top, got {type(values).__name__}")
    if "layer_list" in values:
        return _read_vllm_ascend(values)
    if "initial_global_assignments" in values:
        rows = values["initial_global_assignments"]
        return PlacementFile(_table([rows[key] for key in sorted(rows, key=int)]))
    if "physical_to_logical_map" in values:
        topology = values.get("topology", {})
        ranks = msgspec.convert(topology.get("num_ranks"), int | None)
        nodes = msgspec.convert(topology.get("num_nodes", 1), int)
        return PlacementFile(_table(values["physical_to_logical_map"]), ranks, nodes)
    raise RecordingError(f"no placement known to us; its keys are {sorted(map(str, values))[:6]}")


def _table(rows: Any) -> NDArray[np.int32]:
    array = np.asarray(rows)
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        raise RecordingError(f"expected whole numbers of shape [layers, slots], got {array.dtype} {array.shape}")
    if array.min() < 0 or array.max() >= array.shape[1]:
        raise RecordingError(f"experts {array.min()}..{array.max()} do not fit {array.shape[1]} slots")
    return array.astype(np.int32)


def _write_json(placement: Placement, layer_ids: list[int]) -> bytes:
    """Our own: the map with its topology."""
    return _json(
        {
            "topology": msgspec.to_builtins(placement.topology),
            "num_experts": placement.num_experts,
            "layer_ids": layer_ids,
            "physical_to_logical_map": placement.physical_to_logical_map.tolist(),
        }
    )


def _write_sglang(placement: Placement, layer_ids: list[int]) -> bytes:  # noqa: ARG001
    """What SGLang's `--init-expert-location FILE.json` takes; one row for each MoE layer it counts."""
    return _json({"physical_to_logical_map": placement.physical_to_logical_map.tolist()})


def _write_tensorrt_llm(placement: Placement, layer_ids: list[int]) -> bytes:
    """TensorRT-LLM's `moe_config.load_balancer` YAML: experts by slot for each layer of the model."""
    rows = placement.physical_to_logical_map.tolist()
    lines = ["initial_global_assignments:"]
    lines += [f"  {layer}: {msgspec.json.encode(row).decode()}" for layer, row in zip(layer_ids, rows, strict=True)]
    lines += ["layer_updates_per_iter: 0", f"num_slots: {placement.topology.num_slots}", ""]
    return "\n".join(lines).encode()


def _write_vllm_ascend(placement: Placement, layer_ids: list[int]) -> bytes:
    """vllm-ascend's `expert_map_path`: experts by device for each MoE layer."""
    topology = placement.topology
    shape = (placement.num_layers, topology.num_ranks, topology.slots_per_rank)
    layers = [
        {
            "layer_id": layer_id,
            "device_count": topology.num_ranks,
            "device_list": [{"device_id": rank, "device_expert": row.tolist()} for rank, row in enumerate(rows)],
        }
        for layer_id, rows in zip(layer_ids, placement.physical_to_logical_map.reshape(shape), strict=True)
    ]
    return _json({"moe_layer_count": placement.num_layers, "layer_list": layers})


def _read_vllm_ascend(values: Mapping[str, Any]) -> PlacementFile:
    rows, devices = [], set()
    for layer in sorted(values["layer_list"], key=lambda entry: int(entry["layer_id"])):
        by_device = sorted(layer["device_list"], key=lambda entry: int(entry["device_id"]))
        devices.add(len(by_device))
        rows.append([expert for device in by_device for expert in device["device_expert"]])
        if len({len(device["device_expert"]) for device in by_device}) != 1:
            raise RecordingError(f"layer {layer['layer_id']}: devices hold different numbers of experts")
    if len(devices) != 1:
        raise RecordingError(f"layers are spread over different numbers of devices: {sorted(devices)}")
    return PlacementFile(_table(rows), devices.pop())


def _json(values: Any) -> bytes:
    return msgspec.json.encode(values) + b"\n"
