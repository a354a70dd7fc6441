"""Scripts say what they take instead of failing on what they do not know."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.edges.engines import LONG_S, ROOT, environment


@pytest.mark.parametrize("command", [["scripts/bench_interpreter_lock.py"], ["-m", "scripts.plot_tradeoff"]])
def test_a_script_has_help(command: list[str]) -> None:
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
