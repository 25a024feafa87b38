"""The emitter: a `Value` writes LLVM instructions as you compute with it, on vectors and on scalars alike.

Widths are the source's (`LANES` per vector): LLVM splits or joins them for the machine at hand. No fast-math flag is
ever set, so NaN and infinity behave as IEEE 754 says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Union

from llvmlite import ir

LANES = 16
CACHE_LINE = 64


class Ahead(NamedTuple):
    """How long before its use memory is asked for, in bytes, and into which level of cache."""

    distance: int
    level: int


# By itself a processor looks less far, and not into the next page. On two cores of Zen 3 cross-entropy of
# 65,536 x 1,000 takes 11 ms with FAR, 18 without; L1 0.85 of the memory's speed, not 0.7. Zen 4, which has AVX-512,
# reads as fast as it can with NEAR: L1 is at 0.83 of that with FAR. But where arithmetic takes as long as memory, FAR
# is better there too, by 10% for rows in half types or with gradients; and DEEP where a block is read before its rows
# are finished: it leaves the nearest cache to the block. 799,000 x 21 takes 1.8 ms so, 2.3 with FAR, with the gradient
# 2.8, not 4.0.
NEAR, FAR, DEEP = Ahead(512, 1), Ahead(4096, 1), Ahead(8192, 2)

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
SIZE = {I8: 1, I16: 2, I32: 4, I64: 8, F16: 2, F32: 4, F64: 8}
INT_OF = {F16: I16, F32: I32, F64: I64}
NAME = {F16: "f16", F32: "f32", F64: "f64", I1: "i1", I8: "i8", I16: "i16", I32: "i32", I64: "i64"}

Number = Union["Value", float, int]


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"


BF16 = _BFloat()


def element(type_: ir.Type) -> ir.Type:
    """The element type of a vector type; a scalar type is its own."""
    return type_.element if isinstance(type_, ir.VectorType) else type_


def vector(elem: ir.Type, lanes: int) -> ir.Type:
    """`<lanes x elem>`; one lane is the scalar itself, so that a loop's tail runs the same source."""
    return ir.VectorType(elem, lanes) if lanes > 1 else elem


def constant(type_: ir.Type, number: float) -> ir.Constant:
    """`number` in every lane of `type_`."""
    number = float(number) if element(type_) in INT_OF else int(number)
    return ir.Constant(type_, [number] * type_.count if isinstance(type_, ir.VectorType) else number)


class Value:
    """An LLVM value and the builder that made it. Python numbers take the type of what they meet."""

    __slots__ = ("b", "v")

    def __init__(self, b: ir.IRBuilder, v: Any) -> None:
        self.b, self.v = b, v

    @property
    def type(self) -> ir.Type:
        return self.v.type

    @property
    def elem(self) -> ir.Type:
        return element(self.type)

    @property
    def lanes(self) -> int:
        return self.type.count if isinstance(self.type, ir.VectorType) else 1

    def may_use(self, feature: str) -> bool:
        """Whether the module that I am in is for CPUs that have a feature: see `compiler.features_of`."""
        return feature in getattr(self.b.module, "features", ())

    @property
    def is_float(self) -> bool:
        return self.elem in INT_OF

    def _new(self, v: Any) -> Value:
        return type(self)(self.b, v)

    def lift(self, other: Number) -> Value:
        """`other` as a value of my type: a Python number, a scalar to splat, or already one."""
        if not isinstance(other, Value):
            number = self._new(constant(self.type, other))
            return number.held() if other and self.is_float else number
        return other.splat(self.lanes) if other.lanes == 1 else other

    def held(self) -> Value:
        """A constant, in a register of its own where there are 32 of them: LLVM would load it again in every turn of a
        loop, though memory is what loops wait for. exp of 16 float32 takes 6.6 cycles so on Zen 4, not 9.
        """
        if self.lanes * SIZE[self.elem] != 64 or not self.may_use("avx512"):
            return self
        function = self.b.function
        known = function.__dict__.setdefault("held", {})
        key = str(self.v)
        if key not in known:
            with self.b.goto_entry_block():
                known[key] = self.opaque().v
        return self._new(known[key])

    def opaque(self) -> Value:
        """The same, in an AVX-512 register, and LLVM does not know where from."""
        same = ir.FunctionType(self.type, [self.type])
        return self._new(self.b.asm(same, "", "=v,0", [self.v], False))

    def _binary(self, name: str, other: Number, swapped: bool = False) -> Value:
        if isinstance(other, Value) and other.lanes > self.lanes:
            return other._binary(name, self, not swapped)
        a, c = self, self.lift(other)
        if swapped:
            a, c = c, a
        return self._new(getattr(self.b, ("f" if self.is_float else "") + name)(a.v, c.v))

    # fmt: off
    def __add__(self, o: Number) -> Value: return self._binary("add", o)
    def __radd__(self, o: Number) -> Value: return self._binary("add", o, True)
    def __sub__(self, o: Number) -> Value: return self._binary("sub", o)
    def __rsub__(self, o: Number) -> Value: return self._binary("sub", o, True)
    def __mul__(self, o: Number) -> Value: return self._binary("mul", o)
    def __rmul__(self, o: Number) -> Value: return self._binary("mul", o, True)
    def __truediv__(self, o: Number) -> Value: return self._binary("div", o)
    def __rtruediv__(self, o: Number) -> Value: return self._binary("div", o, True)
    def __neg__(self) -> Value: return self._new((self.b.fneg if self.is_float else self.b.neg)(self.v))
    def __abs__(self) -> Value: return self.call("llvm.fabs")
    def __and__(self, o: Number) -> Value: return self._new(self.b.and_(self.v, self.lift(o).v))
    def __or__(self, o: Number) -> Value: return self._new(self.b.or_(self.v, self.lift(o).v))
    def __xor__(self, o: Number) -> Value: return self._new(self.b.xor(self.v, self.lift(o).v))
    def __invert__(self) -> Value: return self._new(self.b.not_(self.v))
    def __floordiv__(self, o: Number) -> Value: return self._new(self.b.sdiv(self.v, self.lift(o).v))
    def __mod__(self, o: Number) -> Value: return self._new(self.b.srem(self.v, self.lift(o).v))
    def __lshift__(self, bits: int) -> Value: return self._new(self.b.shl(self.v, self.lift(bits).v))
    def __rshift__(self, bits: int) -> Value: return self._new(self.b.ashr(self.v, self.lift(bits).v))

    # fmt: on
    def _compare(self, op: str, other: Number) -> Value:
        if isinstance(other, Value) and other.lanes > self.lanes:
            return other._compare({"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(op, op), self)
        o = self.lift(other).v
        if not self.is_float:
            return self._new(self.b.icmp_signed(op, self.v, o))
        # != is the one comparison that NaN satisfies
        return self._new((self.b.fcmp_unordered if op == "!=" else self.b.fcmp_ordered)(op, self.v, o))

    def __lt__(self, o: Number) -> Value: return self._compare("<", o)
    def __le__(self, o: Number) -> Value: return self._compare("<=", o)
    def __gt__(self, o: Number) -> Value: return self._compare(">", o)
    def __ge__(self, o: Number) -> Value: return self._compare(">=", o)
    def __eq__(self, o: Number) -> Value: return self._compare("==", o)  # type: ignore[override]
    def __ne__(self, o: Number) -> Value: return self._compare("!=", o)  # type: ignore[override]
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("an emitted value is not known while compiling: use where(condition, a, b)")

    def below(self, bound: Number) -> Value:
        """0 <= self < bound for integers, in one unsigned comparison."""
        return self._new(self.b.icmp_unsigned("<", self.v, self.lift(bound).v))

    def above(self, bound: Number) -> Value:
        """self > bound as unsigned integers."""
        return self._new(self.b.icmp_unsigned(">", self.v, self.lift(bound).v))

    def isnan(self) -> Value:
        return self._new(self.b.fcmp_unordered("uno", self.v, self.v))

    def select(self, yes: Number, no: Number) -> Value:
        """yes where I am true, no elsewhere; at least one of them a value."""
        like = yes if isinstance(yes, Value) and (not isinstance(no, Value) or yes.lanes >= no.lanes) else no
        if not isinstance(like, Value):
            raise TypeError("select needs one emitted value to know the type")
        like = like.splat(self.lanes)
        return self._new(self.b.select(self.splat(like.lanes).v, like.lift(yes).v, like.lift(no).v))

    def at_least(self, floor: Number) -> Value:
        """max(floor, self) that keeps NaN in self: one maxps."""
        return (self < floor).select(floor, self)

    def at_most(self, ceiling: Number) -> Value:
        """min(ceiling, self) that keeps NaN in self."""
        return (self > ceiling).select(ceiling, self)

    def fma(self, y: Number, z: Number) -> Value:
        """self * y + z, rounded once."""
        lanes = max(v.lanes for v in (self, y, z) if isinstance(v, Value))
        x = self.splat(lanes)
        return x.call("llvm.fma", x.lift(y), x.lift(z))

    def rint(self) -> Value: return self.call("llvm.rint")

    def reciprocal(self) -> Value:
        """1 / self where both are normal numbers."""
        return 1.0 / self

    def call(self, name: str, *args: Value, result: ir.Type | None = None) -> Value:
        """Call the intrinsic `name`, overloaded on my type."""
        suffix = f"v{self.lanes}{NAME[self.elem]}" if self.lanes > 1 else NAME[self.elem]
        return self.named(f"{name}.{suffix}", *args, result=result)

    def named(self, name: str, *args: Value, result: ir.Type | None = None) -> Value:
        """Call the function `name`, which gives my type where `result` is no other."""
        values = [self.v, *(a.v for a in args)]
        signature = ir.FunctionType(result or self.type, [v.type for v in values])
        return self._new(self.b.call(declare(self.b.module, name, signature), values))

    # conversions
    def like(self, elem: ir.Type) -> ir.Type:
        return vector(elem, self.lanes)

    def splat(self, lanes: int) -> Value:
        """A scalar in every one of `lanes` lanes; a vector stays as it is."""
        if lanes == 1 or self.lanes > 1:
            return self
        undef = ir.Constant(vector(self.type, lanes), ir.Undefined)
        first = self.b.insert_element(undef, self.v, ir.Constant(I32, 0))
        return self._new(self.b.shuffle_vector(first, undef, ir.Constant(vector(I32, lanes), [0] * lanes)))

    def bits(self, elem: ir.Type) -> Value: return self._new(self.b.bitcast(self.v, self.like(elem)))
    def zext(self, elem: ir.Type) -> Value: return self._new(self.b.zext(self.v, self.like(elem)))
    def sext(self, elem: ir.Type) -> Value: return self._new(self.b.sext(self.v, self.like(elem)))
    def trunc(self, elem: ir.Type) -> Value: return self._new(self.b.trunc(self.v, self.like(elem)))
    def to_int(self, elem: ir.Type) -> Value: return self._new(self.b.fptosi(self.v, self.like(elem)))

    def to(self, elem: ir.Type, unsigned: bool = False) -> Value:
        """The number that I hold, as a float of type `elem` (rounded to nearest even where it is narrower)."""
        if self.elem == elem:
            return self
        if not self.is_float:
            return self._new((self.b.uitofp if unsigned else self.b.sitofp)(self.v, self.like(elem)))
        widen = SIZE[elem] > SIZE[self.elem]
        return self._new((self.b.fpext if widen else self.b.fptrunc)(self.v, self.like(elem)))

    def bfloat(self) -> Value:
        """The bits of a float32 rounded to bfloat16, as int16; subnormal numbers may become 0."""
        rounded = self._new(self.b.fptrunc(self.v, self.like(BF16)))
        # LLVM forgets of stores of its own bfloat that they go past the caches
        return self._new(self.b.bitcast(rounded.v, self.like(I16))).opaque()

    def wide(self) -> Value:
        """In the type that a target has for what float32 would round too early."""
        return self.to(F64)

    # lanes
    def lane(self, k: int) -> Value:
        return self._new(self.b.extract_element(self.v, ir.Constant(I32, k))) if self.lanes > 1 else self

    def with_lane(self, k: int, scalar: Value) -> Value:
        return self._new(self.b.insert_element(self.v, scalar.v, ir.Constant(I32, k))) if self.lanes > 1 else scalar

    def halves(self) -> tuple[Value, Value]:
        """The lower and the upper half of my lanes."""
        half, undef = self.lanes // 2, ir.Constant(self.type, ir.Undefined)
        if half == 1:
            return self.lane(0), self.lane(1)
        masks = (ir.Constant(vector(I32, half), list(range(k, k + half))) for k in (0, half))
        lo, hi = (self.b.shuffle_vector(self.v, undef, mask) for mask in masks)
        return self._new(lo), self._new(hi)

    def shuffle(self, other: Value | None, indices: Iterable[int]) -> Value:
        """The lanes `indices` of mine, followed by other's."""
        mask = list(indices)
        rest = ir.Constant(self.type, ir.Undefined) if other is None else other.v
        return self._new(self.b.shuffle_vector(self.v, rest, ir.Constant(vector(I32, len(mask)), mask)))

    def parts(self, lanes: int) -> list[Value]:
        """Me in order, cut into pieces of at most `lanes` lanes."""
        return [part for half in self.halves() for part in half.parts(lanes)] if self.lanes > lanes else [self]

    def fold(self, combine: Callable[[Value, Value], Value]) -> Value:
        """All lanes combined pairwise, lower half with upper half, into one scalar: a fixed order."""
        out = self
        while out.lanes > 1:
            out = combine(*out.halves())
        return out

    def sum(self) -> Value: return self.fold(lambda a, b: a + b)
    def max(self) -> Value: return self.fold(lambda a, b: (a > b).select(a, b))

    def any(self) -> Value:
        return self.call("llvm.vector.reduce.or", result=I1) if self.lanes > 1 else self

    def count(self) -> Value:
        """How many of my lanes, which are conditions, hold: an int64."""
        if self.lanes == 1:
            return self.zext(I64)
        bits = self._new(self.b.bitcast(self.v, ir.IntType(self.lanes)))
        number = bits._new(self.b.ctpop(bits.v))
        return number._new(self.b.zext(number.v, I64))

    # memory: I am an address
    def load(self, elem: ir.Type, lanes: int = 1, align: int | None = None) -> Value:
        type_ = vector(elem, lanes)
        pointer = self.b.inttoptr(self.v, type_.as_pointer())
        return self._new(self.b.load(pointer, align=align or SIZE[elem], typ=type_))

    def prefetch_ahead(self, nbytes: int, ahead: Ahead = NEAR) -> None:
        """Ask for as much memory as is read at me, some way ahead."""
        distance, level = self.suited(ahead)
        for k in range(distance, distance + nbytes, CACHE_LINE):
            (self + k).prefetch(level)

    def suited(self, ahead: Ahead) -> Ahead:
        """Which one does best on the CPUs that my module is for."""
        return ahead if self.may_use("avx512") else FAR

    def prefetch(self, level: int = 1) -> None:
        """Ask for my cache line, which may lie beyond the end of an array, into a first- or second-level cache."""
        pointer = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        intrinsic = declare(self.b.module, "llvm.prefetch.p0", signature)
        # to read; 3 is the nearest cache; data
        self.b.call(intrinsic, [self.b.inttoptr(self.v, pointer), I32(0), I32(4 - level), I32(1)])

    def store(self, value: Value, stream: bool = False, align: int | None = None) -> None:
        """Write `value` at me. `stream` (a whole, aligned vector) goes past the caches."""
        align = align or SIZE[value.elem] * (value.lanes if stream else 1)
        put = self.b.store(value.v, self.b.inttoptr(self.v, value.type.as_pointer()), align=align)
        if stream:
            put.set_metadata("nontemporal", self.b.module.add_metadata([ir.Constant(I32, 1)]))


def declare(module: ir.Module, name: str, signature: ir.FunctionType) -> ir.Function:
    """The external function `name` of `module`, declared once."""
    return module.globals[name] if name in module.globals else ir.Function(module, signature, name)


def iota(b: ir.IRBuilder, lanes: int, elem: ir.Type = I32) -> Value:
    """0, 1, 2, ... across the lanes."""
    return Value(b, ir.Constant(vector(elem, lanes), list(range(lanes)) if lanes > 1 else 0))


def full(b: ir.IRBuilder, elem: ir.Type, lanes: int, number: float = 0.0) -> Value:
    """`number` in every lane."""
    return Value(b, constant(vector(elem, lanes), number))


def full_of(b: ir.IRBuilder, elem: ir.Type, numbers: Sequence[float]) -> Value:
    """These numbers, one in each lane."""
    return Value(b, ir.Constant(vector(elem, len(numbers)), list(numbers)))


def joined(parts: Sequence[Value]) -> Value:
    """Vectors one behind the other, a power of 2 of them."""
    while len(parts) > 1:
        lanes = range(2 * parts[0].lanes)
        parts = [a.shuffle(b, lanes) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def loop(
    start: Value,
    stop: Value,
    step: int | Value,
    state: Sequence[Value],
    body: Callable[..., Sequence[Value] | None],
) -> tuple[Value, list[Value]]:
    """`while i + step <= stop: state = body(i, *state); i += step`; gives the last i and state.

    What is left over (fewer than `step`) is the caller's, who runs the same body with fewer lanes.
    """
    b, before = stop.b, stop.b.block
    head, inside, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(start.v, before)
    phis = []
    for value in state:
        phi = b.phi(value.type)
        phi.add_incoming(value.v, before)
        phis.append(phi)
    following = b.add(i, stop.lift(step).v)
    b.cbranch(b.icmp_signed("<=", following, stop.v), inside, after)
    b.position_at_end(inside)
    new = body(stop._new(i), *(value._new(phi) for value, phi in zip(state, phis, strict=True))) or []
    i.add_incoming(following, b.block)
    for phi, value in zip(phis, new, strict=True):
        phi.add_incoming(value.v, b.block)
    b.branch(head)
    b.position_at_end(after)
    return stop._new(i), [value._new(phi) for value, phi in zip(state, phis, strict=True)]


def when(
    condition: Value,
    then: Callable[[], Sequence[Value] | None],
    otherwise: Callable[[], Sequence[Value] | None] | None = None,
) -> list[Value]:
    """The values of `then()` where the scalar `condition` holds, else those of `otherwise()`, by a real branch."""
    b = condition.b
    yes, no, after = (b.append_basic_block(name) for name in ("yes", "no", "join"))
    b.cbranch(condition.v, yes, no)
    arms = []
    for block, arm in ((yes, then), (no, otherwise)):
        b.position_at_end(block)
        values = list((arm() if arm else None) or [])
        arms.append((values, b.block))
        b.branch(after)
    b.position_at_end(after)
    out = []
    for a, c in zip(arms[0][0], arms[1][0], strict=True):
        phi = b.phi(a.type)
        phi.add_incoming(a.v, arms[0][1])
        phi.add_incoming(c.v, arms[1][1])
        out.append(condition._new(phi))
    return out
