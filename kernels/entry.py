"""What Python calls: a compiled function that takes arrays, puts their addresses into a task's block, runs its chunks
and hands back the reduced loss. In Python, finding one array's address alone takes five times as long.

It is a function of CPython's vectorcall convention, `PyObject *entry(self, args, nargs)`. `self` is a NumPy array of
int64, the state: `Entry`, the operands' places, the task's block, its parameters, its template. Calls only read it, so
that any number of threads may call one entry: what they write lies in memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from llvmlite import ir

from . import compiler
from .exact import add_rows
from .pointwise import SUMS
from .records import Header
from .values import F32, F64, I1, I32, I64, LANES, Value, full, loop, when

OBJECT = object.__basicsize__  # bytes of an object before its own fields, the last of which is its type
LOSS, WEIGHT, Z, COUNT, INVALID = (SUMS.index(name) for name in ("loss", "weight", "z", "count", "invalid"))
ROW = 8 * len(SUMS)
PARAMETERS, ROWS_OF_SUMS, TEMPLATE = (Header._fields.index(name) for name in ("parameters", "sums", "arrays"))

# What is made of the sums. RAW: the sums themselves, as bytes; else a number: the sum of losses, or that over the
# samples that count, their weights, or the extent of the first dimension.
RAW, SUM, OVER_COUNT, OVER_WEIGHT, OVER_ROWS = range(5)


class Entry(NamedTuple):
    """The first words of the state. Addresses differ from process to process: compiled code holds none."""

    # Python's functions and objects, NumPy's
    arrays: int  # the type of arrays
    as_address: int  # PyLong_AsVoidPtr
    allocate: int  # PyMem_RawCalloc
    free: int  # PyMem_RawFree
    retain: int  # Py_IncRef
    none: int
    bytes: int  # PyBytes_FromStringAndSize
    float: int  # PyFloat_FromDouble
    scalar: int  # PyArray_Scalar
    release: int  # PyEval_SaveThread
    acquire: int  # PyEval_RestoreThread
    # the task
    driver: int
    runner: int  # calls the driver for every chunk, on threads; 0: one after the other, here
    chunks: int
    block_words: int
    parameters: int  # how many
    shared: int  # whether other Python threads may run meanwhile
    operands: int  # how many
    # the result
    reduction: int
    rows: int  # extent of the first dimension
    dtype: int  # of a NumPy scalar, as an address; 0: a Python float
    single: int  # whether that is float32
    # where the gradient's scale is a share of the samples that count, the class indices, contiguous and native
    index_bytes: int  # of each, 4 or 8; 0: none are counted
    indices: int  # how many
    classes: int
    ignore_index: int
    mean: int  # whether the scales of losses and of z-losses are 1 / count, or stay as they are


class Place(NamedTuple):
    """Where an operand goes."""

    word: int  # of the block
    misaligned: int  # bits that its address may not have set
    kind: int  # word of the state where an array's dtype (its address), ndim, shape and strides stand; 0: any will do


class _Words:
    """Words of memory by the names of a NamedTuple's fields."""

    def __init__(self, base: Value, names: Sequence[str]) -> None:
        self._base, self._names = base, names

    def __getattr__(self, name: str) -> Value:
        return (self._base + 8 * self._names.index(name)).load(I64)


# a NumPy array's own fields
DATA, NDIM, SHAPE, STRIDES, DTYPE = (OBJECT + 8 * k for k in (0, 1, 2, 3, 5))


def call(function: Value, arguments: Sequence[Value], returns: ir.Type) -> Value:
    """Call the C function at an address."""
    b = function.b
    type_ = ir.FunctionType(returns, [argument.type for argument in arguments])
    return Value(b, b.call(b.inttoptr(function.v, type_.as_pointer()), [argument.v for argument in arguments]))


def _finite(x: Value) -> Value:
    return abs(x) < float("inf")


def _rounded(high: Value, low: Value) -> Value:
    """`reductions.Exact` as one number."""
    return (_finite(high) & _finite(low)).select(high + low, high)


def _halves(x: Value) -> tuple[Value, Value]:
    scaled = x * 134217729.0
    upper = scaled - (scaled - x)
    return upper, x - upper


def _over(high: Value, low: Value, divisor: Value) -> Value:
    """`reductions.Exact.over`, operation by operation. Counts and sums of weights 1 are never -0."""
    quotient = high / divisor
    (a, a_low), (c, c_low) = _halves(quotient), _halves(divisor)
    product = quotient * divisor
    error = ((a * c - product) + a * c_low + a_low * c) + a_low * c_low
    exact = quotient + ((high - product) - error + low) / divisor
    usable = _finite(low) & (abs(quotient) > 1e-150) & (abs(quotient) < 1e150)
    # the NaN of IEEE 754 has any sign, Python's has none
    over_zero = quotient.isnan().select(float("nan"), quotient)
    return (divisor == 0).select(over_zero, usable.select(exact, _rounded(high, low) / divisor))


def _reduced(sums: Value, reduction: Value, rows: Value) -> Value:
    """`reductions.Sums.value`, operation by operation."""
    slots = [(sums + 8 * k).load(F64) for k in range(len(SUMS))]
    high, z_high, count = slots[LOSS], slots[Z], slots[COUNT]
    total = high + z_high
    back = total - high
    low = slots[LOSS + 1] + ((high - (total - back)) + (z_high - back) + slots[Z + 1])
    divisor = (reduction == OVER_WEIGHT).select(_rounded(slots[WEIGHT], slots[WEIGHT + 1]), count)
    divisor = (reduction == OVER_ROWS).select(rows.to(F64), divisor)
    mean = _over(high, slots[LOSS + 1], divisor)
    plain = (z_high == 0) | (reduction == OVER_ROWS)
    mean = plain.select(mean, mean + _over(z_high, slots[Z + 1], count))
    return (reduction == SUM).select(_rounded(total, low), mean)


def _count(indices: Value, n: Value, elem: ir.Type, classes: Value, ignore_index: Value) -> Value:
    """How many class indices are not ignored; -1 where one is no class."""
    size = elem.width // 8

    def look(i: Value, kept: Value, bad: Value, lanes: int) -> list[Value]:
        index = (indices + i * size).load(elem, lanes)
        index = index if elem == I64 else Value(n.b, n.b.sext(index.v, index.like(I64)))
        counts = index != ignore_index
        return [kept + counts.zext(I64), bad | (counts & ~index.below(classes)).zext(I64)]

    b = n.b
    i, (kept, bad) = loop(
        Value(b, I64(0)), n, LANES, [full(b, I64, LANES, 0)] * 2, lambda i, kept, bad: look(i, kept, bad, LANES)
    )
    state = [kept.sum(), bad.fold(lambda a, c: a | c)]
    _, (kept, bad) = loop(i, n, 1, state, lambda i, kept, bad: look(i, kept, bad, 1))
    return (bad == 0).select(kept, -1)


def _entry(self: Value, args: Value, nargs: Value) -> Value:
    b = nargs.b
    zero = Value(b, I64(0))
    state = (self + OBJECT).load(I64)
    entry = _Words(state, Entry._fields)
    places = state + 8 * len(Entry._fields)
    block = places + 8 * len(Place._fields) * entry.operands
    chunks, block_words, parameters = entry.chunks, entry.block_words, entry.parameters

    # of this call's own: rows of sums, each a cache line, and copies of block and parameters
    words = chunks * len(SUMS) + block_words + parameters + len(SUMS)
    memory = call(entry.allocate, [words, full(b, I64, 1, 8)], I64)
    sums = (memory + (ROW - 1)) & -ROW
    own_block = sums + chunks * ROW
    own_parameters = own_block + block_words * 8

    def copy(i: Value) -> None:
        (own_block + 8 * i).store((block + 8 * i).load(I64))

    def other_kind(array: Value, kind: Value) -> Value:
        """Not 0 where an array is not of the kind that stands at an address."""
        dtype, ndim = kind.load(I64) ^ (array + DTYPE).load(I64), (kind + 8).load(I64)
        extents = kind + 16

        def compare(field: int, expected: Value) -> Callable[..., list[Value]]:
            actual = (array + field).load(I64)
            return lambda i, other: [other | ((expected + 8 * i).load(I64) ^ (actual + 8 * i).load(I64))]

        def all_extents() -> list[Value]:
            other = dtype
            for field, expected in ((SHAPE, extents), (STRIDES, extents + 8 * ndim)):
                _, (other,) = loop(zero, ndim, 1, [other], compare(field, expected))
            return [other]

        same_ndim = (array + NDIM).load(I32) == Value(b, b.trunc(ndim.v, I32))
        return when(same_ndim, all_extents, lambda: [zero + 1])[0]

    def place(k: Value, wrong: Value) -> list[Value]:
        operand = (args + 8 * k).load(I64)
        at = _Words(places + 8 * len(Place._fields) * k, Place._fields)
        kind = at.kind

        def array() -> list[Value]:
            (other,) = when(kind == 0, lambda: [zero], lambda: [other_kind(operand, state + 8 * kind)])
            return [(operand + DATA).load(I64), other]

        def number() -> list[Value]:
            return when(
                kind == 0, lambda: [call(entry.as_address, [operand], I64), zero], lambda: [zero, zero + 1]
            )

        address, other = when((operand + (OBJECT - 8)).load(I64) == entry.arrays, array, number)
        (own_block + 8 * at.word).store(address)
        return [wrong | other | (address & at.misaligned)]

    def prepare() -> list[Value]:
        """Whether the call may go on, once its block and its parameters are filled in."""
        loop(zero, block_words + parameters, 1, [], copy)
        (own_block + 8 * ROWS_OF_SUMS).store(sums)
        _, (wrong,) = loop(zero, nargs, 1, [zero], place)
        (own_block + 8 * PARAMETERS).store(own_parameters)
        (own_block + 8 * TEMPLATE).store(block + 8 * (block_words + parameters))
        (count,) = when((wrong != 0) | (entry.index_bytes == 0), lambda: [zero], scale)
        return [(wrong == 0) & (count >= 0)]

    def scale() -> list[Value]:
        """The number of class indices that count, of which the gradient's scales are made."""
        second = _Words(places + 8 * len(Place._fields), Place._fields)
        indices = (own_block + 8 * second.word).load(I64)
        rest = entry.indices, entry.classes, entry.ignore_index

        def count(elem: ir.Type) -> list[Value]:
            return [_count(indices, rest[0], elem, *rest[1:])]

        (counted,) = when(entry.index_bytes == 8, lambda: count(I64), lambda: count(I32))

        def share() -> None:
            upstream, upstream_z = ((own_parameters + 8 * k).load(F64) for k in range(2))
            own_parameters.store(upstream * (1.0 / counted.to(F64)))
            (own_parameters + 8).store((counted == 0).select(upstream_z, upstream_z / counted.to(F64)))

        when(entry.mean == 1, share)
        return [counted]

    def run() -> list[Value]:
        (thread,) = when(entry.shared == 1, lambda: [call(entry.release, [], I64)], lambda: [zero])

        def serial() -> None:
            driver = entry.driver

            def one(chunk: Value) -> None:
                call(driver, [own_block, chunk], ir.VoidType())

            loop(zero, chunks, 1, [], one)

        when(
            entry.runner == 0,
            serial,
            lambda: [call(entry.runner, [entry.driver, own_block, chunks], ir.VoidType())][:0],
        )
        # one row is the result as it stands: adding it to zeros would lose the sign of -0
        when(chunks > 1, lambda: add_rows(sums, chunks, sums, len(SUMS)))
        when(entry.shared == 1, lambda: [call(entry.acquire, [thread], ir.VoidType())][:0])
        return when(
            entry.reduction == RAW, lambda: [call(entry.bytes, [sums, full(b, I64, 1, ROW)], I64)], number
        )

    def number() -> list[Value]:
        return when((sums + 8 * INVALID).load(F64) == 0, valid, nothing)

    def valid() -> list[Value]:
        value = _reduced(sums, entry.reduction, entry.rows)

        def scalar() -> list[Value]:
            sums.store(value)
            when(entry.single == 1, lambda: sums.store(value.to(F32)))
            return [call(entry.scalar, [sums, entry.dtype, zero], I64)]

        return when(entry.dtype == 0, lambda: [call(entry.float, [value], I64)], scalar)

    def nothing() -> list[Value]:
        call(entry.retain, [entry.none], ir.VoidType())
        return [entry.none]

    usable = (memory != 0) & (nargs == entry.operands)
    (ready,) = when(usable, prepare, lambda: [full(b, I1, 1, 0)])
    (result,) = when(ready, run, nothing)
    call(entry.free, [memory], ir.VoidType())
    return result


@cache
def address() -> int:
    """Where the machine code lies."""
    return compiler.compile_function(_entry, 3, ("entry", OBJECT))
