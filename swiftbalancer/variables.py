"""Settings in environment variables, `SWIFTBALANCER_SECTION__KEY`, and which others of that prefix there are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from swiftbalancer.errors import ConfigError

PREFIX = "SWIFTBALANCER_"
CONFIG_FILE = "SWIFTBALANCER_CONFIG"
FREE = "policy.options."
"""Whatever is below is for the policy to know."""
NO_SETTINGS = re.compile(
    r"CONFIG|IN_VLLM|VENV|TEST_VENV|TRACES|PROMTOOL|DEEPSEEK_EPLB|PEERS|PEER_[A-Z]+|[A-Z_]+_SOURCE"
)
"""Names after the prefix that other parts read: the engines' hooks, scripts and tests."""
KUBERNETES = re.compile(
    r"([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)?)"
)
"""What Kubernetes sets in every pod beside a service whose name begins with ours."""


def settings(environ: Mapping[str, str], known: Collection[str]) -> dict[str, Any]:
    """Nested values of the variables that name an option of `known` (`policy.name`) or a whole section.

    Each is read as JSON, else as text. Raises `ConfigError` for a variable of our prefix that names neither.
    """
    values: dict[str, Any] = {}
    for key in sorted(key for key in environ if key.startswith(PREFIX)):
        if not key.isascii():
            raise ConfigError(f"{key!a}: names of options are plain ASCII")
        name = key.removeprefix(PREFIX)
        option = name.lower().replace("__", ".")
        if _is_setting(option, known):
            _put(values, option.split("."), key, environ[key])
        elif not NO_SETTINGS.fullmatch(name) and not _is_kubernetes(name, environ[key]):
            raise ConfigError(f"{key}: sets no option; {_nearest(option, known)}")
    return values


def _is_setting(option: str, known: Collection[str]) -> bool:
    return option in known or option.startswith(FREE) or any(name.startswith(f"{option}.") for name in known)


def _is_kubernetes(name: str, value: str) -> bool:
    """A port is an option of ours, too, so that one without a number in its name must hold an address."""
    return bool(KUBERNETES.fullmatch(name)) and (not name.endswith("PORT") or "SERVICE" in name or "://" in value)


def _put(values: dict[str, Any], path: list[str], key: str, text: str) -> None:
    node = values
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {part} is set as a value elsewhere in the environment")
    try:
        node[path[-1]] = scalar(text)
    except (UnicodeError, RecursionError) as error:
        raise ConfigError(f"{key}: cannot be read: {error}") from None


def scalar(text: str) -> Any:
    """The value in `text`, read as JSON where it is JSON."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _nearest(option: str, known: Collection[str]) -> str:
    """The variable of the option that is most like `option`, also where it has `_` between section and key."""
    by_name = {name.replace(".", "_"): name for name in known}
    found = difflib.get_close_matches(option.replace(".", "_"), by_name, n=1, cutoff=0.0)
    return f"the nearest that does is {PREFIX}{by_name[found[0]].upper().replace('.', '__')}"
