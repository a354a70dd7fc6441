"""Tiny MoE checkpoints on disk, made of seeded random weights, in the layout vLLM loads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCAB = 512
HIDDEN = 64
EXPERT = 32
EXPERTS = 16
HEADS = 4
HEAD_DIM = 32

Weights = dict[str, torch.Tensor]


def write_qwen3_moe(folder: Path, *, layers: int = 4) -> Path:
    """A Qwen3-MoE: top-4 of 16 experts in every layer, with a router that prefers some experts."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": EXPERT,
        "num_experts_per_tok": 4,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": VOCAB - 2,
        "eos_token_id": VOCAB - 1,
    }
    make = _Random(seed=0)
    weights = make.frame()
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        weights |= make.norms(prefix)
        weights |= make.linear(prefix + "self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN)
        weights |= make.linear(prefix + "self_attn.k_proj", 2 * HEAD_DIM, HIDDEN)
        weights |= make.linear(prefix + "self_attn.v_proj", 2 * HEAD_DIM, HIDDEN)
        weights |= make.linear(prefix + "self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM)
        weights |= {prefix + f"self_attn.{kind}_norm.weight": torch.ones(HEAD_DIM) for kind in "qk"}
        weights |= make.experts(prefix)
    return _save(folder, config, weights)


def write_deepseek(folder: Path, *, layers: int = 3, draft: bool = False) -> Path:
    """DeepSeek-V3's shape: a dense first layer, sigmoid scores with a bias, top-2 of 4 groups, a shared expert.

    `draft` adds one MTP layer, whose guesses are right often enough to be accepted at times.
    """
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "moe_intermediate_size": EXPERT,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": int(draft),
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": VOCAB - 2,
        "eos_token_id": VOCAB - 1,
    }
    make = _Random(seed=1)
    weights = make.frame()
    for layer in range(layers + draft):
        prefix = f"model.layers.{layer}."
        weights |= make.norms(prefix)
        weights |= make.linear(prefix + "self_attn.q_proj", HEADS * 64, HIDDEN)
        weights |= make.linear(prefix + "self_attn.kv_a_proj_with_mqa", 32 + 32, HIDDEN)
        weights |= {prefix + "self_attn.kv_a_layernorm.weight": torch.ones(32)}
        weights |= make.linear(prefix + "self_attn.kv_b_proj", HEADS * 64, 32)
        weights |= make.linear(prefix + "self_attn.o_proj", HIDDEN, HEADS * 32)
        if layer == 0:
            weights |= make.mlp(prefix + "mlp.", 2 * HIDDEN)
            continue
        weights |= make.experts(prefix)
        weights |= {prefix + "mlp.gate.e_score_correction_bias": 0.1 * make.normal(EXPERTS)}
        weights |= make.mlp(prefix + "mlp.shared_experts.", EXPERT)
    if draft:
        weights = {name: tensor * (0.2 if _adds_to_stream(name) else 1.0) for name, tensor in weights.items()}
        weights |= _draft_head(f"model.layers.{layers}.", weights)
    return _save(folder, config, weights)


def _adds_to_stream(name: str) -> bool:
    """The smaller these, the more the last token alone decides the next."""
    return "o_proj" in name or "down_proj" in name


def _draft_head(prefix: str, weights: Weights) -> Weights:
    """What an MTP layer has beside a decoder layer. It looks at the last token only, as a guess."""
    return {
        prefix + "enorm.weight": torch.ones(HIDDEN),
        prefix + "hnorm.weight": torch.ones(HIDDEN),
        prefix + "eh_proj.weight": torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], dim=1),
        prefix + "embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
        prefix + "shared_head.norm.weight": torch.ones(HIDDEN),
        prefix + "shared_head.head.weight": weights["lm_head.weight"].clone(),
    }


def write_dense(folder: Path) -> Path:
    """A Qwen3 without experts; its configuration is all a test needs."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
    }
    return _save(folder, config, _Random(seed=2).frame())


class _Random:
    """Named random tensors of one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def linear(self, name: str, out: int, into: int, *, scale: float = 0.15) -> Weights:
        return {name + ".weight": scale * self.normal(out, into)}

    def frame(self) -> Weights:
        return {
            "model.embed_tokens.weight": self.normal(VOCAB, HIDDEN),
            "lm_head.weight": 0.3 * self.normal(VOCAB, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN),
        }

    def norms(self, prefix: str) -> Weights:
        names = ("input_layernorm", "post_attention_layernorm")
        return {f"{prefix}{name}.weight": torch.ones(HIDDEN) for name in names}

    def mlp(self, prefix: str, width: int) -> Weights:
        return (
            self.linear(prefix + "gate_proj", width, HIDDEN)
            | self.linear(prefix + "up_proj", width, HIDDEN)
            | self.linear(prefix + "down_proj", HIDDEN, width)
        )

    def experts(self, prefix: str) -> Weights:
        skew = torch.exp(0.7 * self.normal(EXPERTS, 1))
        weights = {prefix + "mlp.gate.weight": 0.3 * skew * self.normal(EXPERTS, HIDDEN)}
        for expert in range(EXPERTS):
            weights |= self.mlp(f"{prefix}mlp.experts.{expert}.", EXPERT)
        return weights


def _save(folder: Path, config: dict[str, object], weights: Weights) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    """Whitespace-separated words `<t0>`, `<t1>`, ..."""
    tokenizers, transformers = (importlib.import_module(name) for name in ("tokenizers", "transformers"))
    words = {f"<t{i}>": i for i in range(VOCAB - 3)} | {"<unk>": VOCAB - 3, "<s>": VOCAB - 2, "</s>": VOCAB - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
