"""NumPy arrays and scalars, ml_dtypes' bfloat16 among them."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import View


def view(array: Any, differentiable: bool = False) -> View:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("a masked array has a mask, which a loss would ignore; fill or compress it")
    data = np.asarray(array)
    name = data.dtype.name
    return View(data.view(np.uint16) if name == "bfloat16" else data, name)


def wrap(data: np.ndarray, dtype: str, like: Any) -> Any:
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16

        data = data.view(bfloat16)
    return data[()]  # a NumPy scalar where there are no dimensions
