"""What the benchmark of a server makes of its answers."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.bench_serve import parse
from scripts.servebench import server as module
from scripts.servebench.client import Answer, Workload, read_answer
from scripts.servebench.report import summarize, write_report
from scripts.servebench.server import Server, balancing_arguments

AGES_S = 60.0


def event(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n"


def rounds(*rounds_of_tokens: list[list[int]]) -> list[dict[str, Any]]:
    """One request a second, a token each ten milliseconds after the first, which takes a hundred."""
    return [
        {
            "took_s": float(len(tokens)),
            "answers": [Answer(each, [0.1 + 0.01 * n for n in range(len(each))]) for each in tokens],
        }
        for tokens in rounds_of_tokens
    ]


def test_prompts_are_the_same_in_every_run_and_topics_follow_each_other() -> None:
    load = Workload(requests=8, concurrency=2, prompt_tokens=200, output_tokens=1, topics=2, vocabulary=10_000)
    prompts = load.prompts()
    assert prompts == load.prompts()
    first, second = (set().union(*prompts[at : at + 4]) for at in (0, 4))
    assert 0 < len(first) <= 64 and 0 < len(second) <= 64
    assert len(first & second) < 8
    assert all(3 <= token < 10_000 and len(prompt) == 200 for prompt in prompts for token in prompt)


def test_an_answer_has_the_times_of_events_with_tokens() -> None:
    lines = [(0.1, event(token_ids=[5])), (0.2, event(token_ids=[])), (0.3, event(token_ids=[6, 7]))]
    assert read_answer([*lines, (0.4, b"data: [DONE]\n")], 3) == Answer([5, 6, 7], [0.1, 0.3])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (event(token_ids=[5]), "answered 1 tokens where 2 were asked for"),
        (b'data: {"error": {"message": "out of memory"}}\n', "out of memory"),
    ],
)
def test_an_answer_that_ends_early_is_an_error(line: bytes, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        read_answer([(0.1, line)], 2)


def test_answers_are_compared_with_the_first_round_of_all() -> None:
    plain, other = [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 9]]
    seen = summarize(
        [
            {"mode": "off", "rounds": rounds(plain, plain), "balancer": {}},
            {"mode": "ours", "rounds": rounds(other, plain), "balancer": {"placements": 1.0}},
        ]
    )
    found = [(row["mode"], row["round"], row["differ"], row["earliest"]) for row in seen["answers"]]
    assert found == [("off", 0, 0, None), ("off", 1, 0, None), ("ours", 0, 1, 1), ("ours", 1, 0, None)]
    assert seen["balancer"] == {"ours": {"placements": 1.0}}


def test_the_first_round_warms_up() -> None:
    slow = [{"took_s": 100.0, "answers": [Answer([1, 2], [50.0, 100.0])]}]
    row = summarize([{"mode": "off", "rounds": slow + rounds([[1, 2]]), "balancer": {}}])["times"][0]
    assert row["tokens_s"] == 2.0
    assert row["first_p50_ms"] == row["first_p99_ms"] == 100.0
    assert row["next_p50_ms"] == row["next_max_ms"] == 10.0


def test_the_report_is_written(tmp_path: Path) -> None:
    seen = summarize([{"mode": "ours", "rounds": rounds([[1, 2]]), "balancer": {"placements": 2.0}}])
    write_report(tmp_path, {"vllm": ["--tensor-parallel-size", "2"]}, seen)
    assert json.loads((tmp_path / "serve.json").read_text())["times"] == seen["times"]
    text = (tmp_path / "serve.md").read_text()
    assert "| ours | 2.0 |" in text and '"placements": 2.0' in text


def test_each_mode_has_its_arguments() -> None:
    ours, vllms = {"num_redundant_experts": 4, "metrics": {"per_layer": True}}, {"num_redundant_experts": 6}
    assert balancing_arguments("off", ours, vllms, 1) == []
    enable, config, value = balancing_arguments("vllm", ours, vllms, 1)
    assert (enable, config) == ("--enable-eplb", "--eplb-config")
    assert json.loads(value) == {"num_redundant_experts": 6, "use_async": True}
    flag, value = balancing_arguments("ours", ours, vllms, 9)
    assert flag == "--additional-config"
    asked = json.loads(value)["swiftbalancer"]
    assert asked == {"enable": True, "num_redundant_experts": 4, "metrics": {"per_layer": True, "port": 9}}


def test_what_a_server_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that do not listen, too, and those of a server that ended without them."""
    monkeypatch.setattr(module, "STOP_S", 0.2)
    for listens in ("exec sleep 1000", "trap '' TERM; wait"):
        script = f"(trap '' TERM; exec sleep 1000) & echo $!; {listens}"
        process = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        engine = psutil.Process(int(process.stdout.readline()))
        Server("", "", tmp_path / "log", process).stop()
        process.stdout.close()
        assert process.returncode
        assert psutil.wait_procs([engine], timeout=30)[1] == []


def test_a_server_that_ends_early_is_an_error_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("no such model")
    process = subprocess.Popen(["false"])
    process.wait()
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1.*no such model"):
        Server("http://127.0.0.1:9", "", log, process).wait_until_ready(AGES_S)


def test_a_server_that_takes_too_long_is_an_error_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("loading")
    process = subprocess.Popen(["sleep", str(AGES_S)])
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)not ready after 1 s.*loading"):
        Server("http://127.0.0.1:9", "", log, process).wait_until_ready(1.0)
    assert time.monotonic() - began < AGES_S
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--modes", "off,on"], "--modes knows off, vllm, ours, not on"),
        (["--model", "/nowhere"], "/nowhere is no folder of a checkpoint"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--out", "results", *arguments])
    assert says in capsys.readouterr().err


def test_what_follows_two_dashes_is_vllms() -> None:
    args = parse(["--out", "results", "--modes", "ours", "--", "--data-parallel-size", "2"])
    assert (args.modes, args.vllm) == (["ours"], ["--data-parallel-size", "2"])
