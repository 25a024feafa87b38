"""Softmax cross-entropy without options over rows of a few classes, one behind the other in memory: exponentials are
computed as if there were no rows, and added up by row in registers."""

from __future__ import annotations

from typing import Any

from . import storage
from .softmax_exp import ShiftedExp
from .softmax_shared import BYTES, SharedReferenceKernel
from .transpose import load_classes, packed_sums, row_sums, store_classes
from .values import DEEP, F32, I32, I64, LANES, Value, full, full_of, loop

VECTOR = LANES * BYTES
# Logits of a block. With a gradient their exponentials wait in L1 as well.
BLOCK_LOGITS, WITH_GRADIENT = 2048, 1024


def block_of(classes: int, gradient: bool) -> int:
    """How many rows make a block."""
    logits = WITH_GRADIENT if gradient else BLOCK_LOGITS
    return max(LANES, logits // classes // LANES * LANES)


class PackedKernel(SharedReferenceKernel):
    """The number of classes is compiled in. Scratch holds a block's sums, behind them its targets' logits, and, where
    gradients are wanted, its exponentials as the logits lie in memory."""

    early = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.a["logits_step"] = Value(self.b, I64(self.size))

    def kept(self, j: Value) -> Value:
        """Where the exponentials of the block's j-th row are."""
        return self.scratch + (2 * self.tile + j * self.v.few) * BYTES

    def transposed(self, place: Value) -> list[Value]:
        """A vector for each class of sixteen rows, the first of them at a place."""
        kind = self.v.logits
        return load_classes(place, self.v.few, storage.MEMORY[kind], lambda raw: storage.widened(raw, kind, F32))

    def exponentiate(self, start: Value, stop: Value) -> tuple[ShiftedExp, Value]:
        first = self.a["logits"] + start * self.a["logits_row"]
        shifted = self.exponential_for(first)
        size = LANES * self.size

        def sixteen(j: Value, seen: Value) -> list[Value]:
            place = first + j * self.a["logits_row"]
            terms = []
            for c in range(self.v.few):
                at = place + c * size
                at.prefetch_ahead(size, DEEP)
                p, scale, seen = shifted.watched(self.logits(at), seen)
                terms.append(p * scale)
            if self.v.grad:
                for c, term in enumerate(terms):
                    (self.kept(j) + c * VECTOR).store(term)
            (self.scratch + j * BYTES).store(packed_sums(terms))
            self.pick_early(start + j, j)
            return [seen]

        _, (seen,) = loop(self.begin, stop - start, LANES, [full(self.b, I32, LANES)], sixteen)
        return shifted, ~shifted.overflowed(seen)

    def again(self, i: Value, j: Value) -> tuple[Value, Value, Value]:
        logits = self.transposed(self.a["logits"] + i * self.a["logits_row"])
        highest = full(self.b, F32, LANES, float("-inf"))
        for z in logits:
            highest = (z > highest).select(z, highest)
        offset, count = self.own_reference(highest)
        exponential = ShiftedExp(count, short=True, capped=False)
        terms = [exponential(z - offset) for z in logits]
        if self.v.grad:
            store_classes(self.kept(j), terms, F32, lambda term: term)
        return offset, count, row_sums(terms)

    def keep(self, i: Value, j: Value, t: Value, share: Value, own: Value, usual: Value) -> None:
        kind = self.v.grad or ""
        size = LANES * storage.itemsize(kind)
        target = self.a["grad"] + i * self.a["grad_row"]

        def written(stream: bool, all_live: bool) -> None:
            for v in range(self.v.few):
                rows, classes = zip(*(divmod(LANES * v + lane, self.v.few) for lane in range(LANES)), strict=True)
                less, times, at = (column.shuffle(None, rows) for column in (own, share, t))
                e = (self.kept(j) + v * VECTOR).load(F32, LANES)
                gradient = self.gradients(e, full_of(self.b, I32, classes), at, less, times, all_live)
                storage.store(target + v * size, gradient, kind, stream)

        self.written_at_once(self.a["grad"], usual, written)

    def hand_over(self, start: Value, stop: Value) -> None:
        """`keep` has written them."""
