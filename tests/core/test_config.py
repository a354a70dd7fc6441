"""The one configuration: sources, precedence, and what is said about mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from swiftbalancer.cli.config import markdown
from swiftbalancer.config import (
    Config,
    describe,
    from_dict,
    from_environment,
    from_file,
    from_text,
    load,
    merge,
    to_dict,
)
from swiftbalancer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "configuration.md"
FILES = {
    "c.yaml": "policy:\n  name: greedy\nwindow: {sub_windows: 4}\n",
    "c.yml": "policy:\n  name: greedy\nwindow: {sub_windows: 4}\n",
    "c.json": '{"policy": {"name": "greedy"}, "window": {"sub_windows": 4}}',
    "c.toml": '[policy]\nname = "greedy"\n[window]\nsub_windows = 4\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_says_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    assert from_file(tmp_path / name) == from_dict({"policy": {"name": "greedy"}, "window": {"sub_windows": 4}})


def test_plain_values_make_the_same_config_again() -> None:
    chosen = from_dict({"worker": {"cpus": [1, 2]}, "policy": {"options": {"a": {"b": 1}}}, "num_nodes": 2})
    assert from_dict(to_dict(chosen)) == chosen


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    assert from_file(tmp_path / "c.yaml") == Config()


def test_environment_overrules_file_overrules_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("policy: {name: greedy, max_moves_per_layer: 3}\nseed: 5\n")
    environ = {
        "SWIFTBALANCER_CONFIG": str(path),
        "SWIFTBALANCER_POLICY__MAX_MOVES_PER_LAYER": "7",
        "SWIFTBALANCER_WORKER__CPUS": "[4, 5]",
        "SWIFTBALANCER_RECORD__DIRECTORY": "/tmp/x",
        "SWIFTBALANCER_MODE": "shadow",
        "OTHER": "1",
    }
    chosen = load(environ=environ)
    assert (chosen.policy.name, chosen.policy.max_moves_per_layer, chosen.seed) == ("greedy", 7, 5)
    assert (chosen.worker.cpus, chosen.record.directory, chosen.mode) == ([4, 5], "/tmp/x", "shadow")


def test_a_file_given_by_hand_overrules_the_one_in_the_environment(tmp_path: Path) -> None:
    for name, seed in (("a.json", 1), ("b.json", 2)):
        (tmp_path / name).write_text(f'{{"seed": {seed}}}')
    assert load(tmp_path / "b.json", environ={"SWIFTBALANCER_CONFIG": str(tmp_path / "a.json")}).seed == 2


def test_variables_that_are_none_of_ours_are_left_alone() -> None:
    environ = {"SWIFTBALANCER_TRACES": "/data", "SWIFTBALANCER_CONFIG": "x.yaml", "PATH": "/bin"}
    assert from_environment(environ) == {}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("SWIFTBALANCER_POLICY_NAME", "SWIFTBALANCER_POLICY__NAME"),
        ("SWIFTBALANCER_MOD", "SWIFTBALANCER_MODE"),
        ("SWIFTBALANCER_WORKER__CPU", "SWIFTBALANCER_WORKER__CPUS"),
        ("SWIFTBALANCER_METRICS_PORT", "SWIFTBALANCER_METRICS__PORT"),
        ("SWIFTBALANCER_RECRD__DIRECTORY", "SWIFTBALANCER_RECORD__DIRECTORY"),
        ("SWIFTBALANCER_MODE__X", "SWIFTBALANCER_MODE"),
    ],
)
def test_a_variable_that_sets_nothing_is_refused_with_the_nearest_that_does(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: sets no option; the nearest that does is {nearest}$"):
        from_environment({name: "9"})


def test_every_variable_that_another_part_reads_is_let_through() -> None:
    own = ("test_config.py", "test_properties_wire.py", "test_flag.py")
    files = [file for folder in ("scripts", "tests", "adaptors", ".ci") for file in (ROOT / folder).rglob("*")]
    texts = [f.read_text() for f in files if f.suffix in (".py", ".sh", "") and f.is_file() and f.name not in own]
    found = {name for text in texts for name in re.findall(r"\bSWIFTBALANCER_[A-Z_]*[A-Z]\b", text)}
    assert {"SWIFTBALANCER_IN_VLLM", "SWIFTBALANCER_TRACES", "SWIFTBALANCER_TEST_VENV"} <= found
    assert from_environment(dict.fromkeys(found, "x")) == {}


def test_what_kubernetes_sets_beside_a_service_of_our_name_is_let_through() -> None:
    address = "tcp://10.0.0.1:7711"
    for service in ("SWIFTBALANCER", "SWIFTBALANCER_WORKER"):
        environ = {
            f"{service}_SERVICE_HOST": "10.0.0.1",
            f"{service}_SERVICE_PORT": "7711",
            f"{service}_SERVICE_PORT_PLANS": "7711",
            f"{service}_PORT": address,
            f"{service}_PORT_7711_TCP": address,
            f"{service}_PORT_7711_TCP_ADDR": "10.0.0.1",
        }
        assert from_environment(environ) == {}


def test_the_json_that_vllm_takes_is_a_config(tmp_path: Path) -> None:
    wanted = from_dict({"num_redundant_experts": 8})
    for text in (
        '{"enable": true, "num_redundant_experts": 8}',
        '{"swiftbalancer": {"enable": true, "num_redundant_experts": 8}}',
        '{"swiftbalancer": {"num_redundant_experts": 8}, "of_others": {"enabled": true}}',
    ):
        (tmp_path / "c.json").write_text(text)
        assert from_file(tmp_path / "c.json") == from_text(text) == wanted
    assert from_text('{"swiftbalancer": {"enable": false}}').mode == "off"
    with pytest.raises(ConfigError, match="enable: must be true or false, got 'yes'"):
        from_text('{"enable": "yes"}')
    with pytest.raises(ConfigError, match="not a JSON object"):
        from_text('{"enable": ')


def test_the_file_that_vllms_flag_names_comes_under_what_the_flag_says(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("num_redundant_experts: 4\npolicy: {name: greedy}\n")
    flag = json.dumps({"swiftbalancer": {"config": str(tmp_path / "own.yaml"), "num_redundant_experts": 8}})
    (tmp_path / "flag.json").write_text(flag)
    wanted = from_dict({"num_redundant_experts": 8, "policy": {"name": "greedy"}})
    assert from_text(flag) == from_file(tmp_path / "flag.json") == wanted
    (tmp_path / "own.yaml").write_text("num_redundant_expert: 4\n")
    with pytest.raises(ConfigError, match="num_redundant_expert: unknown key"):
        from_text(flag)
    with pytest.raises(ConfigError, match="config: must be the path of a file, got 5"):
        from_text('{"config": 5}')


@pytest.mark.parametrize("word", ["on", "off"])
def test_a_mode_that_yaml_took_for_a_truth_value_is_to_be_quoted(tmp_path: Path, word: str) -> None:
    (tmp_path / "c.yaml").write_text(f"mode: {word}\n")
    with pytest.raises(ConfigError, match=f'unquoted {word}; quote it: mode: "{word}"'):
        from_file(tmp_path / "c.yaml")


def test_a_variable_that_is_section_and_value_at_once_is_refused() -> None:
    with pytest.raises(ConfigError, match="POLICY__NAME"):
        from_environment({"SWIFTBALANCER_POLICY": "greedy", "SWIFTBALANCER_POLICY__NAME": "swift"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"polcy": {}}, r"polcy: unknown key; known here: mode, "),
        ({"policy": {"nam": "x"}}, r"policy\.nam: unknown key; known here: name, max_moves_per_layer"),
        ({"policy": {"max_moves_per_layer": -1}}, r"policy\.max_moves_per_layer: .*Range 0\.\.1000000"),
        ({"policy": {"max_moves_per_layer": "8"}}, r"policy\.max_moves_per_layer: Expected `int`, got `str`"),
        ({"policy": {"target_imbalance": 0.5}}, r"policy\.target_imbalance: .*Range 1\.0\.\.10\.0"),
        ({"transport": {"kind": "pigeon"}}, r"transport\.kind: .*pigeon.*One of auto, copy_engine"),
        ({"mode": "maybe"}, r"mode: .*One of observe, off, on, shadow"),
        ({"worker": {"plan_timeout_s": 0}}, r"worker\.plan_timeout_s: .*Range above 0"),
        ({"worker": {"plan_timeout_s": float("nan")}}, r"worker\.plan_timeout_s"),
        ({"worker": {"spawn": False}}, r"worker\.endpoint: needed with worker\.spawn false"),
        ({"window": {"replan_sub_windows": 1, "refresh_sub_windows": 4}}, r"window\.replan_sub_windows: 1 is below"),
        ({"metrics": {"port": 70000}}, r"metrics\.port: .*Range 1\.\.65535"),
        ({"window": 3}, r"window: Expected `object`, got `int`"),
    ],
)
def test_a_mistake_is_named_by_its_path_with_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", "{", "not valid json"),
        ("c.yaml", "a: [", "not valid yaml"),
        ("c.toml", "a = ", "not valid toml"),
        ("c.ini", "", "unknown ending '.ini'; known: .json, .yaml, .yml, .toml"),
        ("c.yaml", "- 1\n- 2\n", "top level must be a mapping, got list"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{name}.*{message}"):
        from_file(tmp_path / name)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/no/such\.yaml: cannot be read: No such file"):
        from_file("/no/such.yaml")


def test_merging_goes_section_by_section() -> None:
    assert merge({"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": 4}) == {"a": {"x": 1, "y": 3}, "b": 1, "c": 4}


def test_the_reference_in_the_docs_is_current() -> None:
    written = DOCS.read_text().partition("<!-- options -->\n")[2].partition("<!-- end of options -->")[0]
    assert written == markdown(), "run: swiftbalancer config --show --format markdown"


def test_every_default_in_the_reference_is_valid() -> None:
    assert len(describe()) > 40
    assert from_dict(to_dict(Config())) == Config()
