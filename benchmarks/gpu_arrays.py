"""Operands on the GPU (torch tensors; in Numba's simulator its own arrays), and exact losses to compare with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch
from gpu_cases import Work

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
DEVICE = "cpu" if SIMULATED else "cuda"  # where torch's tensors are
CHUNK = 1 << 26  # elements that are widened to float64 at a time

Pair = tuple[Any, Any]


def tensors(work: Work, device: str = DEVICE) -> Pair:
    """Fresh random input and target."""
    dtype = getattr(torch, work.dtype)
    if work.loss == "binary_cross_entropy":
        x = torch.rand(work.shape, dtype=dtype, device=device)
    else:
        x = torch.randn(work.shape, dtype=dtype, device=device)
    if work.indices:
        return x, torch.randint(0, work.shape[1], work.samples, device=device)
    y = torch.rand(work.shape, dtype=dtype, device=device)
    return x, y / y.sum(1, keepdim=True) if work.probabilities else y


def to_gpu(array: Any) -> Any:
    """A NumPy array or CPU tensor as what fastloss is called with."""
    if not SIMULATED:
        return torch.as_tensor(array).to(DEVICE)
    from numba import cuda

    return cuda.to_device(to_numpy(array))


def operands(work: Work) -> tuple[Pair, Pair]:
    """What fastloss is called with, and the same as torch tensors."""
    pair = tensors(work)
    return ((to_gpu(pair[0]), to_gpu(pair[1])) if SIMULATED else pair), pair


def to_numpy(array: Any) -> np.ndarray:
    """Any library's array in the CPU's memory."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        if array.dtype is torch.bfloat16:
            return array.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()
    if hasattr(array, "copy_to_host"):  # Numba
        return np.asarray(array.copy_to_host())
    return np.asarray(array.get() if hasattr(array, "get") else array)  # CuPy; JAX


def number(value: Any) -> float:
    """A loss of any library."""
    return float(to_numpy(value).astype(np.float64).reshape(()))


# ---- exact losses, float64, in chunks of rows


def _losses(work: Work, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if work.loss == "cross_entropy":
        lse = x.logsumexp(1)
        if work.probabilities:
            return (y * (lse[:, None] - x)).sum(1)
        return lse - x.gather(1, y[:, None])[:, 0]
    if work.loss == "binary_cross_entropy":
        return -(y * x.log().clamp(min=-100) + (1 - y) * (-x).log1p().clamp(min=-100))
    if work.loss == "binary_cross_entropy_with_logits":
        return x.clamp(min=0) - x * y + (-x.abs()).exp().log1p()
    difference = x - y
    return difference.abs() if work.loss == "l1_loss" else difference * difference


def exact_losses(work: Work, x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Losses of the samples, chunk after chunk."""
    step = max(1, CHUNK // max(1, x[0].numel()))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        yield rows, _losses(work, x[rows].double(), y[rows] if work.indices else y[rows].double())


def exact_mean(work: Work, x: torch.Tensor, y: torch.Tensor) -> float:
    total, count = 0.0, 0
    for _, losses in exact_losses(work, x, y):
        total += float(losses.sum())
        count += losses.numel()
    return total / count


def exact_gradient(work: Work, x: torch.Tensor, y: torch.Tensor, rows: slice) -> torch.Tensor:
    """Rows of the gradient of the mean of cross-entropy."""
    p = x[rows].double().softmax(1)
    if work.probabilities:
        q = y[rows].double()
        return (p * q.sum(1, keepdim=True) - q) / len(x)
    hot = torch.zeros_like(p).scatter_(1, y[rows][:, None], 1.0)
    return (p - hot) / len(x)


# A mean is rounded once, to its dtype; others' sums and their half-precision steps are coarser.
OURS_WITHIN = {"bfloat16": 1.01 * 2**-8, "float16": 1.01 * 2**-11, "float32": 1e-6, "float64": 1e-12}
OTHERS_WITHIN = {"bfloat16": 3e-2, "float16": 1e-2, "float32": 1e-3, "float64": 1e-9}


def near(got: float, want: float, within: float) -> bool:
    """Relative; NaN is near nothing."""
    return abs(got - want) <= within * abs(want)
