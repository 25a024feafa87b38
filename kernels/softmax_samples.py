"""Softmax cross-entropy with lanes along sixteen samples: their classes lie apart, or are few and are transposed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from . import storage
from .softmax_exp import ShiftedExp
from .softmax_math import ClassSums, Loss, Reference, Samples, SoftmaxKernel
from .targets import LIVE, MAX_CHOSEN, Targets, chosen, within
from .transpose import QUAD, load_classes, load_quad, store_classes, store_quad, transposed
from .values import DEEP, F32, F64, I32, I64, LANES, NEAR, SIZE, Value, full, loop, when
from .vecmath import log_of_normal

MAX_FEW = 32  # classes that stay in registers and on the stack, their number compiled in: 1.3x at 10, against a loop
FLUSH = 64  # exponentials added in a lane before they move to float64
# Samples whose sums are multiplied, 64 in a lane or a tile's 16: the products of numbers up to 4,096 stay finite.
PRODUCT = 64 * LANES
UNROLL = 4  # classes of one turn of a loop
GATHERED = 64  # rows whose gradients leave together, past the caches: what does not fill whole lines there is rare

Body = Callable[..., Sequence[Value]]


class Classes(ABC):
    """The classes of sixteen samples: for each class a vector of the compute type, in its place."""

    @abstractmethod
    def fold(self, state: Sequence[Value], body: Body) -> list[Value]:
        """`state = body(c, place, vector, *state)` for every class c."""

    @abstractmethod
    def sums(self, more: int, body: Body) -> list[Value]:
        """What `fold` adds up from 0, in float64: a sum that only now and then moves there, and `more`."""

    @abstractmethod
    def put(self, place: Any, vector: Value) -> None:
        """Replace a class's vector."""

    @abstractmethod
    def pick(self, t: Value, targets: Targets, i: Value) -> Value:
        """The element of each sample's class: t, an int32 in range, from `targets` of samples i .. i + 16."""


class InRegisters(Classes):
    """Few classes, their number known while compiling; a place is an index."""

    def __init__(self, vectors: list[Value]) -> None:
        self.vectors = vectors

    def fold(self, state: Sequence[Value], body: Body) -> list[Value]:
        state = list(state)
        for c, vector in enumerate(self.vectors):
            state = list(body(Value(vector.b, I64(c)), c, vector, *state))
        return state

    def sums(self, more: int, body: Body) -> list[Value]:
        zero = self.vectors[0].lift(0.0)
        return [part.to(F64) for part in self.fold([zero, *[zero.to(F64)] * more], body)]

    def put(self, place: int, vector: Value) -> None:
        self.vectors[place] = vector

    def pick(self, t: Value, targets: Targets, i: Value) -> Value:
        return chosen(t, self.vectors)


class InScratch(Classes):
    """Vectors `pitch` bytes apart in memory; a place is an address."""

    def __init__(self, first: Value, pitch: Value, count: Value, elem: ir.Type) -> None:
        self.first, self.pitch, self.count, self.elem = first, pitch, count, elem
        self.begin = Value(first.b, I64(0))

    def fold(self, state: Sequence[Value], body: Body) -> list[Value]:
        return self._fold(self.begin, self.count, state, body)

    def _fold(self, start: Value, stop: Value, state: Sequence[Value], body: Body) -> list[Value]:
        def turn(c: Value, state: Sequence[Value], many: int) -> list[Value]:
            for k in range(many):
                place = self.first + (c + k) * self.pitch
                state = list(body(c + k, place, place.load(self.elem, LANES), *state))
            return list(state)

        c, state = loop(start, stop, UNROLL, state, lambda c, *s: turn(c, s, UNROLL))
        return loop(c, stop, 1, state, lambda c, *s: turn(c, s, 1))[1]

    def sums(self, more: int, body: Body) -> list[Value]:
        zero, wide = full(self.first.b, self.elem, LANES), full(self.first.b, F64, LANES)

        def block(start: Value, total: Value, *rest: Value) -> list[Value]:
            stop = (start + FLUSH).at_most(self.count)
            part, *rest_ = self._fold(start, stop, [zero, *rest], body)
            return [total + part.to(F64), *rest_]

        return loop(self.begin, self.count + (FLUSH - 1), FLUSH, [wide] * (1 + more), block)[1]

    def put(self, place: Value, vector: Value) -> None:
        place.store(vector)

    def pick(self, t: Value, targets: Targets, i: Value) -> Value:
        found = full(t.b, self.elem, LANES)
        for k in range(LANES):  # from memory: out of a vector's lanes indices come slowly
            place = self.first + targets.clamped(i + k) * self.pitch + k * SIZE[self.elem]
            found = found.with_lane(k, place.load(self.elem))
        return found


class SamplesKernel(SoftmaxKernel):
    """Sixteen samples at a time, each relative to its own maximum.

    Samples come in whole groups of sixteen: where there are fewer, memory for sixteen is readable and writable, and the
    surplus counts for nothing.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # of what is at most about 0
        self.exponential = ShiftedExp(full(self.b, self.type, 1), short=True, capped=False)
        # exponentials take their logits' place for the gradient, where nothing else asks for these
        self.replaced = bool(self.v.grad) and not self.v.softcap and not self.v.grad_target
        # A sum of losses takes one logarithm of a product of samples' sums, each in [1, C]: a quarter of the time, with
        # two classes. In float64, so that it does not matter which samples meet in a product.
        self.by_product = self.plain and self.wide == F32

    def groups(self, start: Value, stop: Value, state: Sequence[Value], group: Body) -> list[Value]:
        """`state = group(i, *state)` for samples start .. stop, at most `PRODUCT` of them."""
        if not self.by_product:
            return loop(start, stop, LANES, state, group)[1]
        one = full(self.b, F64, LANES, 1.0)
        _, (*state, product) = loop(start, stop, LANES, [*state, one], group)
        return [*self.add_term(state[:2], log_of_normal(product)), *state[2:]]

    def held(self, raw: Value) -> Value:
        """What stands for a logit in `Classes`: tanh(x / softcap) where logits are capped."""
        bent = self.logit_of(raw)[1]
        return raw if bent is None else bent

    def logit(self, held: Value) -> Value:
        """The logit that `held` stands for."""
        return self.uncapped(held) if self.v.softcap else held

    def group(
        self,
        i: Value,
        classes: Classes,
        probability: Callable[[Value, Any], Value | None],
        write: Callable[[str, Value, Any, Value], None],
        state: Sequence[Value],
    ) -> list[Value]:
        """Samples i .. i + 16. `probability(c, place)` is class c's, `write(name, c, place, gradient)` keeps one."""

        def larger(c: Value, place: Any, held: Value, highest: Value) -> list[Value]:
            z = self.logit(held)
            return [(z > highest).select(z, highest)]

        (highest,) = classes.fold([full(self.b, self.type, LANES, float("-inf"))], larger)
        highest = self.reference_of(highest)
        left = self.n - i
        t = z = weight = None
        if self.v.probabilities:
            fate, usual = within(left).zext(I32), left >= LANES
        else:
            t, fate, usual = self.targets.sixteen(i, left)
            z = self.logit(self.pick(classes, t, i, usual)).to(self.wide)
            weight = self.weights_of(t.at_least(0) if self.v.shard else t)
        upstream = (self.a["upstream"] + 8 * i).load(F64, LANES).to(self.wide) if self.v.upstream else None
        pull = merged = None
        if self.v.shard and self.v.grad:
            pull, merged = ((self.a[name] + 8 * i).load(F64, LANES) for name in ("pull", "merged"))

        def add(c: Value, place: Any, held: Value, part: Value, *rest: Value) -> list[Value]:
            self.coming(i, c)
            z = self.logit(held)
            p, scale = self.exponential.factors(z - highest)
            if self.replaced:
                classes.put(place, p * scale)
            part = p.fma(scale, part)
            if not rest:
                return [part]
            # few classes leave their rounding errors no room to average out
            wide = [None if x is None else x.to(F64) for x in (probability(c, place), self.load_weight(c, 1))]
            return list(self.accumulate(ClassSums(part, *rest), z.to(F64), highest.to(F64), *wide))

        found = [total.to(self.wide) for total in classes.sums(0 if self.plain else 2, add)]
        zero, wide = full(self.b, self.wide, LANES), highest.to(self.wide)
        sums = ClassSums(*found) if len(found) == 3 else ClassSums(found[0], zero, zero)
        own_weight = None if weight is None else weight.to(F64)
        if self.v.shard and t is not None and z is not None:
            z, own_weight = self.of_shard(t, z, weight)
        samples = Samples(fate, Reference(wide, zero, wide), sums, z, own_weight, upstream, pull, merged)
        loss = self.finish(samples)
        live = fate == LIVE
        written = self.written(loss)
        for name, kind in self.writes.items():
            storage.store(self.a[name] + i * storage.itemsize(kind), live.select(written[name], 0.0), kind)
        if self.v.grad or self.v.grad_target:
            self.write_gradients(classes, probability, write, t, live, highest, loss, weight)
        if self.by_product and z is not None:
            *state, product = state
            factor, one = found[0].to(F64), product.lift(1.0)
            (factor,) = when(usual, lambda: [factor], lambda: [live.select(factor, one)])
            return [*self.add_samples(state, fate, usual, wide - z), product * factor]
        one = full(self.b, self.wide, LANES, 1.0)
        more = () if self.plain else (one if samples.weight is None else samples.weight, loss.z)
        return self.add_samples(state, fate, usual, loss.loss, *more)

    def pick(self, classes: Classes, t: Value, i: Value, usual: Value) -> Value:
        """What `held` says of each sample's own class t; all of them live if `usual`."""
        return classes.pick(t, self.targets, i)

    def coming(self, i: Value, c: Value) -> None:
        """Ask for memory that will soon be read."""

    def weights_of(self, t: Value) -> Value | None:
        """The class weights of sixteen targets."""
        if not self.v.weighted:
            return None
        found = full(self.b, self.type, LANES)
        for k in range(LANES):
            found = found.with_lane(k, (self.a["weight"] + t.lane(k).zext(I64) * SIZE[self.type]).load(self.type))
        return found

    def write_gradients(
        self,
        classes: Classes,
        probability: Callable[[Value, Any], Value | None],
        write: Callable[[str, Value, Any, Value], None],
        t: Value | None,
        live: Value,
        highest: Value,
        loss: Loss,
        weight: Value | None,
    ) -> None:
        """The gradients of sixteen samples."""
        share = loss.share.to(self.type)
        pulled = None if t is None else self.pulled(weight, loss.scale)

        def each(c: Value, place: Any, held: Value) -> list[Value]:
            own, z = self.load_weight(c, 1), self.logit(held)
            if self.v.grad:
                e = held if self.replaced else self.exponential(z - highest)
                g = self.gradient(e * share, None, probability(c, place), own, loss.scale)
                if t is not None and pulled is not None:
                    g = (t == c.trunc(I32)).select(g - pulled, g)
                if self.v.softcap:
                    g = g * (1.0 - held * held)
                write("grad", c, place, live.select(g, 0.0))
            if self.v.grad_target:
                write("grad_target", c, place, self.gradient_of_target(z, loss.lse, own, loss.scale))
            return []

        classes.fold([], each)


class TileKernel(SamplesKernel):
    """Samples side by side for each class (images, transposed arrays). A tile of them is copied to scratch, class by
    class, so that memory is read in long pieces and once."""

    def emit(self) -> None:
        """Write the kernel's body."""
        own = SIZE[self.type]
        tile, scratch = self.a["tile"], self.a["scratch"]
        pitch = tile * own

        def each(start: Value, stop: Value, name: str, body: Callable[[Value, Value], None]) -> None:
            """`body(address in an array, address in scratch)` for every vector of a tile, class by class."""
            itemsize = storage.itemsize(getattr(self.v, name))

            def one(c: Value) -> None:
                there, here = self.a[name] + start * itemsize + c * self.a[f"{name}_step"], scratch + c * pitch
                loop(self.begin, stop - start, LANES, [], lambda j: body(there + j * itemsize, here + j * own))

            loop(self.begin, self.classes, 1, [], one)

        def fill(there: Value, here: Value) -> None:
            here.store(self.held(storage.load(there, self.v.logits, self.type, LANES)))

        def drain(start: Value, stop: Value) -> None:
            kind = self.v.grad or ""
            size = storage.itemsize(kind)

            def drained(stream: bool) -> None:
                def one(there: Value, here: Value) -> None:
                    storage.store(there, here.load(self.type, LANES), kind, stream)

                each(start, stop, "grad", one)

            if self.v.stream:  # which takes aligned vectors
                places = (self.a["grad"] + start * size) | self.a["grad_step"]
                when((places & (LANES * size - 1)) == 0, lambda: drained(True), lambda: drained(False))
            else:
                drained(False)

        def some(start: Value, *state: Value) -> list[Value]:
            stop = (start + tile).at_most(rounded)
            each(start, stop, "logits", fill)

            def group(i: Value, *state: Value) -> list[Value]:
                classes = InScratch(scratch + (i - start) * own, pitch, self.classes, self.type)
                return self.group(i, classes, self.probability_at(i), self.writer_at(i, classes), state)

            state = tuple(self.groups(start, stop, state, group))
            if self.v.grad:
                drain(start, stop)
            return list(state)

        rounded = (self.n + (LANES - 1)) & -LANES
        _, state = loop(self.begin, rounded + tile - 1, tile, self.no_sums(), some)
        self.store_sums(state)

    def coming(self, i: Value, c: Value) -> None:
        size = storage.itemsize(self.v.logits)
        (self.a["logits"] + (i + self.a["tile"]) * size + c * self.a["logits_step"]).prefetch()

    def probability_at(self, i: Value) -> Callable[[Value, Any], Value | None]:
        def probability(c: Value, place: Any) -> Value | None:
            kind = self.v.probabilities
            if not kind:
                return None
            at = self.a["probabilities"] + i * storage.itemsize(kind) + c * self.a["probabilities_step"]
            return storage.load(at, kind, self.type, LANES)

        return probability

    def writer_at(self, i: Value, classes: Classes) -> Callable[[str, Value, Any, Value], None]:
        def write(name: str, c: Value, place: Any, g: Value) -> None:
            if name == "grad":  # the gradient replaces what it was computed from
                classes.put(place, g)
                return
            kind = self.v.grad_target or ""
            at = self.a[name] + i * storage.itemsize(kind) + c * self.a[f"{name}_step"]
            storage.store(at, g, kind)

        return write


class ShortKernel(SamplesKernel):
    """Few classes, side by side for each sample: transposed, into registers or through scratch."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.a["logits_step"] = Value(self.b, I64(storage.itemsize(self.v.logits)))

    def emit(self) -> None:
        """Write the kernel's body."""
        rounded = (self.n + (LANES - 1)) & -LANES

        def some(start: Value, *state: Value) -> list[Value]:
            return self.groups(start, (start + PRODUCT).at_most(rounded), state, self.transposed)

        _, state = loop(self.begin, rounded + (PRODUCT - 1), PRODUCT, self.no_sums(), some)
        self.store_sums(state)

    def transposed(self, i: Value, *state: Value) -> list[Value]:
        """Samples i .. i + 16."""
        second: Classes | None = None
        first = self.vectors("logits", i, 0)
        if self.v.probabilities:
            second = self.vectors("probabilities", i, 1)

        def probability(c: Value, place: Any) -> Value | None:
            if second is None:
                return None
            if isinstance(second, InRegisters):
                return second.vectors[place]
            return self.place(c, 1).load(self.type, LANES)

        def write(name: str, c: Value, place: Any, g: Value) -> None:
            # the gradient replaces what it was computed from
            if name == "grad":
                first.put(place, g.to(self.type))
            elif second is not None:
                second.put(place if isinstance(second, InRegisters) else self.place(c, 1), g.to(self.type))

        out = self.group(i, first, probability, write, state)
        for name, classes in (("grad", first), ("grad_target", second)):
            if name == "grad" and self.v.stream and isinstance(first, InRegisters):
                self.gather(i, first)
            elif getattr(self.v, name) and classes is not None:
                self.write_rows(name, i, classes)
        return out

    def gather(self, i: Value, classes: InRegisters) -> None:
        """Add gradients to those of the rows before, in scratch; write these out when there are enough of them."""
        before = i & (GATHERED - 1)
        row = self.a["grad_row"] // storage.itemsize(self.v.grad or "") * SIZE[self.type]
        store_classes(self.a["scratch"] + before * row, classes.vectors, self.type, lambda vector: vector)

        def write_out() -> None:
            target = self.a["grad"] + (i - before) * self.a["grad_row"]
            self.write_out(self.a["scratch"], target, (before + LANES) * self.classes)

        when((before == GATHERED - LANES) | (i + LANES >= self.n), write_out)

    def pick(self, classes: Classes, t: Value, i: Value, usual: Value) -> Value:
        if self.v.few and self.v.few <= MAX_CHOSEN:
            return classes.pick(t, self.targets, i)
        return self.held(self.picked(i, usual))

    def place(self, c: Value, array: int) -> Value:
        """Where class c of the logits, 0, or of the probabilities, 1, lies in scratch."""
        return self.a["scratch"] + (self.classes * array + c) * (LANES * SIZE[self.type])

    def vectors(self, name: str, i: Value, array: int) -> Classes:
        """The classes of sixteen rows."""
        kind = getattr(self.v, name)
        row = self.a[f"{name}_row"]
        first = self.a[name] + i * row

        def held(vector: Value) -> Value:
            return self.held(vector) if array == 0 else vector

        elem = storage.MEMORY[kind]

        def read(raw: Value) -> Value:
            return storage.widened(raw, kind, self.type)

        if self.v.few:
            size, ahead = self.v.few * SIZE[elem], first.suited(DEEP if self.v.few > 2 else NEAR)
            first.prefetch_ahead(size * LANES, ahead)
            if not self.v.probabilities:
                self.targets.prefetch(i + ahead.distance // size, ahead.level)
            return InRegisters([held(x) for x in load_classes(first, self.v.few, elem, read)])

        def quad(c: Value) -> None:
            (first + c * (LANES * SIZE[elem])).prefetch_ahead(QUAD * LANES * SIZE[elem], DEEP)
            vectors = load_quad(first + c * SIZE[elem], row, elem, read)
            for k, vector in enumerate(transposed(vectors)):
                self.place(c + k, array).store(held(vector))

        self.each_quad(quad)
        pitch = Value(self.b, I64(LANES * SIZE[self.type]))
        return InScratch(self.place(self.begin, array), pitch, self.classes, self.type)

    def each_quad(self, body: Callable[[Value], None]) -> None:
        """Four classes at a time; the last four may overlap those before."""
        loop(self.begin, self.classes, QUAD, [], body)
        body(self.classes - QUAD)

    def write_rows(self, name: str, i: Value, classes: Classes) -> None:
        """Write what took the classes' place to sixteen rows of a gradient."""
        kind = getattr(self.v, name)
        row = self.a[f"{name}_row"]
        first = self.a[name] + i * row
        elem = storage.MEMORY[kind]

        def raw(vector: Value) -> Value:
            return storage.narrowed(vector, kind)

        if isinstance(classes, InRegisters):
            store_classes(first, classes.vectors, elem, raw)
            return
        array = 0 if name == "grad" else 1

        def quad(c: Value) -> None:
            vectors = [self.place(c + k, array).load(self.type, LANES) for k in range(QUAD)]
            store_quad(first + c * SIZE[elem], row, transposed(vectors), raw)

        self.each_quad(quad)
