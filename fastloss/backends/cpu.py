"""Runs kernels on this machine's CPU: compiles them once per process, serial or on Numba's threads by the work."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np

from .. import runtime
from ..kernels import softmax_flat, softmax_packed, softmax_planes
from ..kernels.compiler import Variant, host_features
from ..kernels.entry import RAW, Entry, Place
from ..kernels.nll import NLLVariant
from ..kernels.pointwise import SUMS, PointwiseVariant
from ..kernels.records import (
    ADDRESS,
    ARRAYS,
    CLASS_STEP,
    DIRECT,
    GRAD,
    INDEX,
    ITEMSIZE,
    LOGITS,
    N_CLASSY,
    Header,
)
from ..kernels.softmax import SoftmaxVariant, scratch_bytes
from ..kernels.softmax_samples import MAX_FEW
from ..kernels.storage import itemsize
from ..kernels.values import LANES
from .entry import environment, function, memory
from .layout import Samples, address, records

# Bytes from which threads pay, of arithmetic as cheap as a squared difference. On two threads a launch costs what 6 us
# of work does (TBB), so that 15 to 30 us of work are needed. benchmarks/scheduling.py measures it.
PARALLEL_BYTES = 512 * 1024
# What a byte costs under the other drivers, at least.
COST = {"rows": 1.3, "flat": 1.7, "packed": 1.7, "planes": 1.7, "short": 2.7, "tile": 2.7}
# Work on fewer bytes takes a few us, and other Python threads wait for it: handing over to one and back costs more.
SHARED_BYTES = 64 * 1024
# Results larger than this leave by streaming stores: they would not stay in the cache anyway.
STREAM_BYTES = 8 * 1024 * 1024

# Elements or logits of one chunk: 2 to 5 us of work, so that little of it is shared out well: 128 rows of 1,000 classes
# are 8 chunks. Where there would be many, larger ones save the time that describing them to a driver takes: 4% with
# four times as many logits, of half types 3% more with sixteen times.
CHUNK, LARGE_CHUNK = 16384, 262144
MANY = 64  # chunks
STAGED_CHUNK = 65536  # of arrays that are copied to scratch: more does not stay in the cache
MAX_SAMPLES = 8192
# Logits of the samples that are copied to scratch together, in bytes: they stay in the first-level cache.
TILE_BYTES = 32 * 1024
MAX_TILE = 256
# Rows with no more classes than this are transposed: 2.3 times as fast as row by row at 32, 1.2 at 64, even at 100.
MAX_SHORT = 64
# Rows of so many classes, without options, are taken as if there were no rows: 1.1 times as fast as transposed at 21,
# 1.6 at 64, and 1.8 times as fast as row by row at 100, 1.3 at 256. More classes are too many for float32 sums.
MIN_FLAT, MAX_SHARED = 17, 256
# With AVX-512 few classes are, up to `MAX_FEW`, and added up by row in registers: 1.2 times as fast as transposed at 5,
# 1.4 times with the gradient; at 21 1.1 and 1.3 times as fast as what `MIN_FLAT` begins. Two are no faster so.
MIN_PACKED = 3
# Where classes lie apart, so many are taken at once: 1.5 times as fast as some and then others at 2, 1.2 at 10, and
# slower at 21, whose lines share a set of the nearest cache where images are of some power of 2. AVX2 has half as many
# registers.
MAX_AT_ONCE = 10
# Rows with more classes than this that lie strided are staged one by one: 16 samples of them would not fit the cache.
MAX_TILE_CLASSES = 4096


# A variant and its hash take 10 us to make, and a program uses few: they are kept, looked up by their fields.
pointwise_variant = cache(PointwiseVariant)
softmax_variant = cache(SoftmaxVariant)
nll_variant = cache(NLLVariant)


class Task:
    """A kernel over arrays of one layout: everything but their addresses, which its entries may be given anew."""

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
        from ..kernels.drivers import driver as driver_of

        self.records, self.parameters, self._template = records, parameters, template
        header = Header(
            function=variant.address,
            total=total,
            per_chunk=per_chunk,
            ndim=len(shape),
            n_arrays=len(records),
            n_sources=n_sources,
            alignment=alignment,
            parameters=0,
            sums=0,
            arrays=0,
            **memory(),
        )
        self._block = [*header, *shape, *(field for record in records for field in record)]
        self._first = len(header) + len(shape)
        self._total, self.chunks = total, -(-total // per_chunk)
        self._driver = driver_of(driver, len(records)) if template else driver_of(driver)
        self.nbytes = nbytes
        self.parallel = self.chunks > 1 and nbytes * COST.get(driver, 1) >= PARALLEL_BYTES  # whether threads pay
        self._shared = nbytes >= SHARED_BYTES

    def run(self) -> list[float]:
        """The sums in `SUMS`' order, on threads where that pays and is safe."""
        if self.parallel and runtime.may_run_parallel():
            sums = runtime.run_parallel(self.entry((), parallel=True))
        else:
            sums = self.entry(())()
        if sums is None:
            raise MemoryError("no memory for the sums of a loss")
        found = list(struct.unpack(f"{len(SUMS)}d", sums))
        if math.isnan(found[SUMS.index("invalid")]):  # what a driver without memory leaves
            raise MemoryError("no memory for the scratch of a loss")
        return found

    def entry(
        self,
        operands: Sequence[int],
        *,
        parallel: bool = False,
        reduction: int = RAW,
        rows: int = 0,
        dtype: str | None = None,
        counted: Mapping[str, int] = MappingProxyType({}),
        kinds: Sequence[np.ndarray] = (),
    ) -> Callable[..., Any]:
        """This task as a function of some of its arrays, by their numbers; the others stay as they are.

        `reduction`: what is returned, of kernels.entry's; `dtype`: as a NumPy scalar, None: as a Python number.
        `counted`: the entry's fields about class indices, which are counted before the kernel runs.
        `kinds`: arrays like which the operands must be, else None is returned; their dtypes must live for ever.
        """
        if parallel:
            from ..kernels.cpu import runner

        width = len(self.records[0])
        places: list[int] = []
        described: list[int] = []
        start = len(Entry._fields) + len(Place._fields) * len(operands)
        start += len(self._block) + len(self.parameters) + len(self._template)
        for n, k in enumerate(operands):
            kind = start + len(described) if kinds else 0
            places += Place(self._first + k * width, self.records[k][ITEMSIZE] - 1, kind)
            if kinds:
                described += [id(kinds[n].dtype), kinds[n].ndim, *kinds[n].shape, *kinds[n].strides]
        scalar = np.dtype(dtype) if dtype else None
        fields = environment() | dict.fromkeys(("index_bytes", "indices", "classes", "ignore_index", "mean"), 0)
        fields |= counted
        entry = Entry(
            driver=self._driver,
            runner=runner() if parallel else 0,
            chunks=self.chunks,
            block_words=len(self._block),
            parameters=len(self.parameters),
            shared=self._shared,
            operands=len(operands),
            reduction=reduction,
            rows=rows,
            dtype=id(scalar) if scalar else 0,
            single=dtype == "float32",
            **fields,
        )
        numbers = np.array(self.parameters, np.float64)
        if entry.mean:
            numbers[:2] = 1  # of which the entry makes the scales of this call's losses and z-losses
        words = (places, self._block, numbers.view(np.int64), self._template, described)
        return function(entry, words)

    def number_of(self, array: np.ndarray) -> int | None:
        """The number of the array that is written to this memory."""
        start = address(array)
        found = (k for k in reversed(range(len(self.records))) if self.records[k][ADDRESS] == start)
        return next(found, None)

    def aligned(self, numbers: Sequence[int]) -> bool:
        """Whether these arrays were aligned, as entries want them."""
        return all(self.records[k][ADDRESS] % self.records[k][ITEMSIZE] == 0 for k in numbers)

    def counted(self, mean: bool) -> dict[str, int] | None:
        """The entry's fields about class indices: empty where the task has none, None where they do not lie in one
        piece of memory as integers that an entry counts."""
        if not self._template or not self.records[INDEX][ITEMSIZE]:
            return {}
        record = self.records[INDEX]
        if not record[DIRECT] or record[CLASS_STEP] or record[ITEMSIZE] not in (4, 8):
            return None
        classes, ignore_index = (self._template[ARRAYS.index(name)] for name in ("classes", "ignore_index"))
        return {
            "index_bytes": record[ITEMSIZE],
            "indices": self._total,
            "classes": classes,
            "ignore_index": ignore_index,
            "mean": mean,
        }


def chunk_of(numbers: int) -> int:
    """How many of so many elements or logits make a chunk."""
    return max(CHUNK, min(numbers // MANY // CHUNK * CHUNK, LARGE_CHUNK))


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
        "pointwise",
        variant,
        shape,
        rows,
        total,
        chunk_of(total),
        nbytes,
        parameters,
        n_sources=len(sources),
        alignment=alignment,
    )


def softmax_task(
    options: tuple[Any, ...],
    arrays: Sequence[np.ndarray | None],
    weight: np.ndarray | None,
    ignore_index: int,
    parameters: Sequence[float],
) -> Task | None:
    """A row loss over `arrays`: logits, probabilities, their gradients, of shape (N, C, d1, ...); class indices,
    upstream gradients, losses, of shape (N, d1, ...), for a shard's kernel four more; absent ones None. `options` are
    SoftmaxVariant's fields from `compute` to `shard`."""
    samples = Samples(arrays)
    logits, grad = arrays[LOGITS], arrays[GRAD]
    if samples.total == 0 or logits is None:
        return None
    classes = logits.shape[1]
    # Classes that lie apart go to lanes along samples, where these fit the cache.
    by_row = samples.classes_adjoin(LOGITS) or not samples.samples_adjoin(LOGITS)
    if classes <= MAX_SHORT:
        layout = "short" if by_row else "tile"
    else:
        by_row = samples.classes_adjoin(LOGITS) or (by_row and classes > MAX_TILE_CLASSES)
        layout = "rows" if by_row else "tile"
    variant, avx512 = softmax_variant(layout, 0, *options), "avx512" in host_features()
    if variant.plain and not variant.softcap and variant.compute == "float32" and classes <= MAX_SHARED:
        if not by_row:
            layout = "planes"
        elif MIN_PACKED <= classes <= MAX_FEW and avx512:
            layout = "packed"
        elif classes >= MIN_FLAT:
            layout = "flat"
    at_once = MAX_AT_ONCE if avx512 else MAX_AT_ONCE // 2
    few = classes if classes <= {"short": MAX_FEW, "packed": MAX_FEW, "planes": at_once}.get(layout, 0) else 0
    table = samples.records(by_row)
    if (by_row and few) or layout == "flat":  # their rows are read as one piece
        for record in table[:N_CLASSY]:
            record[DIRECT] &= int(samples.total == 1 or record[-1] == classes * record[ITEMSIZE])
    staged = any(record[ITEMSIZE] and not record[DIRECT] for record in table)
    per_chunk = min(chunk_of(logits.size), STAGED_CHUNK if staged else LARGE_CHUNK) // classes
    per_chunk = max(1, per_chunk) if layout == "rows" else max(LANES, per_chunk // LANES * LANES)
    streams = layout != "short" or few > 0
    stream = streams and grad is not None and grad.nbytes >= STREAM_BYTES and bool(table[GRAD][DIRECT])
    variant = softmax_variant(layout, few, *options, stream)
    tile = min(MAX_TILE, max(LANES, TILE_BYTES // (classes * itemsize(variant.compute)) // LANES * LANES))
    if layout == "flat":
        tile = softmax_flat.block_of(classes)
    elif layout == "packed":
        tile = softmax_packed.block_of(classes, grad is not None)
    elif layout == "planes":
        tile = softmax_planes.block_of(classes, grad is not None)
    template = _template(classes, weight, ignore_index)
    template[ARRAYS.index("tile")] = tile
    template[ARRAYS.index("scratch")] = scratch_bytes(variant, classes, tile)
    return _samples_task(layout, variant, samples, table, min(per_chunk, MAX_SAMPLES), template, parameters)


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
    table = samples.records(by_row=True)
    template = _template(logits.shape[1], weight, ignore_index)
    for record in table[:N_CLASSY]:
        record[DIRECT] = 1
    return _samples_task("rows", variant, samples, table, MAX_SAMPLES, template, parameters)


def _template(classes: int, weight: np.ndarray | None, ignore_index: int) -> list[int]:
    """The slots of `records.ARRAYS` that are the same for every chunk."""
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
