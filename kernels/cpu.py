"""Runs emitted kernels over arrays of any layout, chunk by chunk, on one thread or on Numba's.

A kernel sees contiguous, native memory only. What is laid out otherwise (strided, broadcast, byte-swapped) passes
through scratch that stays in the first-level cache. The chunks and the order in which their sums are added do not
depend on the number of threads, so neither does any bit of the result.

A task is a block of 64-bit integers (see `records`). Its driver, a C function of
(block, chunk), stages a chunk and calls the kernel; `run_serial` and `run_parallel` call a driver for every chunk.
All of it is written on integers and addresses, which Numba compiles in a fraction of the time that arrays take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic

from .records import (
    ADDRESS,
    ALIGNMENT,
    BODY,
    CLASS_STEP,
    DIRECT,
    FUNCTION,
    GRAD,
    INDEX,
    ITEMSIZE,
    LOSSES,
    N_ARRAYS,
    N_SOURCES,
    NDIM,
    PARAMETERS,
    PER_CHUNK,
    PROBABILITIES,
    STRIDES,
    SUMS,
    SWAP,
    TEMPLATE,
    TOTAL,
    UPSTREAM,
)
from .softmax import ARRAYS
from .values import I8, I16, I32, I64, SIZE, Value, loop, when

FIRST_STEP = ARRAYS.index("logits_step")
TO_INDEX, TO_UPSTREAM, TO_LOSSES = ARRAYS.index("index"), ARRAYS.index("upstream"), ARRAYS.index("losses")
CLASSES, N_SLOTS = ARRAYS.index("classes"), len(ARRAYS)

STAGE = 1024  # pointwise elements staged at a time: five float64 operands fill 40 KB
SUM_BYTES = 64  # a chunk's row of sums: a cache line of its own

Codegen = Callable[[Any, Any, Any, Any], Any]


def _integers(emit: Callable[..., Value | None], arity: int) -> Any:
    """A Numba intrinsic over 64-bit integers, written with emitted values."""
    result = types.void if emit.__annotations__["return"] == "None" else types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = emit(*(Value(builder, arg) for arg in args))
        return context.get_dummy_value() if out is None else out.v

    names = ", ".join(f"a{k}" for k in range(arity))
    space: dict[str, Any] = {"signature": result(*[types.int64] * arity), "codegen": codegen}
    # Numba reads an intrinsic's arity off its signature
    exec(f"def {emit.__name__}(typingctx, {names}):\n    return signature, codegen", space)
    return intrinsic(space[emit.__name__])


def _get_(address: Value) -> Value:
    return address.load(I64)


def _put_(address: Value, value: Value) -> None:
    address.store(value)


def _call_(function: Value, n: Value, arrays: Value, parameters: Value, sums: Value) -> None:
    """Call the kernel at an address."""
    type_ = ir.FunctionType(ir.VoidType(), [I64] * 4)
    b = function.b
    b.call(b.inttoptr(function.v, type_.as_pointer()), [n.v, arrays.v, parameters.v, sums.v])


def _drive_(driver: Value, block: Value, chunk: Value) -> None:
    """Call the driver at an address."""
    type_ = ir.FunctionType(ir.VoidType(), [I64] * 2)
    b = driver.b
    b.call(b.inttoptr(driver.v, type_.as_pointer()), [block.v, chunk.v])


def _copy_(
    source: Value, from_step: Value, target: Value, to_step: Value, n: Value, itemsize: Value, swap: Value
) -> None:
    """Copy n elements of 1, 2, 4 or 8 bytes from stride to stride, reversing their bytes if `swap`."""

    def copy(elem: ir.Type, reverse: bool) -> None:
        def body(i: Value) -> None:
            value = (source + i * from_step).load(elem, align=1)
            value = Value(value.b, value.b.bswap(value.v)) if reverse else value
            (target + i * to_step).store(value)

        loop(Value(n.b, I64(0)), n, 1, [], body)

    for elem in (I8, I16, I32, I64):

        def both(elem: ir.Type = elem) -> None:
            if elem == I8:
                copy(elem, False)
            else:
                when(swap == 1, lambda: copy(elem, True), lambda: copy(elem, False))

        when(itemsize == SIZE[elem], both)


def _widen_(source: Value, itemsize: Value, unsigned: Value, n: Value, target: Value) -> None:
    """n contiguous integers as int64; what does not fit becomes the largest one, which is no class."""

    def widen(elem: ir.Type, extend: Callable[[Value], Value]) -> None:
        def body(i: Value) -> None:
            (target + i * 8).store(extend((source + i * SIZE[elem]).load(elem, align=1)))

        loop(Value(n.b, I64(0)), n, 1, [], body)

    def sext(raw: Value) -> Value:
        return raw if raw.elem == I64 else Value(raw.b, raw.b.sext(raw.v, I64))

    def zext(raw: Value) -> Value:
        return (raw < 0).select(2**63 - 1, raw) if raw.elem == I64 else raw.zext(I64)

    for elem in (I8, I16, I32, I64):

        def both(elem: ir.Type = elem) -> None:
            when(unsigned == 1, lambda: widen(elem, zext), lambda: widen(elem, sext))

        when(itemsize == SIZE[elem], both)


_get, _put = _integers(_get_, 1), _integers(_put_, 2)
_call, _drive = _integers(_call_, 5), _integers(_drive_, 3)
_copy, _widen = _integers(_copy_, 7), _integers(_widen_, 5)


@njit
def _field(block, k):  # type: ignore[no-untyped-def]
    return _get(block + 8 * k)


@njit
def _record(block, k):  # type: ignore[no-untyped-def]
    """Address of array k's record."""
    ndim = _field(block, NDIM)
    return block + 8 * (BODY + ndim + k * (STRIDES + ndim))


@njit
def _offset(block, record, index):  # type: ignore[no-untyped-def]
    """Bytes from the start of an array to its element `index` in C order."""
    offset = 0
    for k in range(_field(block, NDIM) - 1, -1, -1):
        extent = _field(block, BODY + k)
        offset += index % extent * _field(record, STRIDES + k)
        index //= extent
    return offset


@njit
def _stage(block, record, base, start, n, scratch, inward):  # type: ignore[no-untyped-def]
    """Copy elements start .. start + n between an array of any layout, at `base`, and contiguous scratch."""
    itemsize, swap = _field(record, ITEMSIZE), _field(record, SWAP)
    last = _field(block, NDIM) - 1
    inner, step = _field(block, BODY + last), _field(record, STRIDES + last)
    done = 0
    while done < n:
        index = start + done
        run = min(n - done, inner - index % inner)
        there = base + _offset(block, record, index)
        here = scratch + done * itemsize
        if inward:
            _copy(there, step, here, itemsize, run, itemsize, swap)
        else:
            _copy(here, itemsize, there, step, run, itemsize, swap)
        done += run


@njit
def _stage_classes(block, record, start, n, classes, scratch, step, inward):  # type: ignore[no-untyped-def]
    """The same for the classes of n samples, which lie `step` bytes apart in scratch."""
    for c in range(classes):
        base = _field(record, ADDRESS) + c * _field(record, CLASS_STEP)
        _stage(block, record, base, start, n, scratch + c * step, inward)


@njit
def _stage_samples(block, start, n, arrays, scratch, per_chunk):  # type: ignore[no-untyped-def]
    """Put the addresses of class indices, upstream gradients and losses of n samples into `arrays`."""
    for k in range(INDEX, LOSSES + 1):
        record = _record(block, k)
        itemsize = _field(record, ITEMSIZE)
        if itemsize:
            here = scratch + (k - INDEX) * per_chunk * 8
            if _field(record, DIRECT):
                here = _field(record, ADDRESS) + start * itemsize
            elif k != LOSSES:
                _stage(block, record, _field(record, ADDRESS), start, n, here, True)
            if k == INDEX:
                if itemsize != 8 or _field(record, CLASS_STEP):
                    wide = scratch + 3 * per_chunk * 8
                    _widen(here, itemsize, _field(record, CLASS_STEP), n, wide)
                    here = wide
                _put(arrays + 8 * TO_INDEX, here)
            elif k == UPSTREAM:
                _put(arrays + 8 * TO_UPSTREAM, here)
            else:
                _put(arrays + 8 * TO_LOSSES, here)


@njit
def _unstage_losses(block, start, n, arrays):  # type: ignore[no-untyped-def]
    record = _record(block, LOSSES)
    if _field(record, ITEMSIZE) and not _field(record, DIRECT):
        _stage(block, record, _field(record, ADDRESS), start, n, _get(arrays + 8 * TO_LOSSES), False)


def pointwise(block, chunk):  # type: ignore[no-untyped-def]
    """One chunk of a pointwise loss: all at once where every array is direct, else `STAGE` elements at a time."""
    n_arrays, n_sources, alignment = _field(block, N_ARRAYS), _field(block, N_SOURCES), _field(block, ALIGNMENT)
    start = chunk * _field(block, PER_CHUNK)
    stop = min(start + _field(block, PER_CHUNK), _field(block, TOTAL))
    direct = True
    for k in range(n_arrays):
        direct = direct and _field(_record(block, k), DIRECT) == 1
    memory = np.empty(n_arrays + (0 if direct else n_arrays * STAGE))
    pointers = memory.ctypes.data
    while start < stop:
        n = stop - start if direct else min(STAGE, stop - start)
        if alignment:  # streaming stores: the elements before the first aligned vector go alone
            last = _record(block, n_arrays - 1)
            itemsize = _field(last, ITEMSIZE)
            before = -(_field(last, ADDRESS) + start * itemsize) % alignment // itemsize
            if before:
                n = min(n, before)
        for k in range(n_arrays):
            record = _record(block, k)
            if _field(record, DIRECT):
                _put(pointers + 8 * k, _field(record, ADDRESS) + start * _field(record, ITEMSIZE))
            else:
                here = pointers + 8 * (n_arrays + k * STAGE)
                _put(pointers + 8 * k, here)
                if k < n_sources:
                    _stage(block, record, _field(record, ADDRESS), start, n, here, True)
        sums = _field(block, SUMS) + chunk * SUM_BYTES
        _call(_field(block, FUNCTION), n, pointers, _field(block, PARAMETERS), sums)
        for k in range(n_sources, n_arrays):
            record = _record(block, k)
            if not _field(record, DIRECT):
                _stage(block, record, _field(record, ADDRESS), start, n, _get(pointers + 8 * k), False)
        start += n
    memory[0] = 0.0  # Numba frees an array after its last use, and sees none of ours through addresses


def rows(block, chunk):  # type: ignore[no-untyped-def]
    """Samples whose classes lie side by side; those that do not are staged, a sample at a time."""
    per_chunk = _field(block, PER_CHUNK)
    start = chunk * per_chunk
    stop = min(start + per_chunk, _field(block, TOTAL))
    template = _field(block, TEMPLATE)
    classes = _field(template, CLASSES)
    direct = True
    for k in range(INDEX):
        record = _record(block, k)
        direct = direct and (_field(record, ITEMSIZE) == 0 or _field(record, DIRECT) == 1)
    step = stop - start if direct else 1
    # the kernel's arguments, four tables of row addresses, four columns of samples, four staged rows
    memory = np.empty(N_SLOTS + 8 * per_chunk + (0 if direct else 4 * classes))
    arrays = memory.ctypes.data
    tables = arrays + 8 * N_SLOTS
    samples = tables + 4 * 8 * per_chunk
    staged = samples + 4 * 8 * per_chunk
    for k in range(N_SLOTS):
        _put(arrays + 8 * k, _field(template, k))
    for i in range(start, stop, step):
        for k in range(INDEX):
            record, table = _record(block, k), tables + k * 8 * per_chunk
            itemsize = _field(record, ITEMSIZE)
            if itemsize:
                _put(arrays + 8 * k, table)
                for row in range(step):
                    _put(table + 8 * row, _field(record, ADDRESS) + _offset(block, record, i + row))
                if not _field(record, DIRECT):
                    here = staged + k * 8 * classes
                    if k <= PROBABILITIES:
                        class_step, swap = _field(record, CLASS_STEP), _field(record, SWAP)
                        _copy(_get(table), class_step, here, itemsize, classes, itemsize, swap)
                    _put(table, here)
        _stage_samples(block, i, step, arrays, samples, per_chunk)
        sums = _field(block, SUMS) + chunk * SUM_BYTES
        _call(_field(block, FUNCTION), step, arrays, _field(block, PARAMETERS), sums)
        for k in range(GRAD, INDEX):
            record = _record(block, k)
            itemsize = _field(record, ITEMSIZE)
            if itemsize and not _field(record, DIRECT):
                there = _field(record, ADDRESS) + _offset(block, record, i)
                here = staged + k * 8 * classes
                _copy(here, itemsize, there, _field(record, CLASS_STEP), classes, itemsize, _field(record, SWAP))
        _unstage_losses(block, i, step, arrays)
    memory[0] = 0.0  # as in pointwise


def tile(block, chunk):  # type: ignore[no-untyped-def]
    """Samples side by side for each class; arrays that lie otherwise are staged, transposed, in scratch."""
    per_chunk = _field(block, PER_CHUNK)
    start = chunk * per_chunk
    stop = min(start + per_chunk, _field(block, TOTAL))
    template = _field(block, TEMPLATE)
    classes = _field(template, CLASSES)
    inner = _field(block, BODY + _field(block, NDIM) - 1)
    n_staged, direct = 0, False
    for k in range(INDEX):
        record = _record(block, k)
        if _field(record, ITEMSIZE):
            n_staged += 1 - _field(record, DIRECT)
            direct = direct or _field(record, DIRECT) == 1
    memory = np.empty(N_SLOTS + 4 * per_chunk + n_staged * classes * per_chunk)
    arrays = memory.ctypes.data
    samples = arrays + 8 * N_SLOTS
    staged = samples + 4 * 8 * per_chunk
    for k in range(N_SLOTS):
        _put(arrays + 8 * k, _field(template, k))
    while start < stop:
        n = stop - start
        if direct:  # an array read in place is in one piece only along the innermost dimension
            n = min(n, inner - start % inner)
        here = staged
        for k in range(INDEX):
            record = _record(block, k)
            itemsize = _field(record, ITEMSIZE)
            if itemsize:
                if _field(record, DIRECT):
                    _put(arrays + 8 * k, _field(record, ADDRESS) + _offset(block, record, start))
                    _put(arrays + 8 * (FIRST_STEP + k), _field(record, CLASS_STEP))
                else:
                    _put(arrays + 8 * k, here)
                    _put(arrays + 8 * (FIRST_STEP + k), per_chunk * itemsize)
                    if k <= PROBABILITIES:
                        _stage_classes(block, record, start, n, classes, here, per_chunk * itemsize, True)
                    here += classes * per_chunk * 8
        _stage_samples(block, start, n, arrays, samples, per_chunk)
        sums = _field(block, SUMS) + chunk * SUM_BYTES
        _call(_field(block, FUNCTION), n, arrays, _field(block, PARAMETERS), sums)
        for k in range(GRAD, INDEX):
            record = _record(block, k)
            if _field(record, ITEMSIZE) and not _field(record, DIRECT):
                step = _get(arrays + 8 * (FIRST_STEP + k))
                _stage_classes(block, record, start, n, classes, _get(arrays + 8 * k), step, False)
        _unstage_losses(block, start, n, arrays)
        start += n
    memory[0] = 0.0  # as in pointwise


def _run_serial(driver, block, chunks):  # type: ignore[no-untyped-def]
    for chunk in range(chunks):
        _drive(driver, block, chunk)


def _run_parallel(driver, block, chunks):  # type: ignore[no-untyped-def]
    for chunk in prange(chunks):
        _drive(driver, block, chunk)


def _cached(compile_: Callable[[bool], Any]) -> Any:
    """`compile_(cache)` with Numba's disk cache, or without it where that is unwritable or spoilt."""
    try:
        return compile_(True)
    except Exception:  # noqa: BLE001  # a spoilt cache file raises whatever unpickling it raises
        return compile_(False)


@cache
def driver(name: str) -> int:
    """Address of the driver `pointwise`, `rows` or `tile`."""
    function = {"pointwise": pointwise, "rows": rows, "tile": tile}[name]
    signature = types.void(types.int64, types.int64)
    compiled = _cached(lambda cache: cfunc(signature, cache=cache)(function))
    return int(compiled.address)


@cache
def runner(parallel: bool) -> CPUDispatcher:
    """The function that calls a driver for every chunk: (driver, block, chunks)."""
    function = _run_parallel if parallel else _run_serial
    signature = types.void(types.int64, types.int64, types.int64)
    return _cached(lambda cache: njit([signature], cache=cache, nogil=True, parallel=parallel)(function))
