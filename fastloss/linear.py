"""linear_cross_entropy: the cross-entropy of a linear layer's logits, which are never all in memory at once."""

from __future__ import annotations

import operator
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import update_wrapper
from typing import Any, Generic, NamedTuple, ParamSpec

import numpy as np

from . import checks, dispatch
from .arrays import View
from .arrays import numpy as _numpy
from .backends.layout import as_floats
from .call import memory_dtype
from .checks import REDUCTIONS
from .classification import SoftmaxCall
from .kernels.storage import FLOATS, INTEGERS
from .plans import Plan
from .reductions import Exact, rounded, to_memory

P = ParamSpec("P")
Array = Any
Shape = tuple[int, ...]

DIFFERENTIABLE = ("input", "linear_weight", "linear_bias")
CHUNK_BYTES = 64 << 20  # of logits: more gains nothing on a CPU
_SMALL_BYTES = 4 << 20  # logits that are not worth cutting
_FEWEST_ROWS = 256  # the weight's gradient is a product over them: 64 run at half the speed
_BLOCK_BYTES = 4 << 20  # of a block of classes, which is added to the weight's gradient while it is in the cache


class LinearLoss(Generic[P]):
    """A loss of a linear layer, as a function. Calling it evaluates; `call` gives the call unevaluated."""

    differentiable = DIFFERENTIABLE

    def __init__(self, call: Callable[P, LinearCall]) -> None:
        self.call = call
        update_wrapper(self, call)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Array:
        return self.call(*args, **kwargs).evaluate()

    @staticmethod
    def engine(arguments: Any) -> None:
        """No engine evaluates this loss: it multiplies arrays that hold numbers."""

    def __repr__(self) -> str:
        return f"<loss fastloss.{self.call.__name__}>"

    def __reduce__(self) -> str:
        return self.call.__name__


class Options(NamedTuple):
    """What is not an array."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    lse_square_scale: float
    softcap: float | None
    dtype: str | None
    chunk_size: int | None
    check: bool | None


class LinearCall(ABC):
    """One call of linear_cross_entropy. Subclasses multiply with their library's own matmul, chunk by chunk."""

    samples: int  # N, the number of rows of the input
    divisor: Any  # of the sum of losses, under the reduction
    z_scale: float  # lse_square_scale, for losses that are divided by the divisor
    by_probability: bool  # whether the target holds class probabilities

    def __init__(
        self, input: Array, linear_weight: Array, target: Array, linear_bias: Array, weight: Array, options: Options
    ) -> None:
        self.arrays = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
        self.target, self.weight, self.options = target, weight, options

    def prepare(self, differentiable: bool) -> None:
        """Check everything that can be checked without reading the arrays."""
        self._differentiable = differentiable
        self.views = {name: self._look(array, name) for name, array in self.arrays.items() if array is not None}
        x, matrix, bias = (self.views.get(name) for name in self.arrays)
        self.t, self.w = self._look(self.target, "target"), None
        if self.weight is not None:
            self.w = self._look(self.weight, "weight")
        if x is None or matrix is None:
            raise TypeError(f"{'input' if x is None else 'linear_weight'} is None, expected an array")
        dispatch.one_device(self.views | {"target": self.t} | ({"weight": self.w} if self.w else {}))
        for name, view in self.views.items():
            checks.floating(view, name)
        if len(matrix.shape) != 2:
            raise ValueError(f"linear_weight has shape {matrix.shape}, expected (C, D): a row for each class")
        self.classes, self.features = matrix.shape
        if not x.shape or x.shape[-1] != self.features:
            raise ValueError(
                f"input has shape {x.shape}, expected (..., {self.features}) to match linear_weight of shape "
                f"{matrix.shape}"
            )
        self.losses_shape: Shape = x.shape[:-1]
        self.samples = int(np.prod(self.losses_shape, dtype=np.int64))
        if bias is not None:
            checks.same_shape(bias, "linear_bias", (self.classes,), f"the {self.classes} rows of linear_weight")
        if self.w is not None:
            checks.numeric(self.w, "weight")
            checks.same_shape(self.w, "weight", (self.classes,), f"the {self.classes} rows of linear_weight")
        self._check_target()
        if self.classes == 0 and self.samples:
            raise ValueError(f"linear_weight has shape {matrix.shape}: there are samples, but no classes")

    def _look(self, array: Array, name: str) -> View:
        return dispatch.view(array, name, self._differentiable)

    def _check_target(self) -> None:
        probabilities = (*self.losses_shape, self.classes)
        indices = self.t.dtype in INTEGERS
        self.by_probability = self.t.shape == probabilities and not indices
        if not indices and not self.by_probability:
            raise (ValueError if self.t.dtype in FLOATS else TypeError)(
                f"target has dtype {self.t.dtype} and shape {self.t.shape}, expected class indices of an integer dtype "
                f"and shape {self.losses_shape}, or class probabilities of shape {probabilities}"
            )
        if indices and self.t.shape != self.losses_shape:
            raise ValueError(
                f"target has shape {self.t.shape}, expected {self.losses_shape} to match input of shape "
                f"{(*self.losses_shape, self.features)}"
            )
        if self.by_probability:
            checks.floating(self.t, "target")
            if self.options.ignore_index >= 0:
                raise ValueError(
                    f"ignore_index is {self.options.ignore_index}, but target holds class probabilities: nothing to "
                    "ignore"
                )

    @property
    def result_dtype(self) -> str:
        """The dtype of the loss."""
        views = self.views | ({"target": self.t} if self.by_probability else {})
        return self.options.dtype or checks.promote(list(views.values()), list(views))

    def chunk_rows(self, itemsize: int, most: int = CHUNK_BYTES) -> int:
        """Rows of a chunk: as many as fill `most` bytes, at least 256, and of large logits at most a tenth."""
        if self.options.chunk_size is not None:
            return self.options.chunk_size
        row = max(1, self.classes * itemsize)
        rows = min(max(most // row, _FEWEST_ROWS), self.samples // 10)
        rows = max(rows, _SMALL_BYTES // row, 1)
        return -(-self.samples // max(1, -(-self.samples // rows)))  # chunks of one size

    def count(self, target: Array, weight: Array) -> np.ndarray | None:
        """Find the mean's divisors, which the first chunk's gradient needs; gives the rows that count where some do
        not. IndexError where an index is no class. `target`, `weight`: in the CPU's memory."""
        total: float = self.samples
        count, kept = self.samples, None
        if not self.by_probability:
            shape = (*self.losses_shape[:1], self.classes, *self.losses_shape[1:])
            nothing = np.broadcast_to(np.float32(0), shape)
            call = SoftmaxCall(nothing, target, "mean", weight=weight, **self.softmax_options(0.0))
            call.prepare(differentiable=True)
            total, count = call.check_indices()
            if count < self.samples:
                kept = np.flatnonzero(call.index.reshape(-1) != self.options.ignore_index)
        self.divide(total, count)
        return kept

    def divide(self, total: Any, count: Any) -> None:
        """Keep what sums are divided by: the z-losses by their number, but here with all by the sum of weights."""
        mean = self.options.reduction == "mean"
        self.divisor, self.z_scale = (total if mean else 1), self.options.lse_square_scale
        if mean and self.z_scale and self.w is not None and not self.by_probability and count:
            self.z_scale *= float(total / count)

    def softmax_options(self, z_scale: float) -> dict[str, Any]:
        """Options of a chunk's cross_entropy."""
        options = self.options
        return {
            "ignore_index": options.ignore_index,
            "label_smoothing": options.label_smoothing,
            "lse_square_scale": z_scale,
            "softcap": options.softcap,
            "dtype": "float64",
            "out": None,
            "check": False,
        }

    def chunk_loss(self, logits: Array, target: Array, upstream: Any) -> Any:
        """The losses of a chunk, or their sum. Where `upstream` is given, logits are replaced by their gradient."""
        reduction = "none" if self.options.reduction == "none" else "sum"
        call = SoftmaxCall(logits, target, reduction, weight=self.weight, **self.softmax_options(self.z_scale))
        if upstream is None:
            return call.evaluate()
        value, _ = call.value_and_grad(("input",), upstream, (logits,))
        return value

    # what the libraries do

    @abstractmethod
    def evaluate(self) -> Any:
        """The loss."""

    @abstractmethod
    def value_and_grad(self, names: Sequence[str], grad_output: Any, grad_outs: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The loss and its gradients by the arguments `names`, in one pass over the chunks."""

    def plan(self) -> Plan | None:
        """None: each call looks at its arrays anew, which takes nothing beside the products."""
        return None


class NumPyCall(LinearCall):
    """A call on arrays in the CPU's memory, multiplied by NumPy in float32, or float64 where an array is float64."""

    def evaluate(self) -> Any:
        self.prepare(differentiable=False)
        return self._run({}, None)

    def value_and_grad(self, names: Sequence[str], grad_output: Any, grad_outs: Sequence[Any]) -> tuple[Any, list[Any]]:
        self.prepare(differentiable=True)
        none = self.options.reduction == "none"
        upstream: Any = 1.0
        if grad_output is not None:
            view = self._look(grad_output, "grad_output")
            checks.numeric(view, "grad_output")
            shape, of = (self.losses_shape, "the losses") if none else ((), "the reduced loss")
            checks.same_shape(view, "grad_output", shape, of)
            upstream = as_floats(view).astype(np.float64)
        if none:
            upstream = np.broadcast_to(upstream, self.losses_shape).reshape(-1)
        for name, out in zip(names, grad_outs, strict=True):
            self._check_memory(name, out)
        sums = {name: self._memory(name, out) for name, out in zip(names, grad_outs, strict=True)}
        value = self._run(sums, upstream)
        return value, [self._finish(name, sums[name], out) for name, out in zip(names, grad_outs, strict=True)]

    def prepare(self, differentiable: bool) -> None:
        super().prepare(differentiable)
        if (device := dispatch.one_device(self.views)) is not None:
            raise TypeError(
                f"input is a {type(self.arrays['input']).__name__} on GPU {device}; linear_cross_entropy multiplies "
                "NumPy's arrays, what else lies in the CPU's memory, and torch's tensors on CPUs and GPUs"
            )
        wide = checks.promote(list(self.views.values()), list(self.views)) == "float64"
        self.compute = np.dtype("float64" if wide else "float32")
        self.kept = self.count(self.t.data, self.weight)
        rows = self.chunk_rows(self.compute.itemsize)
        self.chunk = np.empty((min(rows, self.samples), self.classes), self.compute)
        self.bias = self._floats(self.views["linear_bias"]) if "linear_bias" in self.views else None
        self.block = max(1, _BLOCK_BYTES // max(1, self.features * self.compute.itemsize))
        matrix = self.views["linear_weight"]
        self.whole = matrix.data if matrix.data.dtype == self.compute and _multiplies_well(matrix.data) else None

    def _run(self, sums: dict[str, np.ndarray], upstream: Any) -> Any:
        """The loss; gradients are added to `sums`."""
        none = self.options.reduction == "none"
        x, t = self.views["input"], self.t.data.reshape(self.samples, *self.t.shape[len(self.losses_shape) :])
        hidden = x.data.reshape(self.samples, self.features)
        losses, total = np.zeros(self.samples if none else 0), Exact()
        scale = None
        if sums and not none:
            scale = float(upstream) * (float(np.divide(1.0, self.divisor)) if self.divisor else np.inf)
        for rows in self._parts():
            part = self._floats(View(hidden[rows], x.dtype))
            logits = self._logits(part)
            target = View(t[rows], self.t.dtype)
            value = self.chunk_loss(logits, _given(target), upstream[rows] if none and sums else scale)
            if none:
                losses[rows] = value
            else:
                total += Exact(float(value))
            if "linear_bias" in sums:
                sums["linear_bias"] += np.ones(len(logits), self.compute) @ logits
            if "linear_weight" in sums:
                self._add_products(logits, part, sums["linear_weight"])
            if "input" in sums:
                sums["input"].reshape(self.samples, self.features)[rows] = self._to_input(logits)
        like, dtype = self.arrays["input"], self.result_dtype
        if none:
            data = to_memory(losses.reshape(self.losses_shape), dtype)
        else:
            data = rounded(total.over(self.divisor) if self.options.reduction == "mean" else float(total), dtype)
        return dispatch.adapter_of(like).wrap(data, dtype, like)

    def _parts(self) -> Iterator[Any]:
        """The rows of each chunk; those that are ignored are in none."""
        step = max(1, len(self.chunk))
        if self.kept is None:
            yield from (slice(start, start + step) for start in range(0, self.samples, step))
        else:
            yield from (self.kept[start : start + step] for start in range(0, len(self.kept), step))

    def _floats(self, view: View) -> np.ndarray:
        """Numbers that can be multiplied."""
        floats: np.ndarray = as_floats(view).astype(self.compute, copy=False)
        return floats

    def _matrices(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The weight, whole or, where it has to be converted, by blocks of classes."""
        if self.whole is not None:
            yield slice(None), self.whole
            return
        view = self.views["linear_weight"]
        for start in range(0, self.classes, self.block):
            part = slice(start, start + self.block)
            yield part, np.ascontiguousarray(self._floats(View(view.data[part], view.dtype)))

    def _logits(self, x: np.ndarray) -> np.ndarray:
        logits = self.chunk[: len(x)]
        for part, matrix in self._matrices():
            np.matmul(x, matrix.T, out=logits[:, part])
        if self.bias is not None:
            logits += self.bias
        return logits

    def _add_products(self, grad: np.ndarray, x: np.ndarray, total: np.ndarray) -> None:
        """total += grad.T @ x, by blocks: a product of the whole would need as much memory as the weight."""
        x = np.ascontiguousarray(x)
        memory = np.empty((min(self.block, self.classes), self.features), self.compute)
        for start in range(0, self.classes, self.block):
            part = total[start : start + self.block]
            part += np.matmul(grad[:, start : start + self.block].T, x, out=memory[: len(part)])

    def _to_input(self, grad: np.ndarray) -> np.ndarray:
        total = np.zeros((), self.compute)
        for part, matrix in self._matrices():
            total = total + grad[:, part] @ matrix if total.ndim else grad[:, part] @ matrix
        return total

    def _check_memory(self, name: str, out: Any) -> None:
        """Whether the caller's memory can take the gradient."""
        if name not in self.views:
            raise ValueError(f"the gradient of {name} was asked for, but there is no {name}")
        if out is not None:
            view, given = self.views[name], self._look(out, "grad_out")
            checks.writable(given, "grad_out", view.shape, view.dtype)
            dispatch.one_device({"input": self.views["input"], "grad_out": given})

    def _memory(self, name: str, out: Any) -> np.ndarray:
        """Zeros that a gradient is summed in: the caller's memory where that can hold sums and nothing reads it."""
        if out is not None and name != "linear_bias":
            given: np.ndarray = self._look(out, "grad_out").data
            read = [*self.views.values(), self.t, *([self.w] if self.w else [])]
            free = not any(np.may_share_memory(given, source.data) for source in read)
            if free and given.dtype == self.compute and given.flags.c_contiguous:
                given[...] = 0
                return given
        return np.zeros(self.views[name].shape, np.float64 if name == "linear_bias" else self.compute)

    def _finish(self, name: str, total: np.ndarray, out: Any) -> Any:
        """A gradient in its argument's dtype and library, or in the caller's memory."""
        view, like = self.views[name], self.arrays[name]
        data = total
        if total.dtype != memory_dtype(view.dtype):
            data = np.empty(view.shape, memory_dtype(view.dtype))
            for start in range(0, len(total), self.block):
                part = slice(start, start + self.block)
                data[part] = to_memory(total[part], view.dtype)
        if out is None:
            return dispatch.adapter_of(like).wrap(data, view.dtype, like)
        given = self._look(out, "grad_out").data
        if not np.may_share_memory(given, data):
            given[...] = data
        return out


def _given(view: View) -> Any:
    """A view as an argument of a loss."""
    return _numpy.wrap(view.data, view.dtype, None) if view.dtype == "bfloat16" else view.data


def _multiplies_well(matrix: np.ndarray) -> bool:
    """Whether BLAS takes a matrix as it lies; NumPy would copy all of it for each chunk otherwise."""
    if not (matrix.dtype.isnative and matrix.flags.aligned):
        return False
    rows, columns = matrix.strides
    size = matrix.itemsize
    return (columns == size and rows >= matrix.shape[1] * size) or (rows == size and columns >= matrix.shape[0] * size)


@LinearLoss
def linear_cross_entropy(
    input: Array,
    linear_weight: Array,
    target: Array,
    linear_bias: Array = None,
    *,
    weight: Array = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    dtype: Any = None,
    chunk_size: int | None = None,
    check: bool | None = None,
) -> LinearCall:
    """Cross-entropy of a linear layer's logits, cross_entropy(input @ linear_weight.T + linear_bias, target).

    The logits are made, reduced and replaced by their gradient a chunk of rows at a time: memory for a tenth of them
    is enough. Rows of ignored targets are not multiplied at all.

    Args:
        input: hidden states of shape (..., D).
        linear_weight: (C, D), a row for each class.
        target: class indices of any integer dtype and shape (...), or class probabilities of shape (..., C).
        linear_bias: (C).
        weight: (C) class weights.
        reduction, label_smoothing, lse_square_scale, softcap: as in `cross_entropy`.
        ignore_index: samples of this class index cost nothing and count for nothing; None is -100.
        dtype: of the result; otherwise the promoted dtype of input, linear_weight and linear_bias (float32 under
            torch's autocast).
        chunk_size: rows of a chunk; otherwise about a tenth of the rows, and not more than 64 MiB of logits.
        check: for tensors on a GPU: wait, and raise IndexError for a class index out of range; otherwise such a
            sample's loss is NaN. FASTLOSS_CHECK=1 in the environment is the same.

    NumPy arrays (and others in the CPU's memory) are multiplied by NumPy, in float64 where one of them is float64,
    else in float32: float16 and bfloat16 are converted by chunk and block. torch tensors are multiplied by torch, on
    their device and in their dtype, or in autocast's; where they require grad, autograd records the call, and its
    gradients are computed in the same pass. For other arrays `value_and_grad` gives them: argnums 0, 1 and 3. Sums of
    the weight's gradient are kept in at least float32.

    Returns:
        A scalar, or for 'none' an array of shape (...), in input's library.

    Raises:
        ValueError: shapes, options. IndexError: a class index outside 0 to C - 1 that is not ignored (naming its
        position). TypeError: array types, dtypes and devices.

    Source: torch.nn.functional.linear_cross_entropy (2.13), whose `options` are `chunk_size` here; Hsu et al.,
    Liger Kernel: Efficient Triton Kernels for LLM Training (2024).

    >>> import numpy as np, fastloss
    >>> hidden, matrix = np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> round(float(fastloss.linear_cross_entropy(hidden, matrix, [2, 0])), 4)
    1.1348
    >>> value, (to_hidden, to_matrix) = fastloss.value_and_grad(fastloss.linear_cross_entropy, (0, 1))(
    ...     hidden, matrix, [2, 0])
    >>> to_hidden.shape, to_matrix.shape
    ((2, 2), (3, 2))
    """
    if chunk_size is not None and (chunk_size := operator.index(chunk_size)) < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1 row")
    options = Options(
        checks.reduction_of(None, None, reduction, REDUCTIONS),
        -100 if ignore_index is None else checks.int64("ignore_index", operator.index(ignore_index)),
        checks.option("label_smoothing", label_smoothing, 0, 1),
        checks.option("lse_square_scale", lse_square_scale, 0),
        None if softcap is None else checks.option("softcap", softcap, 0, open_low=True),
        None if dtype is None else checks.dtype_name(dtype),
        chunk_size,
        check,
    )
    kind: type[LinearCall] = NumPyCall
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(input, torch.Tensor):
        from .torch.linear import TorchCall

        kind = TorchCall
    return kind(input, linear_weight, target, linear_bias, weight, options)
