"""Triton kernels, imported only where a device runs them (`swiftbalancer.device.operators`)."""
