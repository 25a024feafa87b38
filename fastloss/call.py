"""One call of a loss: what its public function was given, and the three things that can be asked of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import checks, dispatch, memory, plans, runtime
from .arrays import View
from .backends.cpu import Task
from .backends.layout import as_floats
from .kernels.storage import FLOATS
from .reductions import Sums, rounded

if TYPE_CHECKING:
    from .backends.cuda.run import Run
    from .plans import Plan

Shape = tuple[int, ...]
# An element's result may replace that element of these; any other overlap needs memory of its own.
_REPLACED = frozenset({"input", "target"})


class Call(ABC):
    """A loss and its arguments. `evaluate` gives the value, `value_and_grad` gradients too, `accumulate` the sums."""

    reduction: str
    weighted_mean: bool  # whether a mean divides by the sum of weights instead of the count
    dtype: str | None  # of the result, where the caller asked for one
    out: Any
    check: bool | None  # whether arrays on a GPU are looked at, and waited for, before anything is written
    run_on_gpu: Run[Any] | None = None  # where arrays are on a GPU
    like: Any  # the array whose library results belong to

    _tasks: tuple[Task, ...] = ()  # the kernels that ran, on the CPU
    _results: tuple[tuple[str, Result], ...] = ()  # the arrays that they wrote, and the argument that each belongs to
    _counts = False  # whether class indices were counted for the gradient's scale

    @property
    def task(self) -> Task | None:
        """The kernel that ran last."""
        return self._tasks[-1] if self._tasks else None

    @task.setter
    def task(self, task: Task | None) -> None:
        self._tasks = (*self._tasks, task) if task else ()

    @abstractmethod
    def prepare(self, differentiable: bool) -> None:
        """Look at the arrays and check everything that can be checked without reading them."""

    @property
    @abstractmethod
    def result_dtype(self) -> str:
        """The dtype of the result where the caller asked for none."""

    @property
    @abstractmethod
    def losses_shape(self) -> Shape:
        """The shape of the per-sample losses."""

    @property
    @abstractmethod
    def losses_like(self) -> np.ndarray:
        """An array whose memory layout new per-sample losses take over, where the shapes agree."""

    @property
    @abstractmethod
    def named_sources(self) -> dict[str, View]:
        """Everything that is read, by the names of the arguments."""

    @property
    def sources(self) -> list[View]:
        """Everything that is read."""
        return list(self.named_sources.values())

    @property
    @abstractmethod
    def given(self) -> tuple[Any, ...]:
        """The arguments that are arrays, as they were given; None where one was not."""

    @abstractmethod
    def on_gpu(self, device: int) -> Run[Any]:
        """How this call runs on a GPU."""

    @property
    @abstractmethod
    def differentiable(self) -> dict[str, tuple[View, Any]]:
        """The arguments that have a gradient, as views and as given."""

    @property
    @abstractmethod
    def repeats(self) -> bool:
        """Whether the next call with these options runs likewise, where input and target are of the same kind."""

    @abstractmethod
    def plannable(self) -> tuple[int, int] | None:
        """The numbers of input and target among the task's arrays; None where the task depends on more than them."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """Number of losses, ignored ones included."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Extent of the first dimension, 1 where there is none."""

    @abstractmethod
    def run(self, losses: View | None, careful: bool) -> Sums:
        """The sums, and the per-sample losses where memory for them is given; `careful` leaves that memory alone
        unless every element is valid."""

    @abstractmethod
    def run_gradients(self, losses: View | None, grads: dict[str, Result], upstream: Any) -> Sums:
        """The same with gradients, scaled for the reduction and by `upstream` (see `_upstream`)."""

    def evaluate(self) -> Any:
        """The loss."""
        self.prepare(differentiable=False)
        self.run_on_gpu = self.gpu_run()
        if self.run_on_gpu:
            return self.run_on_gpu.evaluate()
        result = self.result()
        if self.reduction == "none":
            self._results = (("input", result),)
            self.run(View(result.data, result.dtype), careful=self.out is not None)
        else:
            sums = self.run(None, careful=False)
            result.data[...] = rounded(sums.value(self.reduction, self.weighted_mean), result.dtype)
        return result.finish()

    def value_and_grad(self, names: Sequence[str], grad_output: Any, grad_outs: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The loss and its gradients by the arguments `names`, in one pass where the kernel can."""
        self.prepare(differentiable=True)
        self.run_on_gpu = self.gpu_run()
        if self.run_on_gpu:
            return self.run_on_gpu.value_and_grad(names, grad_output, grad_outs)
        result = self.result()
        upstream = self._upstream(grad_output)
        grads = [self.gradient(name, out) for name, out in zip(names, grad_outs, strict=True)]
        if isinstance(upstream, np.ndarray) and any(np.may_share_memory(upstream, r.data) for r in (result, *grads)):
            upstream = upstream.copy()
        none = self.reduction == "none"
        losses = View(result.data, result.dtype) if none else None
        self._results = (*((("input", result),) if none else ()), *zip(names, grads, strict=True))
        self._counts = True
        sums = self.run_gradients(losses, dict(zip(names, grads, strict=True)), upstream)
        if not none:
            result.data[...] = rounded(sums.value(self.reduction, self.weighted_mean), result.dtype)
        return result.finish(), [grad.finish() for grad in grads]

    def accumulate(self, per_sample: np.ndarray | None) -> Sums:
        """The sums of this call's samples; their losses go into `per_sample` where it is given."""
        self.prepare(differentiable=False)
        if run := self.gpu_run():
            return Sums(run.accumulate(per_sample), self.samples, self.rows)
        if per_sample is None:
            return self.run(None, careful=False)
        dtype = dispatch.view(per_sample, "per_sample").dtype
        if dtype not in ("float32", "float64"):
            raise TypeError(f"per_sample has dtype {dtype}, expected float32 or float64")
        result = self._result("per_sample", per_sample, self.losses_shape, dtype, per_sample, per_sample)
        sums = self.run(View(result.data, dtype), careful=True)
        result.finish()
        return sums

    def gpu_run(self) -> Run[Any] | None:
        """How this call runs where its arrays are on a GPU; None where they are in the CPU's memory."""
        device = dispatch.one_device(self.named_sources)
        if device is None:
            return None
        runtime.require_cuda()
        return self.on_gpu(device)

    @property
    def checked(self) -> bool:
        """Whether invalid elements on a GPU are an error, for which the call waits."""
        return checks.requested() if self.check is None else self.check

    def plan(self) -> Plan | None:
        """How what was asked of this call was found, for the next one like it; None where more than input and target
        matters."""
        if self.run_on_gpu:
            return plans.on_gpu(self.run_on_gpu.plan())
        numbers = self.plannable() if len(self._tasks) == 1 else None
        if numbers is None or self.out is not None:
            return None
        (task,), (x, y, *_) = self._tasks, self.given
        how = plans.Reduced(self.reduction, self.weighted_mean, self.rows, self.dtype or self.result_dtype)
        if not self._results:
            return plans.reduced(task, numbers, (x, y), how)
        counted = task.counted(self.reduction == "mean") if self._counts else None
        memory = []
        for name, result in self._results:
            number, given = task.number_of(result.data), result.given is not None
            if number is None or (given and result.data is not result.given):
                return None
            argument = ("input", "target").index(name)
            memory.append(plans.Memory(number, prototype(result.data), result.dtype, argument, given))
        if self._counts and counted is None:
            return None
        return plans.with_arrays(task, numbers, (x, y), how, memory, counted)

    def result(self) -> Result:
        """Memory for the loss."""
        shape = self.losses_shape if self.reduction == "none" else ()
        return self._result("out", self.out, shape, self.dtype or self.result_dtype, self.losses_like, self.like)

    def gradient(self, name: str, out: Any) -> Result:
        """Memory for the gradient of one argument, which has that argument's shape and dtype."""
        view, like, dtype = self.gradient_of(name)
        return self._result("grad_out", out, view.shape, dtype, view.data, like)

    def gradient_of(self, name: str) -> tuple[View, Any, str]:
        """An argument that has a gradient, as a view and as given, and the gradient's dtype."""
        if name not in self.differentiable:
            raise ValueError(f"this loss has no gradient for {name}, only for {', '.join(self.differentiable)}")
        view, like = self.differentiable[name]
        return view, like, view.dtype if view.dtype in FLOATS else self.result_dtype

    def scale(self, weight_sum: float, count: int, rows: int) -> float:
        """What the sum of losses is multiplied by under this reduction."""
        divisor = {"mean": weight_sum if self.weighted_mean else count, "batchmean": rows}.get(self.reduction, 1)
        return float(np.divide(1.0, divisor)) if divisor else float("inf")

    def _upstream(self, grad_output: Any) -> Any:
        """The gradient of what comes after: a float64 array for "none", a number for what is reduced."""
        if grad_output is None:
            return None if self.reduction == "none" else 1.0
        view = dispatch.view(grad_output, "grad_output", differentiable=True)
        dispatch.one_device({"input": self.sources[0], "grad_output": view})
        checks.numeric(view, "grad_output")
        if self.reduction == "none":
            checks.same_shape(view, "grad_output", self.losses_shape, "the losses")
            return as_floats(view).astype(np.float64, copy=False)
        checks.same_shape(view, "grad_output", (), "the reduced loss")
        return float(as_floats(view))

    def _result(self, name: str, given: Any, shape: Shape, dtype: str, layout: np.ndarray, like: Any) -> Result:
        """Memory for a result: what the caller gave, or new memory in the layout of `layout`."""
        if given is None:
            return Result(empty_like(layout, shape, dtype), dtype, None, like)
        view = dispatch.view(given, name, differentiable=True)
        checks.writable(view, name, shape, dtype)
        dispatch.one_device({"input": self.sources[0], name: view})
        clash = any(
            np.may_share_memory(view.data, read.data) and not (of in _REPLACED and same_memory(view.data, read.data))
            for of, read in self.named_sources.items()
        )
        return Result(empty_like(view.data, shape, dtype) if clash else view.data, dtype, view.data, given)


class Result:
    """Memory that something is computed in, and the array that it is handed back as."""

    def __init__(self, data: np.ndarray, dtype: str, given: np.ndarray | None, like: Any) -> None:
        self.data, self.dtype, self.given, self.like = data, dtype, given, like

    def finish(self) -> Any:
        """The array that the caller gave, or a new one of the library of `like`."""
        if self.given is None:
            return dispatch.adapter_of(self.like).wrap(self.data, self.dtype, self.like)
        if self.data is not self.given:
            self.given[...] = self.data
        return self.like


def memory_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype that holds a storage's bits."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def empty_like(array: np.ndarray, shape: Shape, dtype: str) -> np.ndarray:
    """New native memory, laid out like `array` where the shape is its own."""
    if array.shape == shape and 0 not in array.strides:
        return memory.empty_like(array, memory_dtype(dtype))
    return memory.empty(shape, memory_dtype(dtype))


def prototype(array: np.ndarray) -> np.ndarray:
    """What `np.empty_like` needs to know of an array, without its memory."""
    return np.lib.stride_tricks.as_strided(np.empty(1, array.dtype), array.shape, array.strides)


def same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.strides == b.strides
        and a.shape == b.shape
        and a.itemsize == b.itemsize
    )
