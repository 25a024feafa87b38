"""The work that is timed on a CPU: issue 3's table with its goals, and sizes from 10^3 to 10^9 elements for the plots.

Nothing here imports an array library but NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_cases import Work
from record import Goal

CONTENDERS = ("fastloss", "NumPy", "torch", "torch.compile", "JAX")
NUMPY_UP_TO = 10**8  # elements of the sweep: ten times as many take it up to a minute a call
CACHE_BYTES = 1 << 20
BLOCK = 1 << 22  # random numbers that are drawn; larger arrays repeat them
ALIGNMENT = 64  # as torch and JAX have it: a cache line


@dataclass(frozen=True)
class Case(Work):
    """Work for the CPU."""

    contenders: tuple[str, ...] = CONTENDERS
    quick: bool = False  # part of --quick
    returned: bool = False  # the gradient is fastloss's own array, not written to the caller's

    @property
    def name(self) -> str:
        return super().name + ", returned" * self.returned

    @property
    def in_cache(self) -> bool:
        """Whether the arrays stay in a core's caches, where a call's own time counts and memory has no part."""
        return self.nbytes < CACHE_BYTES

    @property
    def limit(self) -> str | None:
        """What it cannot be faster than: "read" its inputs, "copy" logits into gradients, or the "triad" of two arrays
        read and one written."""
        if self.in_cache:
            return None
        if not self.gradient:
            return "read"
        return "copy" if self.indices else "triad"

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        """Input and target, the same for every run."""
        rng = np.random.default_rng(0)
        n = min(BLOCK, math.prod(self.shape))
        if self.loss == "binary_cross_entropy":
            block = np.maximum(rng.random(n, np.float32), 2.0**-24)  # neither 0 nor 1: no logarithm of 0
        else:
            block = rng.standard_normal(n, np.float32)
        x = _filled(self.shape, _dtype(self.dtype), block)
        if self.indices:
            return x, _filled(self.samples, np.dtype(np.int64), rng.integers(0, self.shape[1], BLOCK))
        y = _filled(self.shape, _dtype(self.dtype), rng.random(n, np.float32))
        if self.probabilities:
            y /= y.sum(1, keepdims=True)
        return x, y


def _dtype(name: str) -> np.dtype[Any]:
    """Raises ImportError where bfloat16 needs a package that is not there."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """New memory that begins with a cache line."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _filled(shape: tuple[int, ...], dtype: np.dtype[Any], block: np.ndarray) -> np.ndarray:
    """An array of these numbers, repeated."""
    out = aligned(shape, dtype)
    flat = out.reshape(-1)
    for start in range(0, flat.size, block.size):
        part = flat[start : start + block.size]
        part[...] = block[: part.size]
    return out


# ---- goals


def _goal(fraction: float | None = None, **versus: float) -> Goal:
    """A share of the limit, and how many times as long the others take at least."""
    goal: Goal = {"fraction": fraction} if fraction else {}
    names = {"compiled": "torch.compile", "eager": "torch"}
    return goal | ({"versus": {names[name]: least for name, least in versus.items()}} if versus else {})


def cross_entropy(*shape: int, **more: Any) -> Case:
    return Case("cross_entropy", **{"dtype": "float32", "shape": shape} | more)


N = 1 << 25
POINTWISE = {  # loss -> share of the read limit, how many times as long torch.compile takes
    "l1_loss": (0.97, 1.0),
    "mse_loss": (0.97, 1.0),
    "smooth_l1_loss": (0.97, 1.0),
    "huber_loss": (0.97, 1.0),
    "binary_cross_entropy": (0.90, 3.5),
    "binary_cross_entropy_with_logits": (0.95, 3.5),
}


def _goals() -> list[Case]:
    wide = _goal(0.95, compiled=2.7, eager=12)
    few, some = _goal(0.75, compiled=8), _goal(0.8, compiled=2.7)
    fused = {"gradient": True, "goal": _goal(0.6, compiled=4)}
    return [
        cross_entropy(65_536, 1_000, goal=wide, quick=True),
        cross_entropy(2_048, 32_000, goal=wide),
        cross_entropy(512, 128_256, goal=wide),
        cross_entropy(1 << 22, 2, goal=few),
        cross_entropy(1 << 21, 5, goal=few),
        cross_entropy(1 << 20, 10, goal=_goal(0.6, compiled=4.5), quick=True),
        cross_entropy(799_000, 21, goal=some),
        cross_entropy(524_288, 32),
        cross_entropy(262_144, 64, goal=some),
        cross_entropy(262_144, 100, goal=some),
        cross_entropy(16, 21, 256, 256, goal=some),
        cross_entropy(2_048, 32_000, dtype="bfloat16", goal=_goal(0.9, compiled=4), quick=True),
        cross_entropy(2_048, 32_000, dtype="float16", goal=_goal(0.85, compiled=4)),
        cross_entropy(8_192, 1_000, probabilities=True, goal=_goal(0.9)),
        cross_entropy(65_536, 1_000, gradient=True, goal=_goal(0.85, compiled=9, eager=20)),
        cross_entropy(2_048, 32_000, gradient=True, goal=_goal(0.8, compiled=9, eager=20), quick=True),
        cross_entropy(1 << 20, 10, **fused),
        cross_entropy(16, 21, 256, 256, **fused),
        cross_entropy(2_048, 32_000, dtype="bfloat16", **fused),
        *(
            Case(loss, "float32", (N,), goal=_goal(fraction, compiled=ratio), quick=loss in ("mse_loss",))
            for loss, (fraction, ratio) in POINTWISE.items()
        ),
        *(
            # Binary cross-entropy writes to the caller's memory only after a look at all probabilities: a row of its
            # own, without a goal.
            Case(
                loss,
                "float32",
                (N,),
                gradient=True,
                goal=_goal(0.8),
                quick="logits" in loss,
                returned=loss == "binary_cross_entropy",
            )
            for loss in POINTWISE
        ),
        Case("binary_cross_entropy", "float32", (N,), gradient=True),
        cross_entropy(1, 10, goal={"ms": 1.5e-3}, quick=True),
        cross_entropy(32, 10, goal={"ms": 3e-3}, quick=True),
        cross_entropy(128, 1_000, goal={"ms": 20e-3}, quick=True),
    ]


def _sweep() -> list[Case]:
    """Sizes by tens: no peer faster at any of them."""
    cases: list[Case] = []
    for n in (10**k for k in range(3, 10)):
        names = tuple(name for name in CONTENDERS if name != "NumPy" or n <= NUMPY_UP_TO)
        more: dict[str, Any] = {"section": "sweep", "goal": {"peers": 1.0}, "contenders": names}
        cases += [cross_entropy(n // classes, classes, **more) for classes in (1_000, 10)]
        cases += [Case(loss, "float32", (n,), **more) for loss in ("mse_loss", "binary_cross_entropy_with_logits")]
    return cases


CASES = [*_goals(), *_sweep()]
