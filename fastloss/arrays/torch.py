"""torch tensors on the CPU, without a copy."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from . import View


def view(array: Any, differentiable: bool = False) -> View:
    if array.device.type != "cpu":
        raise TypeError(f"the tensor is on {array.device}; fastloss reads torch tensors on the CPU")
    if array.layout is not torch.strided:
        raise TypeError(f"the tensor's layout is {array.layout}; call .to_dense() first")
    if array.requires_grad and torch.is_grad_enabled() and not differentiable:
        raise TypeError(
            "the tensor requires grad, and fastloss does not record it for autograd: use fastloss.value_and_grad for "
            "the gradient, or pass tensor.detach()"
        )
    array = array.detach().resolve_neg()
    if array.dtype is torch.bfloat16:
        return View(array.view(torch.uint16).numpy(), "bfloat16")
    data = array.numpy()
    return View(data, data.dtype.name)


def wrap(data: np.ndarray, dtype: str, like: Any) -> Any:
    tensor = torch.from_numpy(data)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def key(array: Any) -> Hashable | None:
    if type(array) is not torch.Tensor or array.requires_grad or array.is_neg():
        return None
    if not array.is_cpu or array.layout is not torch.strided:
        return None
    return torch, array.dtype, array.shape, array.stride()


def address(array: Any) -> int:
    return int(array.data_ptr())
