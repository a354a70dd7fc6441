"""Triton kernels, imported only where CUDA is used."""
