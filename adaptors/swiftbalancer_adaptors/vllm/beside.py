"""What expert kernels of vLLM read by slot although it does not move with an expert.

vLLM names an expert's tensors by its parameters. Some quantisations make more of them, folded scales above all, and
keep them with the kernel. Those stay in their slot, so they must be the same for all experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from swiftbalancer.border import ExpertTensor
from swiftbalancer.errors import UnsupportedEngine

PRODUCTS = ("w13_weight", "w2_weight")
PARTS_OF_CONFIG = ("_a1", "_a2", "_w1", "_w2")
SCALES = ("scale", "alpha_or_gscale", "zp", "bias")
CHANGE = "use another --moe-backend or --quantization, or drop the swiftbalancer flag"


def check_products(layer: Any, kinds: Sequence[ExpertTensor], *, where: str) -> None:
    """Raises `UnsupportedEngine` if the weights that are multiplied are not among `kinds`, those that move."""
    moved = _memory(kinds)
    for part in _modules(layer):
        for name in PRODUCTS:
            held = getattr(part, name, None)
            if held is None or (isinstance(held, torch.Tensor) and (not held.numel() or _storage(held) in moved)):
                continue
            raise UnsupportedEngine(f"{where}: {name} is not among what vLLM says belongs to an expert; {CHANGE}")


def staying(layer: Any, kinds: Sequence[ExpertTensor]) -> dict[str, str]:
    """By name, what kernels of a layer read by slot beside `kinds`: a fingerprint of the value that all slots of
    this rank have, or an empty string where they differ.

    To be asked after a forward pass: some of it is made there.
    """
    moved = _memory(kinds)
    found = {}
    for name, tensor, always in _read_beside(layer):
        by_slot = tensor.dim() > 0 and len(tensor) == len(kinds[0])
        if tensor.numel() and (by_slot or always) and _storage(tensor) not in moved:
            found[name] = _fingerprint(tensor, len(tensor) if by_slot else 1)
    return found


def check_staying(every: Sequence[Sequence[dict[str, str]]], *, model: str) -> None:
    """`[ranks][layers]` of `staying`. Raises `UnsupportedEngine` where slots differ, on one rank or between two."""
    for layer, ranks in enumerate(zip(*every, strict=True)):
        for name in sorted({name for found in ranks for name in found}):
            values = {found.get(name, "") for found in ranks}
            if len(values) > 1 or "" in values:
                raise UnsupportedEngine(
                    f"{model}: MoE layer {layer}: {name} is not the same for all experts, and vLLM does not say that "
                    f"it belongs to one, so it would stay behind when an expert moves; {CHANGE}"
                )


def _read_beside(layer: Any) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name, tensor, and whether it matters even if it is one for all slots of a rank.

    A scale that activations are quantised by is folded into what moves with an expert, and must fit on every rank.
    """
    for part in _modules(layer):
        method = getattr(part, "quant_method", None)
        config = getattr(method, "moe_quant_config", None)
        for half in PARTS_OF_CONFIG:
            for name in SCALES:
                held = getattr(getattr(config, half, None), name, None)
                if isinstance(held, torch.Tensor):
                    yield f"{half[1:]} {name}", held, half.startswith("_a") and name == "alpha_or_gscale"
        kernel = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        for name, held in sorted(getattr(kernel, "__dict__", {}).items()):
            if isinstance(held, torch.Tensor) and held.is_floating_point():
                yield f"{type(kernel).__name__}.{name}", held, False


def _modules(layer: Any) -> Iterator[Any]:
    yield from layer.modules() if isinstance(layer, torch.nn.Module) else (layer,)


def _memory(kinds: Sequence[ExpertTensor]) -> set[int]:
    whole = {_storage(kind) for kind in kinds if isinstance(kind, torch.Tensor)}
    lists = [kind for kind in kinds if not isinstance(kind, torch.Tensor)]
    return whole | {_storage(kind[slot]) for kind in lists for slot in range(len(kind))}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _fingerprint(tensor: torch.Tensor, slots: int) -> str:
    """Of one slot's bytes, so that what is no number compares too."""
    rows = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).view(slots, -1)
    return hashlib.sha256(rows[0].numpy().tobytes()).hexdigest() if bool((rows == rows[0]).all()) else ""
