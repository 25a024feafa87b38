"""Any array with `__cuda_array_interface__`, read without a copy. Results are Numba's device arrays, which have the
interface as well: whose library the array is of cannot be known."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..runtime import require_cuda
from . import DeviceMemory, View, dlpack
from .dlpack import wrap
from .gpu import LEGACY_STREAM, dtype_name, packed

__all__ = ["SYNCHRONISES", "empty", "stream", "view", "wrap"]

SYNCHRONISES = True


def view(array: Any, differentiable: bool = False) -> View:
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:  # of a library whose other arrays are on a GPU
        return dlpack.view(array, differentiable)
    if interface.get("mask") is not None:
        raise TypeError("the array has a mask, which a loss would ignore; fill or compress it")
    dtype = np.dtype(interface["typestr"])
    if dtype.kind == "V":  # bfloat16 has no type string, in DLPack it has a code
        if hasattr(array, "__dlpack__"):
            return dlpack.view(array, differentiable)
        raise TypeError(
            f"the type string {interface['typestr']!r} of the array's __cuda_array_interface__ names no dtype, nor can "
            "it for bfloat16: pass an array that speaks DLPack"
        )
    address, read_only = interface["data"]
    shape = tuple(interface["shape"])
    memory = DeviceMemory(
        address=address or 0,
        shape=shape,
        strides=tuple(interface.get("strides") or packed(shape, dtype.itemsize)),
        itemsize=dtype.itemsize,
        device=_device_of(address),
        owner=array,
        writable=not read_only,
        stream=interface.get("stream"),
    )
    return View(memory, dtype_name(dtype))


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    from .numba_cuda import new

    return new(shape, dtype, view(like).data.device)


def stream(like: Any) -> int:
    """The stream that the array names: work that its owner adds there later waits for ours."""
    return like.__cuda_array_interface__.get("stream") or LEGACY_STREAM


def _device_of(address: int) -> int:
    """CUDA's number of the GPU that an address belongs to; the current one for arrays without elements."""
    require_cuda()
    from .numba_cuda import SIMULATED

    if SIMULATED:
        return 0
    from cuda.bindings import driver
    from cuda.core import Device

    if not address:
        return int(Device().device_id)
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    status, device = driver.cuPointerGetAttribute(attribute, address)
    if status:
        raise TypeError(f"the array's address {address:#x} is not memory that CUDA knows ({status.name})")
    return int(device)
