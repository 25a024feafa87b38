"""What is compared: losses, shapes and dtypes, each as NumPy, torch (eager) and fastloss would compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import fastloss

Call = Callable[[], object]
CONTENDERS = ("numpy", "torch", "fastloss")


@dataclass(frozen=True)
class Case:
    """One piece of work. `build` makes the arrays and gives each contender's call and the bytes that must be read."""

    name: str
    build: Callable[[], tuple[dict[str, Call], int]]
    contenders: tuple[str, ...] = CONTENDERS


def _cross_entropy_numpy(x: np.ndarray, t: np.ndarray) -> float:
    m = x.max(axis=1)
    lse = m + np.log(np.exp(x - m[:, None]).sum(axis=1))
    return float((lse - x[np.arange(len(x)), t]).mean())


def cross_entropy(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    plain = dtype is torch.float32 and len(shape) == 2

    def build() -> tuple[dict[str, Call], int]:
        x = torch.randn(shape, dtype=torch.float32).to(dtype)
        t = torch.randint(0, shape[1], (shape[0], *shape[2:]))
        calls: dict[str, Call] = {
            "torch": lambda: F.cross_entropy(x, t),
            "fastloss": lambda: fastloss.cross_entropy(x, t),
        }
        if plain:
            x_numpy, t_numpy = x.numpy(), t.numpy()
            calls["numpy"] = lambda: _cross_entropy_numpy(x_numpy, t_numpy)
        return calls, x.nbytes + t.nbytes

    sizes = " x ".join(f"{extent:,}" for extent in shape)
    return Case(f"cross_entropy {str(dtype)[6:]} {sizes}", build, CONTENDERS if plain else CONTENDERS[1:])


def pointwise(name: str, numpy_formula: Callable[[np.ndarray, np.ndarray], float], n: int) -> Case:
    def build() -> tuple[dict[str, Call], int]:
        x, y = torch.rand(n), torch.rand(n)
        x_numpy, y_numpy = x.numpy(), y.numpy()
        ours, theirs = getattr(fastloss, name), getattr(F, name)
        calls: dict[str, Call] = {
            "numpy": lambda: numpy_formula(x_numpy, y_numpy),
            "torch": lambda: theirs(x, y),
            "fastloss": lambda: ours(x, y),
        }
        return calls, x.nbytes + y.nbytes

    return Case(f"{name} float32 {n:,}", build)


def cross_entropy_gradient(shape: tuple[int, int]) -> Case:
    """Value and gradient, into memory that is reused."""

    def build() -> tuple[dict[str, Call], int]:
        x, t = torch.randn(shape), torch.randint(0, shape[1], shape[:1])
        recorded = x.clone().requires_grad_()
        grad = torch.empty_like(x)
        ours = fastloss.value_and_grad(fastloss.cross_entropy)

        def theirs() -> object:
            loss = F.cross_entropy(recorded, t)
            return loss, torch.autograd.grad(loss, recorded)

        return {"torch": theirs, "fastloss": lambda: ours(x, t, grad_out=grad)}, 2 * x.nbytes + t.nbytes

    return Case(f"cross_entropy value and gradient {shape[0]:,} x {shape[1]:,}", build, CONTENDERS[1:])


def _bce_numpy(p: np.ndarray, y: np.ndarray) -> float:
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(p), -100), np.maximum(np.log1p(-p), -100)
    return float(-(y * logs[0] + (1 - y) * logs[1]).mean())


def _bce_with_logits_numpy(x: np.ndarray, y: np.ndarray) -> float:
    return float((np.maximum(x, 0) - x * y + np.log1p(np.exp(-np.abs(x)))).mean())


N = 1 << 25
CASES = [
    cross_entropy((65_536, 1_000)),
    cross_entropy((2_048, 32_000)),
    cross_entropy((512, 128_256)),
    cross_entropy((1 << 22, 2)),
    cross_entropy((1 << 21, 5)),
    cross_entropy((1 << 20, 10)),
    cross_entropy((799_000, 21)),
    cross_entropy((524_288, 32)),
    cross_entropy((262_144, 64)),
    cross_entropy((167_000, 100)),
    cross_entropy((16, 21, 256, 256)),
    cross_entropy((2_048, 32_000), torch.bfloat16),
    cross_entropy((2_048, 32_000), torch.float16),
    cross_entropy_gradient((65_536, 1_000)),
    cross_entropy_gradient((2_048, 32_000)),
    pointwise("l1_loss", lambda x, y: float(np.abs(x - y).mean()), N),
    pointwise("mse_loss", lambda x, y: float(np.square(x - y).mean()), N),
    pointwise("binary_cross_entropy", _bce_numpy, N),
    pointwise("binary_cross_entropy_with_logits", _bce_with_logits_numpy, N),
    cross_entropy((1, 10)),
    cross_entropy((32, 10)),
    cross_entropy((128, 1_000)),
    cross_entropy((1_024, 1_000)),
]
