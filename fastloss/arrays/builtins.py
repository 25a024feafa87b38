"""Python numbers, lists and tuples: read as NumPy would, giving way to the dtype of the arrays beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import View
from .numpy import wrap

__all__ = ["view", "wrap"]


def view(array: Any, differentiable: bool = False) -> View:
    data = np.asarray(array)
    if data.dtype.kind not in "biuf":
        raise TypeError(f"a {type(array).__name__} must hold numbers in rows of one length, got {array!r:.60}")
    return View(data, data.dtype.name, weak=True)
