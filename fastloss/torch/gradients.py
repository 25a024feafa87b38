"""Gradients of a loss: by its kernel, or by torch's own operations where they are to be differentiated again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .spec import Spec

Tensors = Sequence[Tensor | None]


def detached(tensors: Tensors) -> list[Tensor | None]:
    """The tensors without what autograd knows of them."""
    return [None if tensor is None else tensor.detach() for tensor in tensors]


def by_kernel(
    spec: Spec, tensors: Tensors, options: Mapping[str, Any], wanted: tuple[str, ...], grad_output: Tensor
) -> Sequence[Tensor]:
    """Gradients by the arguments `wanted`, for this gradient of what comes after."""
    input, target, *rest = detached(tensors)
    given = spec.given((input, target, *rest), options)
    _, grads = spec.fused(wanted)(input, target, **given, grad_output=grad_output.detach())
    found: Sequence[Tensor] = grads
    return found


def by_composite(
    spec: Spec, tensors: Tensors, options: Mapping[str, Any], wanted: Sequence[str], grad_output: Tensor
) -> Sequence[Tensor]:
    """The same, recorded for autograd."""
    with torch.enable_grad():
        # a tensor that is given twice has two gradients
        own = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        for name, tensor in zip(spec.tensors, own, strict=True):
            if name in wanted and tensor is not None and not tensor.requires_grad:
                tensor.requires_grad_()
        loss = spec.composite(*own, **options)
    of = [tensor for name, tensor in zip(spec.tensors, own, strict=True) if name in wanted]
    found: Sequence[Tensor] = torch.autograd.grad(loss, of, grad_output, create_graph=True)
    return found


def scaled(grads: Sequence[Tensor], grad_output: Tensor, keep: bool) -> list[Tensor]:
    """Gradients times a number, which mostly is 1: in their own memory, unless that is to be kept."""
    if keep:
        return [grad * grad_output for grad in grads]
    if grad_output.is_cpu and not torch._C._are_functorch_transforms_active() and grad_output.item() == 1:
        return list(grads)
    return [grad.mul_(grad_output) for grad in grads]
