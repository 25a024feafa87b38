"""Pointwise losses on a GPU: a grid over the elements, 16 bytes a load where all arrays lie alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..exact import two_sum
from ..pointwise import Pointwise
from ..storage import FLOATS, itemsize
from ..vecmath import where
from .build import Kernel
from .device import Int, Lanes, cuda, divided, each, emitted, fold, full, number
from .memory import VECTOR_BYTES, load, load_lanes, store_lanes
from .sums import FIRST_FIELDS, Reduction, closing, no_sums, quotient, read_row


@dataclass(frozen=True)
class PointwiseKernel(Kernel):
    """One kernel of a loss. Storages are names of `storage.MEMORY`."""

    loss: Pointwise
    compute: str  # "float32" or "float64"
    inputs: tuple[str, ...]  # storages of x, y and the loss's operands
    weight: str | None = None  # of the element weights
    upstream: str | None = None  # of a gradient of each sample's loss
    factor: str | None = None  # of the one number by which gradients of a reduced loss are multiplied
    by_weight: bool = False  # gradients are divided by the sum of weights: the sum of a row of sums that is given
    losses: str | None = None
    grad: str | None = None
    grad_target: str | None = None
    reduction: Reduction | None = None
    ndim: int = 0  # dimensions that all arrays have, with strides; 0: all are contiguous and aligned alike

    @property
    def key(self) -> tuple[object, ...] | None:
        """What tells this kernel from every other; None keeps a formula from outside out of the disk cache."""
        if not (self.loss.value.__module__ or "").startswith(__package__.rpartition(".")[0] + "."):
            return None
        rest = (getattr(self, name) for name in self.__dataclass_fields__ if name != "loss")
        return ("cuda pointwise", self.loss.name, *rest)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Storages of the arrays read, in order."""
        return (*self.inputs, *(name for name in (self.weight, self.upstream) if name))

    @cached_property
    def sinks(self) -> tuple[str, ...]:
        """Storages of the arrays written, in order."""
        return tuple(name for name in (self.losses, self.grad, self.grad_target) if name)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The kernel's arguments. `rest` elements are taken one by one: the first `head` and those from `tail` on;
        between them lie `chunks` of `chunk` elements."""
        arrays = len(self.sources) + len(self.sinks)
        names = [*FIRST_FIELDS, "chunks", "head", "tail", "rest", "scale", "factor", "stats"]
        names += [f"parameter{k}" for k in range(len(self.loss.parameters))]
        names += [f"array{k}" for k in range(arrays)]
        names += [f"extent{d}" for d in range(self.ndim)]
        names += [f"stride{k}_{d}" for k in range(arrays) for d in range(self.ndim)]
        return tuple(names)

    @property
    def lanes(self) -> int:
        """Elements of one vector: 16 bytes of the narrowest floats among the arrays; 1 where arrays have strides."""
        if self.ndim:
            return 1
        sizes = [itemsize(name) for name in self.sources + self.sinks if name in FLOATS]
        return VECTOR_BYTES // min(sizes)

    @property
    def vectors(self) -> int:
        """Vectors that a thread has in flight: 32 or 64 bytes of each array."""
        return 2 if self.lanes in (2, 8) else 4

    @property
    def wanted_threads(self) -> int:
        """With more threads a multiprocessor, loads wait for uses of others, or registers spill."""
        return 512 if self.grad and self.lanes == 8 else 768

    @property
    def chunk(self) -> int:
        """Elements that a block takes at a time."""
        return self.threads * self.vectors * self.lanes

    def build(self) -> Any:
        """The kernel."""
        at = {name: k for k, name in enumerate(self.fields)}
        compute, n_sources = self.compute, len(self.sources)
        arrays = self.sources + self.sinks

        def place(a: Any, k: int, i: Int) -> Int:
            """The address of element i of array k."""
            base = a[at[f"array{k}"]]
            if not self.ndim:
                return base + i * itemsize(arrays[k])
            for d in reversed(range(self.ndim)):
                i, inner = divided(i, a[at[f"extent{d}"]], self.long) if d else (i, i)
                base = base + inner * a[at[f"stride{k}_{d}"]]
            return base

        def elements(a: Any, first: list[Int], lanes: int, scale: Any, sums: Any, invalid: Int) -> Any:
            """`lanes` elements at each of `first`: all are read before any is written."""
            numbers = [number(a[at[f"parameter{k}"]], compute) for k in range(len(self.loss.parameters))]

            def read(i: Int) -> list[Any]:
                return [load_lanes(place(a, k, i), name, compute, lanes) for k, name in enumerate(self.sources)]

            written = []
            for found in [read(i) for i in first]:
                operands = found[: len(self.inputs)]
                weight = found[len(self.inputs)] if self.weight else None
                upstream = found[n_sources - 1] if self.upstream else None
                good = each(self.loss.valid, *operands[:2]) if self.loss.valid else None
                loss = self._valid(each(self.loss.value, *operands, *numbers), good)
                if weight is not None:
                    loss = each(lambda x, w: x * w, loss, weight)
                outputs = [loss] if self.losses else []
                for wanted, formula in ((self.grad, self.loss.grad), (self.grad_target, self.loss.grad_target)):
                    if wanted and formula:
                        g = each(lambda x, s: x * s, each(formula, *operands, *numbers), scale)
                        for other in (weight, upstream):
                            g = g if other is None else each(lambda x, o: x * o, g, other)
                        outputs.append(self._valid(g, good))
                written.append(outputs)
                if self.reduction:
                    pairs = [*two_sum(sums[:2], fold(lambda x, y: x + y, loss)), *sums[2:]]
                    if weight is not None:
                        pairs[2:4] = two_sum(sums[2:4], fold(lambda x, y: x + y, weight))
                    sums = Lanes(pairs)
                    if good is not None:
                        invalid = where(fold(lambda x, y: x & y, good), invalid, invalid + 1)
            for i, outputs in zip(first, written, strict=True):
                for k, (name, value) in enumerate(zip(self.sinks, outputs, strict=True)):
                    store_lanes(place(a, n_sources + k, i), value, name, self.pairs)
            return sums, invalid

        @emitted
        def start(a: Any) -> Any:
            sums, (_, invalid) = no_sums(a[0], compute)
            scale = number(a[at["scale"]], compute)
            if self.factor:
                scale = scale * load(a[at["factor"]], self.factor, compute)
            if self.by_weight:
                row, _ = read_row(a[at["stats"]], compute)
                scale = scale * quotient((full(a[0], compute, 1.0), full(a[0], compute, 0.0)), row[:2])
            return sums, invalid, scale

        @emitted
        def vectors(a: Any, chunk: Int, thread: Int, scale: Any, sums: Any, invalid: Int) -> Any:
            begin = a[at["head"]] + chunk * self.chunk + thread * self.lanes
            first = [begin + u * (self.threads * self.lanes) for u in range(self.vectors)]
            return elements(a, first, self.lanes, scale, sums, invalid)

        @emitted
        def one(a: Any, i: Int, scale: Any, sums: Any, invalid: Int) -> Any:
            head = a[at["head"]]
            return elements(a, [where(i < head, i, a[at["tail"]] + i - head)], 1, scale, sums, invalid)

        @emitted
        def counted(a: Any, invalid: Int) -> Any:
            return a[at["divisor"]] * 0, invalid

        reduced, threads = self.reduction is not None, self.threads
        close = closing(self.reduction or Reduction(compute, "sums"), threads)
        chunks, rest = at["chunks"], at["rest"]

        def pointwise(a):  # type: ignore[no-untyped-def]
            sums, invalid, scale = start(a)
            chunk = cuda.blockIdx.x
            while chunk < a[chunks]:  # Numba's range divides 64-bit numbers first
                sums, invalid = vectors(a, chunk, cuda.threadIdx.x, scale, sums, invalid)
                chunk += cuda.gridDim.x
            i = cuda.blockIdx.x * threads + cuda.threadIdx.x
            while i < a[rest]:
                sums, invalid = one(a, i, scale, sums, invalid)
                i += cuda.gridDim.x * threads
            if reduced:
                close(a, sums, counted(a, invalid))

        return pointwise

    @staticmethod
    def _valid(value: Any, good: Any) -> Any:
        """NaN where an element lies outside the loss's domain."""
        return value if good is None else each(lambda x, ok: where(ok, x, float("nan")), value, good)


def _itself(x: Any) -> Any:
    return x


# Its losses are a copy of its only input; their sum is that of the input.
COPY = Pointwise("copy", _itself, _itself)
