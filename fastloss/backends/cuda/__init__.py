"""Runs kernels on the GPU that the arrays are on, on the caller's stream, without waiting for them."""
