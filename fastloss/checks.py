"""Every validation and every message. What passes here is trusted below."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import View
from .kernels.storage import FLOATS, INTEGERS

REDUCTIONS = ("none", "mean", "sum")

Shape = tuple[int, ...]
Position = tuple[int, ...]


class BroadcastWarning(UserWarning):
    """Input and target have different shapes and were broadcast against each other."""


class PositionedError:
    """Mixed into an error about one element: where it is, so that who passed a part can say where in the whole."""

    template: str
    position: Position

    def relocate(self, offset: int) -> str:
        """The message with the first coordinate moved by `offset`."""
        first, *rest = self.position or (0,)
        return self.template.format(position=(first + offset, *rest))


class ClassIndexError(PositionedError, IndexError):
    """A class index outside 0 .. n_classes - 1 that is not ignore_index."""


class DomainError(PositionedError, ValueError):
    """A number outside the domain of a loss."""


def positioned(kind: type[Any], template: str, position: Sequence[int]) -> Exception:
    """An error whose message names a position."""
    place = tuple(int(k) for k in position)
    error: Exception = kind(template.format(position=place))
    error.template, error.position = template, place  # type: ignore[attr-defined]
    return error


def requested() -> bool:
    """Whether FASTLOSS_CHECK asks for errors about elements on a GPU, for which calls wait."""
    return os.environ.get("FASTLOSS_CHECK", "") not in ("", "0")


def reduction_of(size_average: bool | None, reduce: bool | None, reduction: str, allowed: Sequence[str]) -> str:
    """The reduction that torch's legacy arguments and `reduction` ask for together."""
    if size_average is not None or reduce is not None:
        average = size_average is None or size_average
        legacy = ("mean" if average else "sum") if reduce is None or reduce else "none"
        warnings.warn(
            f"size_average and reduce are deprecated: use reduction={legacy!r}", DeprecationWarning, stacklevel=5
        )
        return legacy
    if reduction not in allowed:
        raise ValueError(f"reduction is {reduction!r}, expected one of {', '.join(map(repr, allowed))}")
    return reduction


def option(name: str, value: float, low: float, high: float = math.inf, open_low: bool = False) -> float:
    """A number in [low, high], or (low, high] with `open_low`."""
    number = float(value)
    if not (low < number if open_low else low <= number) or not number <= high:
        bounds = f"{'greater than' if open_low else 'at least'} {low:g}" + (
            f" and at most {high:g}" if high < math.inf else ""
        )
        raise ValueError(f"{name} is {value!r}, expected a number {bounds}")
    return number


def int64(name: str, value: int) -> int:
    """An integer that kernels can hold."""
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value}, expected an integer of 64 bits")
    return value


def dtype_name(dtype: Any) -> str:
    """The name of a floating dtype given as a string, a NumPy dtype or type, or a torch dtype."""
    name = str(dtype) if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    name = name.rpartition(".")[2]
    if name not in FLOATS:
        raise TypeError(f"dtype is {dtype!r}, expected one of {', '.join(FLOATS)}")
    return name


def numeric(view: View, name: str) -> None:
    """Real numbers only."""
    if view.dtype not in FLOATS and view.dtype not in INTEGERS and view.dtype != "bool":
        raise TypeError(f"{name} has dtype {view.dtype}, expected one of {', '.join(FLOATS)}")


def floating(view: View, name: str) -> None:
    """Floating-point numbers only."""
    if view.dtype not in FLOATS:
        example = "float32" if view.dtype != "float128" else "float64"
        raise TypeError(
            f"{name} has dtype {view.dtype}, expected one of {', '.join(FLOATS)}; cast it, for example to {example}"
        )


def promote(views: Sequence[View], names: Sequence[str]) -> str:
    """The dtype of the result, as torch promotes: floats win over integers, float16 with bfloat16 is float32."""
    strong = [view for view in views if not view.weak] or list(views)
    for view, name in zip(views, names, strict=True):
        numeric(view, name)
    floats = {view.dtype for view in strong if view.dtype in FLOATS}
    floats = floats or {view.dtype for view in views if view.dtype in FLOATS}
    if not floats:
        raise TypeError(
            f"{names[0]} has dtype {views[0].dtype} and {names[1]} {views[1].dtype}; a loss needs floating-point "
            "numbers: cast one of them, for example to float32"
        )
    if "float64" in floats:
        return "float64"
    return floats.pop() if len(floats) == 1 else "float32"


def same_shape(view: View, name: str, shape: Shape, of: str) -> None:
    """`view` must have exactly `shape`."""
    if view.shape != shape:
        raise ValueError(f"{name} has shape {view.shape}, expected {shape} to match {of} of shape {shape}")


def broadcast_shape(input: View, target: View, stacklevel: int = 5) -> Shape:
    """The common shape of input and target, with a warning where they differ."""
    if input.shape == target.shape:
        return input.shape
    try:
        shape = np.broadcast_shapes(input.shape, target.shape)
    except ValueError:
        raise ValueError(
            f"target has shape {target.shape}, expected {input.shape} to match input of shape {input.shape}"
        ) from None
    warnings.warn(
        f"target of shape {target.shape} is broadcast against input of shape {input.shape}; give both the same shape "
        "to be sure that this is meant",
        BroadcastWarning,
        stacklevel=stacklevel,
    )
    return shape


def broadcastable(view: View, name: str, shape: Shape) -> None:
    """`view` must broadcast to `shape` without enlarging it."""
    try:
        enlarged = np.broadcast_shapes(view.shape, shape) != shape
    except ValueError:
        enlarged = True
    if enlarged:
        raise ValueError(f"{name} has shape {view.shape}, expected one that broadcasts to the input's {shape}")


def writable(view: View, name: str, shape: Shape, dtype: str) -> None:
    """A result's memory that the caller gave: shape, dtype, and that it may be written."""
    if view.shape != shape:
        raise ValueError(f"{name} has shape {view.shape}, expected {shape}")
    if view.dtype != dtype:
        raise TypeError(f"{name} has dtype {view.dtype}, expected {dtype}")
    if not view.writable:
        raise ValueError(f"{name} is read-only")
