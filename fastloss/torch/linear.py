"""linear_cross_entropy of torch's tensors: torch multiplies, autograd records one node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks, dispatch
from ..linear import CHUNK_BYTES, DIFFERENTIABLE, LinearCall
from ..reductions import Exact, rounded
from . import composite

_CUDA_CHUNK_BYTES = 512 << 20  # of logits on a GPU, whose matmul wants more rows
_BLOCK_BYTES = 4 << 20  # of a block of classes, on the CPU, where halves are summed in float32
_HALVES = (torch.float16, torch.bfloat16)


class TorchCall(LinearCall):
    """A call on tensors: they are multiplied on their device, in their dtype or autocast's."""

    matmul: torch.dtype | None = None  # the dtype that they are multiplied in, where it is known before

    def evaluate(self) -> Tensor:
        """The loss, recorded for autograd where a tensor requires grad."""
        self._take()
        tensors = [self.tensors.get(name) for name in DIFFERENTIABLE]
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            from .linear_ops import call

            return call(self)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return self.composition(tensors, *self.dtypes())
        self.prepare(differentiable=True)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            found: Tensor = _Recorded.apply(self, *tensors)
            return found
        return self.run((), None)[0]

    def value_and_grad(self, names: Sequence[str], grad_output: Any, grad_outs: Sequence[Any]) -> tuple[Any, list[Any]]:
        self.prepared()
        upstream = None if grad_output is None else self._tensor(grad_output, "grad_output").detach()
        if upstream is not None and tuple(upstream.shape) != (self.losses_shape if self._none else ()):
            raise ValueError(
                f"grad_output has shape {tuple(upstream.shape)}, expected {self.losses_shape if self._none else ()}"
            )
        for name, out in zip(names, grad_outs, strict=True):
            if out is not None and name in self.views:
                view = self.views[name]
                checks.writable(dispatch.view(out, "grad_out", differentiable=True), "grad_out", view.shape, view.dtype)
        value, grads = self.run(names, upstream)
        for k, out in enumerate(grad_outs):
            if out is not None:
                with torch.no_grad():
                    self._tensor(out, "grad_out").copy_(grads[k])
                grads[k] = out
        return value, grads

    @property
    def _none(self) -> bool:
        return self.options.reduction == "none"

    def _take(self) -> None:
        """The arguments as tensors."""
        self.tensors = {name: self._tensor(array, name) for name, array in self.arrays.items() if array is not None}
        self.arrays = {name: self.tensors.get(name) for name in self.arrays}
        self.target = self._constant(self.target, "target")
        self.weight = None if self.weight is None else self._constant(self.weight, "weight")

    def _constant(self, array: Any, name: str) -> Tensor:
        tensor = self._tensor(array, name)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise TypeError(f"{name} requires grad, but linear_cross_entropy has no gradient for it: detach it")
        return tensor.detach()

    def _tensor(self, array: Any, name: str) -> Tensor:
        if isinstance(array, Tensor):
            return array
        view = dispatch.view(array, name)
        if view.device is not None:
            raise TypeError(
                f"{name} is a {type(array).__name__} on GPU {view.device}, but input a torch tensor: make it one by "
                "torch.from_dlpack"
            )
        tensor = torch.from_numpy(np.array(view.data))
        return tensor.view(torch.bfloat16) if view.dtype == "bfloat16" else tensor

    def prepare(self, differentiable: bool) -> None:
        super().prepare(differentiable)
        self.device = self.tensors["input"].device
        kind = self.device.type
        self.matmul_dtype, self.result = self.dtypes()
        # sums of the weight's gradient
        self.sum_dtype = torch.float32 if self.matmul_dtype in _HALVES else self.matmul_dtype
        flat = self.target.reshape(self.samples, *self.target.shape[len(self.losses_shape) :])
        self.kept: Tensor | None = None
        if kind == "cpu":
            self.flat_target = flat
            kept = self.count(self.target, self.weight)
            self.kept = None if kept is None else torch.from_numpy(kept)
        else:
            self._count_on_gpu(flat)

    def prepared(self) -> TorchCall:
        """This call, checked."""
        self._take()
        self.prepare(differentiable=True)
        return self

    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the products, and of the loss."""
        x, own = self.tensors["input"], {tensor.dtype for tensor in self.tensors.values()}
        asked = getattr(torch, self.options.dtype) if self.options.dtype else None
        if self.matmul is not None:
            return self.matmul, asked or x.dtype
        if torch.is_autocast_enabled(x.device.type) and torch.float64 not in own:
            return torch.get_autocast_dtype(x.device.type), asked or torch.float32
        if len(own) > 1:
            told = ", ".join(f"{name} has dtype {tensor.dtype}" for name, tensor in self.tensors.items())
            raise TypeError(f"{told}: torch multiplies tensors of one dtype, or mixed ones under torch.autocast")
        if self.target.is_floating_point():
            return x.dtype, asked or composite.result_dtype(x, self.target)
        return x.dtype, asked or x.dtype

    def _count_on_gpu(self, flat: Tensor) -> None:
        """The same without waiting: rows that do not count take part with zeros."""
        self.flat_target, self.invalid = flat, None
        total: Any = self.samples
        count: Any = self.samples
        if not self.by_probability:
            if checks.requested() if self.options.check is None else self.options.check:
                self.count(self.target.cpu(), None)
            index = flat.to(torch.int64)
            ignored = index == self.options.ignore_index
            self.invalid = ((index < 0) | (index >= self.classes)) & ~ignored
            self.kept = ~(ignored | self.invalid)
            self.flat_target = torch.where(self.invalid, self.options.ignore_index, index)
            total = count = self.kept.sum()
            if self.weight is not None:
                own = self.weight.to(torch.float64)[index.clamp(0, max(self.classes - 1, 0))]
                total = torch.where(self.kept, own, 0.0).sum()
        self.divide(total, count)

    def run(self, names: Sequence[str], upstream: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients by the arguments `names`, times `upstream`."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._run(names, upstream)

    def _run(self, names: Sequence[str], upstream: Any) -> tuple[Tensor, list[Tensor]]:
        none, on_cpu = self._none, self.device.type == "cpu"
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise ValueError(f"the gradient of {missing[0]} was asked for, but there is no {missing[0]}")
        x = self.tensors["input"].detach().reshape(self.samples, self.features)
        matrix = self.tensors["linear_weight"].detach().to(self.matmul_dtype)
        bias = self.tensors["linear_bias"].detach().to(self.matmul_dtype) if "linear_bias" in self.tensors else None
        sums = {name: self._zeros(name) for name in names}
        scale: Any = None
        if names:
            scale = torch.ones((), dtype=torch.float64, device=self.device) if upstream is None else upstream.double()
            scale = scale.expand(self.losses_shape).reshape(-1) if none else scale / self.divisor
        losses = torch.zeros(self.samples if none else 0, dtype=torch.float64, device=self.device)
        total: Any = Exact() if on_cpu else torch.zeros((), dtype=torch.float64, device=self.device)
        rows_at_once = self.chunk_rows(matrix.element_size(), CHUNK_BYTES if on_cpu else _CUDA_CHUNK_BYTES)
        chunk = matrix.new_empty(min(rows_at_once, self.samples), self.classes)
        for rows in self._parts(len(chunk)):
            part = x[rows].to(self.matmul_dtype)
            if not on_cpu and self.kept is not None:
                part = torch.where(self.kept[rows, None], part, 0)
            logits = chunk[: len(part)]
            if bias is None:
                torch.mm(part, matrix.t(), out=logits)
            else:
                torch.addmm(bias, part, matrix.t(), out=logits)
            value = self.chunk_loss(logits, self.flat_target[rows], scale[rows] if none and names else scale)
            if none:
                losses[rows] = value
            else:
                total += Exact(value.item()) if on_cpu else value
            if "linear_bias" in sums:
                sums["linear_bias"] += logits.sum(0, dtype=sums["linear_bias"].dtype)
            if "linear_weight" in sums:
                self._add_products(logits, part, sums["linear_weight"])
            if "input" in sums:
                self._to_input(logits, matrix, sums["input"], rows)
        value = self._value(losses if none else total)
        grads = [sums[name].view_as(self.tensors[name]).to(self.tensors[name].dtype) for name in names]
        return value, grads

    def _parts(self, step: int) -> Iterator[Any]:
        """The rows of each chunk; on the CPU, those that are ignored are in none."""
        if self.kept is None or self.device.type != "cpu":
            yield from (slice(start, start + step) for start in range(0, self.samples, max(step, 1)))
        else:
            yield from (self.kept[start : start + step] for start in range(0, len(self.kept), max(step, 1)))

    def _zeros(self, name: str) -> Tensor:
        """Memory that a gradient is summed in."""
        like = self.tensors[name]
        if name == "input":
            return like.new_zeros((self.samples, self.features))
        dtype = torch.float64 if name == "linear_bias" and self.device.type == "cpu" else self.sum_dtype
        return torch.zeros(like.shape, dtype=dtype, device=self.device)

    def _add_products(self, grad: Tensor, x: Tensor, total: Tensor) -> None:
        """total += grad.T @ x; halves by blocks of classes, whose products are added in float32."""
        if total.dtype == x.dtype:
            total.addmm_(grad.t(), x)
            return
        block = max(1, _BLOCK_BYTES // max(1, self.features * x.element_size()))
        block = block if self.device.type == "cpu" else max(1, self.classes)
        for start in range(0, self.classes, block):
            total[start : start + block] += torch.mm(grad[:, start : start + block].t(), x)

    def _to_input(self, grad: Tensor, matrix: Tensor, total: Tensor, rows: Any) -> None:
        if total.dtype == grad.dtype and isinstance(rows, slice):
            torch.mm(grad, matrix, out=total[rows])
        else:
            total[rows] = torch.mm(grad, matrix).to(total.dtype)
        if self.device.type != "cpu" and self.kept is not None:
            total[rows].masked_fill_(~self.kept[rows, None], 0)  # whatever the weight holds

    def _value(self, found: Any) -> Tensor:
        """The loss out of the samples' losses, or of their sum."""
        mean = self.options.reduction == "mean"
        if isinstance(found, Exact):
            number = found.over(self.divisor) if mean else float(found)
            value = torch.from_numpy(rounded(number, str(self.result).removeprefix("torch.")))
            return value.view(self.result)
        if self._none:
            if self.device.type != "cpu" and self.invalid is not None:
                found = found.masked_fill(self.invalid, torch.nan)
            return found.to(self.result).reshape(self.losses_shape)
        if self.invalid is not None:
            found = torch.where(self.invalid.any(), torch.nan, found)
        return (found / self.divisor).to(self.result)

    def composition(self, tensors: Sequence[Tensor | None], matmul: torch.dtype, result: torch.dtype) -> Tensor:
        """The loss by torch's own differentiable operations, which hold all logits."""
        x, matrix, bias = (None if tensor is None else tensor.to(matmul) for tensor in tensors)
        if x is None or matrix is None:
            raise TypeError("input and linear_weight must be arrays")
        options, samples = self.options, x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        target = self.target.reshape(len(x), *self.target.shape[len(samples) :])
        if not target.is_floating_point():  # what an ignored row holds must not reach the weight's gradient
            x = torch.where((target == options.ignore_index)[:, None], 0.0, x)
        logits = torch.nn.functional.linear(x, matrix, bias)
        loss = composite.cross_entropy(
            logits,
            target,
            self.weight,
            reduction=options.reduction,
            dtype=result,
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            lse_square_scale=options.lse_square_scale,
            softcap=options.softcap,
        )
        return loss.reshape(samples) if options.reduction == "none" else loss


class _Recorded(torch.autograd.Function):
    """A call whose gradients are computed together with its value, and handed over by the backward pass.

    Where they cannot be known in the forward pass (each sample's loss has a gradient of its own), or would be rounded
    before a loss scale lifts them (float16), and in a second backward pass, the chunks are computed anew.
    """

    @staticmethod
    def forward(ctx: Any, call: TorchCall, *tensors: Tensor | None) -> Tensor:
        ctx.call, ctx.grads = call, None
        ctx.wanted = [name for name, need in zip(DIFFERENTIABLE, ctx.needs_input_grad[1:], strict=True) if need]
        ctx.save_for_backward(*tensors)
        if call.options.reduction == "none" or call.matmul_dtype is torch.float16:
            return call.run((), None)[0]
        value, ctx.grads = call.run(ctx.wanted, None)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        tensors = ctx.saved_tensors  # torch's own error where the graph is gone, or a tensor was changed
        grads, ctx.grads = ctx.grads, None
        if torch.is_grad_enabled():  # create_graph
            grads = _by_composition(ctx.call, tensors, ctx.wanted, grad_output)
        elif grads is None:
            _, grads = ctx.call.run(ctx.wanted, grad_output)
        elif grad_output.device.type != "cpu" or grad_output.item() != 1:
            grads = [grad.mul_(grad_output) for grad in grads]  # nobody else holds them
        found = dict(zip(ctx.wanted, grads, strict=True))
        return None, *(found.get(name) for name in DIFFERENTIABLE)


def _by_composition(
    call: TorchCall, tensors: Sequence[Tensor | None], wanted: Sequence[str], grad_output: Tensor
) -> Sequence[Tensor]:
    """Gradients that autograd records."""
    # a tensor that is given twice has two gradients
    own = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    loss = call.composition(own, call.matmul_dtype, call.result)
    of = [tensor for name, tensor in zip(DIFFERENTIABLE, own, strict=True) if name in wanted and tensor is not None]
    found: Sequence[Tensor] = torch.autograd.grad(loss, of, grad_output, create_graph=True)
    return found
