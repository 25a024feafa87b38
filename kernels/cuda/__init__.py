"""Kernels for NVIDIA GPUs: Python functions that numba.cuda compiles, or runs in its simulator."""
