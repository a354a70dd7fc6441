#!/usr/bin/env python3
"""Trains minimoe's demo model on the archive that build_corpus.py wrote, on one GPU or on the CPU.

    python scripts/train_minimoe.py --corpus corpus.npz --out DIR --minutes 4

Needs swiftbalancer's adaptors on the path (`pip install -e '.[torch]'`, or PYTHONPATH=.:adaptors).

Every batch mixes all domains evenly; the balance loss is taken over the whole batch, so experts may specialise
in a domain as long as the mixture keeps all of them busy. Writes `demo.safetensors` (bfloat16), at every
evaluation that is the best so far, and `training.json`: loss per domain, and each domain's expert loads.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from swiftbalancer_adaptors.minimoe.config import ModelConfig, preset
from swiftbalancer_adaptors.minimoe.dense import DenseMixture
from swiftbalancer_adaptors.minimoe.model import MiniMoe

EVALUATION_BATCHES = 4


class Network(nn.Module):
    """The model with all its experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = MiniMoe(config)
        self.experts = DenseMixture(config)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                narrow = name.endswith(("out.weight", "w_down", "router.weight"))
                nn.init.normal_(parameter, std=0.02 if narrow else config.hidden**-0.5 / 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, length]` int64 -> logits `[batch, length, vocabulary]`."""
        self.experts.start()
        logits: Tensor = self.backbone(tokens, self.experts)
        return logits


@dataclass(frozen=True)
class Corpus:
    """The bytes of each domain on the device, for training and held out."""

    names: tuple[str, ...]
    train: tuple[Tensor, ...]
    valid: tuple[Tensor, ...]

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Corpus:
        """Reads an archive of `<domain>.train` and `<domain>.valid` arrays of bytes."""
        with np.load(path) as archive:
            names = tuple(sorted(key[: -len(".train")] for key in archive.files if key.endswith(".train")))
            parts = {key: torch.from_numpy(archive[key].copy()).to(device) for key in archive.files}
        train = tuple(parts[f"{name}.train"] for name in names)
        return cls(names, train, tuple(parts[f"{name}.valid"] for name in names))


def draw(text: Tensor, *, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """`[rows, length + 1]` int64: stretches of a text from random places."""
    start = torch.randint(len(text) - length - 1, (rows, 1), device=text.device, generator=generator)
    return text[start + torch.arange(length + 1, device=text.device)].long()


def next_byte_loss(network: Network, rows: Tensor) -> Tensor:
    """Mean cross entropy in nats of predicting each byte from those before it."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
        logits = network(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(network: Network, corpus: Corpus, args: argparse.Namespace) -> dict[str, object]:
    """Bits per byte of each domain's held-out text, and its tokens per expert `[layers, experts]`."""
    bits, loads = {}, {}
    for name, text in zip(corpus.names, corpus.valid, strict=True):
        generator = torch.Generator(text.device).manual_seed(1)
        total, load = 0.0, torch.zeros_like(network.experts.loads)
        for _ in range(EVALUATION_BATCHES):
            rows = draw(text, rows=args.rows, length=args.length, generator=generator)
            total += float(next_byte_loss(network, rows)) / math.log(2) / EVALUATION_BATCHES
            load += network.experts.loads
        bits[name], loads[name] = round(total, 4), load.long().tolist()
    return {"bits_per_byte": bits, "loads": loads}


def describe(result: dict[str, object], *, ranks: int = 4) -> str:
    """One line per domain: bits per byte, max/mean expert load and imbalance over contiguous ranks, per layer."""
    lines, loads = [], result["loads"]
    bits = result["bits_per_byte"]
    assert isinstance(loads, dict)
    assert isinstance(bits, dict)
    for name, rows in loads.items():
        load = np.asarray(rows, float)
        skew = load.max(1) / load.mean(1)
        rank = load.reshape(len(load), ranks, -1).sum(2)
        split = rank.max(1) / rank.mean(1)
        lines.append(f"  {name:9s} {bits[name]:.3f} bits  max/mean expert {skew.round(2)}  4 ranks {split.round(2)}")
    each = np.stack([np.asarray(rows, float) for rows in loads.values()])
    total = each.sum(0) / each.sum(0).mean(1, keepdims=True)
    lines.append(f"  all: max/mean expert {total.max(1).round(2)}, min/mean {total.min(1).round(2)}")
    lines.append(f"  correlation between domains' loads:\n{np.corrcoef(each.reshape(len(each), -1)).round(2)}")
    return "\n".join(lines)


def save(network: Network, result: dict[str, object], out: Path) -> None:
    """Writes the weights in bfloat16 and the evaluation beside them."""
    state = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in network.state_dict().items()}
    save_file(state, out / "demo.safetensors")
    (out / "training.json").write_text(json.dumps(result) + "\n")


def learning_rate(done: float, peak: float) -> float:
    """Warm-up over the first 2 % of the time, then a cosine down to a twentieth of the peak."""
    if done < 0.02:
        return peak * (done / 0.02 + 0.01)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def optimiser(network: Network, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW, weight decay on matrices only."""
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    vectors = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=args.device == "cuda")


def train_step(network: Network, corpus: Corpus, adam: torch.optim.AdamW, args: argparse.Namespace) -> Tensor:
    """One update from a batch of all domains; gives the language loss (on the device)."""
    each = args.rows // len(corpus.names)
    parts = [draw(text, rows=each, length=args.length, generator=args.generator) for text in corpus.train]
    loss = next_byte_loss(network, torch.cat(parts))
    adam.zero_grad(set_to_none=True)
    balance = network.experts.balance_loss / network.backbone.config.num_layers
    (loss + args.balance * balance).backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    adam.step()
    return loss.detach()


def train(network: Network, corpus: Corpus, args: argparse.Namespace) -> None:
    """Trains until the time or the steps are up; evaluates and saves on the way and at the end."""
    adam = optimiser(network, args)
    begin, best, step, next_look = time.monotonic(), math.inf, 0, 0.25
    done = 0.0
    while done < 1.0:
        for group in adam.param_groups:
            group["lr"] = learning_rate(done, args.rate)
        loss = train_step(network, corpus, adam, args)
        step += 1
        if step % 10 == 0:
            loss.item()  # keeps the host from running far ahead of the device, so that the clock means something
        done = max((time.monotonic() - begin) / (60 * args.minutes), step / args.steps if args.steps else 0)
        if done < next_look and done < 1.0:
            continue
        next_look += 0.15
        result = evaluate(network, corpus, args) | {"step": step, "bytes_seen": step * args.rows * args.length}
        result |= {"balance": args.balance, "seconds": round(time.monotonic() - begin, 1)}
        mean = float(np.mean(list(result["bits_per_byte"].values())))  # type: ignore[attr-defined]
        print(f"step {step} {result['seconds']} s: train {loss.item() / math.log(2):.3f}, held out {mean:.3f} bits")
        print(describe(result), flush=True)
        if mean < best:
            best = mean
            save(network, result, args.out)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and numbers")
    parser.add_argument("--minutes", type=float, default=4.0, help="wall-clock limit (default 4)")
    parser.add_argument("--steps", type=int, default=0, help="limit in steps; 0 is none (default)")
    parser.add_argument("--rows", type=int, default=128, help="sequences per batch (default 128)")
    parser.add_argument("--length", type=int, default=256, help="bytes per sequence (default 256)")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    parser.add_argument("--balance", type=float, default=3e-3, help="weight of the balance loss (default 3e-3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    args.generator = torch.Generator(args.device).manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.load(args.corpus, torch.device(args.device))
    network = Network(preset("demo")).to(args.device)
    train(network, corpus, args)


if __name__ == "__main__":
    main()
