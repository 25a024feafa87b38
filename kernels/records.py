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
    allocate: int  # C functions: memory of so many bytes, and its end
    free: int


FUNCTION, TOTAL, PER_CHUNK, NDIM, N_ARRAYS, N_SOURCES, ALIGNMENT, PARAMETERS, SUMS, TEMPLATE, ALLOCATE, FREE = range(12)
BODY = len(Header._fields)

# Columns of an array's record; its strides in bytes follow. CLASS_STEP is the stride between classes, or 1 for
# unsigned class indices.
ADDRESS, ITEMSIZE, DIRECT, SWAP, CLASS_STEP, STRIDES = range(6)

# a row loss's records, in order; the first four have a class dimension, those after LOSSES are a shard's
LOGITS, PROBABILITIES, GRAD, GRAD_TARGET, INDEX, UPSTREAM, LOSSES, PULL, MERGED, LSE, MASS = range(11)
N_CLASSY, N_RECORDS = 4, 7

# What a call of a row loss's kernel passes, all 64 bits wide: addresses of the first sample's first class, the bytes
# from class to class and from sample to sample; what each sample has one of; class weights; how many samples make a
# tile, and where scratch is (for the driver, which makes it: how many bytes).
ARRAYS = (
    "logits", "probabilities", "grad", "grad_target",
    "logits_step", "probabilities_step", "grad_step", "grad_target_step",
    "logits_row", "probabilities_row", "grad_row", "grad_target_row",
    "index", "upstream", "losses", "pull", "merged", "lse", "mass",
    "weight", "classes", "ignore_index", "tile", "scratch",
)  # fmt: skip
# float64: scale of gradients, of the z-loss's gradient; 1 - e and e / C of label smoothing; sum of class weights
NUMBERS = ("scale", "scale_z", "keep", "share", "weight_sum", "lse_square_scale", "softcap")
