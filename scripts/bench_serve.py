"""What clients of `vllm serve` see of expert balancing: token times, and whether answers differ.

    python scripts/bench_serve.py --out results --layers 8 -- --tensor-parallel-size 2
    python scripts/bench_serve.py --out results --model MODEL --modes off,vllm,ours -- --data-parallel-size 8

What follows `--` goes to vLLM. A server is started for each mode in turn (`off`, `vllm`: vLLM's own balancer, `ours`)
and gets the same greedy requests over HTTP in rounds, many at a time; the topic of prompts, and with it the popular
experts, changes on the way. Tokens of every round are compared with those of the first round of the first mode.
Writes `serve.json` and `serve.md`.

Without `--model`, an MoE of Qwen3-30B-A3B's geometry with seeded random weights is written to disk. Answers are equal
only where they do not depend on what else is in a batch, nor on the order in which the outputs of a token's experts
are added: `VLLM_BATCH_INVARIANT=1` and `--top-k 1` make that so. Later rounds of the first mode show how much answers
differ by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.processes import compile_planner, free_port
from scripts.servebench.client import Answer, Workload, ask_all
from scripts.servebench.report import summarize, write_report
from scripts.servebench.server import MODES, balancing_arguments, serving
from scripts.vllmbench.settings import Settings, model_name


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--modes", default="off,ours", help="of off, vllm, ours, in the order they are run")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; one is made otherwise")
    parser.add_argument("--layers", type=int, default=8, help="of the model that is made")
    parser.add_argument("--top-k", type=int, default=8, help="experts per token of the model that is made")
    parser.add_argument("--dtype", default="bfloat16", help="of the model that is made")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script without a GPU")
    parser.add_argument("--requests", type=int, default=256, help="of a round")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at a time")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--topics", type=int, default=4, help="of the prompts of a round, one after another")
    parser.add_argument("--rounds", type=int, default=3, help="the first one warms up: its times do not count")
    parser.add_argument("--redundant", type=int, default=16, help="redundant experts per layer")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, more swiftbalancer options")
    parser.add_argument(
        "--eplb-config", type=json.loads, default={}, help="JSON, more options of vLLM's own balancer"
    )
    parser.add_argument("--start-s", type=float, default=600, help="a server must be ready after this many seconds")
    parser.add_argument("vllm", nargs="*", help="arguments of vLLM, after --")
    args = parser.parse_args(arguments)
    args.modes = args.modes.split(",")
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"--modes knows {', '.join(MODES)}, not {', '.join(sorted(unknown))}")
    if args.model and not (args.model / "config.json").is_file():
        parser.error(f"--model: {args.model} is no folder of a checkpoint, it has no config.json")
    return args


def vocabulary_of(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def made_model(args: argparse.Namespace) -> Path:
    """The folder of a seeded MoE, which is written unless it is there."""
    from scripts.vllmbench.checkpoint import write_checkpoint

    values = {name: getattr(args, name) for name in ("layers", "top_k", "dtype", "tiny")}
    settings = Settings(mode="off", out=str(args.out), tag="serve", **values)
    folder: Path = args.out / model_name(settings)
    write_checkpoint(folder, settings)
    return folder


def run_mode(mode: str, args: argparse.Namespace, arguments: list[str], load: Workload) -> dict[str, Any]:
    """Serves all rounds in `mode`; what `summarize` wants to know."""
    redundant, metrics_port = {"num_redundant_experts": args.redundant}, free_port()
    balancing = balancing_arguments(mode, redundant | args.options, redundant | args.eplb_config, metrics_port)
    rounds: list[dict[str, Any]] = []
    began = time.monotonic()
    with serving(arguments + balancing, metrics_port, args.out / f"{mode}.log") as server:
        server.wait_until_ready(args.start_s)
        print(f"{mode}: ready after {time.monotonic() - began:.0f} s", flush=True)
        for number in range(args.rounds):
            at = time.monotonic()
            answers: list[Answer] = asyncio.run(ask_all(server.url, "served", load))
            took_s = time.monotonic() - at
            print(f"{mode}: round {number} took {took_s:.1f} s", flush=True)
            rounds.append({"took_s": took_s, "answers": answers})
        balancer = server.balancer() if mode == "ours" else {}
    return {"mode": mode, "rounds": rounds, "balancer": balancer}


def main() -> int:
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left behind
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model or made_model(args)
    names = ("requests", "concurrency", "prompt_tokens", "output_tokens", "topics")
    load = Workload(**{name: getattr(args, name) for name in names}, vocabulary=vocabulary_of(model))
    arguments = ["--model", str(model), "--served-model-name", "served", "--enable-expert-parallel"]
    arguments += [*([] if args.model else ["--dtype", args.dtype]), *args.vllm]  # by itself vLLM serves fp32 as bf16
    if "ours" in args.modes:
        compile_planner()
    seen: list[dict[str, Any]] = []
    for mode in args.modes:
        seen.append(run_mode(mode, args, arguments, load))
        write_report(
            args.out, {"workload": asdict(load), "vllm": args.vllm, "options": args.options}, summarize(seen)
        )
    print((args.out / "serve.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
