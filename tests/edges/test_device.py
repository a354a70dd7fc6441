"""The promises of a device layer, kept by the CPU's, the scripted device's and, where there is one, CUDA's."""

from __future__ import annotations

import gc
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from swiftbalancer.device import AcceleratorLayer, DeviceLayer, HostLayer
from swiftbalancer.device.cuda import CudaLayer
from swiftbalancer.errors import ConfigError
from tests.edges.scripted_device import DeafLayer, ScriptedLayer


def cuda() -> DeviceLayer:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return DeviceLayer.for_device("cuda")


LAYERS: list[Callable[[], DeviceLayer]] = [lambda: DeviceLayer.for_device("cpu"), ScriptedLayer, cuda]
any_layer = pytest.mark.parametrize("make", LAYERS, ids=["cpu", "scripted", "cuda"])


@any_layer
def test_a_stream_that_waits_for_an_event_sees_what_came_before_it(make: Callable[[], DeviceLayer]) -> None:
    layer = make()
    source, target = torch.zeros(2, 1000, device=layer.device).unbind(0)
    side = layer.side_stream()
    for value in range(1, 20):
        layer.launch(torch.Tensor.fill_, source, value)
        written, read = layer.event(), layer.event()
        layer.record(written)
        with layer.on(side):
            layer.wait(side, written)
            layer.copy(target, source)
            layer.record(read)
        layer.wait(layer.current_stream(), read)
        layer.launch(torch.Tensor.fill_, source, -1)
        read.synchronize()
        layer.synchronize()
        assert (target == value).all()


def delay(layer: DeviceLayer) -> None:
    """Keeps a real device busy for about a millisecond, so that what does not wait for it is early."""
    if layer.device.type == "cuda":
        spin: Any = torch.cuda._sleep
        spin(2_000_000)


@any_layer
def test_an_event_among_recorded_launches_is_recorded_by_every_call(make: Callable[[], DeviceLayer]) -> None:
    layer = make()
    source, waiting, synchronized = torch.zeros(3, 1000, device=layer.device).unbind(0)
    side, done, read = layer.side_stream(), layer.event(), layer.event()

    def work() -> None:
        delay(layer)
        layer.launch(torch.Tensor.add_, source, 1)
        layer.record(done)

    write = layer.recorded(work)
    layer.launch(torch.Tensor.zero_, source)
    layer.synchronize()
    for calls in range(1, 20):
        delay(layer)
        write()
        with layer.on(side):
            layer.wait(side, done)
            layer.copy(waiting, source)
            layer.record(read)
        layer.wait(layer.current_stream(), read)
        read.synchronize()
        assert (waiting == calls).all()
    for calls in range(20, 40):
        delay(layer)
        write()
        done.synchronize()
        with layer.on(side):
            layer.copy(synchronized, source)
        layer.synchronize()
        assert (synchronized == calls).all()


@any_layer
def test_memory_of_recorded_launches_stays_theirs(make: Callable[[], DeviceLayer]) -> None:
    layer = make()
    target = torch.zeros(5000, dtype=torch.int64, device=layer.device)

    def recorded() -> Callable[[], None]:
        between = torch.zeros_like(target)

        def work() -> None:
            layer.launch(torch.Tensor.add_, between, 1)
            layer.copy(target, between)

        return layer.recorded(work)

    write = recorded()
    gc.collect()
    others = [torch.full_like(target, -1) for _ in range(10)]
    write()
    layer.synchronize()
    before = target.clone()
    write()
    layer.synchronize()
    assert (target == before + 1).all()
    assert all((other == -1).all() for other in others)


class Graph:
    """Of a device that is not here."""

    def capture_begin(self, **_: Any) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...


def test_a_graph_keeps_what_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above where there is no CUDA, whose graphs know addresses only."""
    monkeypatch.setattr("swiftbalancer.device.cuda.Recording", Graph)
    layer: Any = DeviceLayer.for_device("cpu")
    layer._recordable = True

    def recorded() -> tuple[Callable[[], None], weakref.ref[torch.Tensor]]:
        memory = torch.zeros(3)
        return CudaLayer.recorded(layer, lambda: layer.launch(memory.add_, 1)), weakref.ref(memory)

    write, memory = recorded()
    gc.collect()
    assert memory() is not None, "freed while a graph launches what uses it"
    assert write == write.__self__.replay  # type: ignore[attr-defined]


def test_a_forgotten_wait_shows_on_the_scripted_device() -> None:
    stale = 0
    for seed in range(20):
        layer = DeafLayer(seed)
        source, target = torch.zeros(2, 4).unbind(0)
        side = layer.side_stream()
        layer.launch(torch.Tensor.fill_, source, 7)
        written, read = layer.event(), layer.event()
        layer.record(written)
        with layer.on(side):
            layer.wait(side, written)
            layer.copy(target, source)
            layer.record(read)
        read.synchronize()
        stale += int((target != 7).any())
    assert stale > 5


@any_layer
def test_a_pinned_copy_is_readable_once_its_event_has_run(make: Callable[[], DeviceLayer]) -> None:
    layer = make()
    host = layer.pinned((3, 2), torch.int64)
    assert host.tolist() == [[0, 0]] * 3
    layer.copy(host, torch.full((3, 2), 5, device=layer.device))
    event = layer.event()
    layer.record(event)
    event.synchronize()
    assert event.query()
    assert host.tolist() == [[5, 5]] * 3


def test_polling_an_event_gets_there_without_waiting() -> None:
    layer = ScriptedLayer()
    target = torch.zeros(1)
    layer.launch(torch.Tensor.fill_, target, 1)
    event = layer.event()
    layer.record(event)
    assert target.item() == 0, "nothing runs by itself"
    looks = 1
    while not event.query():
        looks += 1
    assert looks == 2
    assert target.item() == 1


@any_layer
def test_a_fused_copy_writes_in_place(make: Callable[[], DeviceLayer]) -> None:
    layer = make()
    targets = [torch.zeros(n, device=layer.device) for n in (1, 5, 300)]
    addresses = [t.data_ptr() for t in targets]
    layer.copy_all(targets, [torch.full_like(t, 3) for t in targets])
    layer.copy_all([], [])
    layer.synchronize()
    assert [t.data_ptr() for t in targets] == addresses
    assert all((t == 3).all() for t in targets)


def test_a_device_nobody_knows_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown 'tpu'; known: cpu, cuda, npu"):
        DeviceLayer.for_device("tpu:0")


def test_a_device_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="'cuda:zz' has no number after the colon, as in cuda:0"):
        DeviceLayer.for_device("cuda:zz")


def test_npu_without_its_extension_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"npu needs torch_npu \(torch_npu is not installed\)") as caught:
        DeviceLayer.for_device("npu")
    assert "\n" not in str(caught.value)


def test_npu_without_cann_names_the_library_and_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_name: str) -> Any:
        raise ImportError("libhccl.so: cannot open shared object file")

    monkeypatch.setattr("swiftbalancer.device.npu.importlib.import_module", broken)
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    with pytest.raises(ConfigError, match=r"libhccl.*is CANN there\? ASCEND_HOME_PATH is not set"):
        DeviceLayer.for_device("npu:1")


def test_a_device_torch_does_not_see_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="sees no cuda device"):
        DeviceLayer.for_device("cuda:0")


class ScriptedNpu(types.ModuleType):
    """`torch.npu` as far as the layer may use it; any other name is an AttributeError, as on the real module."""

    def __init__(self) -> None:
        super().__init__("torch.npu")
        self.calls: list[str] = []

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 3

    def device_count(self) -> int:
        return 4

    def current_stream(self, device: torch.device) -> str:
        self.calls.append(f"current_stream {device}")
        return "main"

    def Stream(self, device: torch.device, priority: int = 0) -> str:
        self.calls.append(f"Stream {device} {priority}")
        return "side"

    def set_device(self, device: torch.device) -> None:
        self.calls.append(f"set_device {device}")

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(f"synchronize {device}")


NPU_SCRIPT = """
import sys, types, torch
from tests.edges.test_device import ScriptedNpu
torch.utils.rename_privateuse1_backend("npu")
torch.npu = ScriptedNpu()
sys.modules["torch_npu"] = types.ModuleType("torch_npu")
from swiftbalancer.device import DeviceLayer
from swiftbalancer.errors import ConfigError
layer = DeviceLayer.for_device("npu")
assert (str(layer.device), layer.backend) == ("npu:3", "hccl")
assert layer.is_accelerator and not layer.can_share_memory
layer.bind_thread()
assert (layer.side_stream(), layer.current_stream()) == ("side", "main")
layer.synchronize()
try:
    DeviceLayer.for_device("npu:4")
except ConfigError as error:
    assert "npu:4 is not there, this process sees 4" in str(error)
else:
    raise AssertionError("a device that is not there was given")
assert torch.npu.calls == ["set_device npu:3", "Stream npu:3 0", "current_stream npu:3", "synchronize npu:3"]
"""


def test_the_npu_layer_talks_to_torch_npu_alone() -> None:
    """In a process of its own, because torch's third device type can be named only once."""
    subprocess.run([sys.executable, "-c", NPU_SCRIPT], check=True, timeout=120)


def test_layers_name_their_collective_library() -> None:
    assert HostLayer(torch.device("cpu")).backend == "gloo"
    assert isinstance(DeviceLayer.for_device("cpu"), HostLayer)
    assert not issubclass(AcceleratorLayer, HostLayer)


def test_the_device_layer_does_not_import_a_vendors_extension() -> None:
    script = "import sys, swiftbalancer.device, swiftbalancer.transport; assert 'torch_npu' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
