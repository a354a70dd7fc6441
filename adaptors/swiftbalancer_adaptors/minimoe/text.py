"""What is served: real text by domain, in batches whose mix of domains shifts over time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swiftbalancer.errors import ConfigError

MAX_TEXT_BYTES = 64 << 20
MIXED_SHARE = 0.5
"""In a transition each sequence is of the next domain with this probability."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One rank's text of one step.

    `tokens` `[batch, length]` int64 bytes; `domains` `[batch]` int64, the domain of each sequence as an index
    into `TextStream.domains`.
    """

    tokens: NDArray[np.int64]
    domains: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of steps whose sequences come from these domains in these shares."""

    domains: tuple[int, ...]
    shares: tuple[float, ...]


class TextStream:
    """Text batches, a pure function of seed, rank and step, so that every run serves the same.

    A stretch of `phase_steps` is of one domain, the next a mixture with the domain that follows, and so on
    through a seeded order of all domains.
    """

    def __init__(
        self, texts: Mapping[str, bytes], *, batch: int, length: int, phase_steps: int = 60, seed: int = 0
    ) -> None:
        if phase_steps < 1:
            raise ConfigError(f"minimoe.phase_steps: {phase_steps} is below 1")
        usable = {name: text for name, text in sorted(texts.items()) if len(text) >= length}
        if not usable:
            raise ConfigError(f"minimoe.text: no domain has as much as one sequence of {length} bytes")
        self.domains = tuple(usable)
        self._texts = [np.frombuffer(text, np.uint8) for text in usable.values()]
        self._shape = (batch, length)
        self._phase_steps = phase_steps
        self._seed = seed
        self._order = [int(i) for i in np.random.default_rng(seed).permutation(len(usable))]

    def phase(self, step: int) -> Phase:
        """The mix of domains at a step."""
        nth, num = step // self._phase_steps, len(self._order)
        domain, following = self._order[nth // 2 % num], self._order[(nth // 2 + 1) % num]
        if nth % 2 == 0 or num == 1:
            return Phase((domain,), (1.0,))
        return Phase((domain, following), (1 - MIXED_SHARE, MIXED_SHARE))

    def describe(self, step: int) -> str:
        """The names of the domains served at a step, such as `german + python`."""
        return " + ".join(self.domains[i] for i in self.phase(step).domains)

    def batch(self, step: int, rank: int) -> Batch:
        """The text of one rank at one step."""
        rng = np.random.default_rng([self._seed, step, rank])
        phase = self.phase(step)
        chosen = rng.choice(np.array(phase.domains, np.int64), self._shape[0], p=phase.shares)
        rows = [self._stretch(self._texts[domain], rng) for domain in chosen]
        return Batch(np.stack(rows).astype(np.int64), chosen)

    def _stretch(self, text: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        length = self._shape[1]
        start = int(rng.integers(len(text) - length + 1))
        return text[start : start + length]


def packaged_texts() -> dict[str, bytes]:
    """The samples in the package, by domain; their sources and licences are in `samples/LICENSES.md`."""
    folder = resources.files(__package__) / "samples"
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".txt"))
    return {name.removesuffix(".txt"): (folder / name).read_bytes() for name in names}


def texts_of_folder(folder: Path) -> dict[str, bytes]:
    """The user's files, whatever their bytes, by domain; at most 64 MiB in the order of their paths.

    A file's domain is the first folder below `folder` on its way, or its suffix if it lies in `folder` itself.
    Raises `ConfigError` if there is no such folder, nothing in it, or a file cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"minimoe.text: {folder} is {'not a folder' if folder.exists() else 'missing'}")
    pieces: dict[str, list[bytes]] = {}
    for domain, path in _files(folder):
        pieces.setdefault(domain, []).append(_content(path))
        if sum(len(piece) for texts in pieces.values() for piece in texts) >= MAX_TEXT_BYTES:
            break
    texts = {domain: b"\n".join(parts)[:MAX_TEXT_BYTES] for domain, parts in pieces.items()}
    if not any(texts.values()):
        raise ConfigError(f"minimoe.text: {folder} holds no file with content")
    return texts


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size:
            below = path.relative_to(folder).parts
            yield (below[0] if len(below) > 1 else path.suffix.lstrip(".") or "text"), path


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_TEXT_BYTES)
    except OSError as error:
        raise ConfigError(f"minimoe.text: {path} cannot be read: {error.strerror}") from error
