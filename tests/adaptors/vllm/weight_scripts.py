"""What happens to the weights of a running engine between two rounds of a test: sleep, reload, update, save."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.adaptors.vllm.interventions import Notes
from tests.adaptors.vllm.probe import balancer, is_initial, physical_map, prompts, short, wait_for_cycles, worker_of


def reload_weights(llm: Any, number: int, notes: Notes) -> None:
    """Loads the checkpoint again after the second round."""
    if number != 1:
        return
    own = balancer(llm)
    if own is not None:
        notes["before"] = own.in_force.placement.physical_to_logical_map.tolist()
    llm.collective_rpc("reload_weights")
    if own is not None:
        state = next(iter(worker_of(llm).model_runner.eplb_state.model_states.values()))
        notes["after"] = state.physical_to_logical_map.tolist()


class PooledMemory:
    """A sleep mode backend of vLLM: what its allocator does on GPUs with the memory of the weights.

    Asleep, it holds nothing; awake again, it holds what was kept on the host (level 1, or named to be preserved), or
    garbage (level 2). vLLM's maps lie in it too, since they are made while the model is loaded.
    """

    def __init__(self, runner: Any) -> None:
        self._weights = [parameter.data for parameter in runner.model.parameters()]
        self._maps = []
        for state in runner.eplb_state.model_states.values():
            self._maps += [state.physical_to_logical_map, state.logical_to_physical_map]
            self._maps += [state.logical_replica_count, state.expert_load_pass]
        self.preserve_weights = False
        self._kept: list[tuple[Any, Any]] = []

    def suspend(self, level: int) -> None:
        tensors = self._weights + self._maps if level == 1 else self._weights * self.preserve_weights
        self._kept = [(tensor, tensor.clone()) for tensor in tensors]
        for tensor in self._weights + self._maps:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

    def resume(self, _tags: list[str] | None) -> None:
        for tensor, kept in self._kept:
            tensor.copy_(kept)


def sleep_and_wake(llm: Any, number: int, notes: Notes) -> None:
    """Sleeps and wakes: on level 1; on level 2 with weights preserved; on level 2 with weights loaded anew."""
    worker, own = worker_of(llm), balancer(llm)
    if number > 2:
        return
    if number == 0:
        worker._sleep_mode_backend = PooledMemory(worker.model_runner)
    memory = worker._sleep_mode_backend
    notes.setdefault("moved", []).append(not is_initial(own.in_force.placement.physical_to_logical_map))
    memory.preserve_weights = number == 1
    worker.model_config.sleep_preserve_parameter_names = ["*"] if number == 1 else []
    llm.sleep(level=1 if number == 0 else 2)
    notes.setdefault("asleep", []).append(not memory._maps[0].min() >= 0)
    llm.wake_up()
    if number == 2:
        llm.collective_rpc("reload_weights")
    wait_for_cycles(llm, own.stats.cycles_committed + 1 if number == 0 else 1)
    notes.setdefault("same", []).append(balancer(llm) is own)


class ReplayedWeights:
    """Stands for vLLM's weight transfer engine: sends tensors as they were after loading, by slot."""

    supports_draft_weight_update = True

    def __init__(self, model: Any) -> None:
        self._model = model
        self.sent = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def start_weight_update(self) -> None:
        return None

    def update_weights(self, info: dict[str, Any]) -> None:
        for name, parameter in self._model.named_parameters():
            if (".experts." in name) == info["experts"]:
                parameter.data.copy_(self.sent[name])

    def finish_weight_update(self) -> None:
        return None

    def reset_weight_update_target(self) -> None:
        return None

    def shutdown(self) -> None:
        return None


def update_weights(llm: Any, number: int, notes: Notes) -> None:
    """An update in pieces; one of a draft model, which this engine has not; one whose only piece is no good."""
    notes.setdefault("moved", []).append(not is_initial(physical_map(llm)))
    try:
        llm.collective_rpc("start_draft_weight_update" if number == 1 else "start_weight_update")
        notes.setdefault("at home", []).append(is_initial(physical_map(llm)))
        if number == 0:
            _send_in_pieces(llm, notes)
        else:
            llm.collective_rpc("update_weights", args=({},))
    except (RuntimeError, KeyError) as error:
        notes.setdefault("failed", []).append(type(error).__name__)
    wait_for_cycles(llm, 2)


def _send_in_pieces(llm: Any, notes: Notes) -> None:
    """Serves between start and end, which must start no balancing."""
    parameters = dict(worker_of(llm).model_runner.model.named_parameters())
    sent = worker_of(llm).weight_transfer_engine.sent
    notes["equal"] = all(bool((tensor == sent[name]).all()) for name, tensor in parameters.items())
    llm.generate(prompts(2), short(), use_tqdm=False)
    for tensor in parameters.values():
        tensor.data.zero_()
    for experts in (True, False):
        notes.setdefault("balancing", []).append(balancer(llm) is not None)
        llm.collective_rpc("update_weights", args=({"experts": experts},))
    llm.collective_rpc("finish_weight_update")


def replay_weights(_notes: Notes) -> None:
    """Keeps the weights of the model right after loading, as the trainer does that will send them."""
    from vllm.v1.worker.gpu_worker import Worker

    original = Worker.load_model

    def load_model(worker: Any, **named: Any) -> None:
        original(worker, **named)
        worker.weight_transfer_engine = ReplayedWeights(worker.model_runner.model)

    Worker.load_model = load_model


def save_weights(llm: Any, number: int, notes: Notes) -> None:
    """Saves the weights while experts are away from home, and compares the file with what was loaded."""
    from safetensors.torch import load_file

    if number:
        return
    folder = Path(os.environ["SAVE_TO"])
    folder.mkdir(exist_ok=True)
    notes["moved"] = not is_initial(physical_map(llm))
    llm.collective_rpc("save_sharded_state", kwargs={"path": str(folder)})
    sent = worker_of(llm).weight_transfer_engine.sent
    (saved,) = [load_file(path) for path in folder.glob(f"model-rank-{os.environ['RANK']}-*.safetensors")]
    notes["experts"] = [name for name in saved if ".experts." in name and name in sent]
    notes["equal"] = all(bool((saved[name] == sent[name]).all()) for name in saved if name in sent)
    wait_for_cycles(llm, 1)


SCRIPTS = {
    "reload_weights": reload_weights,
    "sleep_and_wake": sleep_and_wake,
    "update_weights": update_weights,
    "save_weights": save_weights,
}
PREPARATIONS = {"replay_weights": replay_weights}
