"""JAX arrays on the CPU and on NVIDIA GPUs, read without a copy.

JAX shows its streams to nobody. Reading goes through DLPack, which makes the stream we name wait for JAX's; a result is
JAX's own new memory, written before anybody has seen it.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import jax
import numpy as np

from . import DeviceMemory, Engine, View, dlpack
from . import numpy as _numpy
from .dlpack import stream
from .gpu import numpy_dtype

__all__ = ["SYNCHRONISES", "empty", "engine", "stream", "view", "wrap"]

SYNCHRONISES = True

# Without it JAX makes 32-bit numbers of 64-bit ones. It moved in JAX 0.8.
_enable_x64: Any = (jax if hasattr(jax, "enable_x64") else import_module("jax.experimental")).enable_x64


def view(array: Any, differentiable: bool = False) -> View:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            "the array is being traced by JAX and holds no numbers yet: the loss functions and value_and_grad take "
            "it, everything else is called outside jax.jit, jax.grad and jax.vmap"
        )
    if not hasattr(array, "devices"):
        raise TypeError(f"a {type(array).__name__} is not an array")
    platform = _device(array).platform
    if platform == "cpu":
        return _numpy.view(np.asarray(array))
    if platform != "gpu":
        raise TypeError(f"the array is on a {platform}; fastloss reads JAX arrays on the CPU and on NVIDIA GPUs")
    found = dlpack.view(array)
    if isinstance(found.data, DeviceMemory):
        found = found._replace(data=replace(found.data, writable=False))  # JAX's arrays never change
    return found


def engine(array: Any) -> Engine | None:
    """Losses of arrays that are being traced become operations of the traced program."""
    if not isinstance(array, jax.core.Tracer):
        return None
    from ..jax.rules import ENGINE

    return ENGINE


def wrap(data: np.ndarray, dtype: str, like: Any) -> Any:
    with _enable_x64(True):
        return jax.device_put(_numpy.wrap(data, dtype, like), _device(like), may_alias=True)


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    with _enable_x64(True):
        made = jax.numpy.empty(shape, numpy_dtype(dtype), device=_device(like))
    return made.block_until_ready()  # JAX fills it with zeros, on a stream of its own


def _device(array: Any) -> Any:
    devices = array.devices()
    if len(devices) != 1:
        raise TypeError(
            f"the array is spread over {len(devices)} devices: pass a part of it (array.addressable_shards), or bring "
            "it to one with jax.device_put"
        )
    return next(iter(devices))
