"""Loads as SGLang and TensorRT-LLM record them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from swiftbalancer.errors import RecordingError
from swiftbalancer_worker.counts import CountArray, check_cells, dense, numbers
from swiftbalancer_worker.trace import Trace


def read_sglang(path: Path) -> Trace:
    """SGLang's expert-distribution dump: one file of mode `stat`, or file(s) of `per_pass` / `per_token`.

    `stat` holds `logical_count` `[steps, layers, experts]`. The others hold per rank and forward pass the
    `global_physical_count` `[layers, slots]`, which are added up over ranks and mapped to experts.
    """
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    packs = [_load_pt(file) for file in files]
    if all(isinstance(pack, dict) and "records" in pack for pack in packs):
        return Trace(path.name, [_sglang_passes(packs, path)], model="")
    if len(packs) != 1:
        raise RecordingError(f"{path}: {len(packs)} dumps of mode stat; name one of them")
    pack = packs[0]
    counts = pack.get("logical_count") if isinstance(pack, dict) else pack
    if counts is None:
        raise RecordingError(f"{path}: holds {sorted(pack)}, expected SGLang's logical_count or records")
    array = numbers(counts, path)
    return Trace(path.name, [array[None] if array.ndim == 2 else array])


def _sglang_passes(packs: Sequence[Mapping[str, Any]], path: Path) -> CountArray:
    maps = [numbers(pack["last_physical_to_logical_map"], path).astype(np.int64) for pack in packs]
    if any(not np.array_equal(maps[0], other) for other in maps[1:]):
        raise RecordingError(f"{path}: the dumps were made under different expert locations")
    by_pass: dict[int, CountArray] = {}
    seen: set[tuple[int, int]] = set()
    for pack in packs:
        for record in pack["records"]:
            key = (int(record["forward_pass_id"]), int(record["rank"]))
            if key in seen:
                raise RecordingError(f"{path}: forward pass {key[0]} of rank {key[1]} is there twice")
            seen.add(key)
            counts = numbers(record["global_physical_count"], path)
            if counts.shape != maps[0].shape:
                raise RecordingError(f"{path}: counts {counts.shape} do not fit the expert location {maps[0].shape}")
            by_pass[key[0]] = by_pass[key[0]] + counts if key[0] in by_pass else counts
    if not by_pass:
        raise RecordingError(f"{path}: no forward pass was recorded")
    return _to_experts(np.stack([by_pass[i] for i in sorted(by_pass)]), maps[0], path)


def _to_experts(slots: CountArray, physical_to_logical: NDArray[np.int64], path: Path) -> CountArray:
    """`[steps, layers, slots]` -> `[steps, layers, experts]`."""
    if physical_to_logical.ndim != 2 or physical_to_logical.min(initial=0) < 0:
        raise RecordingError(f"{path}: the expert location {physical_to_logical.shape} is none")
    num_experts = int(physical_to_logical.max(initial=0)) + 1
    shape = (slots.shape[0], slots.shape[1], num_experts)
    check_cells(shape, slots.size, path)
    out = np.zeros(shape, np.float32)
    for layer, row in enumerate(physical_to_logical):
        np.add.at(out[:, layer].T, row, slots[:, layer].T)
    return out


def _load_pt(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise RecordingError(f"{path}: reading .pt files needs torch: pip install 'swiftbalancer[torch]'") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip and the unpickler each have their own
        why = " ".join(str(error).split()).partition(". ")[0][:200]
        raise RecordingError(f"{path}: not a .pt file of tensors ({type(error).__name__}: {why})") from None


def read_tensorrt_llm(folder: Path) -> Trace:
    """Statistics that TensorRT-LLM writes with `EXPERT_STATISTIC_ITER_RANGE`: `meta_info.json`, `rank*.safetensors`.

    Each file holds `ITERATION_LAYER` -> counts `[experts]` of one rank; ranks are added up. Files of routed tokens
    beside them, `rank*_raw.safetensors`, are left alone.
    """
    try:
        num_experts = int(json.loads((folder / "meta_info.json").read_bytes())["num_experts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordingError(f"{folder}/meta_info.json: damaged or foreign: {error!r}") from None
    files = sorted(file for file in folder.glob("rank*.safetensors") if not file.stem.endswith("_raw"))
    if not files:
        raise RecordingError(f"{folder}: no rank*.safetensors beside meta_info.json")
    counts: dict[tuple[int, int], CountArray] = {}
    for file in files:
        for name, array in read_safetensors(file).items():
            key = _iteration_and_layer(name, file)
            if array.shape != (num_experts,):
                raise RecordingError(f"{file}: {name} has shape {array.shape}, expected [{num_experts}]")
            counts[key] = counts[key] + array if key in counts else array.astype(np.float32)
    return Trace(folder.name, [dense(counts, num_experts, folder)])


def _iteration_and_layer(name: str, file: Path) -> tuple[int, int]:
    iteration, _, layer = name.partition("_")
    if not (iteration.isdigit() and layer.isdigit()):
        raise RecordingError(f"{file}: {name!r} is not ITERATION_LAYER")
    return int(iteration), int(layer)


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a `.safetensors` file, memory-mapped; integers and floats only."""
    kinds = {"I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8", "I16": "<i2", "U8": "u1"}
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            raise RecordingError(f"{path}: cut off or not a safetensors file")
        header = msgspec.json.decode(file.read(length), type=dict[str, dict[str, Any]])
    out, left = {}, size - 8 - length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = [int(n) for n in entry["shape"]]
        first, last = (8 + length + int(n) for n in entry["data_offsets"])
        kind = kinds.get(entry["dtype"])
        if kind is None:
            raise RecordingError(f"{path}: {name} is of kind {entry['dtype']}; known: {', '.join(kinds)}")
        count = math.prod(shape)
        left -= last - first
        if left < 0:
            raise RecordingError(f"{path}: its arrays overlap")
        if min(shape, default=0) < 0 or last - first != count * np.dtype(kind).itemsize or last > size or first < 8:
            raise RecordingError(f"{path}: {name} does not fit the file: cut off or damaged")
        out[name] = np.fromfile(path, kind, count, offset=first).reshape(shape)
    return out
