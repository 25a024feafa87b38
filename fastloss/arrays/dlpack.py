"""Any CPU array that speaks DLPack: read without a copy, answered in its own library where that reads DLPack too."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import View
from . import numpy as _numpy


def view(array: Any, differentiable: bool = False) -> View:
    try:
        data = np.from_dlpack(array)
    except (BufferError, RuntimeError, ValueError) as error:
        raise TypeError(f"{type(array).__name__} cannot be read through DLPack on the CPU: {error}") from error
    return View(data, data.dtype.name)


def wrap(data: np.ndarray, dtype: str, like: Any) -> Any:
    namespace = getattr(like, "__array_namespace__", None)
    if namespace is None or dtype == "bfloat16":  # NumPy's own DLPack knows no bfloat16
        return _numpy.wrap(data, dtype, like)
    return namespace().from_dlpack(data)
