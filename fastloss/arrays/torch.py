"""torch tensors on the CPU and on NVIDIA GPUs, without a copy."""

from __future__ import annotations

from collections.abc import Hashable
from operator import methodcaller
from typing import Any

import numpy as np
import torch

from . import DeviceMemory, View

KEYED = (torch.Tensor,)
address = methodcaller("data_ptr")


def view(array: Any, differentiable: bool = False) -> View:
    kind = array.device.type
    if kind not in ("cpu", "cuda"):
        raise TypeError(
            f"the tensor is on {array.device}; fastloss reads torch tensors on the CPU and on NVIDIA GPUs: call .cpu() "
            "first"
        )
    if kind == "cuda" and torch.version.hip:  # ROCm builds call AMD's GPUs cuda as well
        raise TypeError("the tensor is on an AMD GPU; fastloss reads torch tensors on the CPU and on NVIDIA GPUs")
    if array.layout is not torch.strided:
        raise TypeError(f"the tensor's layout is {array.layout}; call .to_dense() first")
    if array.requires_grad and torch.is_grad_enabled() and not differentiable:
        raise TypeError(
            "the tensor requires grad, and this function does not record it for autograd: use fastloss.torch's, or "
            "fastloss.value_and_grad for the gradient, or pass tensor.detach()"
        )
    negated = array.is_neg()
    array = array.detach().resolve_neg()  # a copy where the sign was pending: nothing written to it would be seen
    if kind == "cuda":
        size = array.element_size()
        memory = DeviceMemory(
            address=array.data_ptr(),
            shape=tuple(array.shape),
            strides=tuple(step * size for step in array.stride()),
            itemsize=size,
            device=array.get_device(),
            owner=array,
            writable=not negated,
        )
        return View(memory, str(array.dtype).removeprefix("torch."))
    if array.dtype is torch.bfloat16:
        data, name = array.view(torch.uint16).numpy(), "bfloat16"
    else:
        data = array.numpy()
        name = data.dtype.name
    if negated:
        data.flags.writeable = False
    return View(data, name)


def wrap(data: np.ndarray, dtype: str, like: Any) -> Any:
    tensor = torch.from_numpy(data)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)


def stream(like: Any) -> int:
    return int(torch.cuda.current_stream(like.device).cuda_stream)


def key(array: Any) -> Hashable | None:
    if (array.requires_grad and torch.is_grad_enabled()) or array.is_neg() or array.layout is not torch.strided:
        return None
    if array.is_cpu:
        return array.dtype, array.shape, array.stride()
    if array.is_cuda:
        return array.dtype, array.shape, array.stride(), array.get_device()
    return None
