"""Other projects' functions, for comparison: taken from an installed package, or from copies of their sources.

`SWIFTBALANCER_PEERS` names a folder with `vllm_base_router.py`, `vllm_eplb_state.py` and
`sglang_eplb_map_record_fused.py`, copies of the files of those names' ends in vLLM and SGLang. Only the functions
named below are run, without importing the rest of their packages.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELUDE = """
import torch
import triton
import triton.language as tl
from typing import *
ExpertLocationDispatchInfo = Any
_HAS_TRITON = True
"""


def function(package: str, file: str, *names: str) -> Callable[..., Any] | None:
    """The last of `names`, with the others beside it; None if neither package nor copy is there."""
    path = _source(package, file)
    if path is None:
        return None
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    unique = {node.name: node for node in reversed(found)}
    text = PRELUDE + "\n\n".join(ast.unparse(unique[name]) for name in names)
    target = Path(tempfile.mkdtemp(prefix="swiftbalancer-peer-")) / f"peer_{path.stem}.py"
    target.write_text(text)
    spec = importlib.util.spec_from_file_location(target.stem, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wanted: Callable[..., Any] = getattr(module, names[-1])
    return wanted


def _source(package: str, file: str) -> Path | None:
    folder = os.environ.get("SWIFTBALANCER_PEERS")
    copy = Path(folder or ".") / f"{package}_{Path(file).name}"
    if folder and copy.exists():
        return copy
    spec = importlib.util.find_spec(package)
    origin = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    return origin if origin is not None and origin.exists() else None


def vllm_map_and_record() -> Callable[..., Any] | None:
    return function(
        "vllm",
        "model_executor/layers/fused_moe/router/base_router.py",
        "_eplb_map_and_record_i32_kernel",
        "_eplb_map_and_record_triton",
    )


def sglang_map_and_record() -> Callable[..., Any] | None:
    return function(
        "sglang",
        "srt/eplb/eplb_map_record_fused.py",
        "_eplb_map_record_hist_kernel",
        "eplb_map_and_record_fused",
    )


def vllm_logical_maps() -> Callable[..., Any] | None:
    return function("vllm", "distributed/eplb/eplb_state.py", "compute_logical_maps")
