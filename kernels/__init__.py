"""Fused Triton kernels: one operation per file, each with its plain PyTorch reference."""
