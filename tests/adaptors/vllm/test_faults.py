"""Real vLLM on two CPU ranks: killed processes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.adaptors.vllm.engine import Job
from tests.adaptors.vllm.harness import forced_moves, log_of, run, start

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(1800)


def test_a_killed_worker_costs_cycles_but_no_token(qwen3_moe: Path, tmp_path: Path) -> None:
    job = Job(str(qwen3_moe), forced_moves(), max_tokens=48, rounds=2, wait_for_cycles=2, script="kill_worker")
    ranks = run(job, tmp_path)
    notes = ranks[0].notes
    assert notes["workers"][0], "there was no worker to kill"
    assert notes["workers"][1] and notes["workers"][1] != notes["workers"][0], "no new worker was started"
    assert notes["committed"][1] > notes["committed"][0], "no cycle succeeded after the kill"
    for rank in ranks:
        assert rank.tokens[1] == rank.tokens[0]
        assert rank.maps_match
    assert ranks[0].stats["off_reason"] == ""


def test_a_killed_engine_leaves_no_worker_behind(qwen3_moe: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    job = Job(
        str(qwen3_moe), forced_moves(), max_tokens=32, rounds=10_000, wait_for_cycles=1, script="serve_until_killed"
    )
    processes = start(job, tmp_path, READY_FILE=str(ready))
    try:
        first = Path(f"{ready}.0")
        deadline = time.monotonic() + 600
        while not first.exists():
            assert time.monotonic() < deadline, log_of(tmp_path, 0)[-4000:]
            assert processes[0].poll() is None, log_of(tmp_path, 0)[-4000:]
            time.sleep(0.5)
        workers = json.loads(first.read_text())
        assert workers, "the engine ran without a worker"
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait(30)
    deadline = time.monotonic() + 30
    while any(_is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, f"workers {workers} outlived the engine"
        time.sleep(0.2)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"
