"""Softmax cross-entropy without options, in float32: one reference serves a whole block of samples.

No maximum is looked for. Sums of exponentials show afterwards where the reference does not suit a sample; its group of
sixteen is then done again, each sample relative to its own maximum.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from . import storage
from .softmax_exp import ShiftedExp, log_of_parts
from .softmax_math import SoftmaxKernel
from .targets import INVALID, LIVE, chosen
from .values import F32, F64, I16, I32, I64, LANES, SIZE, Value, full, loop, when
from .vecmath import FORMATS, log_of_normal, split_float32

# A sum outside 1 / MAX_SUM .. MAX_SUM may lack what is too small beside the reference, or be infinite.
MAX_SUM = 2.0**60
PRODUCT = 64 * LANES  # samples of which one logarithm is taken, 64 factors of 0.75 .. 1.5 in a lane
BYTES = SIZE[F32]


class SharedReferenceKernel(SoftmaxKernel):
    """A block has at most `tile` samples; its exponentials, or what a layout wants of them, are in scratch. As for all
    kernels whose lanes are samples, memory for whole groups of sixteen is there."""

    early = False  # whether `exponentiate` keeps the targets' logits

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tile, self.scratch = self.a["tile"], self.a["scratch"]
        self.size = storage.itemsize(self.v.logits)

    @abstractmethod
    def exponentiate(self, start: Value, stop: Value) -> tuple[ShiftedExp, Value]:
        """Fill scratch for samples start .. stop; what was subtracted, and whether it was not far below any logit."""

    def sums_of(self, j: Value) -> Value:
        """The sums of sixteen samples, the first of them the block's j-th."""
        return (self.scratch + j * BYTES).load(F32, LANES)

    @abstractmethod
    def again(self, i: Value, j: Value) -> tuple[Value, Value, Value]:
        """Samples i .. i + 16 each relative to a reference of its own, as `own_reference` gives it: this, and the sums.
        Scratch is written anew; where the block's reference would have done, nothing changes by it."""

    @abstractmethod
    def keep(self, i: Value, j: Value, t: Value, share: Value, own: Value, usual: Value) -> None:
        """Note what exponentials are multiplied by in the gradient, and what the target's has less before that, or
        write the gradient. Both are 0 for samples that do not live, of which there are none if `usual`, and whose
        exponentials may be NaN."""

    @abstractmethod
    def hand_over(self, start: Value, stop: Value) -> None:
        """Write the gradients of samples start .. stop, unless `keep` has."""

    def emit(self) -> None:
        """Write the kernel's body."""
        rounded = (self.n + (LANES - 1)) & -LANES
        many = ((self.begin + PRODUCT) // self.tile).at_least(1) * self.tile
        # Of samples s in [0.75, 1.5) * 2**e with a target's logit z: the product of the factors, sums of e and z.
        nothing = [full(self.b, F64, LANES, 1.0), full(self.b, I32, LANES), full(self.b, F64, LANES)]

        def block(start: Value, last: Value, state: Sequence[Value]) -> list[Value]:
            stop = (start + self.tile).at_most(last)
            shifted, fits = self.exponentiate(start, stop)
            _, new = loop(start, stop, LANES, state, lambda i, *s: self.group(i, i - start, shifted, fits, s))
            if self.v.grad:
                self.hand_over(start, stop)
            return new

        def blocks(start: Value, *state: Value) -> list[Value]:
            last = (start + many).at_most(rounded)
            beyond = last + (self.tile - 1)
            _, new = loop(start, beyond, self.tile, [*state, *nothing], lambda i, *s: block(i, last, s))
            *sums, count, invalid, product, exponents, logits = new
            for term in (log_of_normal(product), exponents.to(F64) * FORMATS[F32].ln2 - logits):
                sums = [*self.add_term(sums, term)]
            return [*sums, count, invalid]

        _, state = loop(self.begin, rounded + many - 1, many, self.no_sums(), blocks)
        self.store_sums(state)

    def streamed(self, places: Value, write: Callable[[bool], None]) -> None:
        """`write(stream)` gradients: past the caches if that is wanted, and these addresses, or-ed, suit it."""
        if not self.v.stream:
            write(False)
            return
        size = LANES * storage.itemsize(self.v.grad or "")
        when((places & (size - 1)) == 0, lambda: write(True), lambda: write(False))

    def written_at_once(self, places: Value, usual: Value, write: Callable[[bool, bool], None]) -> None:
        """`write(stream, all_live)` gradients of sixteen samples, which all live if `usual`."""

        def each(stream: bool) -> None:
            when(usual, lambda: write(stream, True), lambda: write(stream, False))

        self.streamed(places, each)

    @staticmethod
    def gradients(e: Value, c: int | Value, t: Value, own: Value, share: Value, all_live: bool) -> Value:
        """Gradients out of class c's exponentials, of samples of classes t: for `own` and `share` see `keep`."""
        if not all_live:
            e = (own == 0.0).select(0.0, e)
        return (t == c).select(e - own, e) * share

    def logits(self, place: Value) -> Value:
        """Sixteen logits that lie side by side."""
        return storage.load(place, self.v.logits, F32, LANES)

    @staticmethod
    def own_reference(highest: Value) -> tuple[Value, Value]:
        """What is subtracted from logits with this maximum: a number and, from what is left, a count of ln 2. One of
        the two is 0: a count is exact, and a number, of large logits, leaves NaN where the maximum is infinite."""
        suits = ShiftedExp.suits(highest)
        return suits.select(0.0, highest), suits.select(ShiftedExp.count_for(highest), 0.0)

    def target_logits(self, i: Value, j: Value, usual: Value) -> Value:
        """The target's logit of each of samples i .. i + 16, the first of them the block's j-th; of those that do not
        live, of which there are none if `usual`, any."""
        return self.logits(self.picked_at(j)) if self.early else self.picked(i, usual)

    def picked_at(self, j: Value) -> Value:
        """Where the logit of the target of the block's j-th sample waits, behind all samples' sums."""
        return self.scratch + self.tile * BYTES + j * self.size

    def pick_early(self, i: Value, j: Value) -> None:
        """Keep the targets' logits of samples i .. i + 16. Between exponentials, whose instructions wait for one
        another, this takes next to no time, one by one: 2,097,152 x 5 takes 1.5 ms, 1.9 where `picked` does it."""
        elem = {2: I16, 4: I32}[self.size]
        for k in range(LANES):
            row = self.a["logits"] + (i + k) * self.a["logits_row"]
            raw = (row + self.targets.clamped(i + k) * self.a["logits_step"]).load(elem)
            self.picked_at(j + k).store(raw)

    def choose_early(self, i: Value, j: Value, logits: Sequence[Value]) -> None:
        """The same, of a vector for each class, at most `MAX_CHOSEN`."""
        self.picked_at(j).store(storage.narrowed(chosen(self.targets.low(i), logits), self.v.logits))

    def exponential_for(self, place: Value) -> ShiftedExp:
        """Relative to about the highest of the logits at a place."""
        return ShiftedExp(ShiftedExp.count_for(self.logits(place).max()), short=True, capped=False)

    def group(
        self, i: Value, j: Value, shifted: ShiftedExp, fits: Value, state: Sequence[Value]
    ) -> list[Value]:
        """Samples i .. i + 16, the first of them the j-th of its block."""
        *sums_of_all, live_ones, invalid_ones, product, exponents, logits = state
        self.targets.prefetch(i + self.tile, level=2)
        sums = self.sums_of(j)
        t, fate, usual = self.targets.sixteen(i, self.n - i)
        z = self.target_logits(i, j, usual)
        # false for NaN
        good = fits & ~(~((sums < MAX_SUM) & (sums > 1 / MAX_SUM))).any()

        def relative() -> list[Value]:
            e, m = split_float32(sums)
            return [e + shifted.count.to_int(I32), m, z, sums]

        def exact() -> list[Value]:
            offset, count, sums = self.again(i, j)
            e, m = split_float32(sums)
            return [e + count.to_int(I32), (sums > 0.0).select(m, float("nan")), z - offset, sums]

        e, m, z, sums = when(good, relative, exact)
        live = fate == LIVE
        if self.v.losses:
            kept = live.select(log_of_parts(e.to(F32), m, z), 0.0)
            storage.store(self.a["losses"] + i * storage.itemsize(self.v.losses), kept, self.v.losses)
        if self.v.grad:
            scale = self.p["scale"].splat(LANES)
            if self.v.upstream:
                scale = scale * (self.a["upstream"] + 8 * i).load(F64, LANES)
            share = live.select(scale.to(F32) / sums, 0.0)
            self.keep(i, j, t, share, live.select(sums, 0.0), usual)

        def all_() -> list[Value]:
            return [e, m, z, Value(self.b, I64(LANES)), self.begin]

        def some() -> list[Value]:
            counts = live.count(), (fate == INVALID).count()
            return [live.select(e, 0), live.select(m, 1.0), live.select(z, 0.0), *counts]

        e, m, z, more_live, more_invalid = when(usual, all_, some)
        counts = live_ones + more_live, invalid_ones + more_invalid
        return [*sums_of_all, *counts, product * m.to(F64), exponents + e, logits + z.to(F64)]
