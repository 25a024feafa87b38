"""Sums over some axes of an array: the gradient of what was broadcast, and that of class weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..exact import two_sum
from .build import Kernel
from .device import Int, Lanes, barrier, cuda, divided, emitted, thread_index, when
from .memory import load, store
from .sums import block_total, no_sums, total_of


@dataclass(frozen=True, kw_only=True)
class FoldingKernel(Kernel):
    """result[o] = sum over k of source[o, k]: a block for each o."""

    compute: str
    source: str  # storages
    result: str
    kept: int  # dimensions of o
    folded: int  # dimensions of k

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this kernel from every other, for the disk cache."""
        return ("cuda folding", *(getattr(self, name) for name in self.__dataclass_fields__))

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The kernel's arguments: numbers of o and of k, then extents and strides in bytes."""
        names = ["source", "result", "outputs", "terms"]
        names += [f"{name}{d}" for d in range(self.kept) for name in ("extent", "from", "to")]
        names += [f"{name}{d}" for d in range(self.folded) for name in ("terms_extent", "terms_from")]
        return tuple(names)

    def build(self) -> Any:
        """The kernel."""
        k, at = self, {name: n for n, name in enumerate(self.fields)}

        def place(a: Any, base: Int, i: Int, dimensions: int, extent: str, stride: str) -> Int:
            for d in reversed(range(dimensions)):
                i, inner = divided(i, a[at[f"{extent}{d}"]], k.long) if d else (i, i)
                base = base + inner * a[at[f"{stride}{d}"]]
            return base

        @emitted
        def start(a: Any) -> Any:
            return no_sums(a[0], k.compute)

        @emitted
        def add(a: Any, o: Int, i: Int, sums: Any) -> Any:
            begin = place(a, a[at["source"]], o, k.kept, "extent", "from")
            x = load(place(a, begin, i, k.folded, "terms_extent", "terms_from"), k.source, k.compute)
            return Lanes([*two_sum(sums[:2], x), *sums[2:]])

        @emitted
        def finish(a: Any, o: Int, sums: Any, counts: Any) -> None:
            total, _ = block_total(sums, counts, k.compute, k.threads)
            result = place(a, a[at["result"]], o, k.kept, "extent", "to")
            when(thread_index(result) == 0, lambda: store(result, total_of(tuple(total[:2])), k.result))
            barrier(result)  # the sums of the next o go through the same memory

        outputs, terms, threads = at["outputs"], at["terms"], k.threads

        def fold_axes(a):  # type: ignore[no-untyped-def]
            o = cuda.blockIdx.x
            while o < a[outputs]:
                sums, counts = start(a)
                i = cuda.threadIdx.x
                while i < a[terms]:
                    sums = add(a, o, i, sums)
                    i += threads
                finish(a, o, sums, counts)
                o += cuda.gridDim.x

        return fold_axes
