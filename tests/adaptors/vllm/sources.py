"""Where vLLM's own Python source is, release by release; it is read, not imported.

`SWIFTBALANCER_VLLM_SOURCE` names a checkout, an unpacked wheel, or a folder of several; each holds a `vllm` package.
An installed vLLM is read too.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from tests.adaptors.vllm_ascend.sources import Source

ENV = "SWIFTBALANCER_VLLM_SOURCE"


class VllmSource(Source):
    """One release of vLLM; `root` holds the package `vllm`."""

    @override
    def text(self, module: str) -> str:
        path = self.root / "vllm" / (module.replace(".", "/") + ".py")
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def modules_with(self, word: str) -> Iterator[str]:
        """Names of the modules whose text has `word`, without `vllm.` before them."""
        for path in sorted((self.root / "vllm").rglob("*.py")):
            if word in path.read_text(encoding="utf-8", errors="replace"):
                yield ".".join(path.relative_to(self.root / "vllm").with_suffix("").parts)

    @property
    def version(self) -> str:
        """What the package says it is; `dev` for a checkout, which has no version written down."""
        found = re.search(r"version = '([^']+)'", self.text("_version"))
        return found[1] if found else "dev"


def found() -> list[VllmSource]:
    """All releases under the folder the environment names, and the installed one."""
    folders: list[Path] = []
    if os.environ.get(ENV):
        top = Path(os.environ[ENV]).expanduser()
        folders = [top, *sorted(path for path in top.iterdir() if path.is_dir())]
    installed = importlib.util.find_spec("vllm")
    if installed is not None and installed.origin:
        folders.append(Path(installed.origin).parents[1])
    return [VllmSource(folder.name, folder) for folder in folders if (folder / "vllm" / "__init__.py").is_file()]


def each_source() -> list[Any]:
    """Parameters for pytest: one per release, or one that is skipped, saying why."""
    sources = {source.version: source for source in found()}
    if sources:
        return [pytest.param(source, id=version) for version, source in sources.items()]
    reason = f"no source of vLLM: install it, or set {ENV} to a checkout (or a folder of several)"
    return [pytest.param(None, id="no-source", marks=pytest.mark.skip(reason=reason))]
