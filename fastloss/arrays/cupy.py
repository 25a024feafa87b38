"""CuPy arrays, bfloat16 among them where CuPy has it (from 14.0, with ml_dtypes)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import cupy

from . import DeviceMemory, View
from .gpu import dtype_name, numpy_dtype


def view(array: Any, differentiable: bool = False) -> View:
    if not isinstance(array, cupy.ndarray):
        raise TypeError(f"a {type(array).__name__} is not a cupy.ndarray")
    if cupy.cuda.runtime.is_hip:
        raise TypeError("the array is on an AMD GPU; fastloss reads CuPy arrays on NVIDIA GPUs")
    name = dtype_name(array.dtype)
    memory = DeviceMemory(array.data.ptr, array.shape, array.strides, array.itemsize, array.device.id, array)
    return View(memory, name)


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    with cupy.cuda.Device(like.device.id):
        return cupy.empty(shape, numpy_dtype(dtype))


def stream(like: Any) -> int:
    return int(cupy.cuda.get_current_stream(like.device.id).ptr)


def key(array: Any) -> Hashable | None:
    if type(array) is not cupy.ndarray:
        return None
    return cupy, array.dtype, array.shape, array.strides, array.device.id


def address(array: Any) -> int:
    return int(array.data.ptr)
