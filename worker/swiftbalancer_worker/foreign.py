"""Reads loads that others recorded: SGLang, TensorRT-LLM, CSV, Parquet, and our own event log.

Nothing is ever unpickled but by torch with `weights_only`. Every reader raises `RecordingError` for files that are
missing, cut off, foreign or too large.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from swiftbalancer.errors import BalancerError, RecordingError
from swiftbalancer.topology import Topology
from swiftbalancer.wire import ModelSpec
from swiftbalancer_worker.counts import MAX_CELLS, CountArray, check_cells, dense
from swiftbalancer_worker.foreign_engines import read_sglang, read_tensorrt_llm
from swiftbalancer_worker.trace import Trace

MAX_LINE_BYTES = 1 << 26
BLOCK_ROWS = 1 << 16
PLACEMENTS = (".json", ".yaml", ".yml")
"""Endings of placements, which people take for loads."""
DAMAGES = (
    msgspec.MsgspecError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    OverflowError,
    EOFError,
    AttributeError,
    RecursionError,
    csv.Error,
)
LONG_COLUMNS = ("step", "layer", "expert", "count")


def read_foreign(path: Path) -> Trace:
    """The loads in a file or folder of another system, told by its ending or by what is in the folder."""
    try:
        return _read_folder(path) if path.is_dir() else _read_file(path)
    except BalancerError:
        raise
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read: {error.strerror or error}") from None
    except DAMAGES as error:
        raise RecordingError(f"{path}: damaged or foreign: {error!r}") from None


def _read_file(path: Path) -> Trace:
    readers: Mapping[str, Callable[[Path], Trace]] = {
        ".pt": read_sglang,
        ".csv": read_csv,
        ".parquet": read_parquet,
        ".jsonl": read_event_log,
    }
    if path.suffix not in readers:
        known = ", ".join((".npy", *readers))
        if path.suffix in PLACEMENTS:
            raise RecordingError(
                f"{path}: loads do not come as {path.suffix} (but as {known}, or folders); if it is a placement, "
                "`swiftbalancer convert` needs --format, the one to write"
            )
        raise RecordingError(f"{path}: unknown ending {path.suffix!r}; known: {known}, and folders of recordings")
    return readers[path.suffix](path)


def _read_folder(path: Path) -> Trace:
    if (path / "meta_info.json").exists():
        return read_tensorrt_llm(path)
    if any(path.glob("*.pt")):
        return read_sglang(path)
    raise RecordingError(
        f"{path}: no recording (manifest.json), no TensorRT-LLM statistics (meta_info.json), no SGLang dumps (*.pt)"
    )


def read_csv(path: Path) -> Trace:
    """Counts as CSV: `step,layer,expert,count` a line, or `step,layer` and one column per expert."""
    with path.open(newline="", encoding="utf-8", errors="strict") as file:
        reader = csv.reader(file)
        header = [name.strip().lower() for name in next(reader, [])]
        blocks = list(_blocks(reader, len(header), path))
    values = np.concatenate(blocks) if blocks else np.zeros((0, len(header)))
    return Trace(path.name, [_from_columns(header, values, path)])


def _blocks(reader: Iterator[list[str]], width: int, path: Path) -> Iterator[NDArray[np.float64]]:
    """The lines as numbers `[up to BLOCK_ROWS, width]`; text takes many times the memory, so only little is held."""
    line = 2
    while rows := list(islice(reader, BLOCK_ROWS)):
        for number, row in enumerate(rows, start=line):
            if len(row) != width:
                raise RecordingError(f"{path}, line {number}: {len(row)} values, the header names {width}")
        if (line + len(rows)) * width > MAX_CELLS:
            raise RecordingError(f"{path}: more than {MAX_CELLS} values; convert it to .npy in parts")
        yield _numbers(rows, width, line, path)
        line += len(rows)


def _numbers(rows: list[list[str]], width: int, first_line: int, path: Path) -> NDArray[np.float64]:
    try:
        return np.array(rows, np.float64).reshape(len(rows), width)
    except ValueError:
        wrong = ((n, text) for n, row in enumerate(rows, start=first_line) for text in row if not _is_number(text))
        number, text = next(wrong)
        raise RecordingError(f"{path}, line {number}: {text[:40]!r} is not a number") from None


def _is_number(text: str) -> bool:
    try:
        np.array(text, np.float64)
    except ValueError:
        return False
    return True


def read_parquet(path: Path) -> Trace:
    """Counts as Parquet, with the columns that `read_csv` describes."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise RecordingError(f"{path}: reading Parquet needs pyarrow: pip install 'swiftbalancer[report]'") from None
    try:
        file = parquet.ParquetFile(path)
        if file.metadata.num_rows * file.metadata.num_columns > MAX_CELLS:
            raise RecordingError(f"{path}: more than {MAX_CELLS} values")
        table = file.read()
    except RecordingError:
        raise
    except Exception as error:  # pyarrow has its own
        raise RecordingError(f"{path}: not a Parquet file: {error}") from None
    columns = [np.asarray(column.to_numpy(), np.float64) for column in table.columns]
    values = np.stack(columns, axis=1) if columns else np.zeros((0, 0))
    return Trace(path.name, [_from_columns([str(n).lower() for n in table.column_names], values, path)])


def _from_columns(header: Sequence[str], values: NDArray[np.float64], path: Path) -> CountArray:
    if tuple(header[:2]) != ("step", "layer") or len(header) < 3 or not len(values):
        raise RecordingError(f"{path}: columns {list(header)[:6]}, expected step, layer and expert, count or experts")
    if tuple(header) == LONG_COLUMNS:
        return _from_long(values, path)
    step, layer = _ids(values[:, 0], "step", path), _ids(values[:, 1], "layer", path)
    rows = {
        (int(s), int(i)): values[n, 2:].astype(np.float32) for n, (s, i) in enumerate(zip(step, layer, strict=True))
    }
    if len(rows) != len(values):
        raise RecordingError(f"{path}: a step's layer is there twice")
    return dense(rows, values.shape[1] - 2, path)


def _from_long(values: NDArray[np.float64], path: Path) -> CountArray:
    names = ("step", "layer", "expert")
    step, layer, expert = (_ids(values[:, i], names[i], path) for i in range(3))
    steps, step_index = np.unique(step, return_inverse=True)
    layers, layer_index = np.unique(layer, return_inverse=True)
    num_experts = int(expert.max()) + 1
    check_cells((len(steps), len(layers), num_experts), len(values), path)
    out = np.zeros((len(steps), len(layers), num_experts), np.float32)
    np.add.at(out, (step_index, layer_index, expert), values[:, 3])
    return out


def _ids(values: NDArray[np.float64], name: str, path: Path) -> NDArray[np.int64]:
    if not np.isfinite(values).all() or (values < 0).any() or (values > 2**31).any() or (values % 1 != 0).any():
        raise RecordingError(f"{path}: column {name!r} must hold whole numbers from 0 to 2^31")
    return values.astype(np.int64)


def read_event_log(path: Path) -> Trace:
    """The windows in a JSONL event log; a last line that was cut off is left out."""
    windows: list[CountArray] = []
    model: ModelSpec | None = None
    topology: Topology | None = None
    cells = 0
    for number, event in _events(path):
        if event.get("event") == "start":
            model = msgspec.convert(event["model"], ModelSpec)
            topology = msgspec.convert(event["topology"], Topology)
        elif event.get("event") == "window":
            loads = np.asarray(event["loads"], np.float32)
            cells += loads.size
            if cells > MAX_CELLS or loads.ndim != 2 or (windows and loads.shape != windows[0].shape):
                raise RecordingError(f"{path}, line {number}: loads of shape {loads.shape} do not fit those before")
            windows.append(loads)
    if not windows:
        raise RecordingError(f"{path}: no window lines; was it written by swiftbalancer?")
    return Trace(
        name=path.name,
        pieces=[np.stack(windows)],
        model="" if model is None else model.name,
        topology=topology,
        expert_bytes=0 if model is None else model.expert_bytes,
    )


def _events(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            try:
                yield number, msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                    return
                raise RecordingError(f"{path}, line {number}: not a JSON object: {error}") from None
