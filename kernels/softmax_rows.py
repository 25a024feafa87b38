"""Softmax cross-entropy of samples whose classes lie side by side: lanes run along the classes of one sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llvmlite import ir

from . import storage
from .softmax_exp import HalfRange, ShiftedExp
from .softmax_math import ClassSums, Reference, Samples, SoftmaxKernel
from .targets import LIVE
from .values import F64, FAR, I1, I16, I32, I64, INT_OF, LANES, NEAR, SIZE, Value, full, iota, loop, when
from .vecmath import FORMATS, exp

MIN_ROW = 32  # classes that a row needs: its reference comes from the first 32
# Numbers of the compute type added in 16 lanes of a sum before they move to float64: exponentials alone, or masses
# beside them.
FLUSH, FLUSH_MASS = 512, 128
# A sum outside 1 / MAX_SUM .. MAX_SUM means a bad reference: the gradient's coefficients would leave float32's range.
MAX_SUM = 2.0**60
# The reference of the row before serves where it is so near the maximum of a row's first classes. A sum that `SURE`
# bounds is good then by the row's own reference too, which may be larger or smaller by 2**12.5.
NEAR_ENOUGH, SURE = 8.0, 2.0**47
# Logits of the rows that are finished together where gradients are wanted: their exponentials, or what these are
# computed from again, must stay in L1. 65,536 x 1,000 on two cores of Zen 4: 10.4 ms by two rows, 12.0 by eight.
KEPT_LOGITS, AGAIN_LOGITS = 4096, 2048

# of class c's logit z, relative to a reference, as two factors; and what was seen so far of all logits
Exponential = Callable[[Value, Value, Value], tuple[Value, Value, Value]]


class RowsKernel(SoftmaxKernel):
    """Rows are summed one by one, finished sixteen at a time, and their gradients written one by one."""

    def emit(self) -> None:
        """Write the kernel's body."""
        # Whether the gradient finds the exponentials where the sum left them. With AVX-512 float32 has them computed
        # twice: 20 ms, not 22, for 2,048 x 32,000 on a core of Zen 4, since 13 MB of them do not pass through L2.
        self.keeps = bool(self.v.grad) and not (self.v.logits == "float32" and self.n.may_use("avx512"))
        self.half = self.v.logits in ("float16", "bfloat16")
        # whether this call of the kernel has met logits far from their references, as masks are
        self.met_far = self.column(I32)
        self.met_far.store(full(self.b, I32, 1))
        # The reference of the row before, as a count of ln 2. Where a row may share it, nothing waits for its maximum.
        self.before = self.column(self.type)
        self.before.store(full(self.b, self.type, 1, float("nan")))
        # two streams, with probabilities, are asked for late enough to stay in the nearest cache: 1.4 ms, not 1.6
        self.ahead = NEAR if self.v.probabilities else FAR
        # AVX2 has too few registers for a sum of every other vector, and to look at half types that it does not keep.
        registers = self.n.may_use("avx512")
        self.n_parts = 2 if registers else 1
        self.looks = self.half and (self.keeps or registers)
        names = {"exponentials": F64, "high": self.wide}
        names |= {"count": self.wide} if self.plain else dict.fromkeys(("low", "origin", "mass", "dot"), F64)
        if not self.v.probabilities:
            names |= {"z": self.wide, "weight": self.wide}
        if self.v.upstream:
            names["upstream"] = self.wide
        if self.v.shard and self.v.grad:
            names |= {"pull": F64, "merged": F64}
        # a number for each row of a group
        self.columns = {name: self.column(elem) for name, elem in names.items()}
        self.kinds = names
        self.fates, self.exact, self.indices = self.column(I32), self.column(I32), self.column(I64)
        self.results = {"share": self.type} | dict.fromkeys(("scale", "lse", "losses", "mass"), self.wide)
        self.found = {name: self.column(elem) for name, elem in self.results.items()}
        self.ends = {
            name: self.column(storage.MEMORY[kind], 2 * LANES)
            for name in ("grad", "grad_target")
            if (kind := getattr(self.v, name))
        }
        for name, elem in names.items():
            self.columns[name].store(full(self.b, elem, LANES, 1.0))
        size = Value(self.b, I64(LANES))
        if self.v.grad or self.v.grad_target:
            logits = KEPT_LOGITS if self.keeps else AGAIN_LOGITS
            size = (Value(self.b, I64(logits)) // self.classes).at_least(1).at_most(LANES)
        self.size = size
        _, state = loop(self.begin, self.n + size - 1, size, self.no_sums(), lambda i, *s: self.group(i, size, s))
        self.store_sums(state)

    def put(self, name: str, r: Value, value: Value) -> None:
        """Row r's number in a column."""
        (self.columns[name] + r * SIZE[self.kinds[name]]).store(value.to(self.kinds[name]))

    def get(self, name: str, r: Value) -> Value:
        """Row r's number of a result."""
        return (self.found[name] + r * SIZE[self.results[name]]).load(self.results[name])

    def group(self, start: Value, size: Value, state: Sequence[Value]) -> list[Value]:
        """Up to sixteen rows."""
        many = (self.n - start).at_most(size)
        self.fates.store(full(self.b, I32, LANES))
        loop(self.begin, many, 1, [], lambda r: self.read(start + r, r))
        columns = {name: at.load(self.kinds[name], LANES).to(self.wide) for name, at in self.columns.items()}
        fate = self.fates.load(I32, LANES)
        zero, one = (full(self.b, self.wide, LANES, number) for number in (0.0, 1.0))
        samples = Samples(
            fate,
            self.reference(columns),
            ClassSums(columns["exponentials"], columns.get("mass", zero), columns.get("dot", zero)),
            columns.get("z"),
            columns["weight"] if (self.v.weighted or self.v.shard) and "weight" in columns else None,
            columns.get("upstream"),
            columns.get("pull"),
            columns.get("merged"),
        )
        loss = self.finish(samples)
        more = () if self.plain else (one if samples.weight is None else samples.weight, loss.z)
        state = self.add_samples(state, fate, ~(fate != LIVE).any(), loss.loss, *more)
        results = self.written(loss)
        if self.v.grad or self.v.grad_target:
            results |= {"share": loss.share, "scale": loss.scale, "lse": loss.lse}
        for name, result in sorted(results.items()):
            self.found[name].store((fate == LIVE).select(result, 0.0).to(self.results[name]))
        if results:
            loop(self.begin, many, 1, [], lambda r: self.write(start + r, r))
        return state

    def reference(self, columns: Mapping[str, Value]) -> Reference:
        """What was subtracted from the logits of sixteen rows."""
        if not self.plain:
            return Reference(columns["high"], columns["low"], columns["origin"])
        count, zero = columns["count"], columns["count"].lift(0.0)
        exact = self.exact.load(I32, LANES) != 0
        return Reference(exact.select(columns["high"], 0.0), zero, zero, exact.select(0.0, count))

    def kept(self, r: Value, c: Value) -> Value:
        """Where class c's exponential of the r-th row of a group waits for the gradient."""
        return self.a["scratch"] + (r * self.classes + c) * SIZE[self.type]

    # phase 1

    def read(self, i: Value, r: Value) -> None:
        """Sum row i, the r-th of its group, into the columns."""
        x = self.a["logits"] + i * self.a["logits_row"]
        for name in ("upstream", "pull", "merged"):
            if name in self.kinds:
                self.put(name, r, (self.a[name] + 8 * i).load(F64))
        if self.v.probabilities:
            (self.fates + 4 * r).store(full(self.b, I32, 1, LIVE))
            self.sum_row(i, r, x)
            return
        t, fate = self.targets.one(i)
        (self.fates + 4 * r).store(fate)
        (self.indices + 8 * r).store(t)

        def live() -> None:
            # before anything is written: the gradient may replace the logits
            own = t.at_least(0) if self.v.shard else t
            z, _ = self.logit_of(self.load_raw(x, own, 1))
            weight = self.load_weight(own, 1)
            if self.v.shard:
                z, weight = self.of_shard(t, z, weight)
            self.put("z", r, z)
            if weight is not None:
                self.put("weight", r, weight)
            self.sum_row(i, r, x)

        when(fate == LIVE, live)

    def load_raw(self, x: Value, c: Value, lanes: int) -> Value:
        return storage.load(x + c * storage.itemsize(self.v.logits), self.v.logits, self.type, lanes)

    def load_logits(self, x: Value, c: Value, lanes: int = LANES) -> Value:
        return self.logit_of(self.load_raw(x, c, lanes))[0]

    def load_probability(self, i: Value, c: Value, lanes: int) -> Value | None:
        if not self.v.probabilities:
            return None
        row = self.a["probabilities"] + i * self.a["probabilities_row"]
        return storage.load(row + c * storage.itemsize(self.v.probabilities), self.v.probabilities, self.type, lanes)

    def first_maximum(self, x: Value) -> Value:
        """Of a row's first classes the largest logits, one in each lane."""
        first = [self.load_logits(x, Value(self.b, I64(k))) for k in range(0, MIN_ROW, LANES)]
        highest = first[0]
        for other in first[1:]:
            highest = (other > highest).select(other, highest)
        return highest

    def shifted(self, x: Value) -> ShiftedExp:
        """exp(z - reference), the reference being about the maximum of the first classes."""
        highest = self.first_maximum(x)

        def own() -> list[Value]:
            count = ShiftedExp.count_for(highest.max())
            self.before.store(count)
            return [count]

        if not self.plain:
            return ShiftedExp(own()[0], short=True, capped=False)
        before = self.before.load(self.type)
        reference = before * FORMATS[self.type].ln2
        # not where that is NaN
        near = (highest > reference - NEAR_ENOUGH).any() & ~(highest > reference + NEAR_ENOUGH).any()
        return ShiftedExp(when(near, lambda: [before], own)[0], short=True, capped=False)

    def good(self, x: Value, shifted: ShiftedExp, total: Value, seen: Value) -> Value:
        """Whether a row's sum of exponentials, in float64, means something; which row came before does not matter."""
        legal = ~shifted.overflowed(seen)

        def within(bound: float, total: Value) -> Value:
            return (total < bound) & (total > 1 / bound) & legal  # not where that is NaN

        if not self.plain:
            return within(MAX_SUM, total)

        def by_own() -> list[Value]:
            more = shifted.count - ShiftedExp.count_for(self.first_maximum(x).max())
            power = ((more.to_int(I64) + FORMATS[F64].bias) << FORMATS[F64].mantissa).bits(F64)
            return [within(MAX_SUM, total * power)]

        sure = within(SURE, total)
        return when(sure, lambda: [sure], by_own)[0]

    def sum_row(self, i: Value, r: Value, x: Value) -> None:
        """A row's reference and sums."""
        shifted = self.shifted(x)
        origin = shifted.hi.to(self.type)

        def shift(c: Value, z: Value, seen: Value) -> tuple[Value, Value, Value]:
            p, scale, seen = shifted.watched(z, seen)
            if self.keeps:
                self.kept(r, c).store(p * scale)
            return p, scale, seen

        sums, seen = self.sweep(i, r, x, shift, origin, shifted if self.plain else None)
        good = self.good(x, shifted, sums.exponentials, seen)

        def exact() -> list[Value]:
            """The first classes said nothing of the maximum, or there is NaN or infinity: subtract the true maximum."""
            highest = self.reference_of(self.maximum(x))
            again, _ = self.sweep(i, r, x, lambda _, z, seen: (exp(z - highest), z.lift(1.0), seen))
            # what mass and dot are relative to stays as it is
            return [again.exponentials, highest.to(F64), shifted.lo.lift(0.0)]

        exponentials, high, low = when(good, lambda: [sums.exponentials, shifted.hi, shifted.lo], exact)
        (self.exact + 4 * r).store((~good).zext(I32))
        self.put("exponentials", r, exponentials)
        self.put("high", r, high)
        if self.plain:
            self.put("count", r, shifted.count)
            return
        self.put("low", r, low)
        self.put("origin", r, origin)
        self.put("mass", r, sums.mass)
        self.put("dot", r, sums.dot)

    def sweep(
        self,
        i: Value,
        r: Value,
        x: Value,
        exponential: Exponential,
        origin: Value | None = None,
        shifted: ShiftedExp | None = None,
    ) -> tuple[ClassSums, Value]:
        """One pass over a row's classes, and what `exponential` saw; mass and dot only where an origin is given. It
        is `shifted`'s where that is given, which needs no floor while all logits are near the reference."""
        zero, wide = full(self.b, self.type, LANES), full(self.b, F64, LANES)
        nothing = full(self.b, INT_OF[self.type], LANES)

        def add(c: Value, state: Sequence[Value], live: Value | None = None) -> list[Value]:
            """Classes c .. c + LANES, or those of them that live."""
            part, mass, dot, seen = state
            if live is None:
                size = storage.itemsize(self.v.logits)
                (x + c * size).prefetch_ahead(LANES * size, self.ahead)
            z = self.load_logits(x, c)
            p, scale, seen = exponential(c, z, seen)
            more = p.fma(scale, part)
            part = more if live is None else live.select(more, part)
            if origin is None or self.plain:
                return [part, mass, dot, seen]
            probability, weight = self.load_probability(i, c, LANES), self.load_weight(c, LANES)
            new = self.accumulate(ClassSums(part, mass, dot), z, origin, probability, weight)
            if live is not None:
                new = new._replace(mass=live.select(new.mass, mass), dot=live.select(new.dot, dot))
            return [*new, seen]

        def block(start: Value, *state: Value) -> list[Value]:
            *total, seen = state
            stop = (start + flush).at_most(whole)
            part = zero
            if self.plain:
                part, seen = self.sum_pairs(r, x, (start, stop), seen, exponential, shifted)
                start = start + ((stop - start) & -(2 * LANES))
            _, (*parts, seen) = loop(start, stop, LANES, [part, zero, zero, seen], lambda c, *s: add(c, s))
            return [*(t + part.to(F64) for t, part in zip(total, parts, strict=True)), seen]

        whole = self.classes & -LANES
        alone = self.v.shard and not (self.v.probabilities or self.v.smoothing)
        flush = self.n_parts * FLUSH if self.plain else FLUSH if alone else FLUSH_MASS
        _, (*totals, seen) = loop(self.begin, whole + (flush - 1), flush, [*[wide] * 3, nothing], block)
        # the last vector overlaps what was done; only the lanes that are new count
        rest = (self.classes - whole).trunc(I32)
        *parts, seen = add(self.classes - LANES, [*[zero] * 3, seen], iota(self.b, LANES) >= (LANES - rest))
        return ClassSums(*((t + part.to(F64)).sum() for t, part in zip(totals, parts, strict=True))), seen

    def sum_pairs(
        self,
        r: Value,
        x: Value,
        span: tuple[Value, Value],
        seen: Value,
        exponential: Exponential,
        shifted: ShiftedExp | None,
    ) -> list[Value]:
        """The sum over a span of a row's classes, as many as make pairs of vectors, and what was seen."""
        zero, n_parts = full(self.b, self.type, LANES), self.n_parts
        size = storage.itemsize(self.v.logits)

        def pair(c: Value) -> list[Value]:
            """The logits of classes c .. c + 2 LANES; in whatever order is cheapest, unless they are kept."""
            (x + c * size).prefetch_ahead(2 * LANES * size, self.ahead)
            if self.keeps:
                return [self.load_logits(x, c + k) for k in (0, LANES)]
            return [self.logit_of(raw)[0] for raw in storage.load_pair(x + c * size, self.v.logits, self.type, LANES)]

        def added(parts: Sequence[Value]) -> Value:
            return parts[0] if n_parts == 1 else parts[0] + parts[1]

        def add(c: Value, *state: Value) -> list[Value]:
            *parts, seen = state
            for k, z in enumerate(pair(c)):
                p, scale, seen = exponential(c + k * LANES, z, seen)
                parts[k % n_parts] = p.fma(scale, parts[k % n_parts])
            return [*parts, seen]

        def watched() -> list[Value]:
            _, (*parts, new) = loop(*span, 2 * LANES, [*[zero] * n_parts, seen], add)
            return [added(parts), new]

        if shifted is None or not self.looks:
            return watched()
        bounds, factors = HalfRange(shifted, self.v.logits), shifted.factors

        def add_near(c: Value, *state: Value) -> list[Value]:
            parts, near = list(state[:n_parts]), state[n_parts:]
            for k, z in enumerate(pair(c)):
                p, scale = factors(z, floored=False)
                parts[k % n_parts] = p.fma(scale, parts[k % n_parts])
                if self.keeps:
                    self.kept(r, c + k * LANES).store(p * scale)
            return [*parts, *bounds.more(near, (x + c * size).load(I16, 2 * LANES))]

        def near() -> list[Value]:
            _, state = loop(*span, 2 * LANES, [*[zero] * n_parts, *HalfRange.start(self.b)], add_near)
            return [added(state[:n_parts]), bounds.left(state[n_parts:])]

        def again() -> list[Value]:
            self.met_far.store(full(self.b, I32, 1, 1))
            return watched()

        part, far = when(self.met_far.load(I32) == 0, near, lambda: [zero, full(self.b, I1, 1, 1)])
        return when(far, again, lambda: [part, seen])

    def maximum(self, x: Value) -> Value:
        """The largest logit of a row, NaN left out."""

        def larger(c: Value, highest: Value) -> list[Value]:
            z = self.load_logits(x, c)
            return [(z > highest).select(z, highest)]

        lowest = full(self.b, self.type, LANES, float("-inf"))
        _, state = loop(self.begin, self.classes, LANES, [lowest], larger)
        return larger(self.classes - LANES, *state)[0].max()

    # phase 3

    def write(self, i: Value, r: Value) -> None:
        """Row i's loss and gradients, out of the results for the r-th row of the group."""
        for name, kind in self.writes.items():
            storage.store(self.a[name] + i * storage.itemsize(kind), self.get(name, r), kind)
        if not (self.v.grad or self.v.grad_target):
            return
        x = self.a["logits"] + i * self.a["logits_row"]
        scale, share = self.get("scale", r), self.get("share", r)

        def live() -> None:
            if self.v.grad_target:
                lse = self.get("lse", r)
                self.write_row(
                    "grad_target",
                    i,
                    lambda c, lanes, _=False: self.gradient_of_target(
                        self.load_logits(x, c, lanes), lse, self.load_weight(c, lanes), scale
                    ),
                )
            if not self.v.grad:
                return
            high = (self.columns["high"] + r * SIZE[self.wide]).load(self.wide).to(self.type)
            exact = (self.exact + 4 * r).load(I32) != 0
            shifted = ShiftedExp(ShiftedExp.count_for(high), short=True, capped=False)

            times_share = shifted.times(share)

            def relative(c: Value, z: Value) -> Value:
                return self.kept(r, c).load(self.type, z.lanes) * share if self.keeps else times_share(z)

            when(
                exact,
                lambda: self.write_gradient(i, r, x, lambda _, z: exp(z - high) * share, scale),
                lambda: self.write_gradient(i, r, x, relative, scale),
            )

        if self.v.probabilities:
            live()
            return

        def dead() -> None:
            for name in ("grad", "grad_target"):
                if getattr(self.v, name):
                    self.write_row(name, i, lambda c, lanes, _=False: full(self.b, self.type, lanes))

        when((self.fates + 4 * r).load(I32) == LIVE, live, dead)

    def write_gradient(
        self, i: Value, r: Value, x: Value, shared: Callable[[Value, Value], Value], scale: Value
    ) -> None:
        """Row i's gradient by its logits; `shared` is a class's exponential times `Loss.share`."""
        t = weight = None
        if not self.v.probabilities:
            t = (self.indices + 8 * r).load(I64)
            weight = self.load_weight(t.at_least(0) if self.v.shard else t, 1)

        def gradient(c: Value, lanes: int, with_target: bool = False) -> Value:
            z, bent = self.logit_of(self.load_raw(x, c, lanes))
            probability, own = self.load_probability(i, c, lanes), self.load_weight(c, lanes)
            g = self.gradient(shared(c, z), None, probability, own, scale)
            if with_target and t is not None:
                g = (iota(self.b, lanes) == (t - c).trunc(I32)).select(g - self.pulled(weight, scale), g)
            return g if bent is None else g * (1.0 - bent * bent)

        def ahead(c: Value) -> None:
            # Beyond the row of the next group that will take this one's place. Into L2: (2,048, 32,000) takes 13.0 ms
            # so, 14.1 where it is into L1.
            at = x + self.size * self.a["logits_row"] + c * storage.itemsize(self.v.logits)
            (at + FAR.distance).prefetch(level=2)

        self.write_row("grad", i, gradient, t, ahead)

    def write_row(
        self,
        name: str,
        i: Value,
        gradient: Callable[..., Value],
        t: Value | None = None,
        ahead: Callable[[Value], None] = lambda c: None,
    ) -> None:
        """Write `gradient(c, lanes)` over a row, or `gradient(c, lanes, True)` where class t may be among the lanes.

        Whole aligned vectors may go past the caches, so nothing is written twice: memory that was would have to be
        read back. What is left at both ends is computed first, since the gradient may replace what it comes from.
        """
        kind = getattr(self.v, name)
        size = storage.itemsize(kind)
        row = self.a[name] + i * self.a[f"{name}_row"]
        shift = size.bit_length() - 1
        head = ((0 - row) & (LANES * size - 1)) >> shift
        stop = head + ((self.classes - head) & -LANES)
        last = self.classes - LANES
        stream = self.v.stream and name == "grad"
        ends = []
        for at, source, start, many in ((0, self.begin, self.begin, head), (1, last, stop, self.classes - stop)):
            kept = self.ends[name] + at * LANES * size
            storage.store(kept, gradient(source, LANES, True), kind)
            ends.append((kept + (start - source) * size, row + start * size, many))

        def aligned(c: Value, with_target: bool = False) -> None:
            ahead(c)
            storage.store(row + c * size, gradient(c, LANES, with_target), kind, stream)

        if t is None:
            loop(head, stop, LANES, [], aligned)
        else:
            # the vector that holds class t, or the end of all where that is at one of the row's ends
            own = ((t >= head) & (t < stop)).select(head + ((t - head) & -LANES), stop)
            loop(head, own, LANES, [], aligned)
            when(own < stop, lambda: aligned(own, True))
            loop(own + LANES, stop, LANES, [], aligned)
        for source, target, many in ends:
            self.copy_few(source, target, many, storage.MEMORY[kind])

    def copy_few(self, source: Value, target: Value, many: Value, elem: ir.Type) -> None:
        """Copy fewer than sixteen elements."""
        done = self.begin
        for width in (8, 4, 2, 1):

            def some(done: Value = done, width: int = width) -> list[Value]:
                at = done * SIZE[elem]
                (target + at).store((source + at).load(elem, width))
                return [done + width]

            def none(done: Value = done) -> list[Value]:
                return [done]

            (done,) = when((many & width) != 0, some, none)
