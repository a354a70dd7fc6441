"""Only the device layer names a vendor.

The rule, for every module of `swiftbalancer`, the worker and the adaptors: no name in code and no string that code
uses (help texts included) holds a word that a vendor of devices has given. Docstrings and comments are prose and
may. The device layer is `swiftbalancer/device/` and the list `swiftbalancer/vendors.py`; the adaptor to vllm-ascend
may call vllm-ascend's own classes by their names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VENDOR_WORDS = {"cuda", "nccl", "nvidia", "npu", "hccl", "cann", "acl", "rocm", "hip", "rccl"}
ALLOWED = {"adaptors/swiftbalancer_adaptors/vllm_ascend/": {"NPUWorker"}}
DEVICE_LAYER = ("swiftbalancer/device/", "swiftbalancer/vendors.py")


def modules() -> list[str]:
    found = [path for part in ("swiftbalancer", "worker", "adaptors") for path in (ROOT / part).rglob("*.py")]
    names = sorted(path.relative_to(ROOT).as_posix() for path in found)
    return [name for name in names if not name.startswith(DEVICE_LAYER)]


def texts(tree: ast.AST) -> Iterator[str]:
    """Every name and every string of a module but its docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        for field in ("id", "attr", "name", "asname", "arg", "module"):
            if isinstance(text := getattr(node, field, None), str):
                yield text
        yield from getattr(node, "names", []) if isinstance(node, ast.Global | ast.Nonlocal) else []


def vendor_words(text: str) -> set[str]:
    """`NPUWorker`, `npu_format` and `HCCL_` hold one; `input` holds none."""
    return VENDOR_WORDS & {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)}


@pytest.mark.parametrize("module", modules())
def test_a_module_outside_the_device_layer_names_no_vendor(module: str) -> None:
    allowed = {name for folder, names in ALLOWED.items() if module.startswith(folder) for name in names}
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    named = {text for text in texts(tree) if vendor_words(text)} - allowed
    assert not named


def test_the_rule_sees_names_attributes_imports_and_strings_but_not_prose() -> None:
    source = '"CUDA"\nimport torch_npu\nx = torch.cuda.Stream\nd = "hccl"\ndef f(nccl_x): "NCCL"\nPlanInput'
    named = {text for text in texts(ast.parse(source)) if vendor_words(text)}
    assert named == {"torch_npu", "cuda", "hccl", "nccl_x"}


def test_what_is_allowed_is_there() -> None:
    """Else the exception has outlived its reason."""
    for folder, names in ALLOWED.items():
        code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / folder).glob("*.py"))
        assert all(name in code for name in names)
