"""The command line: what users type, what they get, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import typer

from swiftbalancer import config as configs
from swiftbalancer.cli import commands  # noqa: F401  # registers them
from swiftbalancer.cli.app import app, run
from swiftbalancer.cli.files import _layer_ids
from swiftbalancer_worker.compiling import KEPT
from tests.edges.engines import LONG_S, environment


def commands_of(application: Any) -> Iterator[tuple[str, Any]]:
    """Every command by its name, as click sees it."""
    yield from typer.main.get_command(application).commands.items()  # type: ignore[attr-defined]


COMMANDS = {str(name): command for name, command in commands_of(app)}


def help_of(parameter: Any) -> str:
    """What an option or argument says of itself."""
    return getattr(parameter, "help", None) or ""


@pytest.fixture
def loads(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "loads.npy", rng.gamma(0.5, 100.0, (16, 2, 8)))
    return str(tmp_path / "loads.npy")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_of_options_it_has(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--help"]) == 0
    assert "Example" in capsys.readouterr().out
    examples = re.findall(rf"^\s*swiftbalancer {name}\b(.*)$", COMMANDS[name].help or "", re.MULTILINE)
    assert examples
    known = {text for parameter in COMMANDS[name].params for text in parameter.opts}
    for example in examples:
        own = re.split(r"[|>]|&&", example)[0]
        assert {word for word in own.split() if word.startswith("-") and word != "-"} <= known


def test_every_option_of_every_command_says_what_it_is_for() -> None:
    silent = [f"{name} {p.name}" for name, command in COMMANDS.items() for p in command.params if not help_of(p)]
    assert silent == []


@pytest.mark.parametrize(("words", "offered"), [("re", "replay"), ("plan --fo", "--format")])
def test_the_shell_completes_commands_and_options(words: str, offered: str) -> None:
    asked = {
        "_SWIFTBALANCER_COMPLETE": "complete_bash",
        "COMP_WORDS": f"swiftbalancer {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    command = [sys.executable, "-m", "swiftbalancer.cli"]
    done = subprocess.run(
        command, env={**environment(), **asked}, capture_output=True, text=True, timeout=LONG_S, check=True
    )
    assert done.stdout.split() == [offered]


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert [c for c in COMMANDS if f"│ {c} " not in out] == []
    assert "--install-completion" in out
    assert "Exit status: 0 success" in " ".join(out.split())


def test_replay_shows_time_where_reads_of_weights_count(loads: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["replay", loads, "--ranks", "4", "--redundant", "4", "--window", "4"]
    assert run(arguments) == 0
    assert " time " not in capsys.readouterr().out
    assert run([*arguments, "--tokens-per-activation", "200"]) == 0
    assert " time " in capsys.readouterr().out
    assert run([*arguments, "--tokens-per-activation", "200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recording"]["tokens_per_activation"] == 200


def test_advice_is_by_reads_of_weights_where_they_count(loads: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["advise", loads, "--ranks", "4", "--redundant", "4", "--policy", "swift", "--window", "4", "--json"]
    gains = []
    for reads in ("0", "100000"):
        assert run([*arguments, "--tokens-per-activation", reads]) == 0
        gains.append(max(option["gain"] for option in json.loads(capsys.readouterr().out)["options"]))
    assert gains[0] > 0.02 > gains[1]


def test_replay_with_json_prints_one_object_and_nothing_else(loads: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ranks", "4", "--redundant", "4", "--policy", "swift", "--policy", "none", "--window", "4"]
    assert run(["replay", loads, *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.replace(f"{KEPT}\n", "") == ""
    figures = json.loads(captured.out)
    assert set(figures) == {"recording", "without", "policies"}
    assert [policy["name"] for policy in figures["policies"]] == ["swift", "none"]
    assert set(figures["policies"][0]) == {
        "name",
        "imbalance_live",
        "imbalance_live_p95",
        "imbalance_worst_layer",
        "time_live",
        "imbalance_bound",
        "moves_per_layer",
        "dispatch_updates",
        "plan_ms_p50",
        "plan_ms_p99",
        "refresh_ms_p50",
        "bytes_moved",
    }


def test_replay_for_people_is_a_table(loads: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", loads, "--ranks", "4", "--window", "4", "--dispatch", "exact", "--steps", "8"]) == 0
    out = capsys.readouterr().out
    assert "without" in out
    assert "swift" in out
    assert "8 steps x 2 layers x 8 experts" in " ".join(out.split())


@pytest.mark.parametrize(("ranks", "asked", "columns"), [(32, "table", 32), (40, "table", 64), (40, "table:8", 8)])
def test_tables_get_more_columns_with_more_ranks_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int, asked: str, columns: int
) -> None:
    path = tmp_path / "wide.npy"
    np.save(path, np.random.default_rng(0).poisson(100, (6, 1, ranks)).astype(np.float32))
    arguments = ["replay", str(path), "--ranks", str(ranks), "--window", "2", "--dispatch", asked, "--policy", "none"]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recording"]["dispatch"] == f"table:{columns}"


def bad_files(good: Path) -> dict[str, Path]:
    """Files that replay must refuse, beside a good one."""
    cut, foreign, huge, one = (good.with_name(f"{name}.npy") for name in ("cut", "foreign", "huge", "one"))
    garbage, word, placement = (good.with_name(name) for name in ("garbage.pt", "word.csv", "placement.json"))
    np.save(one, np.ones((1, 2, 8)))
    garbage.write_bytes(b"e\n")
    word.write_text("step,layer,expert,count\n0,0,0,3\n0,0,1,many\n")
    placement.write_text("{}")
    cut.write_bytes(good.read_bytes()[:-100])
    foreign.write_text("step,layer,expert,count\n")
    with huge.open("wb") as file:
        shape = (1 << 20, 64, 256)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 4 * (1 << 34))
    return {
        "CUT": cut,
        "FOREIGN": foreign,
        "HUGE": huge,
        "ONE": one,
        "GARBAGE": garbage,
        "WORD": word,
        "PLACEMENT": placement,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "LOADS"], "--ranks"),
        (["replay", "LOADS", "--ranks", "3"], "do not divide over 3 ranks; 1 redundant experts would"),
        (["replay", "LOADS", "--ranks", "4", "--policy", "best"], "unknown 'best'; known:"),
        (["replay", "LOADS", "--ranks", "4", "--dispatch", "table:x"], "not a number of columns"),
        (["replay", "LOADS", "--ranks", "4", "--dispatch", "magic"], "unknown 'magic'; known: table"),
        (["replay", "LOADS", "--ranks", "0"], "Invalid value for '--ranks'"),
        (["replay", "missing.npy", "--ranks", "4"], "no such file"),
        (["replay", "CUT", "--ranks", "4"], "not a whole .npy file"),
        (["replay", "FOREIGN", "--ranks", "4"], "not a .npy file"),
        (["replay", "HUGE", "--ranks", "4"], "out of bounds"),
        (
            ["replay", "LOADS", "--ranks", "4", "--window", "16"],
            "has 16 recorded steps and the first plan comes after 16",
        ),
        (["replay", "LOADS", "--ranks", "4", "--window", "16"], "give --window 4, or a longer recording"),
        (["replay", "ONE", "--ranks", "4"], "1 recorded step; a replay plans from what has passed"),
        (["advise", "ONE", "--ranks", "4"], "1 recorded step; a replay plans from what has passed"),
        (["replay", "LOADS", "--ranks", "4", "--policy", "foreign"], "command line --policy-option NAME=VALUE"),
        (["replay", "LOADS", "--ranks", "4", "--policy-option", "x"], "'x' is not NAME=VALUE"),
        (
            ["plan", "LOADS", "--ranks", "4", "-o", "-", "--policy-option", "tried=1"],
            "policy.options.tried: 'greedy'",
        ),
        (["replay", "LOADS", "--ranks", "4", "--report", "x.pdf"], "--report: x.pdf: a report is HTML; name it"),
        (["convert", "LOADS", "--format", "sglang", "-o", "x"], "holds loads, not a placement; `swiftbalancer plan`"),
        (["convert", "PLACEMENT", "-o", "x"], "if it is a placement, `swiftbalancer convert` needs --format"),
        (["convert", "GARBAGE", "-o", "x"], "not a .pt file of tensors ("),
        (["convert", "WORD", "-o", "x"], "word.csv, line 3: 'many' is not a number"),
        (["plan", "LOADS", "--ranks", "4", "-o", "/nowhere/x.json"], "cannot be written"),
        (["plan", "LOADS", "--ranks", "4", "-o", "-", "--layer-ids", "1-9"], "9 numbers for 2 MoE layers"),
        (["convert", "LOADS", "-o", "x.csv"], "neither .npy nor a folder"),
        (["config"], "give --show or --check"),
        (["config", "--check", "missing.yaml"], "cannot be read"),
        (["worker", "--endpoint", "udp://x"], "neither ipc"),
        (["worker", "--endpoint", "ipc:///tmp/x", "--cpus", "all"], "not a list of core numbers"),
        (["worker", "--endpoint", "ipc:///tmp/x", "--cpus", "9999"], "--cpus: no core 9999 for this process"),
        (["top", "--view", "tcp://127.0.0.1:1", "--client-key", "LOADS"], "go together"),
        (["top", "tcp://127.0.0.1:1"], "give --view"),
        (["nonsense"], "No such command"),
    ],
)
def test_a_wrong_argument_ends_with_status_2_and_says_what_is_wrong(
    arguments: list[str], message: str, loads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"LOADS": Path(loads), **bad_files(Path(loads))}
    assert run([str(files.get(argument, argument)) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in " ".join(captured.err.replace("│", " ").split())


def test_no_command_at_all_is_a_wrong_one_and_shows_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: swiftbalancer" in captured.err and "replay" in captured.err


def test_arguments_are_checked_before_anything_is_planned(loads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("replay.warm_up", "initial.Planner.plan"):
        monkeypatch.setattr(f"swiftbalancer_worker.{place}", lambda *_: pytest.fail("planned first"))
    assert run(["replay", loads, "--ranks", "7"]) == 2
    assert run(["replay", loads, "--ranks", "4", "--window", "16"]) == 2
    assert run(["plan", loads, "--ranks", "7", "-o", "-"]) == 2
    assert run(["plan", loads, "--ranks", "4", "-o", "-", "--layer-ids", "1-9"]) == 2
    assert run(["advise", loads, "--ranks", "7", "--redundant", "1"]) == 2


def test_a_foreign_policy_is_named_on_the_command_line(loads: str, tmp_path: Path) -> None:
    target = "target=swiftbalancer.compat:rebalance_experts"
    arguments = ["--ranks", "4", "--redundant", "4", "--policy", "foreign", "--policy-option", target]
    assert run(["plan", loads, *arguments, "-o", str(tmp_path / "map.json")]) == 0
    assert json.loads((tmp_path / "map.json").read_text())["topology"]["num_ranks"] == 4


def test_plan_writes_what_convert_reads(loads: str, tmp_path: Path) -> None:
    first, second = tmp_path / "map.json", tmp_path / "location.json"
    common = ["--ranks", "4", "--redundant", "4"]
    assert run(["plan", loads, *common, "--format", "vllm-ascend", "-o", str(first)]) == 0
    assert run(["convert", str(first), "--format", "sglang", "-o", str(second)]) == 0
    table = json.loads(second.read_text())["physical_to_logical_map"]
    assert np.asarray(table).shape == (2, 12)
    assert {expert for row in table for expert in row} == set(range(8))


def test_convert_makes_a_recording_that_replay_reads_without_being_told_the_ranks(
    loads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", loads, "-o", str(tmp_path / "run"), "--ranks", "4", "--redundant", "4"]) == 0
    capsys.readouterr()
    assert run(["replay", str(tmp_path / "run"), "--json", "--policy", "none"]) == 0
    about = json.loads(capsys.readouterr().out)["recording"]
    assert (about["ranks"], about["redundant"]) == (4, 4)


def test_advise_with_json_has_options_and_words(loads: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ranks", "4", "--redundant", "4", "--policy", "swift", "--budget", "4", "--window", "4", "--json"]
    assert run(["advise", loads, *flags]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert len(advice["options"]) == 1
    assert advice["advice"][0].startswith("4 ranks:")


def test_advise_says_plainly_when_balancing_is_not_worth_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "even.npy", np.random.default_rng(0).poisson(10_000, (16, 2, 8)))
    assert run(["advise", str(tmp_path / "even.npy"), "--ranks", "4", "--policy", "swift"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4 ranks: balancing is not worth it. Without it the busiest rank carries 1.0" in out


def test_advise_counts_the_memory_of_redundant_experts(loads: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ranks", "4", "--policy", "swift", "--budget", "4", "--expert-mib", "10", "--json"]
    assert run(["advise", loads, *flags, "--redundant", "0", "--redundant", "4"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert [option["memory_mib"] for option in options] == [0, 2 * 10], "one expert a rank in each of two layers"


def test_advise_for_people_ends_with_a_sentence(loads: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ranks", "4", "--policy", "swift", "--budget", "4", "--redundant", "4"]
    assert run(["advise", loads, *flags]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4 ranks: use swift" in out
    assert out.count("(44 MiB an expert assumed, as in DeepSeek-V3 in FP8; give --expert-mib)") == 2
    assert "planned every 4 of 16 recorded steps, not every 8, which is more than a quarter of them" in out
    assert run(["advise", loads, *flags, "--expert-mib", "16.5", "--window", "4"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("(16.5 MiB an expert)") == 2
    assert "not every" not in out


@pytest.mark.parametrize("form", ["yaml", "json", "toml"])
def test_the_printed_defaults_are_a_valid_file_with_the_same_meaning(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "--show", "--format", form]) == 0
    path = tmp_path / f"config.{form}"
    path.write_text(capsys.readouterr().out)
    assert configs.from_file(path) == configs.Config()
    assert run(["config", "--check", str(path)]) == 0


def test_toml_carries_every_kind_of_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"worker": {"cpus": [2, 3], "niceness": 3}, "policy": {"name": "x", "options": {"a b": 1.5, "c": "d"}}}
    (tmp_path / "in.json").write_text(json.dumps(chosen))
    assert run(["config", "--show", "--file", str(tmp_path / "in.json"), "--format", "toml"]) == 0
    (tmp_path / "out.toml").write_text(capsys.readouterr().out)
    assert configs.from_file(tmp_path / "out.toml") == configs.from_dict(chosen)


def test_show_marks_what_differs_from_the_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("seed: 77\n")
    assert run(["config", "--show", "--file", str(tmp_path / "c.yaml")]) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if "(default" in line]
    assert len(marked) == 1
    assert "seed" in marked[0] and "77 (default 0)" in marked[0]


def test_a_reader_that_stops_reading_is_no_error() -> None:
    command = f"{sys.executable} -m swiftbalancer.cli config --show | head -1"
    done = subprocess.run(
        command, shell=True, env=environment(), capture_output=True, text=True, timeout=LONG_S, check=True
    )
    assert done.stderr == ""


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("swiftbalancer 0.")


def test_layer_numbers_are_ranges_and_lists() -> None:
    assert _layer_ids("3-5,9") == [3, 4, 5, 9]


def test_the_command_line_loads_no_library_before_it_must() -> None:
    """numpy among them: it settles how many threads it computes on when it is loaded, and the worker wants one."""
    probe = (
        "import sys; from swiftbalancer.cli import commands; print({'torch', 'zmq', 'numpy'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONG_S, check=True)
    assert done.stdout.split() == ["set()"]


def test_every_option_is_described() -> None:
    values = msgspec.to_builtins(configs.Config())
    keys = {
        f"{s}.{k}" if isinstance(v, dict) else s
        for s, v in values.items()
        for k in (v if isinstance(v, dict) else [""])
    }
    assert {key for key, _, _ in configs.describe()} == keys
    assert [key for key, _, about in configs.describe() if not about] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": {"name": "swif"}}, "policy: unknown 'swif'; known:"),
        (
            {"policy": {"options": {"hot": 3}}},
            "policy.options.hot: 'swift' has no such option; it takes hot_",
        ),
        ({"policy": {"options": {"tried": "x"}}}, "policy.options.tried: Expected `int`, got `str`"),
        (
            {"policy": {"name": "none", "options": {"x": 1}}},
            "policy.options.x: 'none' has no such option; it takes",
        ),
        ({"policy": {"name": "foreign"}}, "policy.options.target: 'foreign' needs it"),
        ({"policy": {"name": "foreign", "options": {"target": "os"}}}, "'os' is not like module:name"),
        ({"policy": {"name": "foreign", "options": {"target": "no:x"}}}, "policy.options.target: cannot load 'no:x'"),
        ({"worker": {"spawn": False, "endpoint": "udp://x"}}, "worker.endpoint: 'udp://x' is neither"),
        (
            {"worker": {"spawn": False, "endpoint": "tcp://10.0.0.1:7711"}},
            "beyond this machine; set",
        ),
    ],
)
def test_checking_a_config_finds_what_an_engine_would_refuse_at_its_start(
    values: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(values))
    for given in (str(tmp_path / "c.json"), json.dumps({"swiftbalancer": {"enable": True, **values}})):
        assert run(["config", "--check", given]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in " ".join(captured.err.split())


def test_checking_takes_what_vllm_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--check", '{"swiftbalancer": {"enable": true, "num_redundant_experts": 8}}']) == 0
    assert capsys.readouterr().out.endswith(": valid\n")
