"""Calls of the pointwise losses: broadcasting, weights, domains, and gradients of input and target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import checks, dispatch
from .arrays import View
from .backends import cpu
from .backends.layout import as_floats
from .call import Call, Result, Shape
from .kernels.pointwise import SUMS, Pointwise, PointwiseVariant
from .reductions import Sums, to_memory

if TYPE_CHECKING:
    from .backends.cuda.pointwise import PointwiseRun

_SCAN = 1 << 20  # elements looked at together for the first invalid one


class PointwiseCall(Call):
    """One call of a pointwise loss. `operands` are the loss's own arrays, `weight` multiplies each element's loss."""

    def __init__(
        self,
        loss: Pointwise,
        input: Any,
        target: Any,
        reduction: str,
        *,
        weight: Any = None,
        weight_broadcasts: bool = False,
        weighted_mean: bool = False,
        broadcasts: bool = True,
        operands: Sequence[Any] = (),
        parameters: Sequence[float] = (),
        dtype: Any = None,
        out: Any = None,
        check: bool | None = None,
    ) -> None:
        self.task, self.check = None, check
        self.loss, self.input, self.target, self.weight = loss, input, target, weight
        self.operands, self.parameters = operands, parameters
        self.weight_broadcasts, self.broadcasts = weight_broadcasts, broadcasts
        self.reduction, self.out, self.like = reduction, out, input
        self.weighted_mean = weighted_mean and weight is not None
        self.dtype = None if dtype is None else checks.dtype_name(dtype)

    def prepare(self, differentiable: bool) -> None:
        self.x = x = dispatch.view(self.input, "input", differentiable)
        self.y = y = dispatch.view(self.target, "target", differentiable)
        if x.weak and not y.weak:
            self.like = self.target
        self._result_dtype = checks.promote((x, y), ("input", "target"))
        if self.broadcasts:
            self.shape = checks.broadcast_shape(x, y)
        else:
            checks.same_shape(y, "target", x.shape, "input")
            self.shape = x.shape
        self.inputs = [x, y]
        for name, operand in zip(self.loss.operands, self.operands, strict=True):
            view = dispatch.view(operand, name, differentiable)
            checks.numeric(view, name)
            checks.broadcastable(view, name, self.shape)
            self.inputs.append(view)
        self.w: View | None = None
        if self.weight is not None:
            self.w = dispatch.view(self.weight, "weight", differentiable)
            checks.numeric(self.w, "weight")
            if self.weight_broadcasts:
                checks.broadcastable(self.w, "weight", self.shape)
            else:
                checks.same_shape(self.w, "weight", self.shape, "input")

    @property
    def result_dtype(self) -> str:
        return self._result_dtype

    @property
    def losses_shape(self) -> Shape:
        return self.shape

    @property
    def losses_like(self) -> np.ndarray:
        data: np.ndarray = self.x.data
        return data

    @property
    def named_sources(self) -> dict[str, View]:
        named = dict(zip(("input", "target", *self.loss.operands), self.inputs, strict=True))
        return named | {"weight": self.w} if self.w else named

    @property
    def given(self) -> tuple[Any, ...]:
        return self.input, self.target, *self.operands, self.weight

    def on_gpu(self, device: int) -> PointwiseRun:
        from .backends.cuda.pointwise import PointwiseRun

        return PointwiseRun(self, device)

    @property
    def differentiable(self) -> dict[str, tuple[View, Any]]:
        arguments = {"input": (self.x, self.input)}
        return arguments | ({"target": (self.y, self.target)} if self.loss.grad_target else {})

    def run(self, losses: View | None, careful: bool) -> Sums:
        if careful:
            self._check()
        return self._launch(losses, {})

    def run_gradients(self, losses: View | None, grads: dict[str, Result], upstream: Any) -> Sums:
        none = self.reduction == "none"
        factor = 1.0 if none else upstream * self.scale(self._weight_sum(), self.samples, self.rows)
        if self.out is not None or any(grad.given is not None for grad in grads.values()):
            self._check()
        # where an argument was broadcast, its gradient is the sum over what it was broadcast to
        sinks = {
            name: View(grad.data, grad.dtype)
            if grad.data.shape == self.shape
            else View(np.empty(self.shape, np.float64), "float64")
            for name, grad in grads.items()
        }
        sums = self._launch(losses, sinks, factor, upstream if none else None)
        for name, grad in grads.items():
            if sinks[name].data is not grad.data:
                grad.data[...] = _unbroadcast(sinks[name].data, grad.data.shape, grad.dtype)
        return sums

    @property
    def samples(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def _weight_sum(self) -> float:
        if self.w is None or not self.weighted_mean:
            return float(self.samples)
        return float(np.broadcast_to(as_floats(self.w), self.shape).sum(dtype=np.float64))

    @property
    def _compute(self) -> str:
        """The dtype that kernels compute in."""
        return "float64" if self.loss.wide or self._result_dtype == "float64" else "float32"

    def _check(self) -> None:
        """Raise for what lies outside the loss's domain, before anything is written."""
        if self.loss.valid:
            pair = (self.x, self.y)
            dtypes = tuple(view.dtype for view in pair)
            variant = cpu.pointwise_variant(self.loss, self._compute, dtypes, domain=True)
            self._run(variant, [view.data for view in pair], [], 1.0)

    def _launch(
        self, losses: View | None, grads: dict[str, View], scale: float = 1.0, upstream: np.ndarray | None = None
    ) -> Sums:
        """Run the kernel that these options need."""
        grad, grad_target = grads.get("input"), grads.get("target")
        variant = cpu.pointwise_variant(
            self.loss,
            self._compute,
            tuple(view.dtype for view in self.inputs),
            self.w.dtype if self.w else None,
            upstream is not None,
            losses.dtype if losses else None,
            grad.dtype if grad else None,
            grad_target.dtype if grad_target else None,
        )
        sources = [view.data for view in self.sources] + ([] if upstream is None else [upstream])
        raw = self._run(variant, sources, [view.data for view in (losses, grad, grad_target) if view], scale)
        if self.w is None:
            raw[SUMS.index("weight")] = self.samples
        return Sums(raw, self.samples, self.rows)

    def _run(
        self, variant: PointwiseVariant, sources: Sequence[np.ndarray], sinks: Sequence[np.ndarray], scale: float
    ) -> list[float]:
        """A kernel's sums over all elements."""
        shape = self.shape
        sources = [array if array.shape == shape else np.broadcast_to(array, shape) for array in sources]
        self.task = cpu.pointwise_task(variant, sources, sinks, [scale, *self.parameters])
        raw = self.task.run() if self.task else [0.0] * len(SUMS)
        if raw[SUMS.index("invalid")]:
            self.raise_invalid(self.x, self.y)
        return raw

    @property
    def repeats(self) -> bool:
        return self.w is None and not self.loss.operands and self.x.shape == self.y.shape

    def plannable(self) -> tuple[int, int] | None:
        return (0, 1) if self.repeats else None

    def raise_invalid(self, x: View, y: View) -> None:
        """Find and name the first element outside the domain, which the kernel only noticed; on the CPU."""
        x, y = (view._replace(data=np.broadcast_to(view.data, self.shape)) for view in (x, y))
        for start in range(0, self.samples, _SCAN):
            places = np.unravel_index(np.arange(start, min(start + _SCAN, self.samples)), self.shape)
            for name, view in (("input", x), ("target", y)):
                numbers = as_floats(View(view.data[places], view.dtype))
                bad = ~((numbers >= 0) & (numbers <= 1))
                if bad.any():
                    k = int(bad.argmax())
                    template = f"{name} {numbers[k]!s} at position {{position}} is outside [0, 1]"
                    raise checks.positioned(checks.DomainError, template, [place[k] for place in places])


def _unbroadcast(grad: np.ndarray, shape: Shape, dtype: str) -> np.ndarray:
    """Sum a float64 gradient over the dimensions that `shape` was broadcast along."""
    lead = grad.ndim - len(shape)
    axes = (*range(lead), *(lead + k for k, extent in enumerate(shape) if extent == 1 and grad.shape[lead + k] != 1))
    total = grad.sum(axis=axes).reshape(shape)
    return to_memory(total, dtype)
