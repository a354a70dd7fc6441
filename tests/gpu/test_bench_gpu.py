"""The benchmark runs, and its soak holds: on CPUs over gloo, and on GPUs where there are two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
LIMIT_S = 400
"""Half a minute on two cores, but several times as long beside busy processes: each step is rounds of gloo."""
pytestmark = pytest.mark.timeout(LIMIT_S + 30)


def bench(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.bench_gpu", "--out", str(out), *arguments]
    paths = [str(ROOT), str(ROOT / "worker"), str(ROOT / "adaptors")]
    environ = dict(os.environ, PYTHONPATH=os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))
    subprocess.run(command, cwd=ROOT, env=environ, check=True, timeout=LIMIT_S)
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def test_every_part_runs_on_cpus(tmp_path: Path) -> None:
    parts = "moving,verify,vllms_way,balanced,soak"
    options = (
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--transports",
        "gloo",
        "--seconds",
        "0.2",
        "--soak-steps",
        "200",
    )
    results = bench(tmp_path, "--parts", parts, "--seconds", "0.2", "--soak-steps", "200", *options)
    assert results["failures"] == []
    assert [row["experts_per_rank"] for row in results["moving"]["gloo"]] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert results["balanced"]["gloo"]["cycles_committed"] > 0
    soak = results["soak"][0]
    assert soak["wrong_outputs"] == 0
    assert soak["experts_moved"] > 0
    assert "| p2p-gloo |" in (tmp_path / "results.md").read_text()


def test_ranks_on_one_device_measure_the_host(tmp_path: Path) -> None:
    parts = (
        "--parts",
        "bound_by_host",
        "--python-ms",
        "5",
        "--one-gpu",
        "--transports",
        "gloo",
        "--seconds",
        "0.2",
    )
    results = bench(tmp_path, "--device", "cpu", "--shape", "tiny", *parts)
    assert results["failures"] == []
    (result,) = results["balanced"].values()
    assert result["cycles_committed"] > 0
    for rows in (result["by_kind"], result["at_rest"]["rows"]):
        assert all(row["host_us_p50"] > 0 for row in rows if row["num"])
    at_rest = {row["step_kind"]: row["num"] for row in result["at_rest"]["rows"]}
    assert at_rest["idle"] + at_rest["planning"] > 0
    assert at_rest["moving"] == at_rest["committing"] == 0
    assert result["off"]["p50_ms"] > 5.0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_thousands_of_steps_with_moves_in_every_cycle_keep_the_outputs(tmp_path: Path) -> None:
    results = bench(tmp_path, "--parts", "soak", "--soak-steps", "2000")
    assert results["failures"] == []
    assert {row["transport"] for row in results["soak"]} == {"copy-engine", "p2p-nccl", "p2p-gloo-staged"}
    for row in results["soak"]:
        assert row["wrong_outputs"] == 0, row
        assert row["memory_growth_mib"] <= 64, row
        assert row["threads_left"] == 0, row
