"""The losses as operators of torch's dispatcher, `torch.ops.fastloss`: what torch.compile and export keep in a graph.

A loss has two: its value, and its gradients for a gradient of what comes after, which run the kernel anew. A compiled
backward pass cannot look whether that gradient is 1, and to read and write a gradient once more in order to scale it
takes longer than to read the input again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gradients
from .spec import SPECS, Spec


class Operators(NamedTuple):
    """The two operators of a loss."""

    value: Any
    backward: Any


def call(spec: Spec, tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Tensor:
    """A loss by way of its operators."""
    found: Tensor = OPERATORS[spec.name].value(*tensors, *(options[name] for name in spec.options))
    return found


class _Definition:
    """How the operators of one loss are made. Their arguments are its tensors and then its options; those of
    `backward` come between the gradient of what comes after and which gradients are wanted, a bool for each tensor."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        tensors = [f"Tensor{'?' if k > 1 else ''} {name}" for k, name in enumerate(spec.tensors)]
        self.schema = ", ".join([*tensors, *(f"{kind} {name}" for name, (kind, _) in spec.options.items())])

    def split(self, arguments: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments as tensors and options."""
        n = len(self.spec.tensors)
        return list(arguments[:n]), dict(zip(self.spec.options, arguments[n:], strict=True))

    def names(self, wanted: Sequence[bool]) -> tuple[str, ...]:
        """The tensors that a gradient is wanted for."""
        return tuple(name for name, want in zip(self.spec.tensors, wanted, strict=True) if want)

    def value(self, *arguments: Any) -> Tensor:
        (input, target, *rest), options = self.split(arguments)
        plain = gradients.detached((input, target, *rest))
        found: Tensor = self.spec.loss(*plain[:2], **self.spec.given(plain, options))
        return found

    def fake_value(self, *arguments: Any) -> Tensor:
        (input, target, *_), options = self.split(arguments)
        self.spec.loss.call(None, None, **self.spec.given((), options))  # wrong options are told while tracing
        dtype = self.spec.result_dtype(input, target, options["dtype"])
        shape = self.spec.losses_shape(input, target)
        if options["reduction"] != "none":
            return input.new_empty((), dtype=dtype)
        like = target if self.spec.classes else input
        if like.shape == torch.Size(shape):
            return torch.empty_like(like, dtype=dtype, device=input.device)
        return input.new_empty(shape, dtype=dtype)

    def keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.options = self.split(inputs)
        ctx.save_for_backward(*tensors)

    def differentiate(self, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        wanted = [bool(need) for need in ctx.needs_input_grad[: len(self.spec.tensors)]]
        run = OPERATORS[self.spec.name].backward
        grads = iter(run(grad_output, *ctx.saved_tensors, *ctx.options.values(), wanted))
        return *(next(grads) if want else None for want in wanted), *(None for _ in ctx.options)

    def backward(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        tensors, options = self.split(arguments[:-1])
        return list(gradients.by_kernel(self.spec, tensors, options, self.names(arguments[-1]), grad_output))

    def fake_backward(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        tensors, options = self.split(arguments[:-1])
        dtype = self.spec.result_dtype(tensors[0], tensors[1], options["dtype"])
        wanted = [tensor for tensor, want in zip(tensors, arguments[-1], strict=True) if want]
        return [torch.empty_like(t, dtype=t.dtype if t.is_floating_point() else dtype) for t in wanted]

    def keep_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_output, *arguments, ctx.names_wanted = inputs
        tensors, ctx.options = self.split(arguments)
        ctx.save_for_backward(grad_output, *tensors)

    def differentiate_twice(self, ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
        """Through the composition: a kernel for second derivatives would serve few."""
        grad_output, *tensors = (None if t is None else t.detach() for t in ctx.saved_tensors)
        needs = ctx.needs_input_grad[: 1 + len(tensors)]
        names = self.names(ctx.names_wanted)
        with torch.enable_grad():
            inputs = [
                t.requires_grad_() if t is not None and (need or want) else t
                for t, need, want in zip((grad_output, *tensors), needs, (True, *ctx.names_wanted), strict=True)
            ]
            first = gradients.by_composite(self.spec, inputs[1:], ctx.options, names, inputs[0])
            of = [t for t, need in zip(inputs, needs, strict=True) if need]
            recorded = [(f, g) for f, g in zip(first, grads, strict=True) if f.requires_grad and g is not None]
            found = iter(
                torch.autograd.grad([f for f, _ in recorded], of, [g for _, g in recorded], allow_unused=True)
            )
        return *(next(found) if need else None for need in needs), *(None for _ in ctx.options), None


def _define(spec: Spec) -> Operators:
    """Register the operators of a loss."""
    d = _Definition(spec)

    def operator(name: str, run: Callable[..., Any], schema: str) -> Any:
        return torch.library.custom_op(f"fastloss::{name}", run, mutates_args=(), schema=schema)

    value = operator(spec.name, d.value, f"({d.schema}) -> Tensor")
    value.register_fake(d.fake_value)
    value.register_autograd(d.differentiate, setup_context=d.keep)
    backward = operator(
        f"{spec.name}_backward", d.backward, f"(Tensor grad_output, {d.schema}, bool[] wanted) -> Tensor[]"
    )
    backward.register_fake(d.fake_backward)
    backward.register_autograd(d.differentiate_twice, setup_context=d.keep_backward)
    for op in (value, backward):
        op.register_vmap(_one_by_one(op))
    return Operators(value, backward)


def _one_by_one(op: Any) -> Callable[..., Any]:
    """A batching rule: the operator for each member of the batch."""

    def rule(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
        def member(k: int) -> list[Any]:
            return [
                a if dim is None else a.select(dim, k) for a, dim in zip(arguments, in_dims, strict=True)
            ]

        results = [op(*member(k)) for k in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return [torch.stack(parts) for parts in zip(*results, strict=True)], [0] * len(results[0])

    return rule


OPERATORS = {spec.name: _define(spec) for spec in SPECS}
