"""The methods of vLLM's `Worker` that swiftbalancer wraps: what happens to the weights beside serving.

Loaders, savers and checksums of vLLM know only the initial slots, so the experts go back there first. Every rank runs
each of these methods between the same two passes.
"""

from __future__ import annotations

from typing import Any

from swiftbalancer.errors import UnsupportedEngine
from swiftbalancer_adaptors.vllm.attachment import Attachment, Hold, attachment_of
from swiftbalancer_adaptors.vllm.patching import Around

WEIGHTS_LOST = "_swiftbalancer_weights_lost"
"""Attribute of a worker: its weights were discarded and will be loaded anew."""


def load_model(worker: Any, original: Any, *args: Any, **named: Any) -> Any:
    """vLLM names the part that cannot be balanced, but not the flag of ours that asked for it."""
    try:
        return original(worker, *args, **named)
    except NotImplementedError as error:
        if "EPLB" not in str(error):
            raise
        raise UnsupportedEngine(
            f"{error} Use another --quantization or MoE backend, or drop the swiftbalancer flag"
        ) from error


def execute_dummy_batch(worker: Any, original: Any, *args: Any, **named: Any) -> Any:
    attachment = attachment_of_worker(worker)
    if attachment is None:
        return original(worker, *args, **named)
    with attachment.uncounted():
        return original(worker, *args, **named)


# -- sleep ----------------------------------------------------------------------------------------------------


def sleep(worker: Any, original: Any, level: int = 1) -> Any:
    """Level 1 keeps the weights on the host; level 2 discards them, and with them every placement but the first."""
    attachment = attachment_of_worker(worker)
    if attachment is not None:
        if level >= 2 and getattr(worker.model_config, "sleep_preserve_parameter_names", None):
            attachment.restore()  # what is preserved may be experts
        attachment.pause(Hold.ASLEEP)
        setattr(worker, WEIGHTS_LOST, level >= 2)
    return original(worker, level)


def discard(worker: Any, original: Any, tags: tuple[str, ...]) -> Any:
    """As level 2, for some kinds of memory only."""
    attachment = attachment_of_worker(worker)
    if attachment is not None and "weights" in tags:
        attachment.pause(Hold.ASLEEP)
        setattr(worker, WEIGHTS_LOST, True)
    return original(worker, tags)


def wake_up(worker: Any, original: Any, tags: list[str] | None = None) -> Any:
    result = original(worker, tags)
    attachment = attachment_of_worker(worker)
    if attachment is not None and (tags is None or "weights" in tags):
        if getattr(worker, WEIGHTS_LOST, False):
            attachment.forget()
        attachment.resume(Hold.ASLEEP)
    return result


def checkpoint_prepare(worker: Any, original: Any, *args: Any, **named: Any) -> Any:
    if attachment_of_worker(worker) is not None:
        raise UnsupportedEngine(
            "a process checkpoint would hold swiftbalancer's connections to its planning process and between ranks; "
            "start the engine without the swiftbalancer flag to checkpoint it"
        )
    return original(worker, *args, **named)


# -- weights read and written by slot -------------------------------------------------------------------------


def at_initial_slots(worker: Any, original: Any, *args: Any, **named: Any) -> Any:
    """vLLM reads or writes experts by slot: they go back first, and balancing starts anew afterwards."""
    attachment = attachment_of_worker(worker)
    if attachment is not None:
        attachment.restore()
    return original(worker, *args, **named)


def begin_update(worker: Any, original: Any, *args: Any, **named: Any) -> Any:
    """The same for weights that arrive in pieces: balancing waits until all are there, or vLLM has given up."""
    attachment = attachment_of_worker(worker)
    if attachment is not None:
        attachment.restore()
        attachment.pause(Hold.WEIGHT_UPDATE)
    return update_weights(worker, original, *args, **named)


def update_weights(worker: Any, original: Any, *args: Any, **named: Any) -> Any:
    try:
        return original(worker, *args, **named)
    finally:
        attachment = attachment_of_worker(worker)
        if attachment is not None and not worker._weight_update_active:
            attachment.resume(Hold.WEIGHT_UPDATE)


def shutdown(worker: Any, original: Any, *args: Any, **named: Any) -> Any:
    attachment = attachment_of_worker(worker)
    if attachment is not None:
        attachment.close()
    return original(worker, *args, **named)


WORKER_HOOKS: dict[str, Around] = {
    "load_model": load_model,
    "execute_dummy_batch": execute_dummy_batch,
    "sleep": sleep,
    "discard": discard,
    "wake_up": wake_up,
    "checkpoint_prepare": checkpoint_prepare,
    "reload_weights": at_initial_slots,
    "save_sharded_state": at_initial_slots,
    "save_tensorized_model": at_initial_slots,
    "compute_weight_checksums": at_initial_slots,
    "start_weight_update": begin_update,
    "start_draft_weight_update": begin_update,
    "update_weights": update_weights,
    "finish_weight_update": update_weights,
    "shutdown": shutdown,
}


def attachment_of_worker(worker: Any) -> Attachment | None:
    """Model Runner V1 has its `EplbState` itself, V2 in a controller."""
    runner = getattr(worker, "model_runner", None)
    holder = getattr(runner, "eplb", None)
    return attachment_of(getattr(runner, "eplb_state", None)) or attachment_of(getattr(holder, "state", None))
