"""What autograd records of an eager call: a loss whose gradients the kernel wrote while it computed the value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import gradients
from .spec import Spec


class Fused(torch.autograd.Function):
    """A loss with the gradients that its backward pass hands over.

    Where they cannot be known in the forward pass (each sample's loss has a gradient of its own), or would be rounded
    before a loss scale lifts them (float16), the backward pass runs the kernel.
    """

    @staticmethod
    def forward(ctx: Any, spec: Spec, options: dict[str, Any], wanted: tuple[str, ...], *tensors: Tensor | None) -> Any:
        """The loss; `wanted` names the arguments that a gradient is wanted for."""
        ctx.spec, ctx.options, ctx.wanted, ctx.grads = spec, options, wanted, None
        ctx.save_for_backward(*tensors)
        given = spec.given(tensors, options)  # autograd records nothing in here
        dtypes = [t.dtype for name, t in zip(spec.tensors, tensors, strict=True) if t is not None and name in wanted]
        if options["reduction"] == "none" or torch.float16 in dtypes:
            return spec.loss(*tensors[:2], **given)
        value, ctx.grads = spec.fused(wanted)(*tensors[:2], **given)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """The gradients, None for what has none."""
        spec, options, wanted = ctx.spec, ctx.options, ctx.wanted
        grads: Sequence[Tensor]
        if torch.is_grad_enabled():  # create_graph
            grads = gradients.by_composite(spec, ctx.saved_tensors, options, wanted, grad_output)
        elif ctx.grads is None:
            grads = gradients.by_kernel(spec, ctx.saved_tensors, options, wanted, grad_output)
        else:
            grads, keep = ctx.grads, _graph_is_kept()
            if not keep:
                ctx.grads = None  # nobody else holds them then: autograd makes this memory .grad
            grads = gradients.scaled(grads, grad_output, keep)
        found = dict(zip(wanted, grads, strict=True))
        return None, None, None, *(found.get(name) for name in spec.tensors)


def _graph_is_kept() -> bool:
    """Whether another backward pass may follow this one (retain_graph)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(ask()) if ask else True
