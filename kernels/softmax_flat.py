"""Softmax cross-entropy without options over rows of some to a few hundred classes, one behind the other in memory:
exponentials of a block of rows are computed as if there were no rows, in whole vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .softmax_exp import ShiftedExp
from .softmax_shared import BYTES, SharedReferenceKernel
from .transpose import QUAD, folded_rows
from .values import CACHE_LINE, DEEP, F32, I32, I64, LANES, Value, full, iota, loop, when

BLOCK_LOGITS, MAX_BLOCK = 2048, 64  # of a block, that stays in L1; rows of it
UNROLL = 4  # vectors of one turn of a loop


def block_of(classes: int) -> int:
    """How many rows make a block. More than sixteen of short ones, so that what was stored has left the store buffer
    when it is loaded at another offset, which no processor forwards."""
    return max(LANES, min(MAX_BLOCK, BLOCK_LOGITS // classes // LANES * LANES))


class FlatKernel(SharedReferenceKernel):
    """Exponentials lie in scratch as the logits do in memory, gradients behind them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.a["logits_step"] = Value(self.b, I64(self.size))
        self.pitch = self.classes * BYTES  # from row to row in scratch
        # a vector between the two: the last row is read and written in whole ones
        self.to_gradients = self.tile * self.pitch + CACHE_LINE
        self.whole = (self.classes - 1) & -LANES  # classes before a row's last vector
        self.last = iota(self.b, LANES) < (self.classes - self.whole).trunc(I32)
        self.columns = {name: self.column(F32) for name in ("offsets", "counts", "sums", "shares", "owns")}
        self.columns["targets"] = self.column(I32)

    def entry(self, name: str, r: Value) -> Value:
        """Where row r's number of a column is."""
        return self.columns[name] + r * BYTES

    def exponentiate(self, start: Value, stop: Value) -> tuple[ShiftedExp, Value]:
        x = self.a["logits"] + start * self.a["logits_row"]
        shifted = self.exponential_for(x)

        def some(many: int) -> Callable[[Value, Value], list[Value]]:
            def turn(k: Value, seen: Value) -> list[Value]:
                (x + k * self.size).prefetch_ahead(many * LANES * self.size, DEEP)
                for place in (k + j * LANES for j in range(many)):
                    p, scale, seen = shifted.watched(self.logits(x + place * self.size), seen)
                    (self.scratch + place * BYTES).store(p * scale)
                return [seen]

            return turn

        logits = (stop - start) * self.classes
        k, state = loop(self.begin, logits, UNROLL * LANES, [full(self.b, I32, LANES)], some(UNROLL))
        _, (seen,) = loop(k, logits, LANES, state, some(1))
        return shifted, ~shifted.overflowed(seen)

    def sums_of(self, j: Value) -> Value:
        row = self.scratch + j * self.pitch

        def quad(q: int) -> list[Value]:
            rows = [row + (QUAD * q + k) * self.pitch for k in range(QUAD)]
            parts = [self.last.select((at + self.whole * BYTES).load(F32, LANES), 0.0) for at in rows]

            def more(c: Value, *parts: Value) -> list[Value]:
                return [part + (at + c * BYTES).load(F32, LANES) for at, part in zip(rows, parts, strict=True)]

            return loop(self.begin, self.whole, LANES, parts, more)[1]

        return folded_rows([part for q in range(LANES // QUAD) for part in quad(q)])

    def again(self, i: Value, j: Value) -> tuple[Value, Value, Value]:
        x, rows = self.a["logits"] + i * self.a["logits_row"], self.scratch + j * self.pitch
        loop(
            self.begin, self.classes * LANES, LANES, [],
            lambda k: (rows + k * BYTES).store(self.logits(x + k * self.size)),
        )  # fmt: skip
        lowest, zero = full(self.b, F32, LANES, float("-inf")), full(self.b, F32, LANES)

        def each(r: Value) -> None:
            row = rows + r * self.pitch
            end = row + self.whole * BYTES

            def larger(at: Value, highest: Value) -> Value:
                z = at.load(F32, LANES)
                return (z > highest).select(z, highest)

            def add(at: Value, total: Value, live: Value | None = None) -> Value:
                z = at.load(F32, LANES)
                e = exponential(z - offset)
                at.store(e if live is None else live.select(e, z))  # what lies behind is the next row's
                return total + (e if live is None else live.select(e, 0.0))

            _, (most,) = loop(self.begin, self.whole, LANES, [lowest], lambda c, m: [larger(row + c * BYTES, m)])
            offset, count = self.own_reference(self.last.select(larger(end, most), most).max())
            exponential = ShiftedExp(count, short=True, capped=False)
            first = add(end, zero, self.last)  # in the order of `sums_of`
            _, (total,) = loop(self.begin, self.whole, LANES, [first], lambda c, s: [add(row + c * BYTES, s)])
            for name, number in (("offsets", offset), ("counts", count), ("sums", total.sum())):
                self.entry(name, r).store(number)

        loop(self.begin, self.begin + LANES, 1, [], each)
        offset, count, sums = (self.columns[name].load(F32, LANES) for name in ("offsets", "counts", "sums"))
        return offset, count, sums

    def keep(self, i: Value, j: Value, t: Value, share: Value, own: Value, usual: Value) -> None:
        for name, column in (("shares", share), ("owns", own), ("targets", t)):
            self.columns[name].store(column)
        rows = self.scratch + j * self.pitch

        def clear(r: Value) -> None:
            row, zero = rows + r * self.pitch, full(self.b, F32, 1)

            def all_() -> None:
                loop(self.begin, self.classes, 1, [], lambda c: (row + c * BYTES).store(zero))

            when(self.entry("owns", r).load(F32) == 0.0, all_)

        def each(r: Value) -> None:
            share, less = (self.entry(name, r).load(F32) for name in ("shares", "owns"))
            target = self.entry("targets", r).load(I32).zext(I64) * BYTES
            row = rows + r * self.pitch
            out = row + self.to_gradients

            def vector(c: Value) -> None:
                (out + c * BYTES).store((row + c * BYTES).load(F32, LANES) * share)

            loop(self.begin, self.whole, LANES, [], vector)
            vector(self.whole)  # reaches into the next row, which is written after it
            (out + target).store(((row + target).load(F32) - less) * share)

        sixteen = self.begin + LANES
        when(~usual, lambda: loop(self.begin, sixteen, 1, [], clear)[1])
        loop(self.begin, sixteen, 1, [], each)

    def hand_over(self, start: Value, stop: Value) -> None:
        target = self.a["grad"] + start * self.a["grad_row"]
        self.write_out(self.scratch + self.to_gradients, target, (stop - start) * self.classes)
