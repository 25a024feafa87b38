"""Each contender's call for a piece of work on the CPU, over one pair of NumPy arrays that all of them share."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import formulas
import numpy as np
from cases import Case, aligned

import fastloss

Call = Callable[[], Any]  # gives a loss, or (loss, gradient)

# Arrays of the input's size that an expression holds at its worst, float32 unless the library computes in halves.
TEMPORARIES = {"NumPy": 3, "torch": 2, "torch.compile": 1, "JAX": 2}

COMPILING = ("fastloss", "torch.compile", "JAX")  # whose first call takes longer


class AbsentError(Exception):
    """A contender that cannot take part on this machine, and why."""


@contextmanager
def _quiet() -> Any:
    """torch and JAX warn about their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def _torch() -> Any:
    try:
        with _quiet():
            import torch
    except ImportError:
        raise AbsentError("torch is not installed") from None
    torch.set_num_threads(fastloss.get_num_threads())
    return torch


def tensor(array: np.ndarray) -> Any:
    """The same memory as a tensor."""
    torch = _torch()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _through_autograd(loss: Callable[[Any, Any], Any], x: Any, y: Any) -> Call:
    torch = _torch()
    recorded = x.detach().requires_grad_()

    def run() -> Any:
        value = loss(recorded, y)
        return value.detach(), torch.autograd.grad(value, recorded)[0]

    return run


def _ours(case: Case, x: np.ndarray, y: np.ndarray) -> Call:
    function = getattr(fastloss, case.loss)
    if not case.gradient:
        return lambda: function(x, y)
    both = fastloss.value_and_grad(function)
    if case.returned:
        return lambda: both(x, y)
    grad = aligned(x.shape, x.dtype)
    return lambda: both(x, y, grad_out=grad)


def _numpy(case: Case, x: np.ndarray, y: np.ndarray) -> Call:
    function = (formulas.value_and_gradient if case.gradient else formulas.value)(case)
    return lambda: function(np, x, y)


def _eager(case: Case, x: np.ndarray, y: np.ndarray) -> Call:
    loss, tensors = getattr(_torch().nn.functional, case.loss), (tensor(x), tensor(y))
    return _through_autograd(loss, *tensors) if case.gradient else lambda: loss(*tensors)


def _compiled(case: Case, x: np.ndarray, y: np.ndarray) -> Call:
    torch = _torch()
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        raise AbsentError("torch.compile needs a C++ compiler, and none was found")
    with _quiet():
        torch.compiler.reset()  # the shapes of earlier cases would count against its limit of recompilations
        eager, tensors = getattr(torch.nn.functional, case.loss), (tensor(x), tensor(y))
        loss = torch.compile(lambda x, y: eager(x, y), dynamic=False)
        call = _through_autograd(loss, *tensors) if case.gradient else lambda: loss(*tensors)
        call()
    return call


def _jax(case: Case, x: np.ndarray, y: np.ndarray) -> Call:
    try:
        with _quiet():
            import jax
    except ImportError:
        raise AbsentError("JAX is not installed") from None
    function = formulas.value(case)

    def loss(x: Any, y: Any) -> Any:
        return function(jax.numpy, x, y)

    compiled = jax.jit(jax.value_and_grad(loss) if case.gradient else loss)
    # Without JAX's 64-bit mode int64 is none of its dtypes.
    arrays = [jax.device_put(array) for array in (x, y.astype(np.int32) if case.indices else y)]
    return lambda: jax.block_until_ready(compiled(*arrays))


_MAKERS: dict[str, Callable[[Case, np.ndarray, np.ndarray], Call]] = {
    "fastloss": _ours,
    "NumPy": _numpy,
    "torch": _eager,
    "torch.compile": _compiled,
    "JAX": _jax,
}


def contender(name: str, case: Case, x: np.ndarray, y: np.ndarray) -> Call:
    """Raises AbsentError, MemoryError before the machine runs out, or whatever goes wrong in that library."""
    need = TEMPORARIES.get(name, 0) * x.size * max(4, x.itemsize)
    if need > available():
        raise MemoryError(f"would need {need / 1e9:.0f} GB more")
    return _MAKERS[name](case, x, y)


def available() -> float:
    """Bytes of memory that may be taken, leaving something to others; infinite where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            facts = dict(line.split(":") for line in lines)
    except OSError:
        return float("inf")
    return 0.8 * 1024 * int(facts["MemAvailable"].split()[0])


# ---- what they return


def check(case: Case, got: Any, ours: Any) -> None:
    """Raises ValueError where a contender computes something else than fastloss does: then its time means nothing."""
    # Wide enough for 10^9 numbers added up in float32, and for logarithms of softmax rounded to halves.
    within = 0.02 if case.dtype == "float32" else 0.1
    pairs = zip(got, ours, strict=True) if case.gradient else [(got, ours)]
    for what, (theirs, expected) in zip(("value", "gradient"), pairs, strict=False):
        a, b = (_first_numbers(array) for array in (theirs, expected))
        if not np.abs(a - b).max() <= within * np.abs(b).max():
            raise ValueError(f"wrong {what}: {a[0]:.6g}, expected {b[0]:.6g}")


def _first_numbers(array: Any) -> np.ndarray:
    part = array.reshape(-1)[:4096] if getattr(array, "shape", ()) else array
    if type(part).__module__.partition(".")[0] == "torch":
        part = part.float().numpy()
    return np.atleast_1d(np.asarray(part)).astype(np.float64)


def free() -> None:
    """Give memory back between cases."""
    gc.collect()
    if "torch" in sys.modules:
        with _quiet():
            sys.modules["torch"].compiler.reset()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
