"""What the tests on a GPU, or in Numba's simulator of one, share: arrays in its memory, bounds, branches of kernels."""

import bisect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba import cuda
from numpy.typing import NDArray

import table
from fastloss.arrays.numba_cuda import address
from fastloss.backends.cuda.driver import Launch
from fastloss.kernels.cuda.build import Kernel
from fastloss.kernels.cuda.device import SIMULATED, WARP
from fastloss.kernels.cuda.folding import FoldingKernel
from fastloss.kernels.cuda.memory import VECTOR_BYTES
from fastloss.kernels.cuda.nll import NLLKernel
from fastloss.kernels.cuda.pointwise import COPY, PointwiseKernel
from fastloss.kernels.cuda.rows import RowsKernel
from fastloss.kernels.cuda.samples import SamplesKernel
from fastloss.kernels.cuda.sums import Combination
from reference import sum_to
from table import Rng, Row, Sample, assert_within, compute_dtype

Array = NDArray[Any]
DEVICE_ARRAY = type(cuda.to_device(np.zeros(1)))

# ---- arrays

MARGIN = 256  # bytes on both sides of an array in a `Room`
margins: list[tuple[int, int, Any]] = []  # sorted addresses that the test's kernels must not touch, and whose they are


def cut_from(room: Any, shape: tuple[int, ...], dtype: Any, offset: int, strides: tuple[int, ...]) -> Any:
    """The device array that lies so in the bytes of another."""
    if SIMULATED:
        return DEVICE_ARRAY(np.ndarray(shape, dtype, room._ary, offset, strides))
    return DEVICE_ARRAY(shape, strides, dtype, gpu_data=room.gpu_data.view(offset))


class Room:
    """Device memory around an array laid out as a NumPy array is, `shift` items after a multiple of 128 bytes. What
    does not belong to the array are random bytes, which must stay as they are."""

    def __init__(self, host: Array, shift: int = 0) -> None:
        reach = [(n - 1) * s for n, s in zip(host.shape, host.strides, strict=True)] if host.size else []
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        own, lead = high - low + host.itemsize * bool(host.size), shift * host.itemsize
        self.before = np.random.default_rng(own).integers(0, 256, own + lead + 2 * MARGIN + 128, np.uint8)
        self.memory = cuda.to_device(self.before)
        start = address(self.memory)
        first = MARGIN - (start + MARGIN - low) % -128 + lead
        self.shape, self.dtype, self.strides, self.offset = host.shape, host.dtype, host.strides, first - low
        self.read(self.before)[...] = host
        self.memory.copy_to_device(self.before)
        self.array = cut_from(self.memory, self.shape, self.dtype, self.offset, self.strides)
        if SIMULATED:
            for low, high in ((start, start + first), (start + first + own, start + self.before.size)):
                bisect.insort(margins, (low, high, self.memory), key=lambda margin: margin[0])

    def read(self, memory: Array | None = None) -> Array:
        """The array, in a copy of the memory."""
        memory = self.memory.copy_to_host() if memory is None else memory
        return np.ndarray(self.shape, self.dtype, memory, self.offset, self.strides)

    def check(self, written: bool = True) -> None:
        """Every byte that does not belong to the array is what it was; all of them unless it may be `written`."""
        others = np.ones(self.before.size, bool)
        if written:
            shape, strides = (*self.shape, self.dtype.itemsize), (*self.strides, 1)
            np.ndarray(shape, bool, others, self.offset, strides)[...] = False
        assert (self.memory.copy_to_host() == self.before)[others].all()


def on_device(x: Any) -> Any:
    """A NumPy array of any layout as a device array of the same layout; other values as they are."""
    if not isinstance(x, np.ndarray | np.generic):
        return x
    x = np.asarray(x)
    return cuda.to_device(x) if x.flags.c_contiguous else Room(x).array


def upload(sample: Sample, place: Callable[[Any], Any] = on_device) -> Sample:
    """A sample's arrays on the device."""
    options = {name: place(value) for name, value in sample.options.items()}
    return Sample(place(sample.input), place(sample.target), options)


def host(array: Any) -> Array:
    """A result in NumPy's memory."""
    assert type(array) is DEVICE_ARRAY
    return np.asarray(array.copy_to_host())


def overlapping(first: Array, second: tuple[int, ...], by: int) -> tuple[Any, Any]:
    """An array on the device and one of the shape `second`, `by` elements after it in the same memory."""
    at, to = max(0, -by), max(0, by)
    room = np.zeros(max(at + first.size, to + math.prod(second)), first.dtype)
    room[at : at + first.size] = first.ravel()
    memory = on_device(room)
    return memory[at : at + first.size].reshape(first.shape), memory[to : to + math.prod(second)].reshape(second)


def every_second(x: Array) -> Array:
    """Every second element of a larger array, along every axis."""
    view = np.zeros(tuple(2 * n + 1 for n in x.shape), x.dtype)[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    view[...] = x
    return view


def backwards(x: Array) -> Array:
    flip = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[flip])[flip]


def wider_rows(x: Array) -> Array:
    """Cut from an array with one element more in each row: rows are aligned otherwise than packed ones."""
    view = np.zeros((*x.shape[:-1], x.shape[-1] + 1), x.dtype)[..., 1:]
    view[...] = x
    return view


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "packed": np.array,
    "fortran": lambda x: np.array(x, order="F"),
    "every-second": every_second,
    "backwards": backwards,
    "wider-rows": lambda x: wider_rows(x) if x.ndim else x,
}

# ---- bounds

# Pointwise losses of float32 arrays are computed in float32 here, in float64 on the CPU. A binary cross-entropy with
# weights is seven roundings of half an ulp each, which count double where the result lies just below a power of 2. Of
# two million values and gradients of each loss and option the worst were 4.74 and 4.0 ulp; the CPU's bounds, 2 and 4
# ulp, times this are 5. All other bounds are the CPU's.
POINTWISE_VALUE, POINTWISE_GRADIENT = 2.5, 1.25


def value_bound(row: Row, sample: Sample, reduction: str) -> Array:
    """The bound of a result of a GPU before it is rounded."""
    dtype = np.result_type(sample.input, sample.target) if row in table.POINTWISE else sample.input.dtype
    looser = row in table.POINTWISE and compute_dtype(dtype) == np.float32
    return table.value_bound(row, sample, reduction, dtype) * (POINTWISE_VALUE if looser else 1)


def gradient_bound(row: Row, truth: table.Truth, operand: str, dtype: Any) -> Array:
    """The bound of a gradient of a GPU before it is rounded."""
    looser = row in table.POINTWISE and compute_dtype(dtype) == np.float32
    return table.gradient_bound(truth, operand, dtype) * (POINTWISE_GRADIENT if looser else 1)


def check_value(row: Row, sample: Sample, reduction: str, device: Sample | None = None, **more: Any) -> Array:
    """Calls the loss on the device and compares it with the oracle; returns the result."""
    __tracebackhide__ = True
    got = host(row.call(device or upload(sample), reduction=reduction, **more))
    truth = row.truth(sample, reduction).value
    dtype = np.dtype(more.get("dtype", sample.input.dtype))
    assert_within(got, truth, value_bound(row, sample, reduction), dtype, f"{row.id} {reduction}")
    return got


def check_gradient(
    row: Row,
    sample: Sample,
    reduction: str,
    operand: str = "input",
    grad_output: Any = None,
    device: Sample | None = None,
    **more: Any,
) -> Array:
    """Calls value_and_grad on the device and compares both with the oracle; returns the gradient. `grad_output`: None,
    a number, or a NumPy array, which goes to the device."""
    __tracebackhide__ = True
    device = device or upload(sample)
    value, grad = row.gradient(device, operand, reduction=reduction, grad_output=on_device(grad_output), **more)
    return compare(row, sample, reduction, operand, grad_output, host(value), host(grad))


def compare(
    row: Row, sample: Sample, reduction: str, operand: str, grad_output: Any, value: Array, grad: Array
) -> Array:
    """A value and a gradient with the oracle's; returns the gradient."""
    __tracebackhide__ = True
    own = {"input": sample.input, "target": sample.target, "weight": sample.options.get("weight")}[operand]
    what = f"{row.id} {reduction}"
    truth = row.truth(sample, reduction, 1.0 if grad_output is None else grad_output)
    assert_within(value, truth.value, value_bound(row, sample, reduction), sample.input.dtype, what)
    whole = truth
    if not row.classes and np.shape(sample.input) != np.shape(sample.target):  # sums, which are as exact as their terms
        spread = Sample(*np.broadcast_arrays(sample.input, sample.target), sample.options)
        whole = row.truth(spread, reduction, 1.0 if grad_output is None else grad_output)
    bound = sum_to(gradient_bound(row, whole, operand, sample.input.dtype), np.shape(own))
    assert_within(grad, getattr(truth, operand), bound, own.dtype, f"{what}, gradient to {operand}")
    return grad


def has_gradient(sample: Sample, operand: str) -> bool:
    return operand != "weight" or "weight" in sample.options


def upstream(row: Row, sample: Sample, rng: Rng, reduction: str = "none") -> Array:
    """A random gradient of the loss's value, in the input's dtype and the value's shape."""
    shape = row.truth(sample, reduction).value.shape
    return np.asarray(rng.uniform(-2, 2, shape)).astype(sample.input.dtype)


# ---- branches

BRANCHES = {
    SamplesKernel: {"tiled", "one sample a thread", "neighbours"},
    RowsKernel: {"warp", "several in a block", "block", "longer than a block", "scalar", "head", "tail"}
    | {"part", "merge", "spread"},
    NLLKernel: {"value", "weights", "gradient", "gradient of classes that lie apart"},
    PointwiseKernel: {"vectors", "head", "tail", "no vectors", "strided", "broadcast", "copy", "sum"},
    FoldingKernel: {"warp", "block"},
    Combination: {"few blocks", "more blocks than threads"},
}


def branches(launch: Launch) -> set[str]:
    """The words of `BRANCHES` that a launch stands for."""
    found: set[str] = set()
    for kind, words in BRANCHES.items():
        if isinstance(launch.kernel, kind):
            values = dict(zip(launch.kernel.fields, launch.arguments, strict=True))
            found.update(word for word in _taken(launch.kernel, values) if word in words)
    return found


def _taken(kernel: Any, values: dict[str, int]) -> Iterator[str]:
    if isinstance(kernel, SamplesKernel):
        yield "tiled" if kernel.tile else "neighbours" if kernel.lanes > 1 else "one sample a thread"
    elif isinstance(kernel, RowsKernel):
        if kernel.phase != "whole":
            yield kernel.phase
        elif not kernel.resident:
            yield "longer than a block"
        else:
            yield "warp" if kernel.group == WARP else "block"
        if kernel.threads > kernel.group:
            yield "several in a block"
        yield from _ends_of_rows(kernel, values)
    elif isinstance(kernel, NLLKernel):
        yield kernel.phase if kernel.phase != "gradient" or kernel.group > 1 else "gradient of classes that lie apart"
    elif isinstance(kernel, PointwiseKernel):
        yield from _of_pointwise(kernel, values)
    elif isinstance(kernel, FoldingKernel):
        yield "warp" if kernel.threads == WARP else "block"
    else:
        yield "few blocks" if values["rows"] <= kernel.threads else "more blocks than threads"


def _ends_of_rows(kernel: RowsKernel, values: dict[str, int]) -> Iterator[str]:
    if kernel.lanes == 1:
        yield "scalar"
        return
    size = kernel.size("logits")
    for sample in range(values["samples"]):
        head = -(values["logits"] + sample * values["logits_stride0"]) % (kernel.lanes * size) // size
        if head:
            yield "head"
        if (values["classes"] - head) % kernel.lanes:
            yield "tail"


def _of_pointwise(kernel: PointwiseKernel, values: dict[str, int]) -> Iterator[str]:
    if kernel.loss is COPY:
        yield "copy" if kernel.losses else "sum"
    elif kernel.ndim:
        extents = [values[f"extent{d}"] for d in range(kernel.ndim)]
        arrays = range(len(kernel.sources + kernel.sinks))
        strides = [[values[f"stride{k}_{d}"] for k in arrays] for d in range(kernel.ndim)]
        yield "strided"
        if any(n > 1 and 0 in row for n, row in zip(extents, strides, strict=True)):
            yield "broadcast"
    elif values["chunks"]:
        yield "vectors"
        if values["head"]:
            yield "head"
        if values["rest"] > values["head"]:
            yield "tail"
    else:
        yield "no vectors"


def kinds(kind: type[Kernel] = Kernel) -> Iterator[type[Kernel]]:
    """Every class of kernels that is launched."""
    for sub in kind.__subclasses__():
        if "build" in vars(sub):
            yield sub
        yield from kinds(sub)


def in_margin(first: int, nbytes: int) -> bool:
    """Whether an access leaves an array for what lies beside it."""
    k = bisect.bisect_left(margins, first + nbytes, key=lambda margin: margin[0])
    return k > 0 and margins[k - 1][1] > first


def aligned(first: int, nbytes: int) -> bool:
    """Whether a GPU can load or store so many bytes at once, or in pieces of 16."""
    return first % math.gcd(nbytes, VECTOR_BYTES) == 0
