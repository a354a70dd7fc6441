"""The benchmark of a server, with real vLLM on CPU: two servers, the second of which moves experts all the time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adaptors.vllm.harness import ROOT, environment, forced_moves

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(1800)


def test_a_balanced_server_answers_as_one_without(tmp_path: Path) -> None:
    options = forced_moves()["swiftbalancer"]
    command = [sys.executable, str(ROOT / "scripts" / "bench_serve.py"), "--out", str(tmp_path), "--tiny"]
    command += ["--layers", "3", "--dtype", "float32", "--requests", "12", "--concurrency", "6"]
    command += ["--prompt-tokens", "16", "--output-tokens", "40", "--redundant", "8"]
    command += [
        "--options",
        json.dumps({name: options[name] for name in ("policy", "window", "agreement", "worker")}),
    ]
    command += ["--", "--tensor-parallel-size", "2", "--distributed-executor-backend", "mp", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--no-enable-prefix-caching"]
    done = subprocess.run(command, env=environment(tmp_path / "plugins"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((tmp_path / "serve.json").read_text())
    assert [row["mode"] for row in seen["times"]] == ["off", "ours"]
    assert [row["tokens"] for row in seen["answers"]] == [12 * 40] * 6
    assert [row["differ"] for row in seen["answers"]] == [0] * 6
    assert seen["balancer"]["ours"]["experts_moved"] > 0
    assert seen["balancer"]["ours"]["placements"] >= 2
