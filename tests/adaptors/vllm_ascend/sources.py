"""Where vllm-ascend's own Python source is, release by release. It is read, and parts of it run, on a CPU.

`SWIFTBALANCER_VLLM_ASCEND_SOURCE` names a checkout, an unpacked source distribution, or a folder of several; each
holds a `vllm_ascend` package.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ENV = "SWIFTBALANCER_VLLM_ASCEND_SOURCE"


@dataclass(frozen=True)
class Source:
    """One release; `root` holds the package `vllm_ascend`, `name` is the folder's."""

    name: str
    root: Path

    def text(self, module: str) -> str:
        """The source of `vllm_ascend.<module>`; empty if this release has no such module."""
        path = self.root / "vllm_ascend" / (module.replace(".", "/") + ".py")
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def tree(self, module: str) -> ast.Module:
        return ast.parse(self.text(module))

    def methods(self, module: str, name: str) -> dict[str, ast.FunctionDef]:
        """The methods a class defines itself, by name."""
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        return {}

    def function(self, module: str, name: str, **names: Any) -> Callable[..., Any]:
        """One function of a module, compiled alone: it sees only `names`."""
        for node in self.tree(module).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                exec(compile(ast.Module([node], []), f"{self.name}/{module}", "exec"), names)
                found: Callable[..., Any] = names[name]
                return found
        raise AssertionError(f"vllm-ascend {self.name}: {module} has no function {name}")

    @property
    def has_v2(self) -> bool:
        return bool(self.text("distributed.eplb_state"))


def found() -> list[Source]:
    """All releases under the folder the environment names, in the order of their names."""
    if not os.environ.get(ENV):
        return []
    top = Path(os.environ[ENV]).expanduser()
    folders = [top, *sorted(path for path in top.iterdir() if path.is_dir())]
    return [Source(folder.name, folder) for folder in folders if (folder / "vllm_ascend" / "__init__.py").is_file()]


def each_source(*, v2: bool = False) -> list[Any]:
    """Parameters for pytest: one per release (with `v2`, of Model Runner V2), or one that is skipped, saying why."""
    sources = [source for source in found() if source.has_v2 or not v2]
    if sources:
        return [pytest.param(source, id=source.name) for source in sources]
    reason = f"no source of vllm-ascend: set {ENV} to a checkout (or a folder of several)"
    return [pytest.param(None, id="no-source", marks=pytest.mark.skip(reason=reason))]
