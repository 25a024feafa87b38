"""linear_cross_entropy as operators of torch's dispatcher: what torch.compile and export keep in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear import DIFFERENTIABLE, Options
from .linear import TorchCall

_ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, str reduction, "
    "int ignore_index, float label_smoothing, float lse_square_scale, float? softcap, ScalarType dtype, "
    "int? chunk_size, bool? check, ScalarType matmul, bool[] wanted"
)
_TENSORS = 5
_REDUCTION, _MATMUL, _WANTED = 5, 13, 14  # their places among the arguments


def call(made: TorchCall) -> Tensor:
    """A call by way of its operators."""
    tensors = [made.tensors.get(name) for name in DIFFERENTIABLE]
    options, (matmul, dtype) = made.options, made.dtypes()
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]
    found: Tensor = torch.ops.fastloss.linear_cross_entropy(
        *tensors,
        made.target,
        made.weight,
        options.reduction,
        options.ignore_index,
        options.label_smoothing,
        options.lse_square_scale,
        options.softcap,
        dtype,
        options.chunk_size,
        options.check,
        matmul,
        wanted,
    )[0]
    return found


def _made(arguments: Sequence[Any]) -> TorchCall:
    x, matrix, bias, target, weight = (None if t is None else t.detach() for t in arguments[:_TENSORS])
    reduction, ignore_index, smoothing, z_scale, softcap, dtype, chunk_size, check = arguments[_TENSORS:_MATMUL]
    name = str(dtype).removeprefix("torch.")
    options = Options(reduction, ignore_index, smoothing, z_scale, softcap, name, chunk_size, check)
    made = TorchCall(x, matrix, target, bias, weight, options)
    made.matmul = arguments[_MATMUL]
    return made


def _names(arguments: Sequence[Any]) -> list[str]:
    return [name for name, want in zip(DIFFERENTIABLE, arguments[_WANTED], strict=True) if want]


def _late(arguments: Sequence[Any]) -> bool:
    return arguments[_REDUCTION] == "none" or arguments[_MATMUL] is torch.float16


def _value(*arguments: Any) -> list[Tensor]:
    value, grads = _made(arguments).prepared().run([] if _late(arguments) else _names(arguments), None)
    return [value, *grads]


def _fake_grads(arguments: Sequence[Any]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, want in zip(arguments[:3], arguments[_WANTED], strict=True) if want]


def _fake_value(*arguments: Any) -> list[Tensor]:
    x, dtype = arguments[0], arguments[_TENSORS + 5]
    value = x.new_empty(x.shape[:-1] if arguments[_REDUCTION] == "none" else (), dtype=dtype)
    return [value] if _late(arguments) else [value, *_fake_grads(arguments)]


def _backward(grad_output: Tensor, *arguments: Any) -> list[Tensor]:
    return _made(arguments).prepared().run(_names(arguments), grad_output)[1]


def _fake_backward(grad_output: Tensor, *arguments: Any) -> list[Tensor]:
    return _fake_grads(arguments)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.options = inputs[_TENSORS:]
    ctx.late = _late(inputs)
    ctx.save_for_backward(*(inputs[:_TENSORS] if ctx.late else output[1:]))


def _differentiate(ctx: Any, grad_outputs: Sequence[Tensor]) -> tuple[Any, ...]:
    grad_output, saved = grad_outputs[0], ctx.saved_tensors
    if ctx.late:
        grads = torch.ops.fastloss.linear_cross_entropy_backward(grad_output, *saved, *ctx.options)
    else:
        grads = [(grad * grad_output).to(grad.dtype) for grad in saved]
    rest = iter(grads)
    found = [next(rest) if want else None for want in ctx.options[-1]]
    return *found, *(None for _ in range(_WANTED + 1 - len(found)))


def _define() -> None:
    operator = torch.library.custom_op
    name = "fastloss::linear_cross_entropy"
    value = operator(name, _value, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor[]")
    value.register_fake(_fake_value)
    value.register_autograd(_differentiate, setup_context=_keep)
    schema = f"(Tensor grad_output, {_ARGUMENTS}) -> Tensor[]"
    operator(f"{name}_backward", _backward, mutates_args=(), schema=schema).register_fake(_fake_backward)


_define()
