"""Numba's device arrays, in its CUDA simulator too: there they are NumPy's memory, on a GPU that is called 0.

What Numba takes for device memory is read on the GPU: mapped and managed arrays as well, though NumPy could read them.
Pinned arrays are plain NumPy arrays, and so on the CPU.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from numba import config, cuda

from . import DeviceMemory, View
from .gpu import dtype_name, numpy_dtype

SIMULATED = bool(config.ENABLE_CUDASIM)


def view(array: Any, differentiable: bool = False) -> View:
    if not getattr(array, "__cuda_ndarray__", False):
        raise TypeError(f"a {type(array).__name__} is not an array")
    if not _addressable(array):
        raise TypeError(
            "a part of a mapped or managed array, of which Numba knows no address on the GPU: pass the whole array, or "
            "read the part on the CPU with numpy.asarray"
        )
    memory = DeviceMemory(
        address=address(array),
        shape=tuple(array.shape),
        strides=array.strides,
        itemsize=array.dtype.itemsize,
        device=_device(array),
        owner=array,
        writable=getattr(array.flags, "writeable", True),  # device arrays have a dict of two other flags
        stream=stream(array) or None,
    )
    return View(memory, dtype_name(array.dtype))


def new(shape: tuple[int, ...], dtype: str, device: int, stream: Any = 0) -> Any:
    """New memory on a GPU."""
    with cuda.gpus[device]:
        return cuda.device_array(shape, numpy_dtype(dtype), stream=stream)


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    return new(shape, dtype, _device(like), like.stream)


def stream(like: Any) -> int:
    return 0 if SIMULATED or not like.stream else int(like.stream.handle)


def key(array: Any) -> Hashable | None:
    if not getattr(array, "__cuda_ndarray__", False) or not _addressable(array) or stream(array):
        return None
    return cuda, array.dtype, array.shape, array.strides, _device(array)


def address(array: Any) -> int:
    if SIMULATED:
        return int(array.__array_interface__["data"][0])
    return array.device_ctypes_pointer.value or 0


def _addressable(array: Any) -> bool:
    return SIMULATED or hasattr(array, "gpu_data")


def _device(array: Any) -> int:
    return 0 if SIMULATED else int(array.gpu_data.context.device.id)
