"""The list of checks that gpu.py runs beside tests/gpu, and what they are written with.

Each raises AssertionError with what was found, or NotRunError with a reason, or returns what is worth knowing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from gpu_arrays import OURS_WITHIN, SIMULATED, exact_mean, near, number, to_numpy
from gpu_cases import Work
from gpu_contenders import ours

Found = str | None


class NotRunError(Exception):
    """A check that cannot be made here, and why."""


CHECKS: dict[str, Callable[[], Found]] = {}


def check(name: str, simulated: bool = False) -> Callable[[Callable[[], Found]], Callable[[], Found]]:
    """Register a check; `simulated`: it also runs in Numba's simulator."""

    def register(function: Callable[[], Found]) -> Callable[[], Found]:
        @functools.wraps(function)
        def guarded() -> Found:
            if SIMULATED and not simulated:
                raise NotRunError("needs a GPU")
            return function()

        CHECKS[name] = guarded
        return guarded

    return register


def run(name: str) -> dict[str, Any]:
    """Outcome and message of one check."""
    try:
        return {"outcome": "passed", "message": CHECKS[name]()}
    except NotRunError as error:
        return {"outcome": "not run", "message": str(error)}
    except AssertionError as error:
        return {"outcome": "failed", "message": str(error)[:2000]}


def both(work: Work) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The loss, and its value and gradient."""
    yield work.name, ours(work)
    yield f"{work.name}, with gradient", ours(replace(work, gradient=True))


def value_of(result: Any) -> float:
    return number(result[0] if isinstance(result, tuple) else result)


def expect_value(what: str, got: float, work: Work, x: torch.Tensor, y: torch.Tensor) -> None:
    want = exact_mean(work, x, y)
    assert near(got, want, OURS_WITHIN[work.dtype]), f"{what}: {got:.9g}, expected {want:.9g}"


def imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotRunError(f"not installed: {error}") from None


def bits(result: Any) -> bytes:
    return b"".join(to_numpy(part).tobytes() for part in (result if isinstance(result, tuple) else (result,)))
