"""Any array that speaks DLPack, on the CPU or on an NVIDIA GPU: read without a copy, answered in its own library where
that follows the array API or has `from_dlpack`; else by a NumPy array, or a Numba device array on a GPU."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..runtime import require_cuda
from . import DeviceMemory, View
from . import numpy as _numpy
from .gpu import LEGACY_STREAM, packed

SYNCHRONISES = True

_HOST = (1, 3, 11)  # DLPack's numbers of the CPU's memory, and of what CUDA and ROCm have pinned there
_CUDA = (2, 13)  # a GPU's, and what it shares with the CPU (managed)
_ELSEWHERE = {4: "an OpenCL device", 7: "a Vulkan device", 8: "Metal", 10: "an AMD GPU", 14: "a oneAPI device"}


def view(array: Any, differentiable: bool = False) -> View:
    name = type(array).__name__
    try:
        kind = int(array.__dlpack_device__()[0]) if hasattr(array, "__dlpack_device__") else _HOST[0]
        if kind in _CUDA:
            return _on_gpu(array)
        if kind in _HOST:
            data = np.from_dlpack(array)
            return View(data, data.dtype.name)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be read through DLPack: {error}") from error
    where = _ELSEWHERE.get(kind, f"a device of DLPack's type {kind}")
    raise TypeError(f"{name} is on {where}; fastloss reads arrays on the CPU and on NVIDIA GPUs: copy it to one")


def _on_gpu(array: Any) -> View:
    require_cuda()
    from cuda.core.utils import StridedMemoryView

    source = StridedMemoryView.from_dlpack(array, LEGACY_STREAM)  # which then waits for the array's own stream
    dtype, shape = source.dtype, source.shape
    strides = source.strides  # None, or in elements
    memory = DeviceMemory(
        address=source.ptr,
        shape=shape,
        strides=packed(shape, dtype.itemsize) if strides is None else tuple(s * dtype.itemsize for s in strides),
        itemsize=dtype.itemsize,
        device=source.device_id,
        owner=source,
        writable=not source.readonly,
        stream=LEGACY_STREAM,
    )
    return View(memory, dtype.name)


def wrap(data: np.ndarray, dtype: str, like: Any) -> Any:
    namespace = _namespace(like)
    if namespace is None:
        return _numpy.wrap(data, dtype, like)
    _require(namespace, dtype)
    made = namespace.from_dlpack(data)
    device = getattr(like, "device", None)  # a library may have several in the CPU's memory
    return made if device is None or made.device == device else made.to_device(device)


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    if not hasattr(like, "__array_namespace__"):
        from .numba_cuda import new

        return new(shape, dtype, like.__dlpack_device__()[1])
    namespace = like.__array_namespace__()
    _require(namespace, dtype)
    return namespace.empty(shape, dtype=getattr(namespace, dtype), device=like.device)


def _namespace(like: Any) -> Any:
    """What an array's library calls `from_dlpack`; None where it has none."""
    if hasattr(like, "__array_namespace__"):
        return like.__array_namespace__()
    roots = (sys.modules.get(kind.__module__.partition(".")[0]) for kind in type(like).__mro__)
    return next((root for root in roots if hasattr(root, "from_dlpack")), None)


def _require(namespace: Any, dtype: str) -> None:
    """A library without a dtype cannot hold the result."""
    if not hasattr(namespace, dtype):
        raise TypeError(f"{namespace.__name__} has no {dtype}, which the result would have: ask for another dtype")


def stream(like: Any) -> int:
    return LEGACY_STREAM
