"""What a pointwise loss declares, and the vector loop that is emitted around its formulas."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

from . import storage
from .compiler import Variant
from .exact import add_lanes, two_sum
from .values import AHEAD, F32, F64, I32, I64, LANES, Value, full, loop, when
from .vecmath import where

Formula = Callable[..., Any]

# Elements whose losses are added plainly, 8 in each lane, before the sum is carried exactly. For positive losses of
# float32 numbers another cut of the data then changes the last bit of one sum in 25, and never two (32,000 random
# cuts); 16 squared errors in cache take 8.2 ns, where TwoSum for each vector took 11.5. float64 arrays bring twice the
# bytes for the same work, and have every addition exact.
GROUP = 8 * 16
UNROLL = 2  # vectors side by side, instruction by instruction: neither waits for its own results alone

# Bytes that are asked for before their use where each takes exponentials or logarithms: BCE of 2 x 128 MB on two cores
# of Zen 4 reads at 0.92 of the memory's speed so, with `values.AHEAD` at 0.83.
NEAR_AHEAD = 1536

SHORT = {"float32", "float16", "bfloat16"}  # storages whose numbers float32 holds

# float64 slots that a call of a kernel adds to; every back end and every reduction is made of them
SUMS = ("loss", "loss_low", "weight", "weight_low", "z", "z_low", "count", "invalid")


def sign(d: Value) -> Value:
    """1, -1, or d itself at 0 and NaN."""
    return where(d > 0, 1.0, where(d < 0, -1.0, d))


def wide(x: Value) -> Value:
    """x as float64: products and sums of a float32 logarithm with exact factors then add no error of their own."""
    return x.wide() if isinstance(x, Value) else x  # type: ignore[redundant-expr]  # formulas run on arrays too


def scaled(g: Value, scale: Value, wide: bool) -> Value:
    """g times a float64 number, as if in float64: float32's rounding of the number and of what follows would be two of
    five that add up to more than 4 ulp. `wide`: the result is wanted in float64."""
    if g.elem == F64 or wide:
        return g.to(F64) * scale
    high = scale.to(F32)
    # High is nearer to 0, so that low has its sign: with another one, or as 0, it made NaN of an infinite gradient.
    outward = (high * (scale - high.to(F64)).to(F32) <= 0.0) & (high != 0.0)
    high = outward.select((high.bits(I32) - 1).bits(F32), high)
    return g.fma(high, g * (scale - high.to(F64)).to(F32))


@dataclass(frozen=True, eq=False)
class Pointwise:
    """A loss of one element: formulas over `(x, y, *operands, *parameters)`, written once for every back end."""

    name: str
    value: Formula
    grad: Formula  # d value / dx
    grad_target: Formula | None = None  # d value / dy
    # value in fewer instructions, within 2.6 ulp: for sums of float32 without weights; may be NaN where value is not
    summand: Formula | None = None
    valid: Formula | None = None  # where the input lies in the loss's domain
    suspect: Formula | None = None  # negative int32 where float32 may lie outside it, unless the loss is NaN there
    operands: tuple[str, ...] = ()  # further arrays, broadcast to the input
    parameters: tuple[str, ...] = ()  # numbers, the same for every element; passed at run time
    wide: bool = False  # compute in float64 whatever the storage: free where memory is the limit, and exact
    short_grads: bool = False  # but gradients of float32 in float32, where they round once or twice
    signed: bool = False  # losses of both signs, whose sums cancel


@dataclass(frozen=True)
class PointwiseVariant(Variant):
    """One kernel of a loss: the options that change the loop. Storages are names of `storage.MEMORY`."""

    loss: Pointwise
    compute: str  # "float32" or "float64"
    inputs: tuple[str, ...]  # storages of x, y and the loss's operands
    weight: str | None = None  # storage of the element weights
    upstream: bool = False  # a float64 gradient of each sample's loss
    losses: str | None = None  # storage of the per-sample losses, where they are wanted
    grad: str | None = None
    grad_target: str | None = None
    stream: bool = False  # gradients go past the caches; the caller aligns them to a whole vector
    domain: bool = False  # only look whether x and y lie in the loss's domain, at the speed of memory

    @cached_property
    def streaming(self) -> PointwiseVariant:
        """The same, with gradients that go past the caches."""
        return replace(self, stream=True)

    @property
    def key(self) -> tuple[object, ...] | None:
        """What tells this kernel from every other, for the disk cache; None keeps a formula from outside out of it."""
        if not (self.loss.value.__module__ or "").startswith(__package__ + "."):
            return None  # nothing would notice that its source has changed
        rest = (self.compute, self.inputs, self.weight, self.upstream, self.losses, self.grad, self.grad_target)
        return ("pointwise", self.loss.name, *rest, self.stream, self.domain)

    @property
    def sources(self) -> tuple[str, ...]:
        """Storages of the arrays read, in the kernel's order."""
        return self.inputs + ((self.weight,) if self.weight else ()) + (("float64",) if self.upstream else ())

    @property
    def sinks(self) -> tuple[str, ...]:
        """Storages of the arrays written, in the kernel's order."""
        return tuple(name for name in (self.losses, self.grad, self.grad_target) if name)

    def emit(self, n: Value, arrays: Value, parameters: Value, sums: Value) -> None:
        """`void kernel(n, arrays, parameters, sums)`: addresses of `sources` then `sinks`, each contiguous;
        float64 `parameters` (the gradient's scale, then the loss's); adds to the float64 slots `SUMS`."""
        b = n.b
        compute = storage.COMPUTE[self.compute]
        slots = [(arrays + 8 * k).load(I64) for k in range(len(self.sources + self.sinks))]
        scale, *numbers = ((parameters + 8 * k).load(F64) for k in range(1 + len(self.loss.parameters)))
        extra = len(self.inputs)
        ahead = AHEAD if self.loss.wide or self.domain else NEAR_AHEAD
        summand = self.loss.summand if compute == F32 and not self.weight and not self.domain else None
        suspect = self.loss.suspect if compute == F32 and not self.domain else None

        def read(i: Value, lanes: int, k: int, type_: Any = compute) -> Value:
            """Elements of array k at i."""
            name = self.sources[k]
            at = slots[k] + i * storage.itemsize(name)
            if lanes > 1:
                at.prefetch_ahead(lanes * storage.itemsize(name), ahead)
            return storage.load(at, name, type_, lanes)

        def elements(i: Value, lanes: int, again: bool) -> tuple[Value, Value | None, Value | None]:
            """Read `lanes` elements at i, write what is wanted; their losses, weights, and a negative int32 for those
            that are or may be invalid. `again`: write nothing, every loss by `value`, every invalid one for certain."""
            x, y, *operands = (read(i, lanes, k) for k in range(extra))
            arguments = (x, y, *operands, *(number.to(compute) for number in numbers))
            loss = full(b, compute, lanes) if self.domain else self.loss.value(*arguments)
            weight = read(i, lanes, extra).to(F64) if self.weight else None
            loss = loss if weight is None else loss.to(F64) * weight
            term = summand(*arguments) if summand and not again else loss
            if not again:
                write(i, lanes, loss, arguments, weight)
            invalid = None
            if suspect and not again:
                invalid = suspect(x, y)
            elif self.loss.valid:
                invalid = self.loss.valid(x, y).select(full(b, I32, lanes), -1)
            return term.to(F64), weight, invalid

        def write(i: Value, lanes: int, loss: Value, arguments: Sequence[Value], weight: Value | None) -> None:
            upstream = read(i, lanes, len(self.sources) - 1, F64) if self.upstream else None
            factors = [factor for factor in (weight, upstream) if factor is not None]
            written = [loss] if self.losses else []
            for wanted, formula in ((self.grad, self.loss.grad), (self.grad_target, self.loss.grad_target)):
                if wanted and formula:
                    short = self.loss.short_grads and not factors and {*self.inputs, wanted} <= SHORT
                    g = formula(*(argument.to(F32) for argument in arguments) if short else arguments)
                    written.append(reduce(operator.mul, factors, scaled(g, scale, bool(factors))))
            for k, (name, value) in enumerate(zip(self.sinks, written, strict=True)):
                at = slots[len(self.sources) + k] + i * storage.itemsize(name)
                stream = self.stream and k >= (1 if self.losses else 0) and lanes > 1
                for part in value.parts(LANES):
                    storage.store(at, part, name, stream)
                    at = at + part.lanes * storage.itemsize(name)

        def add(i: Value, lanes: int, again: bool, state: Sequence[Value]) -> list[Value]:
            loss, weight, invalid = elements(i, lanes, again)
            weights = state[2:4] if weight is None else two_sum(state[2:4], weight)
            return [*two_sum(state[:2], loss), *weights, state[4] if invalid is None else state[4] | invalid]

        def add_plainly(i: Value, loss: Value, weights: Value, bad: Value) -> list[Value]:
            def fold(more: Value | None, into: Value, combine: Callable[[Value, Value], Value]) -> Value:
                return into if more is None else reduce(combine, more.parts(LANES), into)

            more, weight, invalid = elements(i, LANES * UNROLL, False)
            return [
                fold(more, loss, operator.add),
                fold(weight, weights, operator.add),
                fold(invalid, bad, operator.or_),
            ]

        # float32 losses add up exactly in float64, but where their sizes are far apart: no sum of the two BCE changes
        # in 8,000 random cuts. 16 logits in cache take 0.35 ns less so.
        group = GROUP if compute == F64 or self.weight else 4 * GROUP

        def add_group(i: Value, *state: Value) -> list[Value]:
            _, (loss, weights, bad) = loop(i, i + group, LANES * UNROLL, [zero, zero, state[4]], add_plainly)
            kept = two_sum(state[2:4], weights) if self.weight else state[2:4]
            return [*two_sum(state[:2], loss), *kept, bad]

        zero = full(b, F64, LANES)
        slots_of_sums = [sums + 8 * k for k in range(4)]
        old = [slot.load(F64) for slot in slots_of_sums]

        def added(again: bool) -> list[Value]:
            """What the slots hold and all elements, and a negative int32 where some are or may be invalid."""
            i, lanes = Value(b, I64(0)), [zero] * 4 + [full(b, I32, LANES)]
            if not again and not self.loss.signed and "float64" not in self.sources:
                i, lanes = loop(i, n, group, lanes, add_group)
            i, lanes = loop(i, n, LANES, lanes, lambda i, *s: add(i, LANES, again, s))
            bad = (lanes[4] < 0).any().select(full(b, I32, 1, -1), 0)
            state = [*add_lanes(old[:2], lanes[:2]), *add_lanes(old[2:], lanes[2:4]), bad]
            return loop(i, n, 1, state, lambda i, *s: add(i, 1, again, s))[1]

        state = added(False)
        if summand or suspect:
            state = when((state[4] < 0) | state[0].isnan(), lambda: added(True), lambda: state)
        for slot, value in zip(slots_of_sums, state[:4], strict=True):
            slot.store(value)
        counted = sums + 8 * SUMS.index("count")
        counted.store(counted.load(F64) + n.to(F64))
        when(state[4] < 0, lambda: (sums + 8 * SUMS.index("invalid")).store(full(b, F64, 1, 1.0)))
