"""How a task is described to the drivers: a block of 64-bit integers, header, shape, and a record for each array."""

from __future__ import annotations

from typing import NamedTuple


class Header(NamedTuple):
    """The first fields of a task's block; the shape and the records follow."""

    function: int  # address of the kernel
    total: int  # elements or samples
    per_chunk: int
    ndim: int
    n_arrays: int
    n_sources: int  # how many of them are read; the rest are written
    alignment: int  # bytes that the vectors of a streamed result are aligned to, or 0
    parameters: int  # addresses: float64 parameters, rows of sums,
    sums: int
    arrays: int  # and what every chunk of a row loss passes to its kernel, the slots of its own arrays empty


FUNCTION, TOTAL, PER_CHUNK, NDIM, N_ARRAYS, N_SOURCES, ALIGNMENT, PARAMETERS, SUMS, TEMPLATE = range(10)
BODY = len(Header._fields)

# Columns of an array's record; its strides in bytes follow. CLASS_STEP is the stride between classes, or 1 for
# unsigned class indices.
ADDRESS, ITEMSIZE, DIRECT, SWAP, CLASS_STEP, STRIDES = range(6)

# a row loss's records, in order; the first four have a class dimension
LOGITS, PROBABILITIES, GRAD, GRAD_TARGET, INDEX, UPSTREAM, LOSSES = range(7)
N_CLASSY = 4
