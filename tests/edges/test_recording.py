"""Recordings: whole after any crash, bounded, and refused when they are not ours."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from swiftbalancer.errors import BalancerError, RecordingError
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer.wire import ModelSpec
from swiftbalancer_worker import recording_writer
from swiftbalancer_worker.recording import Manifest, PlanEvent, Recording, WindowIndex
from swiftbalancer_worker.recording_writer import WINDOWS_PER_CHUNK, RecordingWriter
from swiftbalancer_worker.trace import open_trace
from tests.edges.engines import LONG_S, environment, wait_for

LAYERS, EXPERTS = 3, 8
TOPOLOGY = Topology.for_experts(EXPERTS, num_redundant=4, num_ranks=4)
MANIFEST = Manifest("engine", "2026-01-01T00:00:00Z", ModelSpec("m", LAYERS, EXPERTS, 2, 1 << 20), TOPOLOGY, 32)
PLACEMENT = Placement.initial(TOPOLOGY, EXPERTS, num_layers=LAYERS).physical_to_logical_map
PLAN = PlanEvent(1.0, 5, "placement", 0, 3, 1.4, 1.1, 0.01)


def writer(folder: Path, *, max_bytes: int = 1 << 30, manifest: Manifest = MANIFEST) -> RecordingWriter:
    return RecordingWriter(folder, manifest, max_bytes=max_bytes)


def loads(number: int) -> NDArray[np.float32]:
    return np.full((LAYERS, EXPERTS), number, np.float32)


def write(to: RecordingWriter, first: int, last: int) -> None:
    for number in range(first, last):
        to.window(WindowIndex(number * 32, float(number), number // 100), loads(number), PLACEMENT)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    to = writer(tmp_path)
    to.event(PLAN)
    write(to, 0, 150)
    to.close()
    recording = Recording(tmp_path)
    recording.check()
    assert recording.manifest == MANIFEST
    assert recording.num_windows == 150
    assert [window.step for window in recording.windows] == [32 * n for n in range(150)]
    assert recording.events == [PLAN]
    assert sorted(recording.placements()) == [0, 1]
    trace = open_trace(tmp_path)
    assert trace.shape == (150, LAYERS, EXPERTS)
    assert (trace.topology, trace.steps_per_entry) == (TOPOLOGY, 32)
    assert [float(step[0, 0]) for step in trace] == list(range(150))


def test_a_chunk_may_know_no_placement(tmp_path: Path) -> None:
    to = writer(tmp_path)
    to.window(WindowIndex(32, 0.0, 7), loads(1), None)
    to.close()
    recording = Recording(tmp_path)
    recording.check()
    assert (recording.num_windows, recording.placements()) == (1, {})


def test_arrays_are_mapped_not_loaded(tmp_path: Path) -> None:
    to = writer(tmp_path)
    write(to, 0, 3)
    to.close()
    assert isinstance(Recording(tmp_path).chunks[0].loads, np.memmap)


def test_the_next_worker_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    first = writer(tmp_path)
    write(first, 0, 70)
    first.close()
    second = writer(tmp_path)
    assert second.last_step == 69 * 32
    write(second, 70, 80)
    second.close()
    assert [window.step for window in Recording(tmp_path).windows] == [32 * n for n in range(80)]


VICTIM = """
import sys
from pathlib import Path
from tests.edges.test_recording import writer, write
to = writer(Path(sys.argv[1]))
n = 0
while True:
    write(to, n, n + 1)
    n += 1
    print(n, flush=True)
"""


def test_after_kill_9_everything_up_to_the_last_whole_chunk_is_there(tmp_path: Path) -> None:
    command = [sys.executable, "-c", VICTIM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        written = 0
        while written < 5 * WINDOWS_PER_CHUNK + 7:
            written = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait(LONG_S)
    recording = Recording(tmp_path)
    recording.check()
    assert recording.num_windows >= 5 * WINDOWS_PER_CHUNK
    assert [window.step for window in recording.windows] == [32 * n for n in range(recording.num_windows)]
    to = writer(tmp_path)
    write(to, recording.num_windows, recording.num_windows + 1)
    to.close()
    assert Recording(tmp_path).num_windows == recording.num_windows + 1


MID_WRITE = """
import os, sys, time
from pathlib import Path
from tests.edges.test_recording import writer, write
to = writer(Path(sys.argv[1]))
write(to, 0, 2 * 64)
stop_at, real = int(sys.argv[2]), os.fsync
files = []
def fsync(fd):
    files.append(fd)
    if len(files) == stop_at:
        os.ftruncate(fd, os.fstat(fd).st_size // 2)
        print("in the middle", flush=True)
        time.sleep(600)
    real(fd)
os.fsync = fsync
write(to, 2 * 64, 3 * 64)
print("the chunk was written without stopping", flush=True)
"""


@pytest.mark.parametrize("file", [1, 2, 3])
def test_kill_9_in_the_middle_of_each_file_of_a_chunk_costs_that_chunk_only(tmp_path: Path, file: int) -> None:
    """Loads, placements, index: the file being written is half there when the writer is killed."""
    command = [sys.executable, "-c", MID_WRITE, str(tmp_path), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGKILL)
        process.wait(LONG_S)
    assert list(tmp_path.glob("*.tmp")), "nothing was being written"
    recording = Recording(tmp_path)
    recording.check()
    assert (recording.num_windows, recording.skipped) == (2 * WINDOWS_PER_CHUNK, 0)
    to = writer(tmp_path)
    assert list(tmp_path.glob("*.tmp")) == []
    write(to, 2 * WINDOWS_PER_CHUNK, 3 * WINDOWS_PER_CHUNK)
    to.close()
    assert [window.step for window in Recording(tmp_path).windows] == [32 * n for n in range(3 * WINDOWS_PER_CHUNK)]


@pytest.mark.parametrize("suffix", ["json", "loads.npy", "placements.npy"])
def test_a_last_chunk_cut_off_anywhere_is_left_out(tmp_path: Path, suffix: str) -> None:
    to = writer(tmp_path)
    write(to, 0, 2 * WINDOWS_PER_CHUNK)
    to.close()
    path = tmp_path / f"chunk-00000001.{suffix}"
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        recording = Recording(tmp_path)
        assert (recording.num_windows, recording.skipped) == (WINDOWS_PER_CHUNK, 1)


def test_a_damaged_chunk_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    to = writer(tmp_path)
    write(to, 0, 3 * WINDOWS_PER_CHUNK)
    to.close()
    (tmp_path / "chunk-00000001.loads.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(RecordingError, match=r"chunk-00000001\.loads\.npy"):
        Recording(tmp_path)


def test_a_flipped_bit_in_the_loads_is_found_by_the_check(tmp_path: Path) -> None:
    to = writer(tmp_path)
    write(to, 0, 3)
    to.close()
    path = tmp_path / "chunk-00000000.loads.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(RecordingError, match="checksum"):
        Recording(tmp_path).check()


def test_the_oldest_chunks_go_when_the_bound_is_reached(tmp_path: Path) -> None:
    probe = writer(tmp_path / "probe")
    write(probe, 0, WINDOWS_PER_CHUNK)
    probe.close()
    chunk_bytes = sum(path.stat().st_size for path in (tmp_path / "probe").glob("chunk-*"))
    to = writer(tmp_path / "bounded", max_bytes=3 * chunk_bytes + chunk_bytes // 2)
    write(to, 0, 10 * WINDOWS_PER_CHUNK)
    to.close()
    recording = Recording(tmp_path / "bounded")
    assert recording.num_windows == 3 * WINDOWS_PER_CHUNK
    assert recording.windows[-1].step == (10 * WINDOWS_PER_CHUNK - 1) * 32
    assert len(list((tmp_path / "bounded").glob("chunk-*"))) == 9


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    first = writer(tmp_path)
    with pytest.raises(RecordingError, match="another worker is recording here"):
        writer(tmp_path)
    first.close()
    writer(tmp_path).close()


def test_a_recording_of_another_model_is_not_continued(tmp_path: Path) -> None:
    writer(tmp_path).close()
    other = Manifest("engine", "", ModelSpec("m2", LAYERS, EXPERTS, 2, 1), TOPOLOGY)
    with pytest.raises(RecordingError, match="another model or topology"):
        writer(tmp_path, manifest=other)


def test_a_full_disk_costs_chunks_and_recording_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    to = writer(tmp_path)
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", _no_space)
    write(to, 0, WINDOWS_PER_CHUNK)
    assert to.lost_chunks == 1
    assert "No space left" in caplog.text
    assert list(tmp_path.glob("*.tmp")) == []
    monkeypatch.setattr(os, "fsync", real_fsync)
    write(to, WINDOWS_PER_CHUNK, 2 * WINDOWS_PER_CHUNK)
    to.close()
    assert Recording(tmp_path).windows[0].step == WINDOWS_PER_CHUNK * 32


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_windows_that_wait_are_written_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_writer, "SECONDS_PER_CHUNK", 0.02)
    to = writer(tmp_path)
    write(to, 0, 1)
    wait_for(lambda: _flushed(to))
    to.close()


def _flushed(to: RecordingWriter) -> bool:
    to.flush_if_due()
    return any(to.folder.glob("chunk-*.json"))


def test_other_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"manifest\.json"):
        Recording(tmp_path)
    with pytest.raises(RecordingError, match="no recording"):
        open_trace(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a web app", "version": 3}')
    with pytest.raises(RecordingError, match="damaged or foreign"):
        Recording(tmp_path)


def test_a_recording_of_a_later_version_is_refused(tmp_path: Path) -> None:
    writer(tmp_path).close()
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    with pytest.raises(RecordingError, match="version 2; this program reads version 1"):
        Recording(tmp_path)


def test_a_folder_of_recordings_is_opened_if_there_is_one_and_listed_if_several(tmp_path: Path) -> None:
    for name in ("a", "b"):
        to = writer(tmp_path / name)
        write(to, 0, 2)
        to.close()
        if name == "a":
            assert len(open_trace(tmp_path)) == 2
    with pytest.raises(RecordingError, match=r"several recordings, name one of them: .*a, .*b"):
        open_trace(tmp_path)


def test_a_recording_without_a_chunk_is_said_to_be_empty(tmp_path: Path) -> None:
    writer(tmp_path).close()
    with pytest.raises(RecordingError, match="no whole chunk yet"):
        open_trace(tmp_path)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_error_or_a_shorter_recording(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "fuzzed"
    for old in folder.glob("*"):
        old.unlink()
    to = writer(folder)
    write(to, 0, WINDOWS_PER_CHUNK + 1)
    to.close()
    path = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.name != ".lock")))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        trace = open_trace(folder)
        read = [float(step.sum()) for step in trace]
    except BalancerError:
        return
    assert len(read) in (WINDOWS_PER_CHUNK, WINDOWS_PER_CHUNK + 1)


def test_npy_files_are_never_unpickled(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.npy"
    np.save(bomb, np.array([_Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(RecordingError):
        open_trace(bomb)
    assert not _Bomb.went_off


class _Bomb:
    went_off = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (_go_off, ())


def _go_off() -> None:
    _Bomb.went_off = True


def test_a_folder_that_is_refused_is_let_go(tmp_path: Path) -> None:
    writer(tmp_path).close()
    other = Manifest("engine", "2026-01-01T00:00:00Z", ModelSpec("other", LAYERS, EXPERTS, 2, 1), TOPOLOGY, 32)
    with pytest.raises(RecordingError, match="another model"):
        writer(tmp_path, manifest=other)
    writer(tmp_path).close()


def _read_only(path: Path, **_: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system", str(path))


def test_a_disk_that_turns_read_only_costs_chunks_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = writer(tmp_path)
    write(to, 0, 3)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", _no_space)
        broken.setattr(Path, "unlink", _read_only)
        to.flush()
        assert to.lost_chunks == 1
        to.close()
        with pytest.raises(RecordingError, match=r"\.tmp: cannot be written: Read-only"):
            writer(tmp_path)
    writer(tmp_path).close()
