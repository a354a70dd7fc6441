"""After warming up no plan compiles: a first plan that does takes longer than the traffic lasts that it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

from swiftbalancer_worker.compiling import KEPT, NOT_KEPT, compiling_is_told
from tests.edges.engines import environment

numba = pytest.importorskip("numba")

SCRIPT = """
import importlib, itertools, pkgutil, sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from swiftbalancer.dispatch import DispatchForm, uniform_table
from swiftbalancer.placement import Placement
from swiftbalancer.topology import Topology
from swiftbalancer_worker import kernels
from swiftbalancer_worker.cost import CostModel
from swiftbalancer_worker.inputs import PlanInput, PlanLimits
from swiftbalancer_worker.planner import Planner
from swiftbalancer_worker.warmup import warm_up

def compiled():
    found = {}
    for each in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{each.name}")
        for name, kernel in vars(module).items():
            if isinstance(kernel, Dispatcher) and not kernel.targetoptions.get("no_cpython_wrapper"):
                found[kernel.py_func.__qualname__] = len(kernel.signatures)
    return found

planner = Planner(sys.argv[1])
warm_up(planner)
warm = compiled()
rng = np.random.default_rng(0)
topologies = [
    Topology(4, 10),
    Topology(8, 5, num_nodes=2),
    Topology(4, 12, rank_speed=(1.0, 0.5, 1.0, 2.0)),
    Topology(4, 16, excluded_ranks=(1,)),
]
moved = 0
for topology, form, reads, moves, windows in itertools.product(
    topologies, ("table", "static", "uniform", "exact"), (0.0, 50.0), (None, 0, 4), (1, 6)
):
    placement = Placement.initial(topology, 32, num_layers=3)
    given = PlanInput(
        placement=placement,
        loads=rng.gamma(0.3, 100.0, (windows, 3, 32)).astype(np.float32),
        dispatch=DispatchForm(form, 32),
        epoch=0,
        limits=PlanLimits(max_moves_per_layer=moves, staging_experts=32),
        cost=CostModel(tokens_per_activation=reads),
        table=uniform_table(placement, 32) if form != "static" and not topology.excluded_ranks else None,
    )
    moved += planner.plan(given).num_moves
    planner.refresh(given)
assert moved > 0, "no plan moved an expert: nothing was shown"
late = {name: count - warm[name] for name, count in compiled().items() if count != warm[name]}
assert not late, f"compiled after warming up: {late}"
print("compiled nothing")
"""


@pytest.mark.parametrize("policy", ["swift", "greedy", "random"])
def test_no_plan_compiles_after_warming_up(policy: str) -> None:
    command = [sys.executable, "-c", SCRIPT, policy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "compiled nothing" in done.stdout


def test_compiling_is_told_once_and_only_of_the_planners_kernels() -> None:
    said: list[str] = []
    with compiling_is_told(said.append):
        for module in ("somewhere.else", "swiftbalancer_worker.kernels.one", "swiftbalancer_worker.kernels.two"):
            kernel = numba.njit(FunctionType((lambda x: x + 1).__code__, {"__name__": module}))
            assert kernel(1) == 2
    assert said == [NOT_KEPT]


def test_kernels_that_are_kept_on_disk_are_not_compiled_again(tmp_path: Path) -> None:
    """Each kernel is kept for itself, so that an interrupted compilation goes on where it was."""
    script = """
import numpy as np
from swiftbalancer_worker.compiling import compiling_is_told
from swiftbalancer_worker.kernels.align import keep_slots
with compiling_is_told(print):
    keep_slots(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32))
"""
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**environment(), "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DISABLE_JIT": "0"},
            capture_output=True,
            text=True,
            timeout=170,
            check=True,
        )
        told.append(done.stdout.strip())
    assert told == [KEPT, ""]
