"""Calls of the losses over classes: cross-entropy of logits and negative log-likelihood."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import checks, dispatch
from .arrays import View
from .backends import cpu
from .backends.layout import as_floats
from .call import Call, Result, Shape
from .kernels.pointwise import SUMS
from .kernels.records import INDEX, LOGITS, PROBABILITIES
from .kernels.storage import INTEGERS
from .reductions import Sums, to_memory

if TYPE_CHECKING:
    from .backends.cuda.classification import NLLRun, SoftmaxRun

_BLOCK = 1 << 20  # elements that NumPy looks at together


class _ClassCall(Call):
    """What both losses share: classes along axis 1, indices, class weights, ignored samples."""

    _alternative = ""  # to class indices, for messages
    _may_be_empty = False  # whether there may be samples without classes
    by_probability = False  # whether the target holds class probabilities
    weighted_mean = True

    def __init__(
        self,
        input: Any,
        target: Any,
        reduction: str,
        *,
        weight: Any,
        ignore_index: int,
        dtype: Any,
        out: Any,
        check: bool | None,
    ) -> None:
        self.task, self.check = None, check
        self.input, self.target, self.weight = input, target, weight
        self.reduction, self.out, self.like = reduction, out, input
        self.dtype = None if dtype is None else checks.dtype_name(dtype)
        self.ignore_index = checks.int64("ignore_index", operator.index(ignore_index))

    def prepare(self, differentiable: bool) -> None:
        self.x = dispatch.view(self.input, "input", differentiable)
        self.t = dispatch.view(self.target, "target", differentiable)
        if self.x.weak and not self.t.weak and self.t.dtype not in INTEGERS:
            self.like = self.target
        checks.floating(self.x, "input")
        if not self.x.shape:
            raise ValueError("input has shape (), expected (C), (N, C) or (N, C, d1, ..., dK)")
        axis = 0 if len(self.x.shape) == 1 else 1
        self.classes = self.x.shape[axis]
        self._result_dtype = self.x.dtype
        self._losses_shape = (*self.x.shape[:axis], *self.x.shape[axis + 1 :])
        self.w: View | None = None
        if self.weight is not None:
            self.w = dispatch.view(self.weight, "weight", differentiable)
            checks.numeric(self.w, "weight")
            checks.same_shape(self.w, "weight", (self.classes,), f"the {self.classes} classes of input")
        if self.x.device is None:  # a row loss over (C) is one over (1, C)
            self.logits = self.x.data[None] if axis == 0 else self.x.data
        self._check_target()
        if self.classes == 0 and 0 not in self._losses_shape and not self._may_be_empty:
            raise ValueError(f"input has shape {self.x.shape}: there are samples, but no classes")

    def _check_target(self) -> None:
        if self.t.dtype not in INTEGERS:
            raise TypeError(
                f"target has dtype {self.t.dtype} and shape {self.t.shape}, expected class indices of an integer dtype "
                f"and shape {self._losses_shape}{self._alternative}"
            )
        if self.t.shape != self._losses_shape:
            raise ValueError(
                f"target has shape {self.t.shape}, expected {self._losses_shape} to match input of shape {self.x.shape}"
            )

    @property
    def result_dtype(self) -> str:
        return self._result_dtype

    @property
    def losses_shape(self) -> Shape:
        return self._losses_shape

    @property
    def losses_like(self) -> np.ndarray:
        data: np.ndarray = self.t.data
        return data

    @property
    def named_sources(self) -> dict[str, View]:
        return {"input": self.x, "target": self.t} | ({"weight": self.w} if self.w else {})

    @property
    def given(self) -> tuple[Any, ...]:
        return self.input, self.target, self.weight

    @property
    def index(self) -> np.ndarray:
        """Class indices of shape (N, d1, ...)."""
        data: np.ndarray = self.t.data
        return data if data.ndim else data[None]

    @property
    def compute(self) -> str:
        return "float64" if self.x.dtype == "float64" else "float32"

    def with_samples(self, array: np.ndarray | None) -> np.ndarray | None:
        """An array of the input's or the losses' shape, with a dimension of one sample where the input is (C)."""
        return array[None] if array is not None and self.x.data.ndim == 1 else array

    def class_weights(self, dtype: str) -> np.ndarray | None:
        """Class weights as one piece of memory of the compute type."""
        return None if self.w is None else np.ascontiguousarray(as_floats(self.w), dtype)

    def raise_invalid(self, target: View) -> None:
        """The error about the first index that is no class, of a target copied to the CPU's memory."""
        other = copy.copy(self)
        other.t, other.w = target, None
        other.check_indices()

    def check_indices(self) -> tuple[float, int]:
        """Sum of weights and number of the samples that count; IndexError where an index is no class."""
        weights = self.class_weights("float64")
        total, count = 0.0, 0
        for start, part in _blocks(self.index):
            ignored = part == self.ignore_index
            bad = ((part < 0) | (part >= self.classes)) & ~ignored
            if bad.any():
                raise self._index_error(start + int(bad.argmax()), part[bad][0])
            kept = part[~ignored] if ignored.any() else part
            count += kept.size
            total += float(weights[kept].sum()) if weights is not None else kept.size
        return total, count

    def _index_error(self, flat: int, value: Any) -> Exception:
        place = np.unravel_index(flat, self.index.shape)
        position = [int(k) for k in place] if self.t.data.ndim else []
        template = f"target {int(value)} at position {{position}} is out of range for {self.classes} classes"
        return checks.positioned(checks.ClassIndexError, template, position)

    @property
    def samples(self) -> int:
        return math.prod(self._losses_shape)

    @property
    def rows(self) -> int:
        return self.x.shape[0] if len(self.x.shape) > 1 else 1

    def _run(self, task: cpu.Task | None) -> Sums:
        self.task = task
        raw = task.run() if task else [0.0] * len(SUMS)
        if raw[SUMS.index("invalid")]:
            self.check_indices()
        return Sums(raw, self.samples, self.rows)

    @property
    def repeats(self) -> bool:
        return self.w is None

    def plannable(self) -> tuple[int, int] | None:
        own = _native(self.logits) is self.logits  # and no copy
        return (LOGITS, INDEX) if self.repeats and own else None


class SoftmaxCall(_ClassCall):
    """One call of cross_entropy."""

    def __init__(
        self,
        input: Any,
        target: Any,
        reduction: str,
        *,
        weight: Any,
        ignore_index: int,
        label_smoothing: float,
        lse_square_scale: float,
        softcap: float | None,
        dtype: Any,
        out: Any,
        check: bool | None,
    ) -> None:
        shared = {"weight": weight, "ignore_index": ignore_index, "dtype": dtype, "out": out, "check": check}
        super().__init__(input, target, reduction, **shared)
        self.label_smoothing, self.lse_square_scale, self.softcap = label_smoothing, lse_square_scale, softcap

    def on_gpu(self, device: int) -> SoftmaxRun:
        from .backends.cuda.classification import SoftmaxRun

        return SoftmaxRun(self, device)

    def _check_target(self) -> None:
        self._alternative = f", or class probabilities of the shape of input, {self.x.shape}"
        self.by_probability = self.t.shape == self.x.shape and self.t.dtype not in INTEGERS
        if not self.by_probability:
            if self.t.shape == self.x.shape:
                raise TypeError(
                    f"target has dtype {self.t.dtype} and the shape of input, which means class probabilities: they "
                    f"must be floating-point; class indices have shape {self._losses_shape}"
                )
            super()._check_target()
        elif self.ignore_index >= 0:
            raise ValueError(
                f"ignore_index is {self.ignore_index}, but target holds class probabilities: nothing to ignore"
            )
        else:
            checks.floating(self.t, "target")
            self._result_dtype = checks.promote((self.x, self.t), ("input", "target"))
        self.weighted_mean = not self.by_probability

    @property
    def num_classes(self) -> int:
        """How many classes share what label smoothing takes from the target."""
        return self.classes

    @property
    def losses_like(self) -> np.ndarray:
        return np.empty(()) if self.by_probability else self.t.data

    @property
    def differentiable(self) -> dict[str, tuple[View, Any]]:
        arguments = {"input": (self.x, self.input)}
        if self.by_probability:
            arguments["target"] = self.t, self.target
            if self.w is not None:
                arguments["weight"] = self.w, self.weight
        return arguments

    def plannable(self) -> tuple[int, int] | None:
        return (LOGITS, PROBABILITIES if self.by_probability else INDEX) if self.repeats else None

    @property
    def compute(self) -> str:
        # tanh(x / softcap) * softcap in float32 would lose the last bits of the logits
        wide = self.softcap is not None or (self.by_probability and self.t.dtype == "float64")
        return "float64" if wide else super().compute

    def run(self, losses: View | None, careful: bool) -> Sums:
        if careful and not self.by_probability:
            self.check_indices()
        return self._launch(losses, {})

    def run_gradients(self, losses: View | None, grads: dict[str, Result], upstream: Any) -> Sums:
        total, count = (0.0, math.prod(self._losses_shape)) if self.by_probability else self.check_indices()
        none = self.reduction == "none"
        factor = 1.0 if none else upstream
        scale = 1.0 if none else upstream * self.scale(total, count, self.rows)
        scale_z = factor / count if self.reduction == "mean" and count else factor
        sinks = {name: View(grad.data, grad.dtype) for name, grad in grads.items() if name != "weight"}
        if "weight" in grads:  # before anything is overwritten
            weight_grad = self._weight_gradient(scale, upstream if none else None)
        sums = self._launch(losses, sinks, scale, scale_z, upstream if none else None)
        if "weight" in grads:
            grads["weight"].data[...] = to_memory(weight_grad, grads["weight"].dtype)
        return sums

    def _launch(
        self,
        losses: View | None,
        grads: dict[str, View],
        scale: float = 1.0,
        scale_z: float = 1.0,
        upstream: np.ndarray | None = None,
        shard: Sequence[np.ndarray | None] = (),
    ) -> Sums:
        """Run the kernel that these options need. `shard`: the arrays of a shard's kernel from `records.PULL` on."""
        grad, grad_target = grads.get("input"), grads.get("target")
        weights = self.class_weights(self.compute)
        options = (
            self.compute,
            self.x.dtype,
            self.t.dtype if self.by_probability else None,
            "int64" if self.by_probability else self.index.dtype.name,
            weights is not None,
            self.label_smoothing > 0,
            self.lse_square_scale > 0,
            self.softcap is not None,
            upstream is not None,
            losses.dtype if losses else None,
            grad.dtype if grad else None,
            grad_target.dtype if grad_target else None,
            bool(shard),
        )

        arrays = [
            self.logits,
            self.with_samples(self.t.data) if self.by_probability else None,
            self.with_samples(grad.data if grad else None),
            self.with_samples(grad_target.data if grad_target else None),
            None if self.by_probability else self.index,
            self.with_samples(upstream),
            self.with_samples(losses.data if losses else None),
            *map(self.with_samples, shard),
        ]
        exact = self.class_weights("float64")
        total_weight = float(self.classes if exact is None else exact.sum())
        keep, share = 1.0 - self.label_smoothing, self.label_smoothing / max(self.num_classes, 1)
        parameters = [scale, scale_z, keep, share, total_weight, self.lse_square_scale, self.softcap or 0.0]
        return self._run(cpu.softmax_task(options, arrays, weights, self.ignore_index, parameters))

    def _weight_gradient(self, scale: float, upstream: np.ndarray | None) -> np.ndarray:
        """sum over samples of q[c] (lse - x[c]), for class probabilities q."""
        smoothing = self.label_smoothing
        # d loss / d q[c] is keep * weight[c] * (lse - x[c]): with unit weights and no smoothing, the factor wanted
        plain = copy.copy(self)
        plain.w, plain.label_smoothing, plain.lse_square_scale = None, 0.0, 0.0
        total = np.zeros(self.classes)
        rows = max(1, _BLOCK // max(1, math.prod(self.x.shape[1:])))
        logits, target = (a if a.ndim > 1 else a[None] for a in (self.x.data, self.t.data))
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            plain.x, plain.t = View(logits[part], self.x.dtype), View(target[part], self.t.dtype)
            plain.logits = plain.x.data
            plain._losses_shape = (plain.x.shape[0], *plain.x.shape[2:])
            factor = np.empty(plain.x.shape)
            plain._launch(None, {"target": View(factor, "float64")})
            q = as_floats(plain.t).astype(np.float64) * (1.0 - smoothing) + smoothing / self.classes
            with np.errstate(invalid="ignore"):
                terms = np.where(q == 0, 0.0, q * factor)
            if upstream is not None:
                up = upstream if self.x.data.ndim > 1 else upstream[None]
                terms = terms * np.expand_dims(up[part], 1)
            total += terms.sum(axis=(0, *range(2, terms.ndim)))
        return total * scale


class NLLCall(_ClassCall):
    """One call of nll_loss."""

    def on_gpu(self, device: int) -> NLLRun:
        from .backends.cuda.classification import NLLRun

        return NLLRun(self, device)

    @property
    def differentiable(self) -> dict[str, tuple[View, Any]]:
        return {"input": (self.x, self.input)}

    def run(self, losses: View | None, careful: bool) -> Sums:
        if careful:
            self.check_indices()
        return self._launch(losses, None, 1.0, None)

    def run_gradients(self, losses: View | None, grads: dict[str, Result], upstream: Any) -> Sums:
        total, count = self.check_indices()
        none = self.reduction == "none"
        scale = 1.0 if none else upstream * self.scale(total, count, self.rows)
        sums = self._launch(losses, None, 1.0, None)  # reads the logits that an in-place gradient replaces
        grad = grads["input"]
        grad.data[...] = 0
        native = _native(grad.data)
        self._launch(None, View(native, grad.dtype), scale, upstream if none else None)
        if native is not grad.data:
            grad.data[...] = native
        return sums

    def _launch(self, losses: View | None, grad: View | None, scale: float, upstream: np.ndarray | None) -> Sums:
        weights = self.class_weights("float64")
        logits = _native(self.logits)
        variant = cpu.nll_variant(
            self.x.dtype,
            self.index.dtype.name,
            weights is not None,
            upstream is not None,
            losses.dtype if losses else None,
            grad.dtype if grad else None,
        )
        arrays = [
            logits,
            None,
            self.with_samples(grad.data if grad else None),
            None,
            self.index,
            self.with_samples(upstream),
            self.with_samples(losses.data if losses else None),
        ]
        return self._run(cpu.nll_task(variant, arrays, weights, self.ignore_index, [scale]))


def _native(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy where it is byte-swapped or misaligned."""
    return array if array.dtype.isnative and array.flags.aligned else array.astype(array.dtype.newbyteorder("="))


def _blocks(array: np.ndarray) -> Any:
    """Parts of an array's elements in C order, with the position of their first; one piece of memory has one part."""
    flat = array.reshape(-1) if array.flags.c_contiguous else None
    for start in range(0, array.size, _BLOCK):
        if flat is not None:
            yield start, flat[start : start + _BLOCK]
        else:
            places = np.unravel_index(np.arange(start, min(start + _BLOCK, array.size)), array.shape)
            yield start, array[places]
