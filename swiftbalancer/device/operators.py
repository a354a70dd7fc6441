"""Which devices run our Triton kernels; all others run the same operators in plain torch."""

from __future__ import annotations

import torch

KERNEL_KEYS = ("CUDA",)
"""torch's dispatch keys of devices with kernels."""
PLAIN_KEYS = ("CPU", "PrivateUse1")
"""And of those without; NPUs register as the second."""


def has_kernels(device: torch.device) -> bool:
    return device.type == "cuda"
