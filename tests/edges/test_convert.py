"""Loads and placements of other systems: read right, written right, and refused when damaged."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from swiftbalancer.errors import BalancerError, ConfigError, InvalidPlan, RecordingError
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker.convert import write_npy, write_recording
from swiftbalancer_worker.foreign_engines import read_safetensors
from swiftbalancer_worker.placement_files import FORMATS, read_placement, write_placement
from swiftbalancer_worker.trace import Trace, open_trace

STEPS, LAYERS, EXPERTS = 5, 3, 8
COUNTS = np.random.default_rng(0).integers(0, 1000, (STEPS, LAYERS, EXPERTS)).astype(np.int64)
SLOTS = np.stack([np.roll([0, 1, 2, 3, 4, 5, 6, 7, 0, 3, 5, 7], 3 * layer) for layer in range(LAYERS)])
TOPOLOGY = Topology.for_experts(EXPERTS, num_redundant=4, num_ranks=4)
FuzzSettings = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def values(trace: Trace) -> NDArray[np.float64]:
    return trace.between(0, len(trace))


# -- writers of the foreign formats, after their projects' own code ---------------------------------------------


def write_csv_long(folder: Path) -> Path:
    lines = ["step,layer,expert,count"]
    lines += [f"{s + 100},{7 * i},{e},{n}" for (s, i, e), n in np.ndenumerate(COUNTS)]
    (folder / "long.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    return folder / "long.csv"


def write_csv_wide(folder: Path) -> Path:
    head = ",".join(["step", "layer", *(f"e{e}" for e in range(EXPERTS))])
    rows = [f"{s},{i},{','.join(map(str, COUNTS[s, i]))}" for s in range(STEPS) for i in range(LAYERS)]
    (folder / "wide.csv").write_text("\n".join([head, *rows]))
    return folder / "wide.csv"


def write_parquet(folder: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    index = np.indices(COUNTS.shape).reshape(3, -1)
    columns = {**dict(zip(("step", "layer", "expert"), index, strict=True)), "count": COUNTS.reshape(-1)}
    parquet.write_table(pa.table(columns), folder / "counts.parquet")
    return folder / "counts.parquet"


def write_sglang_stat(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    pack = {"rank": 0, "logical_count": torch.tensor(COUNTS), "average_utilization_rate_over_window": None}
    torch.save(pack, folder / "stat.pt")
    return folder / "stat.pt"


def slot_counts() -> NDArray[np.int64]:
    """`[steps, layers, slots]` with each expert's tokens on its first slot, but for one that is on its second."""
    out = np.zeros((STEPS, LAYERS, SLOTS.shape[1]), np.int64)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            slots = np.nonzero(SLOTS[layer] == expert)[0]
            out[:, layer, slots[-1 if expert == 3 else 0]] = COUNTS[:, layer, expert]
    return out


def write_sglang_passes(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    where, counts = folder / "passes", slot_counts()
    where.mkdir()
    for rank in range(2):
        share = counts // 2 if rank else counts - counts // 2
        records = [
            {
                "forward_pass_id": 40 + step,
                "rank": rank,
                "gatherer_key": "primary",
                "input_ids": [1, 2],
                "global_physical_count": torch.tensor(share[step]),
            }
            for step in reversed(range(STEPS))
        ]
        pack = {"records": records, "last_physical_to_logical_map": torch.tensor(SLOTS)}
        torch.save(pack, where / f"expert_distribution_recorder_1.5_{rank}.pt")
    return where


def safetensors_bytes(arrays: dict[str, NDArray[Any]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, body = 0, b""
    for name, array in arrays.items():
        kind = {"int32": "I32", "float64": "F64"}[str(array.dtype)]
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        body += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def write_tensorrt_llm(folder: Path) -> Path:
    where = folder / "expert_statistic"
    where.mkdir()
    (where / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": 2}))
    for rank in range(2):
        share = (COUNTS // 2 if rank else COUNTS - COUNTS // 2).astype(np.int32)
        arrays = {f"{100 + s}_{3 + i}": share[s, i] for s in range(STEPS) for i in range(LAYERS)}
        (where / f"rank{rank}.safetensors").write_bytes(safetensors_bytes(arrays))
        for other in (f"cooccurrence_rank{rank}", f"rank{rank}_raw"):
            (where / f"{other}.safetensors").write_bytes(b"not ours to read")
    return where


def write_event_log(folder: Path) -> Path:
    model = {"name": "m", "num_layers": LAYERS, "num_experts": EXPERTS, "top_k": 2, "expert_bytes": 77}
    topology = {"num_ranks": 4, "slots_per_rank": 3}
    events: list[dict[str, Any]] = [{"event": "start", "version": 1, "model": model, "topology": topology}]
    for step in range(STEPS):
        events += [{"event": "window", "step": 32 * step, "loads": COUNTS[step].tolist()}, {"event": "cycle"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder / "events.jsonl"


def write_numpy(folder: Path) -> Path:
    np.save(folder / "loads.npy", COUNTS)
    return folder / "loads.npy"


WRITERS: dict[str, Callable[[Path], Path]] = {
    f.__name__.removeprefix("write_"): f
    for f in (
        write_numpy,
        write_csv_long,
        write_csv_wide,
        write_parquet,
        write_sglang_stat,
        write_sglang_passes,
        write_tensorrt_llm,
        write_event_log,
    )
}


@pytest.mark.parametrize("form", WRITERS)
def test_the_same_counts_come_out_of(form: str, tmp_path: Path) -> None:
    np.testing.assert_array_equal(values(open_trace(WRITERS[form](tmp_path))), COUNTS)


@pytest.mark.parametrize("form", WRITERS)
def test_a_recording_and_npy_made_from_it_hold_the_same(form: str, tmp_path: Path) -> None:
    trace = open_trace(WRITERS[form](tmp_path))
    write_npy(trace, tmp_path / "out.npy")
    assert np.load(tmp_path / "out.npy").dtype == np.float32
    write_recording(open_trace(tmp_path / "out.npy"), tmp_path / "recording", topology=TOPOLOGY)
    back = open_trace(tmp_path / "recording")
    np.testing.assert_array_equal(values(back), COUNTS)
    assert back.topology == TOPOLOGY
    with pytest.raises(RecordingError, match="already holds a recording"):
        write_recording(trace, tmp_path / "recording", topology=TOPOLOGY)


def test_an_event_log_knows_its_ranks_and_survives_a_cut(tmp_path: Path) -> None:
    path = write_event_log(tmp_path)
    assert open_trace(path).topology == Topology(4, 3)
    assert open_trace(path).expert_bytes == 77
    path.write_bytes(path.read_bytes()[:-10])
    assert len(open_trace(path)) == STEPS
    path.write_bytes(path.read_bytes().replace(b'"event"', b'"even', 1))
    with pytest.raises(RecordingError, match="line 1"):
        open_trace(path)


def test_missing_cells_count_zero(tmp_path: Path) -> None:
    (tmp_path / "sparse.csv").write_text("step,layer,expert,count\n0,0,0,5\n9,4,2,7\n0,0,0,1\n")
    read = values(open_trace(tmp_path / "sparse.csv"))
    assert read.shape == (2, 2, 3)
    assert read[0, 0, 0] == 6
    assert read[1, 1, 2] == 7
    assert read.sum() == 13


BAD_TABLES = {
    "expected step, layer": "a,b,c\n1,2,3\n",
    "line 3: 3 values": "step,layer,expert,count\n0,0,0,1\n0,0,0\n",
    "line 2: 'zero' is not a number": "step,layer,expert,count\n0,0,zero,1\n",
    "whole numbers": "step,layer,expert,count\n0,0,1.5,1\n",
    "whole numbers from": "step,layer,expert,count\n0,-1,1,1\n",
    "there twice": "step,layer,e0,e1\n0,0,1,1\n0,0,1,1\n",
    "cells are read into memory": "step,layer,expert,count\n0,0,2000000000,1\n",
    "damaged or foreign": "step,layer,expert,count\n\xff\x00,0,0,1\n",
}


@pytest.mark.parametrize("reason", BAD_TABLES)
def test_a_table_is_refused_with_the_reason(tmp_path: Path, reason: str) -> None:
    (tmp_path / "bad.csv").write_bytes(BAD_TABLES[reason].encode("latin-1"))
    with pytest.raises(RecordingError, match=reason):
        open_trace(tmp_path / "bad.csv")


def test_a_negative_or_nan_count_is_found_when_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "negative.csv").write_text("step,layer,expert,count\n0,0,0,1\n1,0,1,-4\n")
    trace = open_trace(tmp_path / "negative.csv")
    assert trace.at(0)[0, 0] == 1
    with pytest.raises(BalancerError, match=r"negative.csv, step 1\[0, 1\] is -4"):
        trace.at(1)


@pytest.mark.parametrize("name", ["nothing.npy", "nothing.csv", "no-folder"])
def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecordingError, match="no such file or folder"):
        open_trace(tmp_path / name)


def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "loads.xlsx").write_text("x")
    with pytest.raises(RecordingError, match=r"unknown ending '.xlsx'; known: .npy, .pt, .csv"):
        open_trace(tmp_path / "loads.xlsx")


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5), (0, 3, 4), (4,), (3, 0, 4)])
def test_an_array_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "odd.npy", np.ones(shape))
    with pytest.raises(RecordingError):
        open_trace(tmp_path / "odd.npy")


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.npy"
    shape = (1 << 20, 64, 256)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 4 * (1 << 34))
    with pytest.raises(RecordingError, match="out of bounds"):
        open_trace(path)


def test_text_is_no_load(tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.full((2, 2, 2), "many"))
    with pytest.raises(RecordingError, match="must be numbers"):
        open_trace(tmp_path / "text.npy")


class Bomb:
    went_off = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (_go_off, ())


def _go_off() -> None:
    Bomb.went_off = True


def test_a_pt_file_that_would_run_code_runs_none(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"logical_count": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
    Bomb.went_off = False
    for name in ("bomb.pt", "raw.pt"):
        with pytest.raises(RecordingError, match=r"not a \.pt file of tensors"):
            open_trace(tmp_path / name)
    assert not Bomb.went_off


def test_sglang_dumps_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = write_sglang_passes(tmp_path)
    one = sorted(folder.glob("*.pt"))[0]
    (folder / "copy.pt").write_bytes(one.read_bytes())
    with pytest.raises(RecordingError, match="is there twice"):
        open_trace(folder)
    pack = torch.load(one, weights_only=True)
    pack["last_physical_to_logical_map"] = pack["last_physical_to_logical_map"].flip(1)
    torch.save(pack, folder / "copy.pt")
    with pytest.raises(RecordingError, match="different expert locations"):
        open_trace(folder)


@FuzzSettings
@given(data=st.data())
def test_a_damaged_safetensors_file_is_an_error_or_arrays(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(safetensors_bytes({"0_0": np.arange(8, dtype=np.int32), "0_1": np.ones((2, 2))}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "meta" / "rank0.safetensors"
    path.parent.mkdir(exist_ok=True)
    (path.parent / "meta_info.json").write_text('{"num_experts": 8}')
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        open_trace(path.parent)
    except BalancerError:
        return
    assert read_safetensors(path)


@FuzzSettings
@given(content=st.binary(max_size=300), ending=st.sampled_from([".csv", ".jsonl", ".parquet", ".npy", ".pt"]))
def test_any_bytes_are_an_error_or_loads(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"any{ending}"
    path.write_bytes(content)
    try:
        trace = open_trace(path)
    except BalancerError:
        return
    assert len(trace) > 0


# -- placements -------------------------------------------------------------------------------------------------


def placement() -> Placement:
    return Placement.of(TOPOLOGY, EXPERTS, SLOTS)


@pytest.mark.parametrize("form", FORMATS)
def test_a_placement_survives_the_round_trip(form: str, tmp_path: Path) -> None:
    path = tmp_path / ("eplb.yaml" if form == "tensorrt-llm" else "placement.json")
    path.write_bytes(write_placement(placement(), form))
    read = read_placement(path).placement(4)
    assert read.topology == TOPOLOGY
    np.testing.assert_array_equal(read.physical_to_logical_map, SLOTS)


def test_formats_that_know_their_ranks_need_not_be_told(tmp_path: Path) -> None:
    for form in ("json", "vllm-ascend"):
        (tmp_path / form).write_bytes(write_placement(placement(), form))
        assert read_placement(tmp_path / form).placement().topology == TOPOLOGY
    (tmp_path / "sglang").write_bytes(write_placement(placement(), "sglang"))
    with pytest.raises(ConfigError, match="--ranks"):
        read_placement(tmp_path / "sglang").placement()


def test_vllm_ascend_gets_experts_by_device() -> None:
    written = json.loads(write_placement(placement(), "vllm-ascend", layer_ids=[3, 4, 5]))
    assert written["moe_layer_count"] == LAYERS
    layer = written["layer_list"][1]
    assert (layer["layer_id"], layer["device_count"]) == (4, 4)
    assert layer["device_list"][2] == {"device_id": 2, "device_expert": SLOTS[1, 6:9].tolist()}


def test_tensorrt_llm_gets_experts_by_slot_and_the_models_layer_numbers() -> None:
    import yaml

    written = yaml.safe_load(write_placement(placement(), "tensorrt-llm", layer_ids=[3, 4, 5]))
    assert written["num_slots"] == 12
    assert written["layer_updates_per_iter"] == 0
    assert written["initial_global_assignments"] == {3 + i: SLOTS[i].tolist() for i in range(LAYERS)}


def test_sglang_gets_one_row_per_layer() -> None:
    assert json.loads(write_placement(placement(), "sglang")) == {"physical_to_logical_map": SLOTS.tolist()}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"layer_list": []}',
        '{"layer_list": [{"layer_id": 0, "device_list": [{"device_id": 0, "device_expert": ["x"]}]}]}',
        '{"physical_to_logical_map": [[0, 1], [0]]}',
        '{"physical_to_logical_map": [[0, 99]]}',
        '{"physical_to_logical_map": [[0, -1]]}',
        '{"physical_to_logical_map": [[0.5, 1]]}',
        '{"initial_global_assignments": {"a": [0]}}',
        "[" * 5000,
    ],
)
def test_a_placement_file_that_holds_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(RecordingError, match=r"bad\.json"):
        read_placement(tmp_path / "bad.json")


def test_a_placement_that_no_engine_may_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.json").write_text('{"physical_to_logical_map": [[0, 0, 1, 2]]}')
    with pytest.raises(InvalidPlan, match="expert 0 is twice on rank 0"):
        read_placement(tmp_path / "twice.json").placement(2)
