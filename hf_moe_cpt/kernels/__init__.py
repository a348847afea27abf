"""Triton kernels for the expert layer and the router, each beside its definition in plain PyTorch."""
