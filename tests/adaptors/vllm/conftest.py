"""Fixtures of the tests that run a real vLLM; without vLLM they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adaptors.vllm import models


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return models.write_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return models.write_deepseek(tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return models.write_dense(tmp_path_factory.mktemp("dense"))
