"""Triton kernels and what they are made of (docs/gpu.md)."""
