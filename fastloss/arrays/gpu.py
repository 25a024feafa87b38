"""What the adapters of GPU arrays share."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

LEGACY_STREAM = 1  # the default stream by CUDA's and DLPack's handle; 0 may mean another, by how a program was built


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name of a NumPy dtype, which must have the GPU's byte order: only the CPU's kernels swap bytes."""
    if not dtype.isnative:
        native = dtype.newbyteorder("=")
        raise TypeError(f"the array's byte order {dtype.str} is not the GPU's: convert it, for example to {native.str}")
    return str(dtype.name)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name."""
    if name == "bfloat16":
        from ml_dtypes import bfloat16

        name = bfloat16
    return np.dtype(name)


def packed(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides, in bytes, of an array in C order.

    >>> packed((2, 3, 4), 8)
    (96, 32, 8)
    """
    strides: list[int] = []
    for extent in reversed(shape):
        strides.append(itemsize)
        itemsize *= extent
    return tuple(reversed(strides))
