"""Names that vendors have given, for those who must not import torch: the device layer's list of itself."""

from __future__ import annotations

DEVICES = ("cpu", "cuda", "npu")
"""By torch's names, the CPU first."""
ASCEND = "npu"
"""What vLLM's Ascend platform calls its device."""
PACKAGES = ("torch-npu",)
"""Distributions, beside torch itself, whose versions matter."""
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "NCCL_", "ASCEND_HOME", "ASCEND_RT_VISIBLE_DEVICES", "HCCL_")
"""Variables, or how they begin, that change what a device or its collective library does."""
