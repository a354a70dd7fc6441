"""The page on reliability names a proof for each line; each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)", PAGE))))
def test_a_test_the_page_names_exists(name: str) -> None:
    assert f"def {name}(" in TESTS


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(tests/[\w/.]+)`", PAGE))))
def test_a_file_the_page_names_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_kind_of_fault_is_on_the_page() -> None:
    faults = (ROOT / "tests" / "edges" / "faults.py").read_text()
    transient = faults[faults.index("TRANSIENT:") : faults.index("FATAL:")]
    names = re.findall(r'^    "([^"]+)":', transient, flags=re.M)
    assert len(names) > 20
    stems = [stem.removesuffix("...").strip() for stem in re.findall(r"`([a-z ]+(?:\.\.\.)?)`", PAGE)]
    missing = [name for name in names if not any(stem and name.startswith(stem) for stem in stems)]
    assert not missing
