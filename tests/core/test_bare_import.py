"""The core and the worker live without torch, and the core without sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ("config", "topology", "load", "placement", "dispatch", "plan", "cycle", "wire", "errors")
PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({m.partition(".")[0] for m in sys.modules})))
"""


def loaded_by(*modules: str) -> set[str]:
    """Top-level modules a fresh interpreter holds after importing `modules`."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "worker"))
    result = subprocess.run(
        [sys.executable, "-c", PROBE, *modules],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(json.loads(result.stdout))


@pytest.mark.parametrize("name", CORE)
def test_a_core_module_loads_no_torch_no_socket_and_no_process_tools(name: str) -> None:
    assert not loaded_by(f"swiftbalancer.{name}") & {"torch", "zmq", "vllm", "multiprocessing", "asyncio"}


def test_the_worker_loads_no_torch_and_no_engine() -> None:
    modules = [
        f"swiftbalancer_worker.{path.stem}"
        for path in (ROOT / "worker" / "swiftbalancer_worker").glob("*.py")
        if path.stem not in ("__init__", "__main__")
    ]
    assert modules
    assert not loaded_by(*modules) & {"torch", "vllm", "sglang", "swiftbalancer_adaptors"}


def test_the_probe_would_notice() -> None:
    assert "asyncio" in loaded_by("asyncio")
