"""What every layout of softmax cross-entropy shares: sixteen samples, a lane each, from their sums to their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llvmlite import ir

from . import storage
from .exact import add_lanes, two_sum
from .pointwise import SUMS
from .records import ARRAYS, NUMBERS
from .softmax_exp import scaled_log
from .targets import INVALID, LIVE, Targets
from .values import F32, F64, I64, LANES, SIZE, Value, full, loop, when
from .vecmath import exp, log, log_of_normal, tanh

if TYPE_CHECKING:
    from .softmax import SoftmaxVariant


class ClassSums(NamedTuple):
    """Over a sample's classes: exponentials, probability mass, mass times (logit - origin)."""

    exponentials: Value
    mass: Value
    dot: Value


class Reference(NamedTuple):
    """What was subtracted from a sample's logits: high + low in exponentials, origin in `ClassSums.dot`; where `powers`
    are given, high and so many times ln 2."""

    high: Value
    low: Value
    origin: Value
    powers: Value | None = None


class Samples(NamedTuple):
    """Sixteen samples; all numbers of the kernel's wide type."""

    fate: Value
    reference: Reference
    sums: ClassSums
    z: Value | None  # the target's logit
    weight: Value | None  # of the target's class; of a shard that does not have it, 0
    upstream: Value | None
    pull: Value | None = None  # of a shard's gradient: see `SoftmaxVariant.shard`
    merged: Value | None = None


class Loss(NamedTuple):
    """What samples' sums amount to, in the wide type."""

    loss: Value
    z: Value
    lse: Value
    mass: Value  # sum of what (lse - logit) is multiplied by
    share: Value  # what an exponential is multiplied by in the gradient
    scale: Value  # what the rest of the gradient is multiplied by


class SoftmaxKernel:
    """The emission of one variant. A layout's subclass finds the sums over the classes and writes the gradients."""

    def __init__(self, variant: SoftmaxVariant, n: Value, arrays: Value, parameters: Value, sums: Value) -> None:
        self.v, self.n, self.sums, self.b = variant, n, sums, n.b
        self.a = {name: (arrays + 8 * k).load(I64) for k, name in enumerate(ARRAYS)}
        if variant.few:  # known while compiling
            self.a["classes"] = Value(self.b, I64(variant.few))
        if variant.few and variant.layout != "planes":  # as is where its rows lie
            for name in ("logits", "probabilities", "grad", "grad_target"):
                if kind := getattr(variant, name):
                    self.a[f"{name}_row"] = Value(self.b, I64(variant.few * storage.itemsize(kind)))
        self.p = {name: (parameters + 8 * k).load(F64) for k, name in enumerate(NUMBERS)}
        self.type = storage.COMPUTE[variant.compute]
        self.plain = variant.plain
        self.state = variant.shard and not variant.grad
        # Without options a loss is one difference and one logarithm, which float32 holds as well as the logits do.
        self.wide = self.type if self.plain else F64
        # Lanes of the running sums: four losses of float32 add up in float64 without an error that would matter.
        self.sum_lanes = LANES // 4 if self.wide == F32 else LANES
        self.classes, self.begin = self.a["classes"], Value(self.b, I64(0))
        self.targets = Targets(self.a["index"], variant.index, self.classes, self.a["ignore_index"], variant.shard)
        self.summed = ("loss", "loss_low") if self.plain else ("loss", "loss_low", "weight", "weight_low", "z", "z_low")

    # what each sample has one of

    @property
    def writes(self) -> dict[str, str]:
        """Names of the arrays that are written, and their storages."""
        if self.state:
            return dict.fromkeys(("losses", "lse", "mass"), "float64")
        return {"losses": self.v.losses} if self.v.losses else {}

    def written(self, loss: Loss) -> dict[str, Value]:
        """What is written to them."""
        found = {"losses": loss.loss + loss.z, "lse": loss.lse, "mass": loss.mass}
        return {name: found[name] for name in self.writes}

    # the sums of all samples

    def no_sums(self) -> list[Value]:
        """What `add_samples` starts from."""
        return [full(self.b, F64, self.sum_lanes)] * len(self.summed) + [self.begin] * 2

    def add_samples(self, state: Sequence[Value], fate: Value, usual: Value, loss: Value, *more: Value) -> list[Value]:
        """Sixteen samples more, which all live if `usual`: their losses, and where they are not plain their weights and
        z-losses."""
        if self.v.shard:  # of which nobody asks for sums
            return list(state)
        terms = (loss, *more)

        def all_() -> list[Value]:
            return [*terms, Value(self.b, I64(LANES)), self.begin]

        def some() -> list[Value]:
            live = fate == LIVE
            return [*(live.select(term, 0.0) for term in terms), live.count(), (fate == INVALID).count()]

        *added, count, invalid = when(usual, all_, some)
        out: list[Value] = []
        for k, term in enumerate(added):
            out += self.add_term(state[2 * k : 2 * k + 2], term)
        return [*out, state[-2] + count, state[-1] + invalid]

    def add_term(self, pair: Sequence[Value], term: Value) -> tuple[Value, Value]:
        """A running sum and sixteen terms more."""
        term = term.to(F64)
        while term.lanes > self.sum_lanes:
            a, b = term.halves()
            term = a + b
        return two_sum(pair, term)

    def store_sums(self, state: Sequence[Value]) -> None:
        """Add what `add_samples` gave to the slots of the chunk."""

        def slot(name: str) -> Value:
            return self.sums + 8 * SUMS.index(name)

        def add(names: Sequence[str], pair: Sequence[Value]) -> None:
            old = [slot(name).load(F64) for name in names]
            for name, value in zip(names, add_lanes(old, pair), strict=True):
                slot(name).store(value)

        for k in range(0, len(self.summed), 2):
            add(self.summed[k : k + 2], state[k : k + 2])
        count, invalid = (number.to(F64) for number in state[-2:])
        if self.plain:
            add(("weight", "weight_low"), (count, full(self.b, F64, 1)))
        for name, number in (("count", count), ("invalid", invalid)):
            slot(name).store(slot(name).load(F64) + number)

    # reading

    def reference_of(self, highest: Value) -> Value:
        """What is subtracted from logits whose maximum is known: of a shard without a finite one 0, so that its
        exponentials are 0 and not NaN."""
        return (highest == float("-inf")).select(0.0, highest) if self.v.shard else highest

    def of_shard(self, t: Value, z: Value, weight: Value | None) -> tuple[Value, Value]:
        """The target's logit and weight as a shard counts them, 0 where it does not have class t."""
        own = t >= 0
        return own.select(z, 0.0), own.select(z.to(F64).lift(1.0) if weight is None else weight.to(F64), 0.0)

    def picked(self, i: Value, usual: Value) -> Value:
        """The target's logit of each of sixteen samples; of those that do not live, any."""
        elem = storage.MEMORY[self.v.logits]
        x = self.a["logits"] + i * self.a["logits_row"]

        def pick(index: Callable[[Value], Value]) -> list[Value]:
            found = full(self.b, elem, LANES)
            for k in range(LANES):
                at = x + k * self.a["logits_row"] + index(i + k) * self.a["logits_step"]
                found = found.with_lane(k, at.load(elem))
            return [found]

        (found,) = when(usual, lambda: pick(self.targets.unchecked), lambda: pick(self.targets.clamped))
        return storage.widened(found, self.v.logits, self.type)

    def column(self, elem: ir.Type, count: int = LANES) -> Value:
        """The address of scratch for `count` numbers."""
        with self.b.goto_entry_block():
            memory = self.b.alloca(ir.ArrayType(elem, count))
        memory.align = SIZE[elem] * LANES
        return Value(self.b, self.b.ptrtoint(memory, I64))

    def logit_of(self, raw: Value) -> tuple[Value, Value | None]:
        """A logit out of what was read, and tanh(x / softcap) where it is capped."""
        if not self.v.softcap:
            return raw, None
        bent = tanh(raw * (1.0 / self.p["softcap"].to(self.type)))
        return self.uncapped(bent), bent

    def uncapped(self, bent: Value) -> Value:
        """The logit whose tanh(x / softcap) is `bent`."""
        return bent * self.p["softcap"].to(self.type)

    def load_weight(self, c: Value, lanes: int) -> Value | None:
        if not self.v.weighted:
            return None
        return (self.a["weight"] + c * SIZE[self.type]).load(self.type, lanes)

    # writing

    def write_out(self, source: Value, target: Value, count: Value) -> None:
        """Write so many gradients, which lie in scratch in the compute type, to memory: if past the caches, in whole
        aligned vectors."""
        kind, stream = self.v.grad or "", self.v.stream
        size = storage.itemsize(kind)

        def some(many: int, lanes: int = LANES) -> Callable[[Value], None]:
            def turn(k: Value) -> None:
                for place in (k + j * lanes for j in range(many)):
                    number = (source + place * SIZE[self.type]).load(self.type, lanes)
                    storage.store(target + place * size, number, kind, stream and lanes > 1)

            return turn

        head = self.begin
        if stream:  # elements before the first aligned vector
            head = (((0 - target) & (LANES * size - 1)) >> (size.bit_length() - 1)).at_most(count)
            loop(self.begin, head, 1, [], some(1, 1))
        k, _ = loop(head, count, 4 * LANES, [], some(4))
        k, _ = loop(k, count, LANES, [], some(1))
        loop(k, count, 1, [], some(1, 1))

    # the loss

    def mass_of(self, probability: Value, weight: Value | None) -> Value:
        """Weight of one class in a sample's loss, given the class's probability."""
        q = probability
        if self.v.smoothing:
            q = q.fma(self.p["keep"].to(q.elem), self.p["share"].to(q.elem))
        return q if weight is None else q * weight

    def accumulate(
        self, sums: ClassSums, z: Value, origin: Value, probability: Value | None, weight: Value | None
    ) -> ClassSums:
        """Add a class's part to mass and dot, where the loss needs them; all of the compute type."""
        if probability is not None:
            mass = self.mass_of(probability, weight)
            # a class without mass costs nothing, even where its logit is -inf
            dot = (mass == 0.0).select(0.0, mass * (z - origin))
            return sums._replace(mass=sums.mass + mass, dot=sums.dot + dot)
        if self.v.smoothing:
            part = z - origin
            return sums._replace(dot=sums.dot + (part if weight is None else part * weight))
        return sums

    def finish(self, s: Samples) -> Loss:
        """The losses of samples. Large logits cancel before they meet what is small."""
        high, low, origin, powers = s.reference
        p = {name: value.to(self.wide) for name, value in self.p.items()}
        # a sum of exponentials is a normal number, or NaN: see `ShiftedExp`
        rest = low + (log_of_normal(s.sums.exponentials) if self.wide == F32 else log(s.sums.exponentials))
        lse, zero = high + rest, rest.lift(0.0)
        if self.plain and s.z is not None:
            scale = p["scale"].splat(rest.lanes) if s.upstream is None else s.upstream * p["scale"]
            loss = (high - s.z) + rest
            if powers is not None:
                linear, m = scaled_log(s.sums.exponentials, powers, s.z - high)
                loss = linear + log_of_normal(m)
            return Loss(loss, zero, lse, scale, scale / s.sums.exponentials, scale)
        above = (high - origin) + rest
        if s.z is None:
            mass = s.sums.mass
            loss = mass * above - s.sums.dot
        else:
            mass = p["keep"].splat(rest.lanes) if s.weight is None else s.weight * p["keep"]
            loss = mass * ((high - s.z) + rest)
            if self.v.smoothing:
                loss = loss + (above * p["weight_sum"] - s.sums.dot) * p["share"]
                mass = mass + p["share"] * p["weight_sum"]
        scale = p["scale"].splat(rest.lanes) if s.upstream is None else s.upstream * p["scale"]
        if s.pull is not None and s.merged is not None:
            # of exponentials that are all 0 the reference says nothing
            nothing = (s.sums.exponentials == 0.0) & (s.merged > float("-inf"))
            share = nothing.select(0.0, s.pull * exp((high - s.merged) + low))
            return Loss(zero, zero, s.merged, mass, share, scale)
        if self.state:
            loss = (lse == float("-inf")).select(0.0, loss)
        pull, square = mass * scale, zero
        if self.v.z_loss:
            square = lse * lse * p["lse_square_scale"]
            scale_z = p["scale_z"] if s.upstream is None else s.upstream * p["scale_z"]
            pull = pull + lse * scale_z * (2.0 * p["lse_square_scale"])
        return Loss(loss, square, lse, mass, pull / s.sums.exponentials, scale)

    # the gradients

    def gradient(
        self, share: Value, bent: Value | None, probability: Value | None, weight: Value | None, scale: Value
    ) -> Value:
        """d loss / d logit of a class that is no target index: `share` is its exponential times `Loss.share`."""
        g = share
        if probability is not None:
            mass = self.mass_of(probability.to(F64), None if weight is None else weight.to(F64))
            g = g - (mass * scale).to(self.type)
        elif self.v.smoothing:
            part = (scale * self.p["share"]).to(self.type)
            g = g - (part if weight is None else weight * part)
        return g if bent is None else g * (1.0 - bent * bent)

    def pulled(self, weight: Value | None, scale: Value) -> Value:
        """What the target's class has less in its gradient; of the compute type."""
        if self.plain:
            return scale.to(self.type)
        pull = scale * self.p["keep"]
        return (pull if weight is None else weight.to(F64) * pull).to(self.type)

    def gradient_of_target(self, z: Value, lse: Value, weight: Value | None, scale: Value) -> Value:
        """d loss / d class probability."""
        g = (lse - z.to(F64)) * (scale * self.p["keep"])
        return g if weight is None else g * weight.to(F64)
