"""Softmax cross-entropy: a row's state (reference, sum of exponentials, ...), its loss and its gradient.

Two layouts share the arithmetic of `SoftmaxVariant.finish`. `rows`: a sample's classes lie side by side, and lanes run
along them. `tile`: a class's samples lie side by side (images, transposed arrays, short rows that were staged), and
lanes run along samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import storage
from .compiler import Variant
from .exact import add_lanes, two_sum
from .pointwise import SUMS
from .values import F64, I32, I64, LANES, SIZE, Value, full, iota, loop, when
from .vecmath import ShiftedExp, exp, log, tanh

# What a call passes, all 64 bits wide. In the layout `rows` the first four are tables of row addresses, in `tile`
# addresses of the first class, whose followers lie `*_step` bytes on.
ARRAYS = (
    "logits", "probabilities", "grad", "grad_target",
    "logits_step", "probabilities_step", "grad_step", "grad_target_step",
    "index", "weight", "upstream", "losses", "classes", "ignore_index",
)  # fmt: skip
# float64: scale of gradients, of the z-loss's gradient; 1 - e and e / C of label smoothing; sum of class weights
PARAMETERS = ("scale", "scale_z", "keep", "share", "weight_sum", "lse_square_scale", "softcap")

MIN_ROW = 32  # classes that the layout `rows` needs: its reference comes from the first 32
FLUSH = 512  # float32 exponentials added in 32 lanes before they move to float64: 16 additions, 1e-6 at worst
# A sum outside 1 / MAX_SUM .. MAX_SUM means a bad reference: the gradient's coefficients would leave float32's range.
MAX_SUM = 2.0**60


class ClassSums(NamedTuple):
    """Over a sample's classes: exponentials, probability mass, mass times (logit - origin)."""

    exponentials: Value
    mass: Value
    dot: Value


class Reference(NamedTuple):
    """What was subtracted from a sample's logits, float64: high + low in exponentials, origin in `ClassSums.dot`."""

    high: Value
    low: Value
    origin: Value


class Loss(NamedTuple):
    """What a sample's sums amount to, all float64."""

    loss: Value
    z: Value
    lse: Value
    pull: Value  # what the softmax is multiplied by in the gradient


@dataclass(frozen=True)
class SoftmaxVariant(Variant):
    """One kernel: the options that change the loop. Storages are names of `storage.MEMORY`."""

    layout: str  # "rows" or "tile"
    compute: str  # "float32" or "float64"
    logits: str  # storage
    probabilities: str | None = None  # storage of class probabilities; None: int64 class indices
    weighted: bool = False  # class weights of the compute type
    smoothing: bool = False
    z_loss: bool = False
    softcap: bool = False
    upstream: bool = False  # a float64 gradient of each sample's loss
    losses: str | None = None
    grad: str | None = None
    grad_target: str | None = None
    stream: bool = False  # `grad` goes past the caches ("rows" only)

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this kernel from every other, for the disk cache."""
        return ("softmax", *(getattr(self, name) for name in self.__dataclass_fields__))

    def emit(self, n: Value, arrays: Value, parameters: Value, sums: Value) -> None:
        """`void kernel(n, arrays, parameters, sums)` over n samples; adds to the float64 slots `SUMS`."""
        _Kernel(self, n, arrays, parameters, sums).emit()


class _Kernel:
    """The emission of one variant."""

    def __init__(self, variant: SoftmaxVariant, n: Value, arrays: Value, parameters: Value, sums: Value) -> None:
        self.v, self.n, self.sums, self.b = variant, n, sums, n.b
        self.a = {name: (arrays + 8 * k).load(I64) for k, name in enumerate(ARRAYS)}
        self.p = {name: (parameters + 8 * k).load(F64) for k, name in enumerate(PARAMETERS)}
        self.type = storage.COMPUTE[variant.compute]
        self.classes = self.a["classes"]

    def emit(self) -> None:
        start = Value(self.b, I64(0))
        names = ("loss", "loss_low", "weight", "weight_low", "z", "z_low", "count", "invalid")
        slots = [self.sums + 8 * SUMS.index(name) for name in names]
        if self.v.layout == "rows":
            _, state = loop(start, self.n, 1, [slot.load(F64) for slot in slots], self.row)
        else:
            lanes = [full(self.b, F64, LANES)] * len(slots)
            i, lanes = loop(start, self.n, LANES, lanes, lambda i, *s: self.tile(i, LANES, s))
            old = [slot.load(F64) for slot in slots]
            pairs = [add_lanes(old[k : k + 2], lanes[k : k + 2]) for k in (0, 2, 4)]
            state = [value for pair in pairs for value in pair]
            state += [old[6] + lanes[6].sum(), old[7] + lanes[7].sum()]
            _, state = loop(i, self.n, 1, state, lambda i, *s: self.tile(i, 1, s))
        for slot, value in zip(slots, state, strict=True):
            slot.store(value)

    # what both layouts share

    def load_logits(self, address: Value, lanes: int) -> tuple[Value, Value | None]:
        """Logits, and tanh(x / softcap) where they are capped."""
        x = storage.load(address, self.v.logits, self.type, lanes)
        if not self.v.softcap:
            return x, None
        cap = self.p["softcap"].to(self.type)
        bent = tanh(x * (1.0 / cap))
        return bent * cap, bent

    def load_weight(self, c: Value, lanes: int) -> Value | None:
        if not self.v.weighted:
            return None
        return (self.a["weight"] + c * SIZE[self.type]).load(self.type, lanes)

    def mass_of(self, probability: Value, weight: Value | None) -> Value:
        """float64 weight of one class in a sample's loss, given the class's probability."""
        q = probability.to(F64)
        if self.v.smoothing:
            q = q * self.p["keep"] + self.p["share"]
        return q if weight is None else q * weight.to(F64)

    def accumulate(
        self, sums: ClassSums, z: Value, origin: Value, probability: Value | None, weight: Value | None
    ) -> ClassSums:
        """Add a class's part to mass and dot, where the loss needs them."""
        if probability is not None:
            mass = self.mass_of(probability, weight)
            # a class without mass costs nothing, even where its logit is -inf
            dot = (mass == 0.0).select(0.0, mass * (z.to(F64) - origin))
            return sums._replace(mass=sums.mass + mass, dot=sums.dot + dot)
        if self.v.smoothing:
            part = z.to(F64) - origin
            return sums._replace(dot=sums.dot + (part if weight is None else part * weight.to(F64)))
        return sums

    def finish(
        self, reference: Reference, sums: ClassSums, z: Value | None, weight: Value | None, upstream: Value | None
    ) -> Loss:
        """A sample's loss; z is the target's logit. Large logits cancel before they meet what is small."""
        high = reference.high
        rest = reference.low + log(sums.exponentials)
        lse = high + rest
        above = (high - reference.origin) + rest
        if z is None:
            mass = sums.mass
            loss = mass * above - sums.dot
        else:
            mass = self.p["keep"] if weight is None else self.p["keep"] * weight
            loss = mass * ((high - z) + rest)
            if self.v.smoothing:
                loss = loss + self.p["share"] * (self.p["weight_sum"] * above - sums.dot)
                mass = mass + self.p["share"] * self.p["weight_sum"]
        scale = self.p["scale"] if upstream is None else upstream * self.p["scale"]
        pull = mass * scale
        square = lse.lift(0.0)
        if self.v.z_loss:
            square = self.p["lse_square_scale"] * lse * lse
            scale_z = self.p["scale_z"] if upstream is None else upstream * self.p["scale_z"]
            pull = pull + 2.0 * self.p["lse_square_scale"] * scale_z * lse
        return Loss(loss, square, lse, pull)

    def gradient(
        self, share: Value, bent: Value | None, probability: Value | None, weight: Value | None, scale: Value
    ) -> Value:
        """d loss / d logit of a class that is no target index: `share` is pull * softmax; all of the compute type."""
        g = share
        if probability is not None:
            g = g - (self.mass_of(probability, weight) * scale).to(self.type)
        elif self.v.smoothing:
            part = (self.p["share"] * scale).to(self.type)
            g = g - (part if weight is None else weight * part)
        return g if bent is None else g * (1.0 - bent * bent)

    def gradient_of_target(self, z: Value, lse: Value, weight: Value | None, scale: Value) -> Value:
        """d loss / d class probability."""
        g = (lse - z.to(F64)) * (self.p["keep"] * scale)
        return g if weight is None else g * weight.to(F64)

    # rows: lanes along classes

    def row(self, i: Value, *state: Value) -> Sequence[Value]:
        """One sample."""
        x = (self.a["logits"] + 8 * i).load(I64)
        zero = full(self.b, F64, 1)
        if self.v.probabilities:
            loss, z, weight, count = self.live_row(i, x, None)
            invalid = zero
        else:
            t = (self.a["index"] + 8 * i).load(I64)
            inside, ignored = t.below(self.classes), t == self.a["ignore_index"]

            def dead() -> list[Value]:
                for name in ("grad", "grad_target"):
                    if getattr(self.v, name):
                        self.write_row(name, i, lambda c, lanes: full(self.b, self.type, lanes))
                self.write_loss(i, zero)
                return [zero] * 4

            loss, z, weight, count = when(inside & ~ignored, lambda: self.live_row(i, x, t), dead)
            invalid = (inside | ignored).select(zero, full(self.b, F64, 1, 1.0))
        sums = [*two_sum(state[0:2], loss), *two_sum(state[2:4], weight), *two_sum(state[4:6], z)]
        return [*sums, state[6] + count, state[7] + invalid]

    def live_row(self, i: Value, x: Value, t: Value | None) -> list[Value]:
        """Loss, z-loss, weight and count of a sample that is not ignored."""
        first = [
            self.load_logits(x + k * LANES * storage.itemsize(self.v.logits), LANES)[0] for k in range(MIN_ROW // LANES)
        ]
        reference = first[0]
        for other in first[1:]:
            reference = (other > reference).select(other, reference)
        count = ShiftedExp.count_for(reference.max())
        shifted = ShiftedExp(count)
        sums = self.sweep(i, x, shifted, shifted.hi)

        def fast() -> list[Value]:
            return self.finish_row(i, x, t, Reference(shifted.hi, shifted.lo, shifted.hi), sums, shifted)

        def exact() -> list[Value]:
            """The first classes said nothing of the maximum, or there is NaN or infinity: subtract the true maximum."""
            highest = self.maximum(x)

            def difference(z: Value) -> Value:
                return exp(z - highest)

            again = sums._replace(exponentials=self.sweep(i, x, difference, None).exponentials)
            reference = Reference(highest.to(F64), full(self.b, F64, 1), shifted.hi)
            return self.finish_row(i, x, t, reference, again, difference)

        good = (sums.exponentials < MAX_SUM) & (sums.exponentials > 1 / MAX_SUM)  # false for NaN
        return when(good, fast, exact)

    def finish_row(
        self,
        i: Value,
        x: Value,
        t: Value | None,
        reference: Reference,
        sums: ClassSums,
        exponential: Callable[[Value], Value],
    ) -> list[Value]:
        """Loss, z-loss, weight and count, with losses and gradients written."""
        one = full(self.b, F64, 1, 1.0)
        upstream = (self.a["upstream"] + 8 * i).load(F64) if self.v.upstream else None
        z = weight = bent = narrow = None
        if t is not None:
            narrow, bent = self.load_logits(x + t * storage.itemsize(self.v.logits), 1)
            weight = self.load_weight(t, 1)
            z = narrow.to(F64)
        wide_weight = None if weight is None else weight.to(F64)
        result = self.finish(reference, sums, z, wide_weight, upstream)
        self.write_loss(i, result.loss + result.z)
        scale = self.p["scale"] if upstream is None else self.p["scale"] * upstream
        if self.v.grad:
            share = (result.pull / sums.exponentials).to(self.type)

            def gradient(c: Value, lanes: int) -> Value:
                logits, bent = self.load_logits(x + c * storage.itemsize(self.v.logits), lanes)
                return self.gradient(
                    exponential(logits) * share,
                    bent,
                    self.load_probability(i, c, lanes),
                    self.load_weight(c, lanes),
                    scale,
                )

            at_target = None
            if t is not None and narrow is not None:
                # read before anything is written: the gradient may replace the logits
                at_target = self.gradient(exponential(narrow) * share, None, None, weight, scale)
                pulled = self.p["keep"] * scale if wide_weight is None else self.p["keep"] * scale * wide_weight
                at_target = at_target - pulled.to(self.type)
                at_target = at_target if bent is None else at_target * (1.0 - bent * bent)
            self.write_row("grad", i, gradient)
            if t is not None and at_target is not None and self.v.grad:
                address = (self.a["grad"] + 8 * i).load(I64) + t * storage.itemsize(self.v.grad)
                storage.store(address, at_target, self.v.grad)
        if self.v.grad_target:

            def gradient_of_target(c: Value, lanes: int) -> Value:
                logits = self.load_logits(x + c * storage.itemsize(self.v.logits), lanes)[0]
                return self.gradient_of_target(logits, result.lse, self.load_weight(c, lanes), scale)

            self.write_row("grad_target", i, gradient_of_target)
        return [result.loss, result.z, one if wide_weight is None else wide_weight, one]

    def load_probability(self, i: Value, c: Value, lanes: int) -> Value | None:
        if not self.v.probabilities:
            return None
        row = (self.a["probabilities"] + 8 * i).load(I64)
        return storage.load(row + c * storage.itemsize(self.v.probabilities), self.v.probabilities, self.type, lanes)

    def sweep(self, i: Value, x: Value, exponential: Callable[[Value], Value], origin: Value | None) -> ClassSums:
        """One pass over a row's classes; mass and dot only where an origin is given."""
        size = storage.itemsize(self.v.logits)
        zero, wide = full(self.b, self.type, LANES), full(self.b, F64, LANES)

        def add(c: Value, k: int, state: Sequence[Value], live: Value | None = None) -> list[Value]:
            """Classes c .. c + LANES, their exponentials into accumulator k."""
            *parts, mass, dot = state
            z = self.load_logits(x + c * size, LANES)[0]
            if live is None and isinstance(exponential, ShiftedExp):
                p, scale = exponential.factors(z)
                parts[k] = p.fma(scale, parts[k])
            else:
                e = exponential(z)
                parts[k] = parts[k] + (e if live is None else live.select(e, 0.0))
            if origin is not None:
                probability, weight = self.load_probability(i, c, LANES), self.load_weight(c, LANES)
                new = self.accumulate(ClassSums(parts[k], mass, dot), z, origin, probability, weight)
                if live is not None:
                    new = new._replace(mass=live.select(new.mass, mass), dot=live.select(new.dot, dot))
                mass, dot = new.mass, new.dot
            return [*parts, mass, dot]

        def both(c: Value, *state: Value) -> list[Value]:
            return add(c + LANES, 1, add(c, 0, state))

        def block(start: Value, total: Value, mass: Value, dot: Value) -> list[Value]:
            stop = (start + FLUSH).at_most(whole)
            c, (*parts, mass, dot) = loop(start, stop, 2 * LANES, [zero, zero, mass, dot], both)
            part = parts[0] + parts[1]
            _, (part, mass, dot) = loop(c, stop, LANES, [part, mass, dot], lambda c, *s: add(c, 0, s))
            return [total + part.to(F64), mass, dot]

        whole = self.classes & -LANES
        _, state = loop(Value(self.b, I64(0)), whole + (FLUSH - 1), FLUSH, [wide] * 3, block)
        # the last vector overlaps what was done; only the lanes that are new count
        rest = (self.classes - whole).trunc(I32)
        live = iota(self.b, LANES) >= (LANES - rest)
        part, mass, dot = add(self.classes - LANES, 0, [zero, *state[1:]], live)
        return ClassSums((state[0] + part.to(F64)).sum(), mass.sum(), dot.sum())

    def maximum(self, x: Value) -> Value:
        """The largest logit of a row, NaN left out."""
        size = storage.itemsize(self.v.logits)

        def larger(c: Value, highest: Value) -> list[Value]:
            z = self.load_logits(x + c * size, LANES)[0]
            return [(z > highest).select(z, highest)]

        lowest = full(self.b, self.type, LANES, float("-inf"))
        _, state = loop(Value(self.b, I64(0)), self.classes, LANES, [lowest], larger)
        return larger(self.classes - LANES, *state)[0].max()

    def write_row(self, name: str, i: Value, gradient: Callable[[Value, int], Value]) -> None:
        """Write `gradient(c, lanes)` over a row. Both ends are read first and written last, as overlapping vectors:
        the vectors between them start at an aligned address, and may replace what they were computed from."""
        kind = getattr(self.v, name)
        size = storage.itemsize(kind)
        row = (self.a[name] + 8 * i).load(I64)
        last = self.classes - LANES
        ends = [(c, gradient(c, LANES)) for c in (Value(self.b, I64(0)), last)]
        shift = size.bit_length() - 1
        head = ((0 - row) & (LANES * size - 1)) >> shift
        stream = self.v.stream and name == "grad"

        def aligned(c: Value) -> None:
            storage.store(row + c * size, gradient(c, LANES), kind, stream)

        loop(head, self.classes, LANES, [], aligned)
        for c, value in ends:
            storage.store(row + c * size, value, kind)

    def write_loss(self, i: Value, loss: Value) -> None:
        if self.v.losses:
            storage.store(self.a["losses"] + i * storage.itemsize(self.v.losses), loss, self.v.losses)

    # tile: lanes along samples

    def tile(self, i: Value, lanes: int, state: Sequence[Value]) -> list[Value]:
        """`lanes` samples beside each other."""
        zero, one = full(self.b, F64, lanes), full(self.b, F64, lanes, 1.0)
        begin = Value(self.b, I64(0))
        base = self.a["logits"] + i * storage.itemsize(self.v.logits)

        def logits(c: Value) -> tuple[Value, Value | None]:
            return self.load_logits(base + c * self.a["logits_step"], lanes)

        def probability(c: Value) -> Value | None:
            if not self.v.probabilities:
                return None
            first = self.a["probabilities"] + i * storage.itemsize(self.v.probabilities)
            return storage.load(first + c * self.a["probabilities_step"], self.v.probabilities, self.type, lanes)

        def larger(c: Value, highest: Value) -> list[Value]:
            z = logits(c)[0]
            return [(z > highest).select(z, highest)]

        lowest = full(self.b, self.type, lanes, float("-inf"))
        _, (highest,) = loop(begin, self.classes, 1, [lowest], larger)
        origin = highest.to(F64)

        def add(c: Value, many: int, sums: ClassSums) -> ClassSums:
            parts = []
            for k in range(many):
                z = logits(c + k)[0]
                parts.append(exp(z - highest))
                sums = self.accumulate(sums, z, origin, probability(c + k), self.load_weight(c + k, 1))
            while len(parts) > 1:
                parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
            return sums._replace(exponentials=sums.exponentials + parts[0].to(F64))

        c, found = loop(begin, self.classes, 4, [zero] * 3, lambda c, *s: add(c, 4, ClassSums(*s)))
        _, found = loop(c, self.classes, 1, found, lambda c, *s: add(c, 1, ClassSums(*s)))
        sums = ClassSums(*found)

        upstream = (self.a["upstream"] + 8 * i).load(F64, lanes) if self.v.upstream else None
        scale = self.p["scale"] if upstream is None else upstream * self.p["scale"]
        z = weight = t = live = None
        invalid = zero
        if not self.v.probabilities:
            t = (self.a["index"] + 8 * i).load(I64, lanes)
            inside, ignored = t.below(self.classes), t == self.a["ignore_index"]
            live = inside & ~ignored
            invalid = (inside | ignored).select(zero, one)
            t = live.select(t, 0)
            z = full(self.b, self.type, lanes)
            weight = full(self.b, F64, lanes) if self.v.weighted else None
            for k in range(lanes):
                c = t.lane(k)
                own = base + (k * storage.itemsize(self.v.logits)) + c * self.a["logits_step"]
                z = z.with_lane(k, self.load_logits(own, 1)[0])
                own_weight = self.load_weight(c, 1)
                if weight is not None and own_weight is not None:
                    weight = weight.with_lane(k, own_weight.to(F64))
            z = z.to(F64)
        result = self.finish(Reference(origin, zero, origin), sums, z, weight, upstream)

        def counted(value: Value) -> Value:
            return value if live is None else live.select(value, zero)

        self.write_loss(i, counted(result.loss + result.z))
        if self.v.grad:
            share = (result.pull / sums.exponentials).to(self.type)
            pulled = self.p["keep"] * scale if weight is None else weight * (self.p["keep"] * scale)
            pulled = pulled.splat(lanes).to(self.type)
            narrow = None if t is None else t.trunc(I32)
            target = self.a["grad"] + i * storage.itemsize(self.v.grad)

            def write(c: Value) -> None:
                z, bent = logits(c)
                g = exp(z - highest) * share
                g = self.gradient(g, None, probability(c), self.load_weight(c, 1), scale)
                if narrow is not None:
                    g = (narrow == c.trunc(I32)).select(g - pulled, g)
                g = g if bent is None else g * (1.0 - bent * bent)
                g = g if live is None else live.select(g, 0.0)
                storage.store(target + c * self.a["grad_step"], g, self.v.grad or "")

            loop(begin, self.classes, 1, [], write)
        if self.v.grad_target:
            target = self.a["grad_target"] + i * storage.itemsize(self.v.grad_target)

            def write_target(c: Value) -> None:
                g = self.gradient_of_target(logits(c)[0], result.lse, self.load_weight(c, 1), scale)
                storage.store(target + c * self.a["grad_target_step"], g, self.v.grad_target or "")

            loop(begin, self.classes, 1, [], write_target)
        count = counted(one)
        weights = count if weight is None else counted(weight)
        out = [*two_sum(state[0:2], counted(result.loss)), *two_sum(state[2:4], weights)]
        return [*out, *two_sum(state[4:6], counted(result.z)), state[6] + count, state[7] + invalid]
