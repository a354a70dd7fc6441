"""Where vllm-ascend's own Python source is, release by release. It is read, and parts of it run, on a CPU.

`SWIFTBALANCER_VLLM_ASCEND_SOURCE` names a checkout, an unpacked source distribution, or a folder of several; each
holds a `vllm_ascend` package.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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


def each_source() -> list[object]:
    """Parameters for pytest: one per release, or one that is skipped and says what to set."""
    sources = found()
    if sources:
        return [pytest.param(source, id=source.name) for source in sources]
    reason = f"no source of vllm-ascend: set {ENV} to a checkout (or a folder of several)"
    return [pytest.param(None, id="no-source", marks=pytest.mark.skip(reason=reason))]


def newest(minor: str) -> Source | None:
    """The last source whose name has this minor release, such as `0.23`."""
    fitting = [source for source in found() if source.name.lstrip("v").startswith(minor + ".")]
    return fitting[-1] if fitting else None
