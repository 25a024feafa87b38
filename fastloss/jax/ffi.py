"""Evaluates sites on the CPU, called by XLA on its own buffers through its foreign function interface.

A site's first call takes the long way: through Python, as a call on NumPy arrays over the same memory, without a copy.
What that finds out (the kernel, its options, how the work is divided) is written down for `kernels.xla`'s compiled
handler, which serves the next ones alone: 1.5 us instead of 150, without Python's lock. Calls that depend on more than
their operands' addresses (class weights, sums of weights) and those that fail keep to the long way.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import sys
import threading
from collections.abc import Sequence
from ctypes import c_int, c_size_t
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import runtime
from ..call import Call
from ..classification import NLLCall
from ..kernels import entry, xla
from ..kernels.entry import Entry
from ..kernels.xla import Attrs, Buffer, ByteSpan, CallFrame, Environment, Known, Operand
from ..plans import Reduced
from ..pointwise import PointwiseCall
from .sites import Site, described

TARGET = "fastloss"
# XLA_FFI_DataType
_DTYPES = {
    1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64",
    10: "float16", 11: "float32", 12: "float64", 16: "bfloat16",
}  # fmt: skip
# XLA_FFI_Error_Code
_INVALID_ARGUMENT, _RESOURCE_EXHAUSTED, _OUT_OF_RANGE, _INTERNAL = 3, 8, 11, 13
_SCALARS = {"float32": 4, "float64": 8}  # dtypes of numbers that the handler writes: bytes

# Results from which the kernel is asked for large pages. XLA's new memory comes in pages of 4 KB, whose first touch
# takes longer than the loss: 2,048 x 32,000 with gradient 158 ms instead of 50. NumPy asks for its arrays likewise.
HUGE_BYTES = 4 * 1024 * 1024

_Function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
_Advise = ctypes.CFUNCTYPE(c_int, c_size_t, c_size_t, c_int)
_CreateError = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.POINTER(xla.ErrorCreateArgs))


def call(site: Site, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The value of a site and its gradients, on the CPU."""
    results = site.results(arrays)
    if not available():
        made = jax.pure_callback(_Copied(site), tuple(results), *arrays, vmap_method="sequential")
    else:
        attributes = {"description": site.description, "site": np.int64(_number(site, (*arrays, *results)))}
        made = jax.ffi.ffi_call(TARGET, results)(*arrays, **attributes)
    return tuple(made)


class _Copied:
    """A site as a function of NumPy arrays: for releases of XLA whose structures are not the ones we know."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __call__(self, *arrays: Any) -> tuple[np.ndarray, ...]:
        arrays = tuple(map(np.asarray, arrays))
        made = tuple(np.empty(result.shape, result.dtype) for result in self.site.results(arrays))
        evaluate(self.site, arrays, made)
        return made


def evaluate(site: Site, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> Call:
    """Evaluate a site on NumPy arrays into others; the last of its calls."""
    for k in range(site.batch or 1):
        made = [result[k, ...] if site.batch else result for result in results]
        one = site.call(site.parts(arrays, k), out=made[0])
        if site.grads:
            one.value_and_grad(site.grads, None, made[1:])
        else:
            one.evaluate()
    return one


def _number(site: Site, arrays: Sequence[Any]) -> int:
    """A site's number for operands and results like these, the same in every process; never 0."""
    kinds = [(array.shape, np.dtype(array.dtype).name) for array in arrays]
    digest = hashlib.blake2b(repr((site.description, kinds)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


@cache
def available() -> bool:
    """Whether XLA can call us; registers the handler where it can."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    version = xla.api_version(header.read_text()) if header.exists() else None
    if version is None:
        return False
    jax.ffi.register_ffi_target(TARGET, _handler(version).capsule, platform="cpu")
    return True


class Table:
    """What is known of sites, by their numbers, as `kernels.xla` looks it up while others are added."""

    def __init__(self) -> None:
        self._entries: dict[int, int] = {}
        self._memory: list[np.ndarray] = []  # a grown table's predecessors stay: calls may still be reading them
        self._grow(64)

    @property
    def address(self) -> int:
        """Where the table lies now."""
        return int(self._memory[-1].ctypes.data)

    def add(self, number: int, address: int) -> None:
        """Tell where the words about a new site lie."""
        self._entries[number] = address
        table = self._memory[-1]
        if not _insert(table, number, address):
            self._grow(4 * (int(table[0]) + 1))

    def _grow(self, slots: int) -> None:
        """Start again with at least so many slots, a power of 2."""
        table = np.zeros(1 + 2 * slots, np.int64)
        table[0] = slots - 1
        if all(_insert(table, *pair) for pair in self._entries.items()):
            self._memory.append(table)
        else:
            self._grow(2 * slots)


def _insert(table: np.ndarray, number: int, address: int) -> bool:
    """Whether there was room where the number is looked for."""
    for k in range(xla.PROBES):
        slot = 1 + 2 * ((number + k) & int(table[0]))
        if table[slot] == 0:
            table[slot + 1] = address
            table[slot] = number  # last: whoever finds the number finds the address
            return True
    return False


class _Handler:
    """The compiled handler of this process, and the sites that it knows."""

    def __init__(self, version: tuple[int, int]) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, list[np.ndarray]] = {}  # what the table points at; nothing for who keeps to Python
        self._table = Table()
        self._python = _Function(self._long_way)
        python = ctypes.cast(self._python, ctypes.c_void_p).value or 0
        environment = Environment(self._table.address, python, entry.address(), *version, _madvise())
        self._environment = np.array(environment, np.int64)
        self.capsule = jax.ffi.pycapsule(_Function(xla.handler(self._environment.ctypes.data)))

    def _long_way(self, address: int) -> int:
        """Evaluate a call through Python; XLA's error, or 0."""
        frame = CallFrame.from_address(address)
        try:
            description, number = _attributes(frame.attrs)
            arrays = _arrays(frame.args.args, frame.args.size)
            results = _arrays(frame.rets.rets, frame.rets.size)
            for result in results:
                _ask_for_large_pages(result)
            lead = results[0]
            site = described(description, lead.shape, lead.dtype.name)
            first = evaluate(site, arrays, results)
            with self._lock:
                if number not in self._known:
                    self._known[number] = words = _known(site, first, arrays, results)
                    if words:
                        self._table.add(number, int(words[0].ctypes.data))
                        self._environment[Environment._fields.index("table")] = self._table.address
        except BaseException as error:  # noqa: BLE001  # nothing above us is Python
            return _error(frame, error)
        return 0


_handler = cache(_Handler)


@cache
def _madvise() -> int:
    """The address of C's madvise where it knows large pages; 0 elsewhere."""
    return ctypes.cast(ctypes.CDLL(None).madvise, ctypes.c_void_p).value or 0 if sys.platform == "linux" else 0


def _ask_for_large_pages(array: np.ndarray) -> None:
    """As the compiled handler does."""
    if array.nbytes >= HUGE_BYTES and (address := _madvise()):
        start = -(-array.ctypes.data // xla.PAGE) * xla.PAGE
        _Advise(address)(start, array.ctypes.data + array.nbytes - start, xla.HUGEPAGE)


def _known(site: Site, call: Call, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The words that `kernels.xla` reads about a site, and the state of its entry; nothing where every call must take
    the long way."""
    task = call.task
    sources = _sources(site, call)
    if task is None or sources is None:
        return []
    reduced = call.reduction != "none"
    if reduced and site.dtype not in _SCALARS:
        return []
    counted = task.counted(call.reduction == "mean") if site.grads else {}
    parallel = task.parallel and runtime.may_run_parallel()
    if counted is None or (parallel and runtime.threading_layer() not in ("tbb", "omp")):
        return []  # the other layers take one call at a time
    operands = [(source, Operand(0, k, _step(site, k, arrays[k]), 0)) for k, source in enumerate(sources)]
    for k, result in enumerate(results):
        if k == 0 and reduced:
            continue
        number = task.number_of(result[-1] if site.batch else result)
        if number is None:
            return []
        fresh = result.nbytes if result.nbytes >= HUGE_BYTES and _madvise() else 0
        operands.append((number, Operand(1, k, result.strides[0] if site.batch else 0, fresh)))
    numbers = [number for number, _ in operands]
    how = Reduced(call.reduction, call.weighted_mean, call.rows, site.dtype)
    options = how.options | {"dtype": site.dtype if reduced else "float64", "counted": counted}
    state = np.array(task.entry(numbers, parallel=parallel, **options).__self__)  # type: ignore[attr-defined]
    for name, word in xla.replacements().items():
        state[Entry._fields.index(name)] = word
    known = Known(id(state), len(operands), site.batch or 1, 0 if reduced else -1, _SCALARS.get(site.dtype, 0))
    words = np.array([*known, *(word for _, operand in operands for word in operand)], np.int64)
    return [words, state]


def _sources(site: Site, call: Call) -> list[int] | None:
    """The numbers of the operands among the task's arrays; None where the task depends on more than them."""
    if isinstance(call, PointwiseCall):
        if site.grads and call.weighted_mean:
            return None  # the gradient's scale is made of the weights
        order = list(call.named_sources)
        return [order.index(name) for name in site.names]
    if isinstance(call, NLLCall) and site.grads:
        return None  # two kernels
    numbers = call.plannable()
    return None if numbers is None else list(numbers)


def _step(site: Site, k: int, array: np.ndarray) -> int:
    return array.strides[0] if site.batch and site.mapped[k] else 0


def _attributes(attrs: Attrs) -> tuple[str, int]:
    """Description and number of the site."""
    span, scalar = (c_size_t * 2).from_address(attrs.attrs)
    text = ByteSpan.from_address(span)
    number = ctypes.c_int64.from_address(xla.Scalar.from_address(scalar).value).value
    return ctypes.string_at(text.ptr, text.len).decode(), number


def _arrays(pointers: int, size: int) -> list[np.ndarray]:
    """XLA's buffers as NumPy arrays over the same memory."""
    return [_array(Buffer.from_address(pointer)) for pointer in (c_size_t * size).from_address(pointers)]


def _array(buffer: Buffer) -> np.ndarray:
    dtype = jax.numpy.dtype(_DTYPES[buffer.dtype])
    shape = tuple(buffer.dims[: buffer.rank])
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(buffer.data or 0)
    return np.ndarray(shape, dtype, memory)


def _error(frame: CallFrame, error: BaseException) -> int:
    """An error of XLA's."""
    kinds = {IndexError: _OUT_OF_RANGE, ValueError: _INVALID_ARGUMENT, TypeError: _INVALID_ARGUMENT}
    kinds[MemoryError] = _RESOURCE_EXHAUSTED
    code = next((code for kind, code in kinds.items() if isinstance(error, kind)), _INTERNAL)
    message = f"fastloss: {type(error).__name__}: {error}".encode()
    arguments = xla.ErrorCreateArgs(ctypes.sizeof(xla.ErrorCreateArgs), None, message, code)
    create = _CreateError(xla.Api.from_address(frame.api).XLA_FFI_Error_Create)
    return int(create(ctypes.byref(arguments)))
