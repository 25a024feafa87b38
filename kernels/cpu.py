"""Runs compiled kernels over arrays of any layout: `@njit(parallel=True)` over chunks of fixed size.

A kernel sees contiguous, native memory only. What is laid out otherwise (strided, broadcast, byte-swapped) passes
through a block of scratch that stays in the first-level cache. The chunks and the order in which their sums are added
do not depend on the number of threads, so neither does any bit of the result. Every driver exists twice, since a
parallel launch costs more than a small input; the twins share their body, and their names keep Numba's cache apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from .pointwise import SUMS

N_SUMS = len(SUMS)
INVALID = SUMS.index("invalid")
CHUNK = 16384  # pointwise elements per task: 64 KB of float32, about 4 us of work
STAGE = 1024  # elements staged at a time: five float64 operands fill 40 KB

# Columns of an array's record; its strides in bytes follow. CLASS_STEP is the stride between classes, or 1 for
# unsigned class indices.
ADDRESS, ITEMSIZE, DIRECT, SWAP, CLASS_STEP, STRIDES = range(6)


@intrinsic
def _call(typingctx: Any, function: Any, n: Any, arrays: Any, parameters: Any, sums: Any) -> Any:
    """Call the kernel at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        type_ = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
        builder.call(builder.inttoptr(args[0], type_.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def _copy(typingctx: Any, source: Any, target: Any, itemsize: Any, swap: Any) -> Any:
    """Copy one element of 1, 2, 4 or 8 bytes, reversing them if `swap`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, itemsize, swap = args
        after = builder.append_basic_block("copied")
        switch = builder.switch(itemsize, after)
        for size in (1, 2, 4, 8):
            type_ = ir.IntType(8 * size)
            block = builder.append_basic_block(f"copy{size}")
            switch.add_case(ir.Constant(ir.IntType(64), size), block)
            with builder.goto_block(block):
                value = builder.load(builder.inttoptr(source, type_.as_pointer()), align=1, typ=type_)
                if size > 1:
                    value = builder.select(builder.trunc(swap, ir.IntType(1)), builder.bswap(value), value)
                builder.store(value, builder.inttoptr(target, type_.as_pointer()), align=1)
                builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@njit(cache=True, nogil=True)
def _offset(shape, strides, index):  # type: ignore[no-untyped-def]
    """Bytes from the start of an array to its element `index` in C order."""
    offset = 0
    for k in range(len(shape) - 1, -1, -1):
        offset += index % shape[k] * strides[k]
        index //= shape[k]
    return offset


@njit(cache=True, nogil=True)
def _stage(record, shape, start, n, scratch, inward):  # type: ignore[no-untyped-def]
    """Copy elements start .. start + n between an array of any layout and contiguous scratch."""
    itemsize, swap, strides = record[ITEMSIZE], record[SWAP], record[STRIDES:]
    inner, step = shape[-1], strides[-1]
    done = 0
    while done < n:
        index = start + done
        run = min(n - done, inner - index % inner)
        there = record[ADDRESS] + _offset(shape, strides, index)
        here = scratch + done * itemsize
        if inward:
            for k in range(run):
                _copy(there + k * step, here + k * itemsize, itemsize, swap)
        else:
            for k in range(run):
                _copy(here + k * itemsize, there + k * step, itemsize, swap)
        done += run


@njit(cache=True, nogil=True)
def _pointwise_chunk(chunk, function, total, shape, records, n_sources, parameters, alignment, sums):  # type: ignore[no-untyped-def]
    """One chunk of a pointwise kernel: all at once where every array is direct, else block by block."""
    n_arrays = len(records)
    direct = True
    for k in range(n_arrays):
        direct = direct and records[k, DIRECT] == 1
    start, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, total)
    pointers = np.empty(n_arrays, np.int64)
    scratch = np.empty((0 if direct else n_arrays, STAGE))
    while start < stop:
        n = stop - start if direct else min(STAGE, stop - start)
        if alignment:  # streaming stores: the elements before the first aligned vector go alone
            last = records[n_arrays - 1]
            before = -(last[ADDRESS] + start * last[ITEMSIZE]) % alignment // last[ITEMSIZE]
            if before:
                n = min(n, before)
        for k in range(n_arrays):
            if records[k, DIRECT]:
                pointers[k] = records[k, ADDRESS] + start * records[k, ITEMSIZE]
            else:
                pointers[k] = scratch[k].ctypes.data
                if k < n_sources:
                    _stage(records[k], shape, start, n, pointers[k], True)
        _call(function, n, pointers.ctypes.data, parameters.ctypes.data, sums[chunk].ctypes.data)
        for k in range(n_sources, n_arrays):
            if not records[k, DIRECT]:
                _stage(records[k], shape, start, n, pointers[k], False)
        start += n


@njit(cache=True, nogil=True)
def pointwise_serial(chunks, function, total, shape, records, n_sources, parameters, alignment, sums):  # type: ignore[no-untyped-def]
    for chunk in range(chunks):
        _pointwise_chunk(chunk, function, total, shape, records, n_sources, parameters, alignment, sums)


@njit(cache=True, nogil=True, parallel=True)
def pointwise_parallel(chunks, function, total, shape, records, n_sources, parameters, alignment, sums):  # type: ignore[no-untyped-def]
    for chunk in prange(chunks):
        _pointwise_chunk(chunk, function, total, shape, records, n_sources, parameters, alignment, sums)


@intrinsic
def _index(typingctx: Any, address: Any, itemsize: Any, unsigned: Any) -> Any:
    """The integer at an address as an int64; what does not fit is the largest one, which is no class."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, itemsize, unsigned = args
        wide = ir.IntType(64)
        after = builder.append_basic_block("read")
        with builder.goto_block(after):
            phi = builder.phi(wide)
        switch = builder.switch(itemsize, after)
        phi.add_incoming(ir.Constant(wide, 0), builder.block)
        for size in (1, 2, 4, 8):
            type_ = ir.IntType(8 * size)
            block = builder.append_basic_block(f"read{size}")
            switch.add_case(ir.Constant(wide, size), block)
            with builder.goto_block(block):
                raw = builder.load(builder.inttoptr(address, type_.as_pointer()), align=1, typ=type_)
                is_unsigned = builder.trunc(unsigned, ir.IntType(1))
                if size < 8:
                    value = builder.select(is_unsigned, builder.zext(raw, wide), builder.sext(raw, wide))
                else:
                    negative = builder.icmp_signed("<", raw, ir.Constant(wide, 0))
                    too_large = builder.and_(is_unsigned, negative)
                    value = builder.select(too_large, ir.Constant(wide, 2**63 - 1), raw)
                phi.add_incoming(value, block)
                builder.branch(after)
        builder.position_at_end(after)
        return phi

    return types.int64(types.int64, types.int64, types.int64), codegen


# rows of a row loss's records; the first four have a class dimension
LOGITS, PROBABILITIES, GRAD, GRAD_TARGET, INDEX, UPSTREAM, LOSSES = range(7)
# slots of softmax.ARRAYS
A_STEP, A_INDEX, A_WEIGHT, A_UPSTREAM, A_LOSSES, A_CLASSES, A_IGNORE = 4, 8, 9, 10, 11, 12, 13


@njit(cache=True, nogil=True)
def _stage_samples(records, shape, start, n, arrays, scratch):  # type: ignore[no-untyped-def]
    """Put the addresses of class indices, upstream gradients and losses of n samples into `arrays`."""
    for k in range(INDEX, LOSSES + 1):
        record, here = records[k], scratch[k - INDEX].ctypes.data
        if record[ITEMSIZE] == 0:
            continue
        if record[DIRECT]:
            here = record[ADDRESS] + start * record[ITEMSIZE]
        elif k != LOSSES:
            _stage(record, shape, start, n, here, True)
        if k == INDEX and (record[ITEMSIZE] != 8 or record[CLASS_STEP]):
            raw, here = here, scratch[3].ctypes.data
            indices = scratch[3].view(np.int64)
            for i in range(n):
                indices[i] = _index(raw + i * record[ITEMSIZE], record[ITEMSIZE], record[CLASS_STEP])
        arrays[A_INDEX if k == INDEX else A_UPSTREAM if k == UPSTREAM else A_LOSSES] = here


@njit(cache=True, nogil=True)
def _rows_chunk(chunk, function, total, per_chunk, shape, records, fixed, parameters, sums):  # type: ignore[no-untyped-def]
    """Samples whose classes lie side by side; those that do not are staged, a sample at a time."""
    start, stop = chunk * per_chunk, min((chunk + 1) * per_chunk, total)
    classes = fixed[A_CLASSES]
    arrays = fixed.copy()
    tables = np.empty((4, per_chunk), np.int64)
    samples = np.empty((4, per_chunk))
    direct = True
    for k in range(INDEX):
        direct = direct and (records[k, ITEMSIZE] == 0 or records[k, DIRECT] == 1)
    step = stop - start if direct else 1
    scratch = np.empty((4, 0 if direct else classes + 16))
    for i in range(start, stop, step):
        for k in range(INDEX):
            record = records[k]
            if record[ITEMSIZE] == 0:
                continue
            arrays[k] = tables[k].ctypes.data
            for row in range(step):
                tables[k, row] = record[ADDRESS] + _offset(shape, record[STRIDES:], i + row)
            if not record[DIRECT]:
                here = scratch[k].ctypes.data
                if k <= PROBABILITIES:
                    for c in range(classes):
                        there = tables[k, 0] + c * record[CLASS_STEP]
                        _copy(there, here + c * record[ITEMSIZE], record[ITEMSIZE], record[SWAP])
                tables[k, 0] = here
        _stage_samples(records, shape, i, step, arrays, samples)
        _call(function, step, arrays.ctypes.data, parameters.ctypes.data, sums[chunk].ctypes.data)
        for k in range(GRAD, INDEX):
            record = records[k]
            if record[ITEMSIZE] and not record[DIRECT]:
                there = record[ADDRESS] + _offset(shape, record[STRIDES:], i)
                for c in range(classes):
                    here = scratch[k].ctypes.data + c * record[ITEMSIZE]
                    _copy(here, there + c * record[CLASS_STEP], record[ITEMSIZE], record[SWAP])
        if records[LOSSES, ITEMSIZE] and not records[LOSSES, DIRECT]:
            _stage(records[LOSSES], shape, i, step, arrays[A_LOSSES], False)


@njit(cache=True, nogil=True)
def _tile_chunk(chunk, function, total, per_chunk, shape, records, fixed, parameters, sums):  # type: ignore[no-untyped-def]
    """Samples side by side for each class; arrays that lie otherwise are staged, transposed, in scratch."""
    start, stop = chunk * per_chunk, min((chunk + 1) * per_chunk, total)
    classes = fixed[A_CLASSES]
    arrays = fixed.copy()
    samples = np.empty((4, per_chunk))
    staged, direct = 0, False
    for k in range(INDEX):
        if records[k, ITEMSIZE]:
            staged += 1 - records[k, DIRECT]
            direct = direct or records[k, DIRECT] == 1
    scratch = np.empty((staged, classes * per_chunk))
    inner = shape[-1]
    while start < stop:
        n = stop - start
        if direct:  # an array read in place is in one piece only along the innermost dimension
            n = min(n, inner - start % inner)
        used = 0
        for k in range(INDEX):
            record = records[k]
            if record[ITEMSIZE] == 0:
                continue
            if record[DIRECT]:
                arrays[k] = record[ADDRESS] + _offset(shape, record[STRIDES:], start)
                arrays[A_STEP + k] = record[CLASS_STEP]
                continue
            arrays[k], arrays[A_STEP + k] = scratch[used].ctypes.data, per_chunk * record[ITEMSIZE]
            used += 1
            if k <= PROBABILITIES:
                _stage_classes(record, shape, start, n, classes, arrays[k], arrays[A_STEP + k], True)
        _stage_samples(records, shape, start, n, arrays, samples)
        _call(function, n, arrays.ctypes.data, parameters.ctypes.data, sums[chunk].ctypes.data)
        for k in range(GRAD, INDEX):
            if records[k, ITEMSIZE] and not records[k, DIRECT]:
                _stage_classes(records[k], shape, start, n, classes, arrays[k], arrays[A_STEP + k], False)
        if records[LOSSES, ITEMSIZE] and not records[LOSSES, DIRECT]:
            _stage(records[LOSSES], shape, start, n, arrays[A_LOSSES], False)
        start += n


@njit(cache=True, nogil=True)
def _stage_classes(record, shape, start, n, classes, scratch, step, inward):  # type: ignore[no-untyped-def]
    """Copy the classes of n samples between an array of any layout and scratch, `step` bytes from class to class."""
    one = record.copy()
    for c in range(classes):
        one[ADDRESS] = record[ADDRESS] + c * record[CLASS_STEP]
        _stage(one, shape, start, n, scratch + c * step, inward)


@njit(cache=True, nogil=True)
def rows_serial(chunks, function, total, per_chunk, shape, records, fixed, parameters, sums):  # type: ignore[no-untyped-def]
    for chunk in range(chunks):
        _rows_chunk(chunk, function, total, per_chunk, shape, records, fixed, parameters, sums)


@njit(cache=True, nogil=True, parallel=True)
def rows_parallel(chunks, function, total, per_chunk, shape, records, fixed, parameters, sums):  # type: ignore[no-untyped-def]
    for chunk in prange(chunks):
        _rows_chunk(chunk, function, total, per_chunk, shape, records, fixed, parameters, sums)


@njit(cache=True, nogil=True)
def tile_serial(chunks, function, total, per_chunk, shape, records, fixed, parameters, sums):  # type: ignore[no-untyped-def]
    for chunk in range(chunks):
        _tile_chunk(chunk, function, total, per_chunk, shape, records, fixed, parameters, sums)


@njit(cache=True, nogil=True, parallel=True)
def tile_parallel(chunks, function, total, per_chunk, shape, records, fixed, parameters, sums):  # type: ignore[no-untyped-def]
    for chunk in prange(chunks):
        _tile_chunk(chunk, function, total, per_chunk, shape, records, fixed, parameters, sums)


@njit(cache=True, nogil=True)
def add_up(sums):  # type: ignore[no-untyped-def]
    """The chunks' sums in one row, added in order; pairs (high, low) carry the rounding errors of high."""
    out = np.zeros(N_SUMS)
    for chunk in range(len(sums)):
        for pair in range(0, 6, 2):
            term = sums[chunk, pair]
            total = out[pair] + term
            back = total - out[pair]
            out[pair + 1] += (out[pair] - (total - back)) + (term - back) + sums[chunk, pair + 1]
            out[pair] = total
        out[6] += sums[chunk, 6]
        out[7] = max(out[7], sums[chunk, 7])
    return out
