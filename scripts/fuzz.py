"""Coverage-guided fuzzing of everything that decodes bytes from outside.

`python -m scripts.fuzz --minutes 5 wire yaml`, in a checkout installed with the extra `fuzz` (atheris, CPython 3.11
to 3.13); without names, every target gets its share of the minutes. A corpus grows in `--corpus`, seeded with valid
input. A target fails on any error that is not one of swiftbalancer's own, on input that takes more than 20 s, and on
more than 2 GiB of memory; the input is kept in the corpus's folder as `NAME-crash-...`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scripts.fuzzing.targets import TARGETS

SECONDS_PER_INPUT = 20
MEMORY_MIB = 2048
MAX_INPUT_BYTES = 8192
INSTRUMENTED = [
    "swiftbalancer",
    "swiftbalancer_worker",
    "numpy.lib",
    "tomllib",
    "torch._weights_only_unpickler",
    "torch.serialization",
]
"""Modules whose coverage guides the search: ours, and what reads files for us in Python."""


@dataclass(frozen=True)
class Outcome:
    """What libFuzzer said of one target."""

    name: str
    executions: int
    seconds: float
    coverage: int
    """Edges of Python code that the inputs reach."""
    kept: int
    """Inputs in the corpus."""
    finding: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=5.0, help="in all")
    parser.add_argument(
        "--corpus", type=Path, help="folder to keep inputs in; default: a new one, removed at the end"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.only:
        return fuzz(options.only, [*options.targets, *rest])
    if importlib.util.find_spec("atheris") is None:
        parser.error("needs atheris: pip install 'swiftbalancer[fuzz]'")
    names = options.targets or list(TARGETS)
    unknown = sorted(set(names) - set(TARGETS))
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(TARGETS)}")
    seconds = max(1, int(60 * options.minutes / len(names)))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        outcomes = [run(name, options.corpus or Path(folder), seconds) for name in names]
    return report(outcomes)


def fuzz(name: str, arguments: list[str]) -> int:
    """The child: instruments the decoders as they are imported and never returns."""
    atheris = importlib.import_module("atheris")  # an extra of its own, without types

    with atheris.instrument_imports(include=INSTRUMENTED):
        target = TARGETS[name]()
    atheris.Setup([sys.argv[0], *arguments], target)
    atheris.Fuzz()
    return 0


def run(name: str, corpus: Path, seconds: int) -> Outcome:
    """One target in a process of its own, whose end by a crash of C code is a finding, too."""
    folder = corpus / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    command = [sys.executable, "-m", "scripts.fuzz", "--only", name, str(folder)]
    command += [f"-max_total_time={seconds}", f"-timeout={SECONDS_PER_INPUT}", f"-rss_limit_mb={MEMORY_MIB}"]
    command += [f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={corpus}/{name}-", "-print_final_stats=1"]
    interpreted = {**os.environ, "NUMBA_DISABLE_JIT": "1"}  # compiled kernels show no coverage
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=in_memory()) as scratch:
        environment = {**interpreted, "TMPDIR": scratch}
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env=environment
        )
    return read_log(name, ended.stdout + ended.stderr, ended.returncode)


def in_memory() -> str | None:
    """A folder that is no disk, where there is one: targets write a file for each input."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def read_log(name: str, log: str, code: int) -> Outcome:
    """The figures in libFuzzer's log."""
    done = re.search(r"Done (\d+) runs in (\d+) second", log)
    executions = re.search(r"stat::number_of_executed_units: (\d+)", log)
    progress = re.findall(r"cov: (\d+) .*?corp: (\d+)", log)
    coverage, kept = map(int, progress[-1]) if progress else (0, 0)
    said = "\n".join(line for line in log.splitlines() if "Instrumenting" not in line)
    finding = "" if code == 0 and done else f"ended with status {code}: {said[-3000:]}"
    seconds = float(done[2]) if done else 0.0
    return Outcome(name, int(executions[1]) if executions else 0, seconds, coverage, kept, finding)


def report(outcomes: list[Outcome]) -> int:
    """A line per target, then what was found; the exit status."""
    print(f"{'target':<14}{'executions':>12}{'seconds':>9}{'coverage':>10}{'inputs kept':>13}  finding")
    for o in outcomes:
        found = "yes" if o.finding else "none"
        print(f"{o.name:<14}{o.executions:>12,}{o.seconds:>9.0f}{o.coverage:>10}{o.kept:>13}  {found}")
    for o in outcomes:
        if o.finding:
            print(f"\n{o.name}:\n{o.finding}")
    return int(any(o.finding for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
