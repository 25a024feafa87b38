"""What every call on a GPU goes through: memory for results, kernels queued in order, sums read back when asked for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from ... import checks, dispatch
from ...arrays import DeviceMemory, View
from ...kernels.cuda.build import Kernel
from ...kernels.cuda.device import WARP, bits
from ...kernels.cuda.folding import FoldingKernel
from ...kernels.cuda.memory import VECTOR_BYTES
from ...kernels.cuda.pointwise import COPY, PointwiseKernel
from ...kernels.cuda.sums import COUNT, INVALID, PAIRS, ROW_BYTES, Combination, Reduction
from ...kernels.pointwise import SUMS
from ...kernels.storage import FLOATS
from ..layout import Shape, as_floats, collapse
from .driver import Launch, device
from .plan import GPUPlan

if TYPE_CHECKING:
    from ...call import Call

LONG = 2**31  # from so many elements on, kernels count them in 64 bits
C = TypeVar("C", bound="Call")
Values = dict[str, "int | View"]  # arguments of a kernel: numbers, and memory by its address


class Output:
    """An array that a result is computed in."""

    def __init__(self, name: str, given: Any, shape: Shape, dtype: str, like: Any) -> None:
        self.array = given if given is not None else dispatch.adapter_of(like).empty(shape, dtype, like)
        self.view = dispatch.view(self.array, name, differentiable=True)
        self.given = given is not None


class Run(ABC, Generic[C]):
    """One call. Subclasses queue its kernels."""

    compute: str  # "float32" or "float64"

    def __init__(self, call: C, number: int) -> None:
        self.call, self.device = call, device(number)
        self.adapter = dispatch.adapter_of(call.like)
        self.stream = self.adapter.stream(call.like)
        self.launches: list[Launch] = []
        self._outputs: list[Output] = []
        self._temporaries: list[View] = []  # memory that kernels work in, kept until they are queued
        self._places: list[tuple[int, int, View]] = []  # which launch's which argument is the address of what
        self._copies: list[tuple[View, View]] = []

    # what a loss has to say

    @abstractmethod
    def queue(
        self, losses: View | None, result: View | None, grads: Mapping[str, View], upstream: Any, raw: bool = False
    ) -> None:
        """Queue the kernels of the loss: per-sample losses, the reduced loss (or, `raw`, the sums that it is made of)
        and gradients, where memory for them is given. `upstream`: None, a number, or a View."""

    @abstractmethod
    def raise_invalid(self) -> None:
        """The error about the first element that is invalid: one was found."""

    # what can be asked

    def evaluate(self) -> Any:
        """The loss."""
        call = self.call
        if call.checked:
            self.check()
        none = call.reduction == "none"
        result = self.output("out", call.out, call.losses_shape if none else (), call.dtype or call.result_dtype)
        losses, reduced = (self.target(result), None) if none else (None, self.target(result))
        self.queue(losses, reduced, {}, None)
        self.start([result])
        return result.array

    def value_and_grad(self, names: Sequence[str], grad_output: Any, grad_outs: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The loss and its gradients by the arguments `names`."""
        call = self.call
        if call.checked:
            self.check()
        none = call.reduction == "none"
        result = self.output("out", call.out, call.losses_shape if none else (), call.dtype or call.result_dtype)
        upstream = self.upstream(grad_output)
        grads = {}
        for name, out in zip(names, grad_outs, strict=True):
            view, like, dtype = call.gradient_of(name)
            grads[name] = self.output("grad_out", out, view.shape, dtype, like)
        where = self.target(result, upstream)
        losses, reduced = (where, None) if none else (None, where)
        sinks = {name: self.target(grad, upstream) for name, grad in grads.items()}
        self.queue(losses, reduced, sinks, upstream)
        self.start([result, *grads.values()])
        return result.array, [grad.array for grad in grads.values()]

    def accumulate(self, per_sample: Any) -> list[float]:
        """The sums in `SUMS`' order, which are waited for; the samples' losses go into `per_sample`."""
        losses, outputs = None, []
        if per_sample is not None:
            self.check()
            view = dispatch.view(per_sample, "per_sample")
            if view.dtype not in ("float32", "float64"):
                raise TypeError(f"per_sample has dtype {view.dtype}, expected float32 or float64")
            outputs = [self.output("per_sample", per_sample, self.call.losses_shape, view.dtype)]
            losses = self.target(outputs[0])
        row = self.scratch(ROW_BYTES)
        self.queue(losses, row, {}, None, raw=True)
        self.start(outputs)
        sums = self.read_row(row)
        if sums[INVALID]:
            self.raise_invalid()
        return sums

    @abstractmethod
    def check(self) -> None:
        """Look at every element before anything is written, and raise where one is invalid: this waits."""

    def look(self, row: View) -> None:
        """Run what was queued to look at every element, and raise where its row of sums tells of an invalid one."""
        self.start([])
        self.forget()
        if self.read_row(row)[INVALID]:
            self.raise_invalid()

    def forget(self) -> None:
        """What was launched is not part of what a plan repeats."""
        self.launches, self._places, self._temporaries = [], [], []

    def plan(self) -> GPUPlan | None:
        """How this call ran, for the next one like it; None where that may run otherwise."""
        call = self.call
        new = [output.view for output in self._outputs]
        libraries = {dispatch.adapter_of(array) for array in call.given if array is not None}
        if not call.repeats or call.checked or self._synchronises or any(output.given for output in self._outputs):
            return None
        if libraries != {self.adapter} or not hasattr(self.adapter, "key"):
            return None
        addresses = [view.data.address for view in (*call.sources, *new, *self._temporaries)]
        if len(set(addresses)) < len(addresses):  # which is which would be a guess
            return None
        patches = [(launch, argument, addresses.index(view.data.address)) for launch, argument, view in self._places]
        sizes = [view.data.itemsize for view in (*call.sources, *new) if self.in_vectors(view)]
        alignment = VECTOR_BYTES * max(sizes) // min(sizes)  # bytes of the widest array's vector
        return GPUPlan(
            self.device, self.adapter, self.launches, patches, call.sources, new, self._temporaries, alignment
        )

    def in_vectors(self, view: View) -> bool:
        """Whether kernels may read or write an array by vectors, whose lanes are those of the narrowest of them."""
        return view.dtype in FLOATS

    # memory

    def output(self, name: str, given: Any, shape: Shape, dtype: str, like: Any = None) -> Output:
        """Memory for a result: what the caller gave, or new memory."""
        if given is not None:
            view = dispatch.view(given, name, differentiable=True)
            checks.writable(view, name, shape, dtype)
            dispatch.one_device({"input": self.call.sources[0], name: view})
        return Output(name, given, shape, dtype, self.call.like if like is None else like)

    def target(self, output: Output, upstream: Any = None) -> View:
        """Where kernels write: the result's own memory, or other memory where that would overwrite what is read."""
        read = [*self.call.sources, *([upstream] if isinstance(upstream, View) else [])]
        if output.given and any(self.clash(output.view, source) for source in read):
            other = self.temporary(output.view.shape, output.view.dtype)
            self._copies.append((other, output.view))
            return other
        return output.view

    def clash(self, result: View, source: View) -> bool:
        """Whether writing a result would change what is still read of a source."""
        same = _place(result.data) == _place(source.data) and self.replaceable(source)
        return not same and _overlap(result.data, source.data)

    @abstractmethod
    def replaceable(self, source: View) -> bool:
        """Whether the thread that reads an element of a source is the only one, so that it may write there."""

    def temporary(self, shape: Shape, dtype: str) -> View:
        """New memory in C order."""
        array = self.adapter.empty(shape, dtype, self.call.like)
        view = dispatch.view(array, "temporary", differentiable=True)
        self._temporaries.append(view)
        return view

    def scratch(self, nbytes: int) -> View:
        """New memory of 64-bit words."""
        return self.temporary((-(-nbytes // 8),), "int64")

    # kernels

    def add(self, kernel: Kernel, blocks: int, values: Values) -> None:
        """Queue a kernel; arguments that are not named are 0."""
        arguments = []
        for k, name in enumerate(kernel.fields):
            value = values.get(name, 0)
            if isinstance(value, View):
                self._places.append((len(self.launches), k, value))
                value = value.data.address
            arguments.append(value)
        self.launches.append(self.device.prepare(kernel, blocks, arguments))

    def add_reduced(self, kernel: Any, blocks: int, values: Values, result: View | None) -> None:
        """The same for a kernel with a reduction, whose blocks' sums are added up by another kernel."""
        reduction: Reduction | None = kernel.reduction
        blocks = max(1, blocks)
        if reduction is None or result is None:
            self.add(kernel, blocks, values)
            return
        values = values | {"result": result, "rows": blocks}
        if blocks > 1:
            values["partials"] = self.scratch(blocks * ROW_BYTES)
        self.add(kernel, blocks, values)
        if blocks > 1:
            threads = self.device.tuning.pointwise_threads
            self.add(Combination(reduction=reduction, threads=threads), 1, values)

    def fold(self, source: View, result: View, to: Sequence[int | None]) -> None:
        """Queue the sum of `source` into `result`: `to` has the result's stride along each of the source's axes, None
        for those that are summed over."""
        kept = [d for d, stride in enumerate(to) if stride is not None]
        folded = [d for d, stride in enumerate(to) if stride is None]
        shape, strides = source.shape, source.data.strides
        outputs, terms = (math.prod(shape[d] for d in axes) for axes in (kept, folded))
        values: Values = {"source": source, "result": result, "outputs": outputs, "terms": terms}
        for n, d in enumerate(kept):
            values |= {f"extent{n}": shape[d], f"from{n}": strides[d], f"to{n}": to[d] or 0}
        for n, d in enumerate(folded):
            values |= {f"terms_extent{n}": shape[d], f"terms_from{n}": strides[d]}
        tuning = self.device.tuning
        kernel = FoldingKernel(
            compute=self.compute,
            source=source.dtype,
            result=result.dtype,
            kept=len(kept),
            folded=len(folded),
            threads=tuning.pointwise_threads if terms > WARP else WARP,
            long=max(outputs, terms) >= LONG,
        )
        self.add(kernel, min(outputs, self.grid(tuning.pointwise_blocks)), values)

    def grid(self, per_multiprocessor: int) -> int:
        """Blocks that keep the GPU busy."""
        return self.device.multiprocessors * per_multiprocessor

    def start(self, outputs: Sequence[Output]) -> None:
        """Launch what is queued, and the copies into results that would have overwritten what was read."""
        self._outputs = list(outputs)
        for source, result in self._copies:
            self._copy(source, result)
        self._copies.clear()
        views = [*self.call.sources, *(output.view for output in outputs)]
        self.device.wait_for({view.data.stream for view in views if view.data.stream is not None}, self.stream)
        self.device.launch(self.launches, self.stream)
        if outputs and self._synchronises:
            self.device.synchronize(self.stream)

    @property
    def _synchronises(self) -> bool:
        """Whether an argument's library would not wait for our stream, with its memory or with a result."""
        adapters = [dispatch.adapter_of(array) for array in self.call.given if array is not None]
        return any(getattr(adapter, "SYNCHRONISES", False) for adapter in adapters)

    def _copy(self, source: View, result: View) -> None:
        compute = "float64" if source.dtype == "float64" else "float32"
        shape, strides = collapse(result.shape, [source.data.strides, result.data.strides])
        total, ndim = math.prod(shape), len(shape)
        kernel = PointwiseKernel(
            COPY, compute, (source.dtype,), losses=result.dtype, ndim=ndim, long=total >= LONG
        )
        values: Values = {"head": total, "rest": total, "array0": source, "array1": result}
        for d, extent in enumerate(shape):
            values |= {f"extent{d}": extent, f"stride0_{d}": strides[0][d], f"stride1_{d}": strides[1][d]}
        self.add(kernel, -(-total // kernel.threads), values)

    # numbers

    def bits(self, value: float) -> int:
        """A float as a kernel's argument."""
        with np.errstate(over="ignore"):
            return bits(value, self.compute)

    def read_row(self, row: View) -> list[float]:
        """A row of sums as float64 numbers in `SUMS`' order: this waits."""
        raw = np.frombuffer(self.device.read(row.data.address, ROW_BYTES, self.stream), np.int64)
        floats = raw.view(self.compute)[:: 8 // np.dtype(self.compute).itemsize]
        sums = [float(x) for x in floats[: 2 * PAIRS]] + [0.0] * (len(SUMS) - 2 * PAIRS)
        sums[COUNT], sums[INVALID] = float(raw[COUNT]), float(raw[INVALID])
        return sums

    def host(self, view: View) -> View:
        """A copy in the CPU's memory, for messages: this waits."""
        dtype = np.dtype("uint16" if view.dtype == "bfloat16" else view.dtype)
        return View(self.device.to_host(view.data, dtype, self.stream), view.dtype)

    def upstream(self, grad_output: Any) -> View | float | None:
        """The gradient of what comes after: an array for "none", a number or one on the GPU for what is reduced."""
        if grad_output is None:
            return None
        view = dispatch.view(grad_output, "grad_output", differentiable=True)
        checks.numeric(view, "grad_output")
        none = self.call.reduction == "none"
        shape, of = (self.call.losses_shape, "the losses") if none else ((), "the reduced loss")
        checks.same_shape(view, "grad_output", shape, of)
        if not none and view.device is None:
            return float(as_floats(view))
        dispatch.one_device({"input": self.call.sources[0], "grad_output": view})
        return view


def _place(memory: DeviceMemory) -> tuple[object, ...]:
    return memory.address, memory.strides, memory.shape, memory.itemsize


def _overlap(a: DeviceMemory, b: DeviceMemory) -> bool:
    """Whether two arrays may have bytes in common."""
    (a_low, a_high), (b_low, b_high) = (_span(memory) for memory in (a, b))
    return a_low < b_high and b_low < a_high


def _span(memory: DeviceMemory) -> tuple[int, int]:
    if 0 in memory.shape:
        return memory.address, memory.address
    reach = [(extent - 1) * stride for extent, stride in zip(memory.shape, memory.strides, strict=True)]
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
    return memory.address + low, memory.address + high + memory.itemsize


def broadcast(view: View, shape: Shape) -> tuple[int, ...]:
    """A view's strides in a larger shape."""
    lead = len(shape) - len(view.shape)
    own = zip(view.shape, view.data.strides, shape[lead:], strict=True)
    return (0,) * lead + tuple(0 if extent == 1 and whole != 1 else stride for extent, stride, whole in own)
