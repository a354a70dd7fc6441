"""A checkpoint on disk with seeded weights, for servers, which load one as they would a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scripts.vllmbench.settings import EXPERTS, Settings, write_model
from scripts.vllmbench.weights import seed_of

Tensors = dict[str, torch.Tensor]


def write_checkpoint(folder: Path, settings: Settings) -> dict[str, Any]:
    """`write_model`'s MoE with weights, a file per layer, and a tokenizer, unless they are there; its configuration.

    Routers prefer some experts, more so the larger `settings.skew` is.
    """
    write_model(folder, settings)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return config
    files: dict[str, str] = {}
    made = _Seeded(settings)
    for number in range(settings.layers + 1):
        tensors = made.layer(number, config) if number < settings.layers else made.frame(config)
        name = f"model-{number:05d}.safetensors"
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
    write_tokenizer(folder, config["vocab_size"])
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return config


class _Seeded:
    """Tensors by name, each of its own seed."""

    def __init__(self, settings: Settings) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dtype = getattr(torch, settings.dtype)
        self._skew = settings.skew
        self._expert_sd = 0.2 if settings.tiny else 0.05

    def frame(self, config: dict[str, Any]) -> Tensors:
        shape = (config["vocab_size"], config["hidden_size"])
        return {
            "model.embed_tokens.weight": self._normal("embed_tokens", *shape, sd=1.0),
            "lm_head.weight": self._normal("lm_head", *shape),
            "model.norm.weight": torch.ones(config["hidden_size"], dtype=self._dtype),
        }

    def layer(self, number: int, config: dict[str, Any]) -> Tensors:
        hidden, width, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
        queries, keys = (config[f"num_{kind}_heads"] * head for kind in ("attention", "key_value"))
        prefix = f"model.layers.{number}."
        ones = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        ones |= {f"self_attn.{kind}_norm": head for kind in "qk"}
        tensors = {f"{prefix}{name}.weight": torch.ones(n, dtype=self._dtype) for name, n in ones.items()}
        shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        for kind, shape in shapes.items():
            name = f"{prefix}self_attn.{kind}_proj.weight"
            tensors[name] = self._normal(name, *shape)
        for expert in range(EXPERTS):
            for kind, shape in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
                name = f"{prefix}mlp.experts.{expert}.{kind}_proj.weight"
                tensors[name] = self._normal(name, *shape, sd=self._expert_sd)
        router = f"{prefix}mlp.gate.weight"
        popularity = torch.exp(self._skew * self._normal(router + "'s rows", EXPERTS, 1, sd=1.0))
        return tensors | {router: popularity * self._normal(router, EXPERTS, hidden)}

    def _normal(self, name: str, *shape: int, sd: float = 0.02) -> torch.Tensor:
        generator = torch.Generator(device=self._device).manual_seed(seed_of(name))
        made = torch.empty(shape, device=self._device, dtype=self._dtype)
        return made.normal_(0.0, sd, generator=generator)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One word for each id; servers want a tokenizer to put answers into words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(vocabulary)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<1>", "eos_token": "<2>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
