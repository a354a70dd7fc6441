"""Measures the device side on all GPUs of this host, in one run: `python -m scripts.bench_gpu --out results`.

Starts one process per GPU. Writes `results.json`, `results.md` and, for each transport, a timeline picture. On a
host without GPUs, `--device cpu --shape tiny` runs the same code on gloo, to test the benchmark itself.
`--parts` chooses among kernels, verify, moving, balanced, soak, host, bound_by_host, vllms_way, timeline.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from scripts.processes import compile_planner, free_port

PARTS = ("kernels", "verify", "moving", "balanced", "soak", "host", "bound_by_host", "vllms_way", "timeline")
WITH_WORKER = {"balanced", "soak", "host", "bound_by_host"}


def main() -> None:
    options = _parse()
    if "RANK" in os.environ:
        _rank(options)
    else:
        sys.exit(_launch(options))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=0, help="processes; 0: one per GPU, 2 on a CPU")
    parser.add_argument(
        "--one-gpu",
        action="store_true",
        help="all ranks on the first GPU, without NCCL: exchanges become local copies. Of use for host times only; "
        "give --parts host,bound_by_host --transports copy_engine and --ranks",
    )
    parser.add_argument("--shape", default="deepseek", help="deepseek, small, host, eight or tiny")
    parser.add_argument("--layers", type=int, default=16, help="layers of the moving and timeline parts")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument(
        "--transports",
        default="copy_engine,p2p,gloo",
        help="p2p:8 is p2p with at most 8 thread blocks",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="per measured configuration")
    parser.add_argument("--python-ms", type=float, default=4.0, help="of each step of the bound_by_host part")
    parser.add_argument("--soak-steps", type=int, default=3000)
    parser.add_argument("--limit-s", type=float, default=460.0, help="all processes are ended after this")
    parser.add_argument("--out", type=Path, default=Path("results"))
    return parser.parse_args()


def _launch(options: argparse.Namespace) -> int:
    import torch

    ranks = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 2)
    options.out.mkdir(parents=True, exist_ok=True)
    if WITH_WORKER & set(options.parts.split(",")):
        compile_planner()
    common = dict(os.environ, WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    common.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "scripts.bench_gpu", *sys.argv[1:]]
    processes = [subprocess.Popen(command, env=common | {"RANK": str(rank)}) for rank in range(ranks)]
    end = time.monotonic() + options.limit_s
    codes = [_ended(process, end) for process in processes]
    return max(abs(code) for code in codes)


def _ended(process: subprocess.Popen[bytes], end: float) -> int:
    try:
        return process.wait(max(end - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        process.kill()
        return 124


def _rank(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    faulthandler.dump_traceback_later(options.limit_s - 5.0, exit=True)
    if options.device == "cuda" and not options.one_gpu:
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", timeout=timedelta(seconds=60), device_id=torch.device("cuda", rank))
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    run = Run(options, rank)
    for part in options.parts.split(","):
        run.part(part)
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


class Run:
    """One rank's run through the parts; rank 0 keeps and writes the results."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        import torch

        from swiftbalancer.device import DeviceLayer

        self.options = options
        self.rank = rank
        self.layer = DeviceLayer.for_device(options.device)
        name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
        self.results: dict[str, Any] = {
            "machine": f"{os.environ['WORLD_SIZE']} x {name}, torch {torch.__version__}, NCCL {_nccl_version()}",
            "command": " ".join(["python -m scripts.bench_gpu", *sys.argv[1:]]),
            "failures": [],
        }
        self.transports = options.transports.split(",")

    def part(self, name: str) -> None:
        """Runs a part; a failure is kept as a line, and the next part goes on."""
        began = time.monotonic()
        try:
            getattr(self, f"_{name}")()
        except Exception as error:  # the others still run
            traceback.print_exc()
            self.results["failures"].append(f"{name}, rank {self.rank}: {type(error).__name__}: {error}")
        self.save()
        if self.rank == 0:
            print(f"== {name}: {time.monotonic() - began:.1f} s", flush=True)

    def save(self) -> None:
        from scripts.gpubench.report import markdown

        if self.rank == 0:
            (self.options.out / "results.json").write_text(json.dumps(self.results, indent=1))
            (self.options.out / "results.md").write_text(markdown(self.results))

    def _model(self, shape: str, layers: int | None = None) -> Any:
        from scripts.gpubench.decode import SHAPES, Decode

        chosen = SHAPES[shape] if layers is None else SHAPES[shape].with_layers(min(layers, SHAPES[shape].layers))
        decode = Decode(chosen, self.layer, local=self.options.one_gpu)
        decode.capture()
        return decode

    def _each_transport(self, section: str, measure: Callable[[str], Any]) -> None:
        self.results.setdefault(section, {})
        for kind in self.transports:
            self.results[section][kind] = measure(kind)
            self.save()

    def _kernels(self) -> None:
        from scripts.gpubench.kernels import bench_block_sizes, bench_kernels

        if self.rank == 0 and self.options.device == "cuda":
            self.results["kernels"] = bench_kernels()
            self.results["block_sizes"] = bench_block_sizes()

    def _moving(self) -> None:
        from scripts.gpubench.moving import bench_transport

        decode = self._model(self.options.shape, self.options.layers)
        self._each_transport("moving", lambda kind: bench_transport(decode, kind, seconds=self.options.seconds))

    def _verify(self) -> None:
        import torch.distributed as dist

        from scripts.gpubench.moving import bench_verify, link_bandwidth

        decode = self._model(self.options.shape, self.options.layers)
        seconds = self.options.seconds / 4
        self.results["verify"] = [bench_verify(decode, kind, seconds=seconds) for kind in self.transports]
        if self.options.device == "cuda" and self.rank == 0:
            self.results["link_gb_s"] = link_bandwidth()
        dist.barrier()

    def _balanced(self) -> None:
        from scripts.gpubench.balanced import bench_balanced
        from scripts.gpubench.measure import steps_within

        decode = self._model(self.options.shape)
        steps = steps_within(decode, 6 * self.options.seconds)
        self._each_transport("balanced", lambda kind: bench_balanced(decode, kind, steps=steps))

    def _host(self) -> None:
        self._first_transport("host", seconds=4 * self.options.seconds)

    def _bound_by_host(self) -> None:
        self._first_transport("eight", seconds=8 * self.options.seconds, python_ms=self.options.python_ms)

    def _first_transport(self, shape: str, *, seconds: float, python_ms: float = 0.0) -> None:
        from scripts.gpubench.balanced import bench_at_rest, bench_balanced
        from scripts.gpubench.measure import steps_within

        decode = self._model(shape if self.options.shape != "tiny" else "tiny")
        decode.compute_in_python(python_ms / 1e3)
        result = bench_balanced(decode, self.transports[0], steps=steps_within(decode, seconds))
        result["at_rest"] = bench_at_rest(decode, self.transports[0], steps=steps_within(decode, seconds / 4))
        layers, slots = decode.counts.shape
        title = f"{layers} layers x {slots} slots, {python_ms:g} ms of Python a step"
        self.results.setdefault("balanced", {})[title] = result

    def _vllms_way(self) -> None:
        from scripts.gpubench.measure import steps_within
        from scripts.gpubench.vllms_way import bench_vllms_way

        decode = self._model(self.options.shape, self.options.layers)
        self.results["vllms_way"] = bench_vllms_way(decode, steps=steps_within(decode, self.options.seconds))

    def _soak(self) -> None:
        from scripts.gpubench.balanced import soak

        decode = self._model("small" if self.options.shape != "tiny" else "tiny")
        self.results["soak"] = []
        for kind in self.transports:
            self.results["soak"].append(soak(decode, kind, steps=self.options.soak_steps))
            self.save()

    def _timeline(self) -> None:
        from scripts.gpubench.timeline import draw_moving_steps

        if self.options.device != "cuda":
            return
        decode = self._model(self.options.shape, 4)
        self.results["timeline"] = []
        for kind in [kind for kind in self.transports if kind != "gloo"]:
            rows = draw_moving_steps(decode, kind, self.options.out)
            self.results["timeline"] += [{"transport": kind} | row for row in rows]


def _nccl_version() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(str(number) for number in version)


if __name__ == "__main__":
    main()
