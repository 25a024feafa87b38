"""Each contender's call for a piece of work, over input sets that torch holds; what it returns is checked."""

from __future__ import annotations

import gc
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import formulas
import numpy as np
import torch
import torch.nn.functional as F
from gpu_arrays import (
    DEVICE,
    OTHERS_WITHIN,
    OURS_WITHIN,
    SIMULATED,
    Pair,
    exact_gradient,
    exact_mean,
    near,
    number,
    to_gpu,
    to_numpy,
)
from gpu_cases import Work

import fastloss

Run = Callable[[int], Any]  # the number of an input set -> a loss, or (loss, gradient)


class NotHereError(Exception):
    """A contender that cannot take part, and why."""


@dataclass(frozen=True)
class Contender:
    """`wait` blocks until a result is there, for a library whose streams torch's events do not see."""

    run: Run
    wait: Callable[[Any], Any] | None = None


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotHereError(f"not installed: {error}") from None


# ---- contenders


def ours(work: Work) -> Callable[..., Any]:
    """fastloss's function for the work."""
    function = getattr(fastloss, work.loss)
    return fastloss.value_and_grad(function) if work.gradient else function


def _fastloss(work: Work, sets: list[Pair]) -> Contender:
    function = ours(work)
    if SIMULATED:
        sets = [(to_gpu(x), to_gpu(y)) for x, y in sets]
    return Contender(lambda k: function(*sets[k]))


def _through_autograd(loss: Callable[[Any, Any], Any], sets: list[Pair]) -> Run:
    recorded = [(x.detach().requires_grad_(), y) for x, y in sets]

    def run(k: int) -> Any:
        x, y = recorded[k]
        value = loss(x, y)
        return value, torch.autograd.grad(value, x)[0]

    return run


def _torch(work: Work, sets: list[Pair]) -> Contender:
    loss = getattr(F, work.loss)
    return Contender(_through_autograd(loss, sets) if work.gradient else lambda k: loss(*sets[k]))


def _torch_compile(work: Work, sets: list[Pair]) -> Contender:
    torch.compiler.reset()  # the shapes of earlier works would count against its limit of recompilations
    eager = getattr(F, work.loss)
    backend = "aot_eager" if SIMULATED else "inductor"  # the dry run needs no C++ compiler
    loss = torch.compile(lambda x, y: eager(x, y), dynamic=False, backend=backend)
    return Contender(_through_autograd(loss, sets) if work.gradient else lambda k: loss(*sets[k]))


def _cupy(work: Work, sets: list[Pair]) -> Contender:
    if SIMULATED:
        raise NotHereError("needs a GPU")
    cupy = _imported("cupy")
    shared = [(cupy.from_dlpack(x), cupy.from_dlpack(y)) for x, y in sets]
    function = (formulas.value_and_gradient if work.gradient else formulas.value)(work)
    return Contender(lambda k: function(cupy, *shared[k]))


def _jax(work: Work, sets: list[Pair]) -> Contender:
    jax = _imported("jax")
    function = formulas.value(work)

    def loss(x: Any, y: Any) -> Any:
        return function(jax.numpy, x, y)

    compiled = jax.jit(jax.value_and_grad(loss) if work.gradient else loss)
    # Indices as JAX likes them: without its 64-bit mode int64 is not one of its dtypes.
    narrow = [(x, y.int() if work.indices else y) for x, y in sets]
    shared = [(jax.dlpack.from_dlpack(x), jax.dlpack.from_dlpack(y)) for x, y in narrow]
    return Contender(lambda k: compiled(*shared[k]), jax.block_until_ready)


def _liger(work: Work, sets: list[Pair]) -> Contender:
    if SIMULATED:
        raise NotHereError("needs a GPU")
    loss = _imported("liger_kernel.transformers.functional").liger_cross_entropy
    own = [(x.clone(), y) for x, y in sets]  # it writes the gradient over its input
    return Contender(_through_autograd(loss, own) if work.gradient else lambda k: loss(*own[k]))


_MAKERS: dict[str, Callable[[Work, list[Pair]], Contender]] = {
    "fastloss": _fastloss,
    "torch": _torch,
    "torch.compile": _torch_compile,
    "CuPy": _cupy,
    "JAX": _jax,
    "Liger": _liger,
}


def contender(name: str, work: Work, sets: list[Pair]) -> Contender:
    """Raises NotHereError, or whatever goes wrong in that library."""
    return _MAKERS[name](work, sets)


# ---- what they return


class Truth:
    """The exact value, and rows of the gradient, of one input set; made before a contender overwrites it."""

    def __init__(self, work: Work, pair: Pair) -> None:
        self.work = work
        self.value = exact_mean(work, *pair)
        self.rows = [0, work.shape[0] // 2, work.shape[0] - 1]
        grads = [exact_gradient(work, *pair, slice(k, k + 1)) for k in self.rows if work.gradient]
        self.grads = [to_numpy(grad)[0] for grad in grads]

    def check(self, name: str, result: Any) -> None:
        """Raises ValueError for another value, or another gradient in those rows."""
        within = (OURS_WITHIN if name == "fastloss" else OTHERS_WITHIN)[self.work.dtype]
        value, grad = result if self.work.gradient else (result, ())
        if not near(number(value), self.value, within):
            raise ValueError(f"wrong value: {number(value):.9g}, expected {self.value:.9g}")
        for k, want in zip(self.rows, self.grads, strict=False):  # no gradients, no rows
            self._check_row(k, to_numpy(grad[k]).astype(np.float64), want, max(within, 2e-5))

    def _check_row(self, k: int, got: np.ndarray, want: np.ndarray, within: float) -> None:
        """The largest element, the target's as a rule, apart from all others, which are small beside it."""
        largest = np.arange(len(want)) == abs(want).argmax()
        step = 2.0**-25 if self.work.dtype == "float16" else 0.0  # half of its least number: a mean's gradient is small
        for part in (largest, ~largest):
            error, size = np.linalg.norm((got - want)[part]), np.linalg.norm(want[part])
            if not error <= within * size + 1.01 * step * math.sqrt(part.sum()):
                raise ValueError(f"wrong gradient: row {k} is off by {error:.2g} where its norm is {size:.2g}")


def free() -> None:
    """Give memory back between works: the libraries share one GPU."""
    gc.collect()
    torch.compiler.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
