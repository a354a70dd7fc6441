"""The one configuration: typed, validated once where it enters, every option with unit and default.

Sources: a dict (an engine's flag), a JSON, YAML or TOML file, `SWIFTBALANCER_*` environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, inspect

from swiftbalancer import plain_yaml, variables
from swiftbalancer.errors import ConfigError

Mode = Literal["off", "observe", "shadow", "on"]
FLAG = "swiftbalancer"
"""The key that holds our options in the JSON that vLLM takes."""
FILE = "config"
"""The key below it that names a file with more of them."""

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
CountOrZero = Annotated[int, Meta(ge=0, le=1_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Port = Annotated[int, Meta(ge=1, le=65535)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=False):
    """Base of all sections: unknown keys are refused."""


class WindowConfig(Section, frozen=True):
    """How loads are measured."""

    sub_window_steps: Annotated[Count, Meta(description="Forward passes per sub-window.")] = 32
    sub_windows: Annotated[int, Meta(ge=1, le=64, description="Sub-windows a plan looks back on.")] = 8
    refresh_sub_windows: Annotated[
        CountOrZero,
        Meta(description="Dispatch tables are renewed every so many sub-windows; 0: never alone."),
    ] = 1
    replan_sub_windows: Annotated[
        CountOrZero, Meta(description="A placement is planned every so many sub-windows; 0: never.")
    ] = 8


class PolicyConfig(Section, frozen=True):
    """How placements are chosen."""

    name: Annotated[str, Meta(min_length=1, description="swift, greedy, random, none or a plug-in.")] = "swift"
    max_moves_per_layer: Annotated[
        CountOrZero, Meta(description="Budget of moved experts per layer and re-plan; 0: dispatch only.")
    ] = 8
    target_imbalance: Annotated[
        float, Meta(ge=1.0, le=10.0, description="A layer at or below this max/mean load is left alone.")
    ] = 1.02
    min_gain: Annotated[
        float,
        Meta(ge=0.0, le=100.0, description="Predicted time saved must exceed this multiple of a move's cost."),
    ] = 1.0
    min_refresh_gain: Annotated[
        float,
        Meta(ge=0.0, le=10.0, description="Dispatch tables are renewed if predicted max/mean load falls by this."),
    ] = 0.002
    tokens_per_activation: Annotated[
        float,
        Meta(
            ge=0.0,
            le=100_000.0,
            description="Tokens whose computation takes a rank as long as reading one expert's weights, "
            "for decode in small batches; 0: only tokens count.",
        ),
    ] = 0.0
    options: Annotated[dict[str, Any], Meta(description="Options of a plug-in policy.")] = {}


class DispatchConfig(Section, frozen=True):
    """How tokens are split over the replicas of an expert."""

    form: Annotated[
        Literal["auto", "table", "static", "uniform"], Meta(description="auto: the best the engine can do.")
    ] = "auto"
    width: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None,
        Meta(description="Columns of a dispatch table; empty: 32, with more than 32 ranks 64."),
    ] = None


class TransportConfig(Section, frozen=True):
    """How expert weights travel."""

    kind: Annotated[
        Literal["auto", "p2p", "copy_engine", "gloo"],
        Meta(description="auto: copy_engine where devices share memory, else p2p; gloo: through host memory."),
    ] = "auto"
    staging_mib: Annotated[Count, Meta(description="Device memory for arriving experts, MiB per rank.")] = 512
    max_step_inflation: Annotated[
        Fraction,
        Meta(description="Bound on how much longer a step takes while experts move; 0.02 is 2 %, 1 bounds nothing."),
    ] = 0.02
    verify: Annotated[bool, Meta(description="Compare checksums of moved experts before the vote.")] = True
    deadline_s: Annotated[Seconds, Meta(description="A batch not complete after this many seconds is given up.")] = (
        30.0
    )
    max_ctas: Annotated[
        int, Meta(ge=1, le=64, description="Most thread blocks the collective library may take (p2p).")
    ] = 4


class AgreementConfig(Section, frozen=True):
    """How ranks agree without waiting."""

    lag_steps: Annotated[
        int, Meta(ge=1, le=64, description="A vote posted after step s is taken after step s + lag.")
    ] = 4
    idle_round_steps: Annotated[
        Count,
        Meta(
            description="Steps between rounds while nothing is in flight, which bounds the reaction; "
            "in a cycle the lag alone does."
        ),
    ] = 16
    deadline_s: Annotated[Seconds, Meta(description="A vote not learnt after this many seconds is lost.")] = 30.0
    channel: Annotated[
        Literal["auto", "gloo"],
        Meta(description="For votes and loads. auto: memory that ranks of one host share, else gloo."),
    ] = "auto"


class WorkerConfig(Section, frozen=True):
    """The planning process."""

    spawn: Annotated[bool, Meta(description="Rank 0 starts and supervises the worker itself.")] = True
    endpoint: Annotated[
        str | None,
        Meta(description="ZeroMQ endpoint; empty: a private ipc:// one. Needed with spawn: false."),
    ] = None
    plan_timeout_s: Annotated[Seconds, Meta(description="A worker silent for this long is restarted.")] = 20.0
    start_timeout_s: Annotated[
        Seconds,
        Meta(description="Time a worker has to answer the first hello; its first start compiles the planner."),
    ] = 900.0
    restart_backoff_s: Annotated[Seconds, Meta(description="First wait before a restart; doubles, up to 60 s.")] = 0.5
    niceness: Annotated[int, Meta(ge=0, le=19, description="Niceness of a spawned worker.")] = 10
    cpus: Annotated[
        list[int] | None,
        Meta(description="Cores a spawned worker may use; empty: wherever the system puts it."),
    ] = None
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="Its verbosity.")] = "info"
    server_public_key: Annotated[str | None, Meta(description="CURVE key (Z85) of a tcp:// worker.")] = None
    client_secret_key: Annotated[str | None, Meta(description="Our own CURVE secret key (Z85).")] = None
    client_secret_key_file: Annotated[
        str | None, Meta(description="File that holds it, so that no list of processes or log shows it.")
    ] = None


class RecordConfig(Section, frozen=True):
    """What the worker writes to disk."""

    directory: Annotated[str | None, Meta(description="Recording folder; empty: no recording.")] = None
    max_mib: Annotated[Count, Meta(description="Size bound of a recording, MiB; the oldest chunks go first.")] = 4096


class MetricsConfig(Section, frozen=True):
    """What is reported."""

    port: Annotated[Port | None, Meta(description="Prometheus port of rank 0; empty: off.")] = None
    host: Annotated[
        str,
        Meta(min_length=1, description="Address of that port; 0.0.0.0: other hosts read it too, without a password."),
    ] = "127.0.0.1"
    per_layer: Annotated[bool, Meta(description="Also one series per layer and per rank.")] = False
    event_log: Annotated[str | None, Meta(description="JSONL file of cycles, written by rank 0.")] = None


class BreakerConfig(Section, frozen=True):
    """When balancing switches itself off, and when it tries again."""

    max_failures: Annotated[Count, Meta(description="Cycles lost in a row before balancing pauses.")] = 5
    retry_after_s: Annotated[Seconds, Meta(description="Pause before the next try; doubles, up to 1 h.")] = 60.0
    stall_warning_s: Annotated[Seconds, Meta(description="A cycle without progress for this long is reported.")] = (
        30.0
    )


class Config(Section, frozen=True):
    """All options of swiftbalancer."""

    mode: Annotated[Mode, Meta(description="off; observe: count and report; shadow: plan, never apply; on.")] = "on"
    num_redundant_experts: Annotated[
        CountOrZero | None,
        Meta(description="Extra slots per layer over all ranks; empty: the engine's own flag."),
    ] = None
    num_nodes: Annotated[
        Count | None, Meta(description="Hosts the ranks are spread over; empty: ask the engine.")
    ] = None
    seed: Annotated[CountOrZero, Meta(description="Seed of policies that draw lots.")] = 0
    window: WindowConfig = WindowConfig()
    policy: PolicyConfig = PolicyConfig()
    dispatch: DispatchConfig = DispatchConfig()
    transport: TransportConfig = TransportConfig()
    agreement: AgreementConfig = AgreementConfig()
    worker: WorkerConfig = WorkerConfig()
    record: RecordConfig = RecordConfig()
    metrics: MetricsConfig = MetricsConfig()
    breaker: BreakerConfig = BreakerConfig()

    def __post_init__(self) -> None:
        window = self.window
        if not self.worker.spawn and not self.worker.endpoint:
            raise ConfigError("worker.endpoint: needed with worker.spawn false; give an ipc:// or tcp:// endpoint")
        if window.replan_sub_windows and window.replan_sub_windows < window.refresh_sub_windows:
            raise ConfigError(
                f"window.replan_sub_windows: {window.replan_sub_windows} is below window.refresh_sub_windows "
                f"({window.refresh_sub_windows}); a placement plan renews the dispatch too"
            )


def from_dict(values: Mapping[str, Any]) -> Config:
    """A validated config from plain values; raises `ConfigError` with the key's path and the allowed range."""
    try:
        config = msgspec.convert(dict(values), Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_quote_mode(values) or _readable(str(error))) from None
    _check_sendable(config)
    return config


def _quote_mode(values: Mapping[str, Any]) -> str:
    """What to say of a mode that YAML took for a truth value; empty if it did not."""
    mode = values.get("mode")
    if not isinstance(mode, bool):
        return ""
    word = "on" if mode else "off"
    return f'mode: got {str(mode).lower()}, which is how YAML reads an unquoted {word}; quote it: mode: "{word}"'


def _check_sendable(config: Config) -> None:
    """Raises `ConfigError` for a value that no message to the worker can carry, e.g. an integer of 65 bits."""
    for section in config.__struct_fields__:
        part = getattr(config, section)
        options = {f"{section}.{name}": getattr(part, name) for name in getattr(part, "__struct_fields__", ())}
        for key, value in (options or {section: part}).items():
            try:
                msgspec.msgpack.encode(value)
            except (OverflowError, TypeError, RecursionError, UnicodeError) as error:
                raise ConfigError(f"{key}: cannot be sent to the worker: {error}") from None


def from_file(path: str | Path) -> Config:
    """A validated config from a `.json`, `.yaml`, `.yml` or `.toml` file, and the one it names as vLLM's flag may."""
    return from_dict(_with_named_file(read_file(path)))


def from_text(text: str) -> Config:
    """A validated config from JSON, as vLLM's flag takes it."""
    try:
        values = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"not a JSON object: {error}") from None
    return from_dict(_with_named_file(without_flag(values)))


def _with_named_file(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over those of the file that they name."""
    own = dict(values)
    named = own.pop(FILE, None)
    return own if named is None else merge(read_file(named), own)


def load(path: str | Path | None = None, *, environ: Mapping[str, str] | None = None) -> Config:
    """File (or the one `SWIFTBALANCER_CONFIG` names) with `SWIFTBALANCER_SECTION__KEY` variables on top."""
    return from_dict(given_outside(path, os.environ if environ is None else environ))


def given_outside(path: str | Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """The plain values that `load` validates."""
    chosen = path or environ.get(variables.CONFIG_FILE)
    values = read_file(chosen) if chosen else {}
    return merge(values, from_environment(environ))


def read_file(path: str | Path) -> dict[str, Any]:
    """The plain values of a config file, not validated; raises `ConfigError` naming the file.

    The JSON that vLLM takes, `{"swiftbalancer": {"enable": true, ...}}` with or without the outer key, is one, too.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"{FILE}: must be the path of a file, got {path!r}")
    path = Path(path)
    try:
        values = _parse(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ConfigError:
        raise
    except Exception as error:  # each parser has its own error type
        raise ConfigError(f"{path}: not valid {path.suffix[1:]}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the top level must be a mapping, got {type(values).__name__}")
    return without_flag(values)


def without_flag(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the JSON that vLLM takes; `enable` false is the mode off. Other values are as they were.

    Raises `ConfigError` if `enable` is no truth value.
    """
    inner = values.get(FLAG)
    options = dict(inner if isinstance(inner, Mapping) else values)
    enable = options.pop("enable", True)
    if not isinstance(enable, bool):
        raise ConfigError(f"enable: must be true or false, got {enable!r}")
    return options if enable else {**options, "mode": "off"}


def _parse(path: Path) -> Any:
    text = path.read_bytes()
    if path.suffix == ".json":
        return msgspec.json.decode(text)
    if path.suffix in (".yaml", ".yml"):
        return plain_yaml.decode(text)
    if path.suffix == ".toml":
        return msgspec.toml.decode(text)
    raise ConfigError(f"{path}: unknown ending {path.suffix!r}; known: .json, .yaml, .yml, .toml")


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Values of `SWIFTBALANCER_POLICY__NAME=greedy` style variables; each is read as JSON, else as text.

    Raises `ConfigError` for a variable of that prefix that sets no option and that no other part reads.
    """
    return variables.settings(environ, [key for key, _, _ in describe()])


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values of every option, defaults included."""
    values: dict[str, Any] = msgspec.to_builtins(config)
    return values


def describe() -> list[tuple[str, str, str]]:
    """`(key, default, description with range)` of every option, for `config --show` and the docs."""
    return _describe(Config, prefix="")


def _describe(section: type[Section], *, prefix: str) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    defaults = section()
    info = inspect.type_info(section)
    assert isinstance(info, inspect.StructType)
    for field in info.fields:
        value = getattr(defaults, field.name)
        if isinstance(field.type, inspect.StructType):
            rows += _describe(type(value), prefix=f"{prefix}{field.name}.")
        else:
            rows.append((prefix + field.name, msgspec.json.encode(value).decode(), _explain(field.type)))
    return rows


def _explain(kind: inspect.Type) -> str:
    """Description, range and choices of one option's type."""
    if isinstance(kind, inspect.Metadata):
        text = (kind.extra_json_schema or {}).get("description", "")
        return f"{text} {_explain(kind.type)}".strip()
    if isinstance(kind, inspect.UnionType):
        return " ".join(filter(None, (_explain(inner) for inner in kind.types)))
    if isinstance(kind, inspect.LiteralType):
        return f"One of {', '.join(str(v) for v in kind.values)}."
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        low = kind.ge if kind.ge is not None else kind.gt
        edge = "" if kind.gt is None else "above "
        return "" if low is None else f"Range {edge}{low}..{kind.le}."
    return ""


def _readable(message: str) -> str:
    """msgspec's `... - at `$.a.b`` turned around: `a.b: ...`."""
    text, _, where = message.partition(" - at `$")
    key = where.rstrip("`").lstrip(".") or "(top level)"
    if text.startswith("Object contains unknown field"):
        name = text.split("`")[1]
        section: Any = Config()
        for part in key.split(".") if "(" not in key else ():
            section = getattr(section, part)
        path = name if "(" in key else f"{key}.{name}"
        return f"{path}: unknown key; known here: {', '.join(section.__struct_fields__)}"
    about = next((text for name, _, text in describe() if name == key), "")
    return f"{key}: {text}. {about}".rstrip(". ") + "."
