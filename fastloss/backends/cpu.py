"""Runs kernels on this machine's CPU: compiles them once per process, serial or on Numba's threads by the work."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from .. import runtime
from ..kernels import compiler
from ..kernels.compiler import Variant
from ..kernels.exact import add_rows
from ..kernels.nll import NLLVariant
from ..kernels.pointwise import SUMS, PointwiseVariant
from ..kernels.records import CLASS_STEP, DIRECT, GRAD, LOGITS, N_CLASSY, Header
from ..kernels.records import SUMS as SUMS_FIELD
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


class Task:
    """A kernel over arrays of one layout: everything but their addresses, which `run` may be given anew."""

    def __init__(
        self,
        driver: str,
        variant: Variant,
        shape: Sequence[int],
        records: Sequence[Sequence[int]],
        total: int,
        per_chunk: int,
        nbytes: int,
        parameters: Sequence[float],
        *,
        n_sources: int = 0,
        alignment: int = 0,
        template: Sequence[int] = (),
    ) -> None:
        from ..kernels import cpu

        self._numbers = np.array(parameters, np.float64)
        self._template = np.array(template, np.int64)
        header = Header(
            function=variant.address,
            total=total,
            per_chunk=per_chunk,
            ndim=len(shape),
            n_arrays=len(records),
            n_sources=n_sources,
            alignment=alignment,
            parameters=address(self._numbers),
            sums=0,
            arrays=address(self._template),
        )
        fields = [*header, *shape, *(field for record in records for field in record)]
        self._Block = ctypes.c_int64 * len(fields)
        self._block = bytes(self._Block(*fields))
        self._first, self._width = len(header) + len(shape), len(records[0])
        self._chunks = -(-total // per_chunk)
        self._Sums = ctypes.c_double * (self._chunks * len(SUMS))
        self._large = self._chunks > 1 and nbytes >= PARALLEL_BYTES
        self._driver = cpu.driver(driver)
        self._runner = cpu.runner

    def run(self, addresses: Mapping[int, int] | None = None) -> list[float]:
        """The sums in `SUMS`' order, on threads where that pays and is safe; `addresses` of arrays by their number."""
        block = self._Block.from_buffer_copy(self._block)
        sums = self._Sums()
        block[SUMS_FIELD] = ctypes.addressof(sums)
        for k, where in (addresses or {}).items():
            block[self._first + k * self._width] = where
        if self._large and runtime.may_run_parallel():
            with runtime.parallel_region():
                self._runner(True)(self._driver, ctypes.addressof(block), self._chunks)
        else:
            self._runner(False)(self._driver, ctypes.addressof(block), self._chunks)
        if self._chunks == 1:
            return list(sums)
        out = (ctypes.c_double * len(SUMS))()
        _add_rows()(ctypes.addressof(sums), self._chunks, ctypes.addressof(out))
        return list(out)


def pointwise_task(
    variant: PointwiseVariant, sources: Sequence[np.ndarray], sinks: Sequence[np.ndarray], parameters: Sequence[float]
) -> Task | None:
    """One kernel over arrays of one shape, which are numbered in this order; None where there is nothing to do."""
    total = sources[0].size
    if total == 0:
        return None
    arrays = [*sources, *sinks]
    shape, rows = records(arrays)
    alignment = 0
    one_gradient = len(sinks) == 1 and variant.losses is None
    if one_gradient and sinks[0].nbytes >= STREAM_BYTES and rows[-1][DIRECT]:
        variant, alignment = variant.streaming, LANES * sinks[0].itemsize
    nbytes = sum(array.itemsize for array in arrays) * total
    return Task(
        "pointwise", variant, shape, rows, total, CHUNK, nbytes, parameters, n_sources=len(sources), alignment=alignment
    )


def softmax_task(
    options: tuple[Any, ...],
    arrays: Sequence[np.ndarray | None],
    weight: np.ndarray | None,
    ignore_index: int,
    parameters: Sequence[float],
) -> Task | None:
    """A row loss over `arrays`: logits, probabilities, their gradients, of shape (N, C, d1, ...); class indices,
    upstream gradients, losses, of shape (N, d1, ...); absent ones None. `options` are SoftmaxVariant's fields from
    `compute` to `grad_target`."""
    samples = Samples(arrays)
    logits, grad = arrays[LOGITS], arrays[GRAD]
    if samples.total == 0 or logits is None:
        return None
    classes = logits.shape[1]
    # Short rows, and classes that lie apart, go to lanes along samples, where these fit the cache.
    wide = classes >= MIN_ROW
    rows = wide and (samples.classes_adjoin(0) or (classes > MAX_TILE_CLASSES and not samples.samples_adjoin(0)))
    table = samples.records(rows)
    per_chunk = max(1, CHUNK_LOGITS // classes) if rows else max(LANES, CHUNK_LOGITS // classes // LANES * LANES)
    stream = rows and grad is not None and grad.nbytes >= STREAM_BYTES and bool(table[GRAD][DIRECT])
    variant = softmax_variant("rows" if rows else "tile", *options, stream)
    template = _template(classes, weight, ignore_index)
    return _samples_task(variant.layout, variant, samples, table, min(per_chunk, MAX_SAMPLES), template, parameters)


def nll_task(
    variant: NLLVariant,
    arrays: Sequence[np.ndarray | None],
    weight: np.ndarray | None,
    ignore_index: int,
    parameters: Sequence[float],
) -> Task | None:
    """The same for negative log-likelihood, which touches one logit a sample and never stages the others: logits and
    gradient must be native and aligned."""
    logits = arrays[LOGITS]
    samples = Samples(arrays)
    if samples.total == 0 or logits is None:
        return None
    table = samples.records(rows=True)
    template = _template(logits.shape[1], weight, ignore_index)
    for k, record in enumerate(table[:N_CLASSY]):
        record[DIRECT] = 1
        template[ARRAYS.index("logits_step") + k] = record[CLASS_STEP]
    return _samples_task("rows", variant, samples, table, MAX_SAMPLES, template, parameters)


def _template(classes: int, weight: np.ndarray | None, ignore_index: int) -> list[int]:
    """The slots of `softmax.ARRAYS` that are the same for every chunk."""
    fields = dict.fromkeys(ARRAYS, 0)
    fields |= {"classes": classes, "ignore_index": ignore_index, "weight": 0 if weight is None else address(weight)}
    return list(fields.values())


def _samples_task(
    driver: str,
    variant: SoftmaxVariant | NLLVariant,
    samples: Samples,
    table: Sequence[Sequence[int]],
    per_chunk: int,
    template: Sequence[int],
    parameters: Sequence[float],
) -> Task:
    nbytes = sum(array.nbytes for array in samples.arrays if array is not None)
    return Task(
        driver, variant, samples.shape, table, samples.total, per_chunk, nbytes, parameters, template=template
    )
