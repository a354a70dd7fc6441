"""The methods of vLLM that swiftbalancer wraps in a worker process, and what each does instead.

Those of `Worker` are in `lifecycle`.
"""

from __future__ import annotations

import logging
from typing import Any

from swiftbalancer.config import Config
from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer_adaptors.vllm import flag
from swiftbalancer_adaptors.vllm.attachment import SLOT, Attachment, attachment_of
from swiftbalancer_adaptors.vllm.lifecycle import WORKER_HOOKS
from swiftbalancer_adaptors.vllm.part import part_of
from swiftbalancer_adaptors.vllm.patching import Around, wrap
from swiftbalancer_adaptors.vllm_ascend import v2

logger = logging.getLogger(__name__)


def install() -> None:
    """Wraps the hooks. Idempotent; every wrapped method is vLLM's own where nothing is attached."""
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    _log_where_vllm_logs()
    for name, around in STATE_HOOKS.items():
        wrap(EplbState, name, around)
    for name, around in WORKER_HOOKS.items():
        wrap(Worker, name, around)
    for name, around in RUNNER_HOOKS.items():
        wrap(GPUModelRunner, name, around)
    v2.install(WORKER_HOOKS)


# -- EplbState ------------------------------------------------------------------------------------------------


def add_model(state: Any, original: Any, model: Any, model_config: Any, *args: Any, **named: Any) -> Any:
    """vLLM builds its tensors, then the model is ours. A pipeline stage without MoE layers has nothing to balance."""
    before = set(state.model_states)
    config = _config()
    if config is None:
        return original(state, model, model_config, *args, **named)
    attachment = attachment_of(state)
    if attachment is None:
        attachment = Attachment(state, config)
        setattr(state, SLOT, attachment)
    # Some models count the MoE layers of all pipeline stages here; vLLM sizes its maps by it.
    model.num_moe_layers = len(model.moe_layers)
    if not model.num_moe_layers:
        logger.info("swiftbalancer: this pipeline stage has no MoE layers, nothing to balance")
        return None
    try:
        result = original(state, model, model_config, *args, **named)
    except AssertionError as error:
        raise UnsupportedEngine(
            f"vLLM cannot show the expert weights of this model slot by slot ({error!r}); use another "
            "--quantization or MoE backend, or drop the swiftbalancer flag"
        ) from error
    for key in set(state.model_states) - before:
        attachment.add(key, part_of(model_config))
    return result


def step(
    state: Any, original: Any, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False
) -> None:
    """Once per pass, dummy ones included, in lockstep on all ranks of the group."""
    attachment = attachment_of(state)
    if attachment is None:
        original(state, is_dummy, is_profile, log_stats)
        return
    if is_profile:
        attachment.profiled()
    else:
        attachment.after_forward()


def start_async_loop(state: Any, original: Any, *args: Any, **named: Any) -> None:
    """vLLM's own loop stays off."""
    if attachment_of(state) is None:
        original(state, *args, **named)


def hand_back(state: Any, original: Any, *args: Any, **named: Any) -> Any:
    """vLLM is about to rearrange or resize by itself: the experts go back, and swiftbalancer lets go for good."""
    attachment = attachment_of(state)
    if attachment is not None:
        logger.warning("swiftbalancer: vLLM changes its expert slots itself; balancing ends here")
        attachment.restore()
        attachment.close()
        delattr(state, SLOT)
    return original(state, *args, **named)


# -- model runner ---------------------------------------------------------------------------------------------


def execute_model(runner: Any, original: Any, *args: Any, **named: Any) -> Any:
    """Model Runner V1 steps its `EplbState` only on the last pipeline stage; here every other stage steps too."""
    from vllm.sequence import IntermediateTensors

    output = original(runner, *args, **named)
    if isinstance(output, IntermediateTensors) and attachment_of(runner.eplb_state) is not None:
        runner.eplb_step()
    return output


def eplb_step(runner: Any, original: Any, *args: Any, **named: Any) -> None:
    """A pipeline stage without MoE layers has nothing to step; vLLM would stop with an assertion."""
    if runner.eplb_state is None or runner.eplb_state.model_states:
        original(runner, *args, **named)


def pool(runner: Any, original: Any, *args: Any, **named: Any) -> Any:
    """Model Runner V1 steps after it has sampled; a pooling model samples nothing."""
    output = original(runner, *args, **named)
    if attachment_of(runner.eplb_state) is not None:
        runner.eplb_step()
    return output


RUNNER_HOOKS: dict[str, Around] = {"execute_model": execute_model, "eplb_step": eplb_step, "_pool": pool}

STATE_HOOKS: dict[str, Around] = {
    "add_model": add_model,
    "step": step,
    "start_async_loop": start_async_loop,
    "rearrange": hand_back,
    "update_mapping": hand_back,
    "reconfigure_physical_expert_slots": hand_back,
}


def _log_where_vllm_logs() -> None:
    """vLLM gives handlers to its own logger only; ours use them unless the user has set up ours."""
    theirs = logging.getLogger("vllm")
    for name in ("swiftbalancer", "swiftbalancer_adaptors"):
        ours = logging.getLogger(name)
        if not ours.handlers and ours.level == logging.NOTSET:
            ours.handlers = list(theirs.handlers)
            ours.setLevel(theirs.getEffectiveLevel())
            ours.propagate = theirs.propagate


def _config() -> Config | None:
    from vllm.config import get_current_vllm_config

    return flag.read(get_current_vllm_config().additional_config)
