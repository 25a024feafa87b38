"""Runs kernels on this machine's CPU: compiles them once per process, serial or on Numba's threads by the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from .. import runtime
from ..kernels import compiler
from ..kernels.pointwise import SUMS, PointwiseVariant
from ..kernels.softmax import ARRAYS, MIN_ROW, SoftmaxVariant
from ..kernels.values import LANES
from .layout import Samples, address, records

# Under this many bytes a parallel launch costs more than the second thread saves (measured: 40 to 90 KB break even).
PARALLEL_BYTES = 96 * 1024
# Results larger than this leave by streaming stores: they would not stay in the cache anyway.
STREAM_BYTES = 8 * 1024 * 1024

# Logits of one task: about 20 us of work, so that 64 rows or one very wide row are shared out well.
CHUNK_LOGITS = 32768
MAX_SAMPLES = 2048
# Rows with more classes than this that lie strided are staged one by one: 16 samples of them would not fit the cache.
MAX_TILE_CLASSES = 4096


@cache
def compiled(variant: Any) -> int:
    """Address of a variant's machine code."""
    return compiler.compile_function(variant.emit, 4, variant.key)


def launch(serial: Callable[..., None], parallel: Callable[..., None], nbytes: int, chunks: int, *args: Any) -> None:
    """Run a driver over `chunks`, on threads where that pays and is safe."""
    if chunks > 1 and nbytes >= PARALLEL_BYTES and runtime.may_run_parallel():
        runtime.preload_tbb()
        with runtime.parallel_region():
            parallel(chunks, *args)
    else:
        serial(chunks, *args)


def run_pointwise(
    variant: PointwiseVariant, sources: Sequence[np.ndarray], sinks: Sequence[np.ndarray], parameters: Sequence[float]
) -> np.ndarray:
    """Run one kernel over arrays of one shape; gives the sums in `SUMS`' order."""
    from ..kernels import cpu

    total = sources[0].size
    if total == 0:
        return np.zeros(len(SUMS))
    arrays = [*sources, *sinks]
    shape, rows = records(arrays)
    alignment = 0
    one_gradient = len(sinks) == 1 and variant.losses is None
    if one_gradient and sinks[0].nbytes >= STREAM_BYTES and rows[-1, cpu.DIRECT]:
        variant, alignment = replace(variant, stream=True), LANES * sinks[0].itemsize
    chunks = -(-total // cpu.CHUNK)
    sums = np.zeros((chunks, len(SUMS)))
    numbers = np.array(parameters, np.float64)
    nbytes = sum(array.itemsize for array in arrays) * total
    launch(
        cpu.pointwise_serial, cpu.pointwise_parallel, nbytes, chunks,
        compiled(variant), total, shape, rows, len(sources), numbers, alignment, sums,
    )  # fmt: skip
    sums = cpu.add_up(sums)
    sums[SUMS.index("count")] = total
    return sums



def run_softmax(
    variant: SoftmaxVariant,
    arrays: Sequence[np.ndarray | None],
    weight: np.ndarray | None,
    ignore_index: int,
    parameters: Sequence[float],
) -> np.ndarray:
    """Run a row loss over `arrays`: logits, probabilities, their gradients, of shape (N, C, d1, ...); class indices,
    upstream gradients, losses, of shape (N, d1, ...); absent ones None. Gives the sums in `SUMS`' order."""
    from ..kernels import cpu

    samples = Samples(arrays, n_classy=4)
    logits, grad, index = arrays[cpu.LOGITS], arrays[cpu.GRAD], arrays[cpu.INDEX]
    if samples.total == 0 or logits is None:
        return np.zeros(len(SUMS))
    classes = logits.shape[1]
    # Short rows, and classes that lie apart, go to lanes along samples, where these fit the cache.
    wide = classes >= MIN_ROW
    rows = wide and (samples.classes_adjoin(0) or (classes > MAX_TILE_CLASSES and not samples.samples_adjoin(0)))
    table = samples.records(rows)
    if index is not None:
        table[cpu.INDEX, cpu.CLASS_STEP] = index.dtype.kind == "u"
    per_chunk = max(1, CHUNK_LOGITS // classes) if rows else max(LANES, CHUNK_LOGITS // classes // LANES * LANES)
    per_chunk = min(per_chunk, MAX_SAMPLES)
    chunks = -(-samples.total // per_chunk)
    stream = rows and grad is not None and grad.nbytes >= STREAM_BYTES and bool(table[cpu.GRAD, cpu.DIRECT])
    variant = replace(variant, layout="rows" if rows else "tile", stream=stream)
    fixed = np.zeros(len(ARRAYS), np.int64)
    fixed[[cpu.A_WEIGHT, cpu.A_CLASSES, cpu.A_IGNORE]] = 0 if weight is None else address(weight), classes, ignore_index
    sums = np.zeros((chunks, len(SUMS)))
    nbytes = sum(array.nbytes for array in arrays if array is not None)
    launch(
        cpu.rows_serial if rows else cpu.tile_serial, cpu.rows_parallel if rows else cpu.tile_parallel, nbytes, chunks,
        compiled(variant), samples.total, per_chunk, np.array(samples.shape, np.int64), table, fixed,
        np.array(parameters, np.float64), sums,
    )  # fmt: skip
    return cpu.add_up(sums)
