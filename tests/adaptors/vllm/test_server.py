"""The OpenAI server of real vLLM on two CPU ranks, with balancing on, over HTTP."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scripts.servebench.server import Server, serving
from tests.adaptors.vllm.harness import environment, forced_moves, free_port

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(1800)

TENSOR_PARALLEL = ("--tensor-parallel-size", "2")
DATA_PARALLEL = ("--data-parallel-size", "2")
START_S = 600
NUM_CLIENTS = 6


@contextmanager
def started(model: Path, folder: Path, additional: dict[str, Any] | None, *parallel: str) -> Iterator[Server]:
    """A server that is ready."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--model", str(model), "--served-model-name", "tiny", "--dtype", "float32"]
    arguments += [*(parallel or TENSOR_PARALLEL), "--enable-expert-parallel", "--enforce-eager"]
    arguments += ["--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)]
    arguments += ["--no-enable-prefix-caching", "--distributed-executor-backend", "mp"]
    if additional is not None:
        arguments += ["--additional-config", json.dumps(additional)]
    with serving(arguments, 0, folder / "server.log", env=environment(folder / "plugins")) as server:
        server.wait_until_ready(START_S)
        yield server


def complete(server: Server, number: int, *, max_tokens: int = 40) -> str:
    """The greedy completion of prompt `number`."""
    prompt = " ".join(f"<t{(number * 37 + j * 11) % 500}>" for j in range(4 + number))
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return str(json.load(reply)["choices"][0]["text"])


def committed(server: Server) -> int:
    """Cycles with moves that the log reports as committed."""
    return server.log.read_text(errors="replace").count("kind=placement committed")


@pytest.fixture(scope="module")
def plain_texts(qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a server without balancing answers, one request at a time."""
    with started(qwen3_moe, tmp_path_factory.mktemp("plain"), None) as server:
        return [complete(server, number) for number in range(NUM_CLIENTS)]


def test_concurrent_requests_get_the_same_answers_while_experts_move(
    qwen3_moe: Path, plain_texts: list[str], tmp_path: Path
) -> None:
    """And the metrics tell the host time of the main thread for each kind of step."""
    port = free_port()
    with started(qwen3_moe, tmp_path / "moved", forced_moves(metrics={"port": port})) as server:
        serve_while_experts_move(server, plain_texts)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
            steps = steps_by_kind(reply.read().decode())
        assert set(steps) == {"idle", "planning", "moving", "committing"}
        assert all(steps.values()), steps


@pytest.mark.skipif(
    vllm.__version__.startswith("0.33."), reason="vLLM 0.33 on CPU wants a NUMA node for each data-parallel engine"
)
def test_data_parallel_engines_answer_the_same_though_one_is_idle(
    qwen3_moe: Path, plain_texts: list[str], tmp_path: Path
) -> None:
    """Two engine processes. Fewer requests than ranks leave one to dummy passes, which the other one needs."""
    with started(qwen3_moe, tmp_path / "moved", forced_moves(), *DATA_PARALLEL) as server:
        for number in range(NUM_CLIENTS):
            assert complete(server, number) == plain_texts[number]
        serve_while_experts_move(server, plain_texts)
        assert "AgreementLost" not in server.log.read_text(errors="replace")


def serve_while_experts_move(server: Server, texts: list[str]) -> None:
    """Asks concurrently until three cycles with moves were committed."""
    rounds, deadline = 0, time.monotonic() + 600
    while rounds < 3 or committed(server) < 3:
        assert time.monotonic() < deadline, server.tail()
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            answers = list(clients.map(partial(complete, server), range(NUM_CLIENTS)))
        assert answers == texts
        rounds += 1


def steps_by_kind(metrics: str) -> dict[str, float]:
    """How many steps of each kind the host time was measured of."""
    found = re.findall(r'^swiftbalancer_host_seconds_count\{.*doing="(\w+)".*\} (\S+)$', metrics, re.M)
    return {kind: float(count) for kind, count in found}
