#!/usr/bin/env python3
"""Gathers the text that minimoe is trained on, by domain, from Debian packages and the standard library.

    python scripts/build_corpus.py --work /tmp/corpus --out corpus.npz --samples DIR

Downloads the packages named in `PACKAGES` with apt-get (Debian bookworm), unpacks them under `--work`, and
writes one archive with `<domain>.train` and `<domain>.valid` `[bytes]` uint8. Every twelfth document is held
out for validation; with `--samples`, held-out documents that may be redistributed become the package's samples.
"""

from __future__ import annotations

import argparse
import gzip
import html.parser
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACKAGES = (
    "debian-handbook",
    "debian-policy",
    "developers-reference-ja",
    "libstb-dev",
    "manpages",
    "manpages-de",
    "manpages-de-dev",
    "manpages-dev",
    "manpages-fr",
    "manpages-fr-dev",
    "manpages-ja",
    "manpages-ru",
    "python3.11-doc",
    "unicode-cldr-core",
)
HOLD_OUT_EVERY = 12
MAX_DOMAIN_BYTES = 8_000_000
MAX_DOCUMENT_BYTES = 120_000
SAMPLE_BYTES = 40_000
HANDBOOK = "usr/share/doc/debian-handbook/html"


class ProseParser(html.parser.HTMLParser):
    """Collects the text of an HTML page, without scripts, navigation and code."""

    skipped = frozenset({"script", "style", "nav", "head", "pre"})
    breaking = frozenset({"p", "div", "li", "h1", "h2", "h3", "h4", "dt", "dd", "tr"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Counts skipped elements; `attrs` do not matter."""
        del attrs
        self._depth += tag in self.skipped

    def handle_endtag(self, tag: str) -> None:
        """Ends a paragraph or a skipped element."""
        self._depth -= tag in self.skipped
        if tag in self.breaking:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keeps text outside skipped elements."""
        if self._depth <= 0:
            self.parts.append(re.sub(r"\s+", " ", data))


def plain(path: Path) -> str:
    """A file as it is, gunzipped where needed."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8", "replace")


def prose(path: Path) -> str:
    """The paragraphs of an HTML page: lines long enough to be sentences."""
    parser = ProseParser()
    parser.feed(plain(path))
    lines = (line.strip() for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if len(line.encode()) > 60) + "\n"


def manual(path: Path) -> str:
    """The text of a manual page without roff markup."""
    text = re.sub(r"^[.'](?:\\\"|TH|SH|ft|ie|el|ad|if|so|in|nh|ds|de|rm).*$", "", plain(path), flags=re.M)
    text = re.sub(r"\\f(?:\[\w*\]|\w)|\\&|\\c$|\\s[-+]?\d", "", text, flags=re.M)
    text = text.replace("\\-", "-").replace("\\(aq", "'").replace("\\~", " ").replace("\\(en", "-")
    text = re.sub(r"^\.\w+ ?", "", text, flags=re.M).replace('"', "")
    return re.sub(r"\n{2,}", "\n", text)


@dataclass(frozen=True)
class Source:
    """Files of one domain: a root, a glob below it, how to read them.

    `sample`: may be redistributed in small parts. `without`: a folder whose lines are left out (the untranslated
    paragraphs of a translation).
    """

    domain: str
    root: str
    pattern: str
    read: Callable[[Path], str]
    sample: bool = False
    without: str = ""


def handbook(domain: str, language: str) -> Source:
    """One language of the Debian Administrator's Handbook (GPL-2+ or CC-BY-SA-3.0)."""
    original = "" if language == "en-US" else f"{HANDBOOK}/en-US"
    return Source(domain, f"{HANDBOOK}/{language}", "*.html", prose, sample=True, without=original)


def manuals(domain: str, language: str) -> Source:
    """Manual pages of one language."""
    return Source(domain, f"usr/share/man/{language}", "man*/*.gz", manual)


SOURCES = (
    Source("python", sysconfig.get_path("stdlib"), "**/*.py", plain, sample=True),
    Source("c", "usr/include/stb", "*.h", plain, sample=True),
    Source("c", "/usr/include", "**/*.h", plain),
    handbook("english", "en-US"),
    Source("english", "usr/share/doc/python3.11/html", "**/*.html", prose),
    Source("english", "usr/share/doc/debian-policy", "**/*.html", prose),
    manuals("english", "."),
    handbook("german", "de-DE"),
    manuals("german", "de"),
    handbook("french", "fr-FR"),
    manuals("french", "fr"),
    handbook("russian", "ru-RU"),
    manuals("russian", "ru"),
    handbook("japanese", "ja-JP"),
    Source("japanese", "usr/share/developers-reference-ja", "**/*.html", prose),
    manuals("japanese", "ja"),
    Source("markup", "usr/share/unicode/cldr/common/supplemental", "*.xml", plain, sample=True),
    Source("markup", "usr/share/unicode/cldr/common/main", "[a-f]*.xml", plain),
    Source("markup", "usr/share/doc/python3.11/html/library", "[a-m]*.html", plain, sample=True),
)


def unpack_packages(work: Path) -> Path:
    """Downloads and unpacks `PACKAGES` below `work` unless that was done; gives the root."""
    root = work / "root"
    if not root.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=work, check=True)
        for package in sorted(work.glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, root], check=True)
    return root


def documents(source: Source, root: Path) -> Iterator[bytes]:
    """The texts of a source in the order of their paths, each at most `MAX_DOCUMENT_BYTES`."""
    base, known = root / source.root, set[str]()
    if source.without:
        for path in (root / source.without).glob(source.pattern):
            known.update(source.read(path).splitlines())
    for path in sorted(base.glob(source.pattern)):
        if "site-packages" in path.parts or "c++" in path.parts or not path.is_file():
            continue
        lines = (line for line in source.read(path).splitlines(keepends=True) if line.rstrip("\n") not in known)
        text = "".join(lines).encode()[:MAX_DOCUMENT_BYTES]
        if len(text) > 400:
            yield text


@dataclass(frozen=True)
class Split:
    """The documents of a domain: for training, held out, and held out and free to ship."""

    train: list[bytes]
    valid: list[bytes]
    samples: list[bytes]


def gather(domain: str, root: Path) -> Split:
    """Splits a domain's documents; sources share the domain's budget of bytes evenly."""
    split = Split([], [], [])
    sources = [s for s in SOURCES if s.domain == domain]
    for source in sources:
        room = MAX_DOMAIN_BYTES // len(sources)
        found = list(documents(source, root))
        order = np.random.default_rng(len(found)).permutation(len(found))
        for nth, index in enumerate(order):
            if nth % HOLD_OUT_EVERY == 0:
                split.valid.append(found[index])
                split.samples.extend([found[index]] if source.sample else [])
            elif room > 0:
                split.train.append(found[index])
                room -= len(found[index])
    return split


def sample_of(texts: list[bytes]) -> bytes:
    """Up to `SAMPLE_BYTES` of held-out text, in equal parts of six of its documents, ended at a line's end."""
    chosen = texts[:: max(1, len(texts) // 6)][:6]
    part = SAMPLE_BYTES // max(1, len(chosen))
    pieces = [text[: text.rfind(b"\n", 0, part) + 1] for text in chosen]
    return b"".join(pieces)[:SAMPLE_BYTES].rsplit(b"\n", 1)[0] + b"\n"


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads")
    parser.add_argument("--out", type=Path, required=True, help="the archive to write (.npz)")
    parser.add_argument("--samples", type=Path, help="folder for the package's samples")
    args = parser.parse_args()
    root = unpack_packages(args.work)
    arrays: dict[str, np.ndarray[tuple[int], np.dtype[np.uint8]]] = {}
    for domain in dict.fromkeys(s.domain for s in SOURCES):
        split = gather(domain, root)
        arrays[f"{domain}.train"] = np.frombuffer(b"\n".join(split.train), np.uint8)
        arrays[f"{domain}.valid"] = np.frombuffer(b"\n".join(split.valid), np.uint8)
        if args.samples:
            args.samples.mkdir(parents=True, exist_ok=True)
            (args.samples / f"{domain}.txt").write_bytes(sample_of(split.samples))
        print(f"{domain}: {len(arrays[f'{domain}.train'])} train, {len(arrays[f'{domain}.valid'])} valid bytes")
    np.savez_compressed(args.out, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
