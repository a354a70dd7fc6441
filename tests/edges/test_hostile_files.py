"""Files that fuzzing, or a hostile eye, found to end a process or to fill its memory; each is an error now."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import fuzz
from scripts.fuzzing.targets import TARGETS
from swiftbalancer.errors import BalancerError, RecordingError, TopologyError
from swiftbalancer_worker import foreign
from swiftbalancer_worker.foreign_engines import read_safetensors
from swiftbalancer_worker.placement_files import read_placement
from swiftbalancer_worker.trace import open_trace

DEEP = b"[" * 100_000


def in_file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def tensorrt(folder: Path, header: bytes, meta: bytes = b'{"num_experts": 8}') -> Path:
    in_file(folder, "meta_info.json", meta)
    in_file(folder, "rank0.safetensors", len(header).to_bytes(8, "little") + header + bytes(64))
    return folder


def test_deeply_nested_headers_are_refused(tmp_path: Path) -> None:
    for folder in (
        tensorrt(tmp_path, b"{}", meta=DEEP),
        tensorrt(tmp_path, b'{"0_0": {"shape": ' + DEEP),
    ):
        with pytest.raises(RecordingError):
            open_trace(folder)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        b"{a: " * 10_000,
        b"- " * 10_000,
        b"physical_to_logical_map: &a [[*a]]",
        b"initial_global_assignments: {.inf: [0, 1]}",
        b"layer_list: [{layer_id: .inf}]",
    ],
    ids=["lists", "maps", "sequences", "recursion", "an infinite layer", "an infinite layer of vllm-ascend"],
)
def test_a_yaml_placement_that_cannot_be_one_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(RecordingError):
        read_placement(in_file(tmp_path, "placement.yaml", text))


def test_a_few_bytes_of_yaml_do_not_unfold_to_a_huge_table(tmp_path: Path) -> None:
    levels = [b"x0: &x0 [0, 0, 0, 0, 0, 0, 0, 0]"]
    levels += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 8)}]".encode() for i in range(1, 10)]
    path = in_file(tmp_path, "placement.yaml", b"\n".join([*levels, b"physical_to_logical_map: *x9"]))
    with pytest.raises(RecordingError, match="aliases"):
        read_placement(path)


def test_a_topology_of_the_wrong_types_is_refused(tmp_path: Path) -> None:
    values = {"physical_to_logical_map": [[0, 1]], "topology": {"num_ranks": "2"}}
    with pytest.raises(RecordingError, match="Expected `int"):
        read_placement(in_file(tmp_path, "placement.json", json.dumps(values).encode()))


def test_a_placement_on_absurdly_many_ranks_is_refused_at_once(tmp_path: Path) -> None:
    values = {"physical_to_logical_map": [[0, 1, 2, 4, 3]], "topology": {"num_ranks": 10**100}}
    found = read_placement(in_file(tmp_path, "placement.json", json.dumps(values).encode()))
    with pytest.raises(TopologyError, match="do not divide"):
        found.placement()


def test_a_csv_field_beyond_the_readers_limit_is_refused(tmp_path: Path) -> None:
    content = b"step,layer,expert,count\n" + b"1" * 200_000 + b",0,0,1\n"
    with pytest.raises(RecordingError, match="field limit"):
        open_trace(in_file(tmp_path, "long.csv", content))


def test_the_text_of_a_large_csv_is_never_held_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "BLOCK_ROWS", 4096)
    lines = 4 * foreign.BLOCK_ROWS
    path = in_file(tmp_path, "large.csv", b"step,layer,expert,count\n" + b"0,0,0,1\n" * lines)
    tracemalloc.start()
    try:
        assert open_trace(path).at(0).tolist() == [[lines]]
        assert tracemalloc.get_traced_memory()[1] < 150 * lines  # as text alone it would take twice as much
    finally:
        tracemalloc.stop()


def test_a_csv_with_too_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MAX_CELLS", 100)
    path = in_file(tmp_path, "many.csv", b"step,layer,expert,count\n" + b"0,0,0,1\n" * 30)
    with pytest.raises(RecordingError, match="more than 100 values"):
        open_trace(path)


def test_arrays_that_share_bytes_do_not_multiply_them(tmp_path: Path) -> None:
    entry = {"dtype": "F64", "shape": [8], "data_offsets": [0, 64]}
    header = json.dumps({f"{step}_0": entry for step in range(100)}).encode()
    with pytest.raises(RecordingError, match="overlap"):
        read_safetensors(tensorrt(tmp_path, header) / "rank0.safetensors")


def sglang_dump(folder: Path, **values: Any) -> Path:
    torch = pytest.importorskip("torch")
    torch.save(values, folder / "dump.pt")
    return folder / "dump.pt"


def test_counts_of_other_shapes_are_not_broadcast_to_a_huge_one(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    records = [
        {"forward_pass_id": 0, "rank": rank, "global_physical_count": torch.ones(shape, dtype=torch.int32)}
        for rank, shape in enumerate(((30_000, 1), (1, 30_000)))
    ]
    maps = torch.zeros(30_000, 1, dtype=torch.int64)
    with pytest.raises(RecordingError, match="do not fit the expert location"):
        open_trace(sglang_dump(tmp_path, records=records, last_physical_to_logical_map=maps))


def test_many_slots_take_no_memory_beyond_their_number(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    slots = 20_000
    record = {"forward_pass_id": 0, "rank": 0, "global_physical_count": torch.ones(1, slots, dtype=torch.int32)}
    path = sglang_dump(tmp_path, records=[record], last_physical_to_logical_map=torch.arange(slots)[None])
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(open_trace(path).at(0), np.ones((1, slots)))
        assert tracemalloc.get_traced_memory()[1] < 1000 * slots
    finally:
        tracemalloc.stop()


def test_a_slot_of_an_absurd_expert_takes_no_memory(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    record = {"forward_pass_id": 0, "rank": 0, "global_physical_count": torch.ones(1, 4, dtype=torch.int32)}
    path = sglang_dump(tmp_path, records=[record], last_physical_to_logical_map=torch.tensor([[0, 1, 2, 1 << 27]]))
    with pytest.raises(RecordingError, match="are the ids right"):
        open_trace(path)


@pytest.mark.parametrize(
    "lines",
    [["0,0,200000000,1"], [f"{i},{i},{i},1" for i in range(600)]],
    ids=["one large id", "a diagonal"],
)
def test_a_few_lines_of_csv_do_not_become_a_huge_array(tmp_path: Path, lines: list[str]) -> None:
    content = "\n".join(["step,layer,expert,count", *lines]).encode()
    with pytest.raises(RecordingError, match="are the ids right"):
        open_trace(in_file(tmp_path, "sparse.csv", content))


# -- what the fuzzer begins with --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"service"}))
def test_the_fuzzers_seeds_are_valid_input(name: str) -> None:
    """Else it would only ever see how rubbish is refused."""
    if name in ("parquet", "sglang"):
        pytest.importorskip("pyarrow" if name == "parquet" else "torch")
    target: Any = TARGETS[name]()
    target._expected = ()
    seeds = TARGETS[name].seeds()
    assert seeds
    for seed in seeds:
        target(seed)


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"service", "environment"}))
def test_the_fuzzers_targets_let_our_own_errors_pass_and_no_others(name: str) -> None:
    target: Any = TARGETS[name]()
    target(b"\xff" * 40)
    target._expected = ()
    with pytest.raises(BalancerError):
        target(b"\xff" * 40)


LOG = """INFO: Instrumenting swiftbalancer.wire
#2	INITED cov: 30 ft: 30 corp: 1/86b exec/s: 0 rss: 52Mb
#24	DONE   cov: 83 ft: 98 corp: 11/400b exec/s: 0 rss: 60Mb
Done 554758 runs in 91 second(s)
stat::number_of_executed_units: 554758
"""


def test_a_fuzzers_log_becomes_figures_and_a_crash_a_finding() -> None:
    assert fuzz.read_log("yaml", LOG, 0) == fuzz.Outcome("yaml", 554758, 91.0, 83, 11, "")
    crashed = fuzz.read_log("yaml", LOG.replace("Done", "==1== ERROR: deadly signal"), 77)
    assert crashed.finding.startswith("ended with status 77") and "deadly signal" in crashed.finding
    assert fuzz.read_log("yaml", "", -11).finding, "a process that ended without a word is a finding, too"
    assert (fuzz.report([crashed]), fuzz.report([fuzz.read_log("yaml", LOG, 0)])) == (1, 0)
