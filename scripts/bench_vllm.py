"""Decode latency of real vLLM with expert balancing off, static, vLLM's own, and swiftbalancer's.

    python scripts/bench_vllm.py run  --mode ours --layers 48 --gpus 2 --out results
    python scripts/bench_vllm.py report results

`run` starts one process per GPU, each an in-process engine (vLLM's external launcher) on an MoE of Qwen3-30B-A3B's
geometry with seeded random weights, and decodes a fixed batch in phases. With `--layout processes` it starts one
engine, whose workers have a process each, as `vllm serve` does. The routers are re-skewed every
`--interval` steps, so that every rebalance has work. At the end, every slot's weights are made anew from their
seed and compared. `report` prints inter-token percentiles per class of step, host time, steps from trigger to
applied, wrong slots, and how greedy tokens compare between phases of one seed:

    python scripts/bench_vllm.py run --mode ours --layers 8 --greedy --top-k 1 --out results \
        --phases still=x:0:400,settle:1:0,moving=x:1:400

Moving an expert to another rank changes the order in which the outputs of a token's experts are added. With
`--top-k 1` nothing is added, so tokens must agree to the last bit in any precision; with more, rounding may tip
near-ties of the router.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.processes import compile_planner, free_port
from scripts.vllmbench.settings import LAYOUTS, MODES, Phase, Settings, model_name, write_model


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure one mode")
    run.add_argument("--mode", choices=MODES, required=True)
    run.add_argument("--out", required=True, help="folder of results")
    run.add_argument("--tag", help="name of the result; default: mode and layers")
    run.add_argument("--gpus", type=int, default=2)
    run.add_argument("--layers", type=int, default=48)
    run.add_argument("--batch", type=int, default=64)
    run.add_argument("--redundant", type=int, default=16, help="redundant experts per layer")
    run.add_argument("--top-k", type=int, default=8, help="experts per token")
    run.add_argument("--interval", type=int, default=60, help="steps between rebalances and between re-skews")
    run.add_argument("--skew", type=float, default=0.7, help="sd of the log scale of each router row")
    run.add_argument("--dtype", default="bfloat16")
    run.add_argument("--greedy", action="store_true", help="temperature 0, to compare tokens between modes")
    run.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="processes: as vllm serve has them")
    run.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script without a GPU")
    run.add_argument(
        "--one-gpu",
        action="store_true",
        help="all ranks on the first GPU, under NVIDIA's multi-process service: for host times and tokens only",
    )
    run.add_argument(
        "--pin", action="store_true", help="give each rank a share of the cores, and its main thread one"
    )
    run.add_argument(
        "--pieces",
        action="store_true",
        help="note what our threads compute beside each step, and compare steps with those beside which they compute "
        "nothing (--layout one_process)",
    )
    run.add_argument(
        "--limit-s",
        type=int,
        default=200,
        help="the run is ended after so many seconds; what was measured until then is kept",
    )
    run.add_argument(
        "--phases",
        default="settle:1:0,warm:0:60,idle:0:600,busy:1:900",
        help="NAME[=SEED]:REBALANCE(0 or 1):STEPS, ...; what differs in a number at the end of NAME only is reported "
        "together, so that phases can alternate: idle1:0:200,busy1:1:200,idle2:0:200,busy2:1:200",
    )
    run.add_argument("--options", type=json.loads, default={}, help="JSON, more swiftbalancer options")
    run.add_argument("--engine", type=json.loads, default={}, help="JSON, more arguments of vllm.LLM")
    rank = commands.add_parser("rank", help="one rank of a run (started by run)")
    rank.add_argument("settings", type=Path)
    report = commands.add_parser("report", help="print what runs measured")
    report.add_argument("out", type=Path)
    report.add_argument("--rank", type=int, default=0)
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> Settings:
    phases = [Phase.parse(part) for part in args.phases.split(",")]
    tag = args.tag or f"{args.mode}-{args.layers}"
    names = Settings.__dataclass_fields__.keys() - {"phases", "tag"}
    return Settings(**{n: getattr(args, n) for n in names}, phases=phases, tag=tag)


def run(settings: Settings) -> int:
    """Starts a process per GPU and waits; returns 0 if all ended well."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / model_name(settings), settings)
    path = out / f"{settings.tag}.settings.json"
    path.write_text(json.dumps(asdict(settings)))
    if settings.mode == "ours":
        compile_planner()
    port = str(free_port())
    began = time.monotonic()
    drivers = settings.gpus if settings.layout == "one_process" else 1
    processes = [start_rank(settings, path, rank, port) for rank in range(drivers)]
    codes = [wait_for(process, began + settings.limit_s + 20) for process in processes]
    took_s = time.monotonic() - began
    print(f"{settings.tag}: {took_s:.0f} s, exit codes {codes}", flush=True)
    if any(codes):
        if took_s >= settings.limit_s:
            print(f"it was ended after --limit-s {settings.limit_s}; what its threads did then:")
        print((out / f"{settings.tag}.rank0.log").read_text(errors="replace")[-3000:])
    return int(any(codes))


def start_rank(settings: Settings, path: Path, rank: int, port: str) -> subprocess.Popen[bytes]:
    env = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONUNBUFFERED": "1",
    }
    if settings.layout == "one_process":
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        env["WORLD_SIZE"] = str(settings.gpus)
    with Path(settings.out, f"{settings.tag}.rank{rank}.log").open("wb") as log:
        command = [sys.executable, __file__, "rank", str(path)]
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def wait_for(process: subprocess.Popen[bytes], deadline: float) -> int:
    try:
        return process.wait(max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> int:
    args = parse(sys.argv[1:])
    if args.command == "rank":
        from scripts.vllmbench.engine import rank_main

        rank_main(args.settings)
    elif args.command == "report":
        from scripts.vllmbench.report import report

        report(args.out, args.rank)
    else:
        return run(settings_of(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
