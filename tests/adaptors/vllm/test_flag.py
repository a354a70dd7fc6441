"""The flag, the version table and the wrapping of methods; no vLLM needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swiftbalancer.errors import ConfigError
from swiftbalancer_adaptors.vllm import flag
from swiftbalancer_adaptors.vllm.patching import wrap
from swiftbalancer_adaptors.vllm.versions import KNOWN, series_of, unknown_version_warning


class Engine:
    def serve(self, tokens: int) -> int:
        return tokens


def doubled(engine: Any, original: Any, tokens: int) -> int:
    return int(original(engine, 2 * tokens))


@pytest.mark.parametrize(
    "additional", [None, {}, {"other": 1}, {"swiftbalancer": {}}, {"swiftbalancer": {"enable": False}}]
)
def test_without_the_flag_nothing_is_asked_for(additional: object) -> None:
    assert flag.read(additional) is None


def test_mode_off_is_no_flag() -> None:
    assert flag.read({"swiftbalancer": {"enable": True, "mode": "off"}}) is None


def test_all_options_live_under_the_key() -> None:
    config = flag.read({"swiftbalancer": {"enable": True, "num_redundant_experts": 32, "policy": {"name": "greedy"}}})
    assert config is not None
    assert config.num_redundant_experts == 32
    assert config.policy.name == "greedy"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"enable": True, "polcy": {}}, "polcy: unknown key"),
        ({"enable": True, "policy": {"max_moves_per_layer": -1}}, "policy.max_moves_per_layer"),
        ({"enable": "yes"}, "additional_config.swiftbalancer.enable"),
        (True, "additional_config.swiftbalancer: must be a mapping"),
    ],
)
def test_a_wrong_option_is_refused_by_its_path(value: object, path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        flag.read({"swiftbalancer": value})


@pytest.mark.parametrize(
    ("version", "name"),
    [("0.24.0", "0.24"), ("0.30.1", "0.30"), ("0.32.0+cpu", "0.32"), ("0.33.0rc1", "0.33")],
)
def test_known_versions(version: str, name: str) -> None:
    series = series_of(version)
    assert series is not None
    assert series.name == name


@pytest.mark.parametrize("version", ["0.23.9", "0.25.0", "0.34.0", "1.0", "dev", ""])
def test_other_versions_are_unknown_and_the_warning_lists_the_known(version: str) -> None:
    assert series_of(version) is None
    assert all(name in unknown_version_warning(version) for name in KNOWN)


def test_wrapping_twice_wraps_once() -> None:
    class Own(Engine):
        def serve(self, tokens: int) -> int:
            return tokens

    assert wrap(Own, "serve", doubled)
    assert wrap(Own, "serve", doubled)
    assert Own().serve(3) == 6


def test_a_method_this_release_lacks_is_no_error() -> None:
    assert not wrap(Engine, "reconfigure", doubled)


def test_file_and_environment_come_under_what_the_flag_says(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("mode: shadow\nmetrics: {port: 9400, per_layer: true}\nwindow: {sub_windows: 4}\n")
    environ = {"SWIFTBALANCER_METRICS__PORT": "9500", "SWIFTBALANCER_WINDOW__SUB_WINDOWS": "6", "HOME": "/root"}
    ours = {"enable": True, "config": str(file), "window": {"sub_windows": 8}}
    given = flag.completed({"other": 1, "swiftbalancer": ours}, environ)
    config = flag.read(given)
    assert config is not None
    assert (config.mode, config.metrics.per_layer) == ("shadow", True)
    assert (config.metrics.port, config.window.sub_windows) == (9500, 8)
    assert given["other"] == 1
    assert flag.completed(given, {}) == given, "all processes of the engine have it"
    assert ours["config"] == str(file), "what the user gave is left as it is"


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"mode": "observe"}')
    config = flag.read(flag.completed({"swiftbalancer": {"enable": True}}, {"SWIFTBALANCER_CONFIG": str(file)}))
    assert config is not None
    assert config.mode == "observe"
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read"):
        flag.completed({"swiftbalancer": {"enable": True}}, {"SWIFTBALANCER_CONFIG": "/gone.yaml"})


@pytest.mark.parametrize("additional", [None, {}, {"swiftbalancer": True}, {"swiftbalancer": {"enable": False}}])
def test_without_the_flag_neither_file_nor_environment_is_read(additional: Any) -> None:
    environ = {"SWIFTBALANCER_CONFIG": "/gone.yaml", "SWIFTBALANCER_MODE": "on"}
    assert flag.completed(additional, environ) == additional
