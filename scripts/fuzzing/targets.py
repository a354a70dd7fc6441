"""What is fuzzed: every place where bytes from outside become values.

A target takes bytes, and may raise nothing. It imports what it fuzzes only when it is made, so that the fuzzer can
instrument it first; `seeds` gives valid input, made with the samples of the tests.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol


class Target(Protocol):
    """Made once in the fuzzing process, then called with one input after another."""

    @classmethod
    def seeds(cls) -> list[bytes]:
        """Valid inputs."""

    def __call__(self, data: bytes) -> None: ...


def joined(parts: Iterable[bytes]) -> bytes:
    """Several byte strings as one input, each after two bytes of its length."""
    return b"".join(len(part).to_bytes(2, "little") + part for part in parts)


def split(data: bytes) -> list[bytes]:
    """The parts of `joined`; whatever the lengths say, all of `data` is used."""
    parts = []
    while len(data) >= 2:
        end = 2 + int.from_bytes(data[:2], "little")
        parts.append(data[2:end])
        data = data[end:]
    return parts


def messages() -> dict[str, list[bytes]]:
    """The frames of a sample of every message."""
    from tests.core.test_properties_wire import MESSAGES

    return {name: make() for name, make in MESSAGES.items()}


class Wire:
    """Frames from a socket, and the plan in them."""

    def __init__(self) -> None:
        from swiftbalancer import wire
        from swiftbalancer.errors import BalancerError
        from swiftbalancer.placement import Placement
        from swiftbalancer.topology import Topology

        self._wire, self._expected = wire, BalancerError
        self._base = Placement.of(Topology(2, 3), 4, [[0, 1, 2, 3, 0, 1]] * 2)

    @classmethod
    def seeds(cls) -> list[bytes]:
        return [joined(frames) for frames in messages().values()]

    def __call__(self, data: bytes) -> None:
        with contextlib.suppress(self._expected):
            self.decode(split(data))

    def decode(self, frames: Sequence[bytes | memoryview]) -> None:
        message, arrays = self._wire.decode(frames)
        if isinstance(message, self._wire.PlanReply):
            plan = self._wire.plan_of(message, arrays)
            plan.validate(self._base, staging_experts=4)
            plan.target(self._base).validate()


class Block(Wire):
    """The block that is broadcast between ranks, with a true digest, whatever it holds."""

    def __init__(self) -> None:
        from swiftbalancer import sealed

        super().__init__()
        self._sealed = sealed

    @classmethod
    def seeds(cls) -> list[bytes]:
        from swiftbalancer import sealed

        return [sealed.pack(frames)[:-8].tobytes() for frames in messages().values()]

    def __call__(self, data: bytes) -> None:
        with contextlib.suppress(self._expected):
            self.decode(self._sealed.unpack(data + self._sealed.digest(data).to_bytes(8, "little")))


class Service:
    """A worker to which a stranger says two things: whatever they are, it answers and serves on."""

    def __init__(self) -> None:
        from swiftbalancer import wire
        from swiftbalancer_worker import service

        logging.disable(logging.CRITICAL)
        self._wire, self._service = wire, service

    @classmethod
    def seeds(cls) -> list[bytes]:
        known = messages()
        said = [name for name in known if name != "hello"]
        return [joined([joined(known["hello"]), joined(known[name])]) for name in said]

    def __call__(self, data: bytes) -> None:
        options = self._service.ServiceOptions(engines_may_record=False)
        worker = self._service.Service(options)
        for now, said in enumerate(split(data)[:4]):
            reply = worker.handle(b"peer", split(said), now=float(now))
            worker.settle(float(now))
            answer = None if reply is None else self._wire.decode(reply)[0]
            failed = isinstance(answer, self._wire.Refused) and answer.reason.startswith(self._wire.WORKER_FAILED)
            if failed:
                raise AssertionError(answer)
        worker.view(10.0)
        worker.close()


class File:
    """A file, or a folder of files, read by one of our readers."""

    names: ClassVar[Sequence[str]]
    """Of the files an input is cut into; one name: the input is that file."""

    def __init__(self) -> None:
        from swiftbalancer.errors import BalancerError

        self._expected = BalancerError
        self._owner = tempfile.TemporaryDirectory(prefix="fuzz-input-")
        self._folder = Path(self._owner.name)

    def __call__(self, data: bytes) -> None:
        parts = [data] if len(self.names) == 1 else split(data)
        for name, part in itertools.zip_longest(self.names, parts[: len(self.names)], fillvalue=b""):
            (self._folder / str(name)).write_bytes(bytes(part))
        with contextlib.suppress(self._expected):
            self.read(self._folder if len(self.names) > 1 else self._folder / self.names[0])

    def read(self, path: Path) -> None:
        raise NotImplementedError


class Loads(File):
    """Recorded loads, ours and others'."""

    writers: ClassVar[Sequence[str]] = ()
    """Of the tests: each makes a file that is a seed."""

    def __init__(self) -> None:
        super().__init__()
        from swiftbalancer_worker import foreign, trace  # noqa: F401 (read when it is needed, so instrumented now)

        self._open = trace.open_trace

    @classmethod
    def seeds(cls) -> list[bytes]:
        return [written(writer) for writer in cls.writers]

    def read(self, path: Path) -> None:
        found = self._open(path)
        for _ in itertools.islice(found, 3):
            pass


class Csv(Loads):
    names = ("loads.csv",)
    writers = ("csv_long", "csv_wide")


class Events(Loads):
    names = ("events.jsonl",)
    writers = ("event_log",)


class Npy(Loads):
    names = ("loads.npy",)
    writers = ("numpy",)


class Parquet(Loads):
    names = ("loads.parquet",)
    writers = ("parquet",)


class Sglang(Loads):
    names = ("loads.pt",)

    def __init__(self) -> None:
        super().__init__()
        import torch.serialization  # noqa: F401 (to be instrumented)

    @classmethod
    def seeds(cls) -> list[bytes]:
        return [written("sglang_stat"), written("sglang_passes", "*.pt")]


class Tensorrt(Loads):
    names = ("meta_info.json", "rank0.safetensors", "rank1.safetensors")

    @classmethod
    def seeds(cls) -> list[bytes]:
        return [joined(written("tensorrt_llm", name) for name in cls.names)]


class Recording(Loads):
    names = ("manifest.json", "chunk-00000000.json", "chunk-00000000.loads.npy", "chunk-00000000.placements.npy")

    def __init__(self) -> None:
        super().__init__()
        from swiftbalancer_worker import recording

        self._recording = recording.Recording

    @classmethod
    def seeds(cls) -> list[bytes]:
        from swiftbalancer_worker.convert import write_recording
        from swiftbalancer_worker.trace import open_trace
        from tests.edges.test_convert import TOPOLOGY, write_numpy

        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder) / "recording"
            write_recording(open_trace(write_numpy(Path(folder))), where, topology=TOPOLOGY)
            return [joined((where / name).read_bytes() for name in cls.names)]

    def read(self, path: Path) -> None:
        super().read(path)
        self._recording(path).check()


def written(form: str, pattern: str = "") -> bytes:
    """The file that the tests' writer of a format makes; of a folder, the first that fits `pattern`."""
    from tests.edges.test_convert import WRITERS

    with tempfile.TemporaryDirectory() as folder:
        path = WRITERS[form](Path(folder))
        return (sorted(path.glob(pattern))[0] if pattern else path).read_bytes()


class PlacementJson(File):
    """Placements in the files engines load."""

    names = ("placement.json",)
    forms: ClassVar[Sequence[str]] = ("json", "vllm-ascend", "sglang")

    def __init__(self) -> None:
        super().__init__()
        from swiftbalancer_worker import placement_files

        self._read = placement_files.read_placement

    @classmethod
    def seeds(cls) -> list[bytes]:
        from swiftbalancer_worker.placement_files import write_placement
        from tests.edges.engines import PLACEMENT

        return [write_placement(PLACEMENT, form) for form in cls.forms]

    def read(self, path: Path) -> None:
        found = self._read(path)
        found.placement(2 if found.num_ranks is None else None).logical_replica_count()


class PlacementYaml(PlacementJson):
    names = ("placement.yaml",)
    forms = ("tensorrt-llm",)


class Settings(File):
    """A configuration file: what is taken can be said to the worker."""

    names = ("config.yaml",)
    text = "policy: {name: swift, options: {a: [1, 2.5, x]}}\nwindow:\n  sub_window_steps: 16\nmode: shadow\n"

    def __init__(self) -> None:
        super().__init__()
        import msgspec

        from swiftbalancer import config

        self._config, self._encode = config, msgspec.msgpack.encode

    @classmethod
    def seeds(cls) -> list[bytes]:
        return [cls.text.encode()]

    def read(self, path: Path) -> None:
        self._encode(self._config.to_dict(self._config.from_file(path)))


class SettingsJson(Settings):
    names = ("config.json",)
    text = '{"policy": {"name": "swift", "options": {"a": [1, 2.5, "x"]}}, "window": {"sub_window_steps": 16}}'


class SettingsToml(Settings):
    names = ("config.toml",)
    text = 'mode = "shadow"\n[policy]\nname = "swift"\n[policy.options]\na = [1, 2.5, "x", 2001-01-01]\n'


class Environment(Settings):
    """Environment variables, `NAME=value` a line."""

    names = ("environment",)
    text = "POLICY__NAME=swift\nWINDOW__SUB_WINDOW_STEPS=16\nPOLICY__OPTIONS={}\nWORKER__CPUS=[1, 2]\n"

    def read(self, path: Path) -> None:
        lines = path.read_text("utf-8", "surrogateescape").splitlines()
        pairs = (line.partition("=") for line in lines)
        self._config.load(environ={f"SWIFTBALANCER_{name}": value for name, _, value in pairs if name != "CONFIG"})


TARGETS: dict[str, type[Target]] = {
    "wire": Wire,
    "block": Block,
    "service": Service,
    "yaml": Settings,
    "json": SettingsJson,
    "toml": SettingsToml,
    "environment": Environment,
    "recording": Recording,
    "npy": Npy,
    "csv": Csv,
    "events": Events,
    "parquet": Parquet,
    "sglang": Sglang,
    "tensorrt": Tensorrt,
    "placement": PlacementJson,
    "tables": PlacementYaml,
}
