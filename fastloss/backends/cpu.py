"""Runs kernels on this machine's CPU: compiles them once per process, serial or on Numba's threads by the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from .. import runtime
from ..kernels import compiler
from ..kernels.nll import NLLVariant
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
    stream = rows and grad is not None and grad.nbytes >= STREAM_BYTES and bool(table[cpu.GRAD, cpu.DIRECT])
    variant = replace(variant, layout="rows" if rows else "tile", stream=stream)
    fixed = _fixed(classes, weight, ignore_index)
    drivers = (cpu.rows_serial, cpu.rows_parallel) if rows else (cpu.tile_serial, cpu.tile_parallel)
    return _run_samples(drivers, variant, samples, table, per_chunk, fixed, parameters)


def run_nll(
    variant: NLLVariant,
    arrays: Sequence[np.ndarray | None],
    weight: np.ndarray | None,
    ignore_index: int,
    parameters: Sequence[float],
) -> np.ndarray:
    """The same for negative log-likelihood, which touches one logit a sample and never stages the others."""
    from ..kernels import cpu

    logits, index = arrays[cpu.LOGITS], arrays[cpu.INDEX]
    if logits is None or index is None or index.size == 0:
        return np.zeros(len(SUMS))
    arrays = [array if k >= cpu.INDEX or array is None else _aligned(array) for k, array in enumerate(arrays)]
    samples = Samples(arrays, n_classy=4)
    table = samples.records(rows=True)
    table[: cpu.INDEX, cpu.DIRECT] = 1
    table[cpu.INDEX, cpu.CLASS_STEP] = index.dtype.kind == "u"
    fixed = _fixed(logits.shape[1], weight, ignore_index)
    fixed[cpu.A_STEP : cpu.A_STEP + 4] = table[:4, cpu.CLASS_STEP]
    return _run_samples((cpu.rows_serial, cpu.rows_parallel), variant, samples, table, MAX_SAMPLES, fixed, parameters)


def _fixed(classes: int, weight: np.ndarray | None, ignore_index: int) -> np.ndarray:
    """The slots of `softmax.ARRAYS` that are the same for every chunk."""
    fixed = dict.fromkeys(ARRAYS, 0)
    fixed |= {"classes": classes, "ignore_index": ignore_index, "weight": 0 if weight is None else address(weight)}
    return np.array(list(fixed.values()), np.int64)


def _run_samples(
    drivers: tuple[Callable[..., None], Callable[..., None]],
    variant: SoftmaxVariant | NLLVariant,
    samples: Samples,
    table: np.ndarray,
    per_chunk: int,
    fixed: np.ndarray,
    parameters: Sequence[float],
) -> np.ndarray:
    from ..kernels import cpu

    chunks = -(-samples.total // per_chunk)
    sums = np.zeros((chunks, len(SUMS)))
    nbytes = sum(array.nbytes for array in samples.arrays if array is not None)
    shape, numbers = np.array(samples.shape, np.int64), np.array(parameters, np.float64)
    launch(*drivers, nbytes, chunks, compiled(variant), samples.total, per_chunk, shape, table, fixed, numbers, sums)
    return cpu.add_up(sums)


def _aligned(array: np.ndarray) -> np.ndarray:
    """The array itself, or a native copy where it is byte-swapped or misaligned."""
    return array if array.dtype.isnative and array.flags.aligned else array.astype(array.dtype.newbyteorder("="))
