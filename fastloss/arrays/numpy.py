"""NumPy arrays and scalars, ml_dtypes' bfloat16 among them."""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np

from . import View

KEYED = (np.ndarray,)
key = attrgetter("dtype", "shape", "strides")


def view(array: Any, differentiable: bool = False) -> View:
    if type(array) is not np.ndarray:
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError("a masked array has a mask, which a loss would ignore; fill or compress it")
        array = np.asarray(array)
    name = _name(array.dtype)
    return View(array.view(np.uint16) if name == "bfloat16" else array, name)


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


@cache
def _name(dtype: np.dtype[Any]) -> str:
    """dtype.name, which NumPy computes anew each time: 1.5 us."""
    return str(dtype.name)


def wrap(data: np.ndarray, dtype: str, like: Any) -> Any:
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16

        data = data.view(bfloat16)
    return data[()]  # a NumPy scalar where there are no dimensions
