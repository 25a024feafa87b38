"""Runs kernels on this machine's CPU: compiles them once per process, serial or on Numba's threads by the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from .. import runtime
from ..kernels import compiler
from ..kernels.exact import add_rows
from ..kernels.nll import NLLVariant
from ..kernels.pointwise import SUMS, PointwiseVariant
from ..kernels.records import CLASS_STEP, DIRECT, GRAD, LOGITS, N_CLASSY
from ..kernels.softmax import ARRAYS, MIN_ROW, SoftmaxVariant
from ..kernels.values import LANES
from .layout import Samples, address, records

# A parallel launch costs 3.4 us with TBB, in which one thread reads some 50 KB: under twice that, threads do not pay.
PARALLEL_BYTES = 96 * 1024
# Results larger than this leave by streaming stores: they would not stay in the cache anyway.
STREAM_BYTES = 8 * 1024 * 1024

# Pointwise elements of one task: 64 KB of float32, about 4 us of work.
CHUNK = 16384
# Logits of one task: about 20 us of work, so that 64 rows or one very wide row are shared out well.
CHUNK_LOGITS = 32768
MAX_SAMPLES = 2048
# Rows with more classes than this that lie strided are staged one by one: 16 samples of them would not fit the cache.
MAX_TILE_CLASSES = 4096


# A variant and its hash take 10 us to make, and a program uses few: they are kept, looked up by their fields.
pointwise_variant = cache(PointwiseVariant)
softmax_variant = cache(SoftmaxVariant)
nll_variant = cache(NLLVariant)


@cache
def _add_rows() -> Callable[..., None]:
    emit = partial(add_rows, width=len(SUMS))
    return compiler.callable_of(emit, 3, ("add_rows", len(SUMS)))


def launch(
    driver: str,
    variant: Any,
    shape: Sequence[int],
    records: Sequence[Sequence[int]],
    total: int,
    per_chunk: int,
    nbytes: int,
    parameters: Sequence[float],
    *,
    n_sources: int = 0,
    alignment: int = 0,
    template: np.ndarray | None = None,
) -> np.ndarray:
    """Run a driver over all chunks, on threads where that pays and is safe; gives the sums in `SUMS`' order."""
    from ..kernels import cpu

    chunks = -(-total // per_chunk)
    sums = np.zeros((chunks, len(SUMS)))
    numbers = np.array(parameters, np.float64)
    header = cpu.Header(
        function=variant.address,
        total=total,
        per_chunk=per_chunk,
        ndim=len(shape),
        n_arrays=len(records),
        n_sources=n_sources,
        alignment=alignment,
        parameters=address(numbers),
        sums=address(sums),
        arrays=0 if template is None else address(template),
    )
    block = np.array([*header, *shape, *(field for record in records for field in record)], np.int64)
    task = cpu.driver(driver), address(block), chunks
    if chunks > 1 and nbytes >= PARALLEL_BYTES and runtime.may_run_parallel():
        with runtime.parallel_region():
            cpu.runner(True)(*task)
    else:
        cpu.runner(False)(*task)
    if chunks == 1:
        return sums[0]
    out = np.empty(len(SUMS))
    _add_rows()(address(sums), chunks, address(out))
    return out


def run_pointwise(
    variant: PointwiseVariant, sources: Sequence[np.ndarray], sinks: Sequence[np.ndarray], parameters: Sequence[float]
) -> np.ndarray:
    """Run one kernel over arrays of one shape; gives the sums in `SUMS`' order."""
    total = sources[0].size
    if total == 0:
        return np.zeros(len(SUMS))
    arrays = [*sources, *sinks]
    shape, rows = records(arrays)
    alignment = 0
    one_gradient = len(sinks) == 1 and variant.losses is None
    if one_gradient and sinks[0].nbytes >= STREAM_BYTES and rows[-1][DIRECT]:
        variant, alignment = variant.streaming, LANES * sinks[0].itemsize
    nbytes = sum(array.itemsize for array in arrays) * total
    sums = launch(
        "pointwise", variant, shape, rows, total, CHUNK, nbytes, parameters, n_sources=len(sources), alignment=alignment
    )
    sums[SUMS.index("count")] = total
    return sums


def run_softmax(
    options: tuple[Any, ...],
    arrays: Sequence[np.ndarray | None],
    weight: np.ndarray | None,
    ignore_index: int,
    parameters: Sequence[float],
) -> np.ndarray:
    """Run a row loss over `arrays`: logits, probabilities, their gradients, of shape (N, C, d1, ...); class indices,
    upstream gradients, losses, of shape (N, d1, ...); absent ones None. `options` are SoftmaxVariant's fields from
    `compute` to `grad_target`. Gives the sums in `SUMS`' order."""
    samples = Samples(arrays)
    logits, grad = arrays[LOGITS], arrays[GRAD]
    if samples.total == 0 or logits is None:
        return np.zeros(len(SUMS))
    classes = logits.shape[1]
    # Short rows, and classes that lie apart, go to lanes along samples, where these fit the cache.
    wide = classes >= MIN_ROW
    rows = wide and (samples.classes_adjoin(0) or (classes > MAX_TILE_CLASSES and not samples.samples_adjoin(0)))
    table = samples.records(rows)
    per_chunk = max(1, CHUNK_LOGITS // classes) if rows else max(LANES, CHUNK_LOGITS // classes // LANES * LANES)
    stream = rows and grad is not None and grad.nbytes >= STREAM_BYTES and bool(table[GRAD][DIRECT])
    variant = softmax_variant("rows" if rows else "tile", *options, stream)
    template = _template(classes, weight, ignore_index)
    return _run_samples(variant.layout, variant, samples, table, min(per_chunk, MAX_SAMPLES), template, parameters)


def run_nll(
    variant: NLLVariant,
    arrays: Sequence[np.ndarray | None],
    weight: np.ndarray | None,
    ignore_index: int,
    parameters: Sequence[float],
) -> np.ndarray:
    """The same for negative log-likelihood, which touches one logit a sample and never stages the others."""
    logits = arrays[LOGITS]
    arrays = [array if k >= N_CLASSY or array is None else _aligned(array) for k, array in enumerate(arrays)]
    samples = Samples(arrays)
    if samples.total == 0 or logits is None:
        return np.zeros(len(SUMS))
    table = samples.records(rows=True)
    template = _template(logits.shape[1], weight, ignore_index)
    for k, record in enumerate(table[:N_CLASSY]):
        record[DIRECT] = 1
        template[ARRAYS.index("logits_step") + k] = record[CLASS_STEP]
    return _run_samples("rows", variant, samples, table, MAX_SAMPLES, template, parameters)


def _template(classes: int, weight: np.ndarray | None, ignore_index: int) -> np.ndarray:
    """The slots of `softmax.ARRAYS` that are the same for every chunk."""
    fields = dict.fromkeys(ARRAYS, 0)
    fields |= {"classes": classes, "ignore_index": ignore_index, "weight": 0 if weight is None else address(weight)}
    return np.array(list(fields.values()), np.int64)


def _run_samples(
    driver: str,
    variant: SoftmaxVariant | NLLVariant,
    samples: Samples,
    table: Sequence[Sequence[int]],
    per_chunk: int,
    template: np.ndarray,
    parameters: Sequence[float],
) -> np.ndarray:
    nbytes = sum(array.nbytes for array in samples.arrays if array is not None)
    return launch(
        driver, variant, samples.shape, table, samples.total, per_chunk, nbytes, parameters, template=template
    )


def _aligned(array: np.ndarray) -> np.ndarray:
    """The array itself, or a native copy where it is byte-swapped or misaligned."""
    return array if array.dtype.isnative and array.flags.aligned else array.astype(array.dtype.newbyteorder("="))
