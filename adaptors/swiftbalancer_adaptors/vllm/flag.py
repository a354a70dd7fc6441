"""The one flag: `--additional-config '{"swiftbalancer": {"enable": true, ...}}'`.

The flag is read where vLLM builds its configuration. There it is turned into vLLM's own settings (redundant
experts on, vLLM's loop off), conflicts are refused, and an environment variable tells the engine's worker
processes to install the hooks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from swiftbalancer import config as options
from swiftbalancer.config import Config
from swiftbalancer.errors import ConfigError, UnsupportedEngine
from swiftbalancer_adaptors.vllm.part import draft_of
from swiftbalancer_adaptors.vllm.patching import wrap
from swiftbalancer_adaptors.vllm.versions import padding_warning, series_of, unknown_version_warning
from swiftbalancer_adaptors.vllm_ascend import flag as ascend

KEY = options.FLAG
ACTIVE = "SWIFTBALANCER_IN_VLLM"
VLLM_HOOKS = "1"
RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
NEVER_STEPS = 2_000_000_000
"""Step interval of vLLM's own loop; its step is replaced, this is a second bolt."""

RANKS_COME_AND_GO = ("enable_elastic_ep", "enable_fault_tolerance")
MAX_PORT = 65535

logger = logging.getLogger(__name__)


def register() -> None:
    """Wraps `EngineArgs.create_engine_config`; installs the engine hooks where a parent asked for them."""
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "create_engine_config", create_engine_config)
    _install()


def create_engine_config(args: Any, original: Any, *rest: Any, **named: Any) -> Any:
    """`EngineArgs.create_engine_config` with the flag applied before and checked after it."""
    args.additional_config = completed(args.additional_config, os.environ)
    config = read(args.additional_config)
    if config is None:
        return original(args, *rest, **named)
    if ascend.on_v1_runner():
        return _create_for_ascend(args, original, config, rest, named)
    version = _vllm_version()
    series = series_of(version)
    if series is None and not ascend.knows_v2(version):
        logger.warning(unknown_version_warning(version))
        return original(args, *rest, **named)
    apply(args, config)
    if series is not None and series.counts_padding:
        logger.warning(padding_warning(version))
    vllm_config = original(args, *rest, **named)
    check(vllm_config)
    check_parts(vllm_config, config)
    _tell_workers(VLLM_HOOKS)
    return vllm_config


def _create_for_ascend(args: Any, original: Any, config: Config, rest: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The same for Model Runner V1 of vllm-ascend, which balances by an updator of its own."""
    problem = ascend.unknown_release()
    if problem:
        logger.warning(problem)
        return original(args, *rest, **named)
    ascend.apply(args, config)
    vllm_config = original(args, *rest, **named)
    ascend.check(vllm_config)
    _tell_workers(ascend.HOOKS)
    return vllm_config


def completed(additional_config: Any, environ: Mapping[str, str]) -> Any:
    """With the flag on, `additional_config` with the options of a file and of `environ` under those of the flag, for
    all processes of the engine alike. Idempotent. Raises `ConfigError` for what cannot be read.

    The file is the one that `config` under our key names, or `SWIFTBALANCER_CONFIG`.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if not isinstance(given, Mapping) or given.get("enable") is not True:
        return additional_config
    values = dict(given)
    below = options.given_outside(values.pop(options.FILE, None), environ)
    return {**additional_config, KEY: options.merge(below, values)}


def read(additional_config: Any) -> Config | None:
    """The options under our key; None without the key, with `enable` false or `mode` off.

    Raises `ConfigError` with the path of a key that is unknown or out of range.
    """
    if not isinstance(additional_config, Mapping) or KEY not in additional_config:
        return None
    values = additional_config[KEY]
    if not isinstance(values, Mapping):
        raise ConfigError(f'additional_config.{KEY}: must be a mapping such as {{"enable": true}}, got {values!r}')
    values = dict(values)
    enable = values.pop("enable", False)
    values.pop(options.FILE, None)
    if not isinstance(enable, bool):
        raise ConfigError(f"additional_config.{KEY}.enable: must be true or false, got {enable!r}")
    config = options.from_dict(values)
    return config if enable and config.mode != "off" else None


def apply(args: Any, config: Config) -> None:
    """Sets vLLM's own arguments; raises `ConfigError` where the user's contradict ours. Idempotent."""
    from vllm.config.parallel import EPLBConfig

    theirs = args.eplb_config
    redundant = config.num_redundant_experts
    if theirs.policy != "default":
        raise ConfigError(
            f"--eplb-config.policy {theirs.policy}: vLLM's balancer does not run beside swiftbalancer; "
            f"drop it, and choose additional_config.{KEY}.policy.name"
        )
    if redundant is not None and theirs.num_redundant_experts not in (0, redundant):
        raise ConfigError(
            f"--eplb-config.num_redundant_experts {theirs.num_redundant_experts} and additional_config.{KEY}."
            f"num_redundant_experts {redundant} differ; give one of them"
        )
    if not args.enable_expert_parallel:
        raise UnsupportedEngine(
            "swiftbalancer balances experts between expert-parallel ranks: add --enable-expert-parallel, with "
            "--tensor-parallel-size or --data-parallel-size of at least 2"
        )
    if theirs.log_balancedness:
        logger.warning("swiftbalancer: --eplb-config.log_balancedness is off; see swiftbalancer's metrics instead")
    for name in RANKS_COME_AND_GO:
        if getattr(args, name, False):
            raise UnsupportedEngine(
                f"--{name.replace('_', '-')}: ranks may not come and go under swiftbalancer; drop that flag or ours"
            )
    if args.enable_lora:
        raise UnsupportedEngine(
            "--enable-lora: vLLM cuts the adapters of experts by slot when it loads them, so they would stay behind "
            "when an expert moves; drop that flag or ours"
        )
    args.enable_eplb = True
    args.eplb_config = EPLBConfig(
        num_redundant_experts=theirs.num_redundant_experts if redundant is None else redundant,
        window_size=1,
        step_interval=NEVER_STEPS,
        use_async=False,
        communicator=theirs.communicator or "torch_gloo",
    )


def check(vllm_config: Any) -> None:
    """Raises `TopologyError` if slots do not divide over the ranks, with a number that would, and
    `UnsupportedEngine` if weights are not to stay on the device."""
    from swiftbalancer.topology import Topology

    offload = vllm_config.offload_config
    if offload.offload_backend == "prefetch" or offload.prefetch.offload_group_size:
        raise UnsupportedEngine(
            "--offload-group-size: vLLM keeps those layers in host memory and copies them in for every pass, so "
            "experts cannot move there; drop that flag or ours"
        )
    parallel = vllm_config.parallel_config
    num_experts = vllm_config.model_config.get_num_experts()
    num_ranks = (
        parallel.tensor_parallel_size
        * parallel.data_parallel_size
        * getattr(parallel, "prefill_context_parallel_size", 1)
    )
    Topology.for_experts(num_experts, num_redundant=parallel.eplb_config.num_redundant_experts, num_ranks=num_ranks)


def check_parts(vllm_config: Any, config: Config) -> None:
    """Raises where what is balanced apart, pipeline stages and a draft model, cannot be served by one config."""
    experts = vllm_config.model_config.get_num_experts()
    draft = draft_of(vllm_config)
    draft_experts = draft.get_num_experts() if draft is not None else 0
    if draft_experts not in (0, experts):
        raise UnsupportedEngine(
            f"the draft model has {draft_experts} experts, the served one {experts}: vLLM balances both alike; "
            "drop --speculative-config or the swiftbalancer flag"
        )
    parts = vllm_config.parallel_config.pipeline_parallel_size + bool(draft_experts)
    if parts > 1 and config.worker.spawn and config.worker.endpoint:
        raise ConfigError(
            f"worker.endpoint: {parts} parts (pipeline stages, draft model) start a worker each, and these cannot "
            "share an endpoint; leave it empty, or start one worker by hand and set worker.spawn to false"
        )
    last_port = (config.metrics.port or 0) + parts - 1
    if last_port > MAX_PORT:
        raise ConfigError(f"metrics.port: {parts} parts use the ports up to {last_port}, above {MAX_PORT}")


def _tell_workers(which: str) -> None:
    """Worker processes inherit the environment; an engine inside this process needs the hooks here."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    os.environ[ACTIVE] = which
    copied = [name for name in os.environ.get(RAY_COPIES, "").split(",") if name]
    wanted = [ACTIVE, ascend.SWITCH] if which == ascend.HOOKS else [ACTIVE]
    os.environ[RAY_COPIES] = ",".join([*copied, *(name for name in wanted if name not in copied)])
    wrap(WorkerWrapperBase, "init_worker", _init_worker)


def _init_worker(wrapper: Any, original: Any, *args: Any, **named: Any) -> Any:
    _install()
    return original(wrapper, *args, **named)


def _install() -> None:
    """Hooks this process as the environment says; nothing without the flag."""
    which = os.environ.get(ACTIVE)
    if which == VLLM_HOOKS:
        from swiftbalancer_adaptors.vllm import hooks

        hooks.install()
    elif which == ascend.HOOKS:
        from swiftbalancer_adaptors.vllm_ascend import hooks as ascend_hooks

        ascend_hooks.install()


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)
