"""exp, log and their kin on emitted float32 or float64 values of any width, and on NumPy arrays.

No libm, no fast-math, no branch: NaN, infinities, signed zeros and subnormal numbers come out right from the
same straight line of vector instructions. docs/accuracy.md has the errors, and how coefficients were fitted:
the number after each list is the relative error of its fit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

from llvmlite import ir

from .values import F32, F64, I32, I64, Value, full_of, joined

Operand = Any  # an emitted Value, a NumPy array or a Python float


@dataclass(frozen=True)
class Format:
    """What the formulas need to know of a floating-point type."""

    integer: ir.Type
    mantissa: int  # bits stored
    bias: int
    floor: float  # exp(floor) rounds to 0
    ceiling: float  # exp(ceiling) is infinite
    ln2: float  # ln 2, rounded; x - n * ln2 is exact in an fma
    ln2_low: float  # what ln2 lacks
    ln2_short: float  # ln 2 with so few bits that exponent * ln2_short is exact
    ln2_short_low: float
    middle: int  # the bits of 0.75
    max_count: float  # of ShiftedExp: small enough that its floor is right to a thousandth
    exp: Sequence[float]  # exp(r), |r| <= ln(2) / 2
    exp_short: Sequence[float]  # the same where 2e-7 will do
    tanh: Sequence[float]  # (tanh(a) - a) / a**3 in powers of a**2, a <= 0.55

    @property
    def magic(self) -> float:
        """Adding it rounds to an integer and leaves that in the low bits."""
        return 1.5 * 2.0**self.mantissa

    @property
    def magic_bits(self) -> int:
        """Its bits, as an integer."""
        return ((self.bias + self.mantissa) << self.mantissa) | (1 << (self.mantissa - 1))

    @property
    def precision(self) -> int:
        """Significant bits: 2**precision times any subnormal number is normal."""
        return self.mantissa + 1


LOG2E = 1.4426950408889634
EXP64 = [1.0, 1.0, 0.5000000000000001, 0.16666666666666669, 0.04166666666662413, 0.008333333333330062,
         0.0013888888917213717, 0.00019841269863053618, 2.4801521295954376e-05, 2.7557268459997064e-06,
         2.7620088445409746e-07, 2.510038549551032e-08]  # 1.6e-17  # fmt: skip
FORMATS = {
    F32: Format(
        I32, 23, 127, -104.0, 89.0, 0.693147182464599609375, -1.904654323148236e-09,
        0.693359375, -2.1219444005469057e-04, 0x3F400000, 2.0**15,
        exp=[1.0, 1.0, 0.4999999403953552, 0.1666652113199234, 0.041668254882097244, 0.008368662558495998,
             0.0013821469619870186],  # 3.1e-9
        exp_short=[1.0, 0.9999997019767761, 0.4999915063381195, 0.16667647659778595, 0.041897840797901154,
                   0.008289716206490993],  # 9.2e-8
        tanh=[-0.33333316445350647, 0.13332544267177582, -0.0538475476205349, 0.02105071395635605,
              -0.00624284939840436],  # 1.1e-9
    ),
    F64: Format(
        I64, 52, 1023, -745.14, 710.0, 0.6931471805599453, 2.3190468138462996e-17,
        6.93147180369123816490e-01, 1.90821492927058770002e-10, 0x3FE8 << 48, 2.0**40,
        exp=EXP64,
        exp_short=EXP64,
        tanh=[-0.33333333333332316, 0.1333333333316893, -0.053968253876161436, 0.021869485976354908,
              -0.008863194521137334, 0.003591719812353689, -0.0014532172380083976, 0.0005791382389438725,
              -0.00021030412098014086, 5.1022498745324134e-05],  # 2.3e-17
    ),
}  # fmt: skip

# (log(1 + f) - f) / f**2, errors relative to log(1 + f)
LOG = [-0.5, 0.3333345055580139, -0.25000110268592834, 0.19990848004817963, -0.1664687842130661,
       0.14477629959583282, -0.13163936138153076, 0.10472550988197327,
       -0.045152269303798676]  # -1/4 <= f <= 1/2: 4.9e-9  # fmt: skip
LOG_SHORT = [-0.49999991059303284, 0.33333948254585266, -0.25001785159111023, 0.1996215581893921,
             -0.16570048034191132, 0.1491681933403015, -0.14309664070606232,
             0.08740008622407913]  # sqrt(1/2) <= 1 + f <= sqrt(2): 3.0e-8  # fmt: skip
LOG_LOWER = [-0.5000008940696716, 0.33326324820518494, -0.2518686354160309, 0.1758745312690735, -0.34006837010383606,
             -0.5922693610191345, -1.970932126045227, -2.476450204849243,
             -1.743440866470337]  # -1/2 <= f <= 0: 3.8e-9  # fmt: skip
# (2 atanh(s) - 2 s) / s**3 in powers of s**2 <= 0.04, for float64: 3.1e-17
ATANH = [0.6666666666667271, 0.399999999961603, 0.2857142939550783, 0.22222138469336067, 0.18186358309781409,
         0.15250123443875171, 0.15368852495413302]  # fmt: skip


# (log(1 + f) - f) / f**2 where tables of AVX-512 leave only a small f, errors relative to the logarithm looked for
LOG_LOOKED_UP = [-0.5000123381614685, 0.33332255482673645]  # BCE's two, |f| <= 1/60: 3.3e-8
SOFTPLUS_LOOKED_UP = [-0.5000000596046448, 0.33360350131988525, -0.25035881996154785]  # |f| <= 1/24: 7.5e-9


Emitter = Callable[[Value], Any]


def on_arrays(formula: Callable[[Any, Any], Any]) -> Callable[[Emitter], Callable[[Operand], Any]]:
    """The decorated function emits; what is no emitted value goes to `formula(numpy, x)`."""

    def decorate(emit: Emitter) -> Callable[[Operand], Any]:
        @wraps(emit)
        def function(x: Operand) -> Any:
            if isinstance(x, Value):
                return emit(x)
            import numpy

            return formula(numpy, x)

        return function

    return decorate


@on_arrays(lambda np, x: np.signbit(x))
def signbit(x: Value) -> Any:
    """Whether x has the sign -: one instruction less than x < 0 where it selects."""
    return x.bits(FORMATS[x.elem].integer) < 0


def where(condition: Operand, a: Operand, b: Operand) -> Any:
    """a where the condition holds, else b; a Python bool decides while compiling."""
    if isinstance(condition, bool):
        return a if condition else b
    if isinstance(condition, Value):
        return condition.select(a, b)
    import numpy

    return numpy.where(condition, a, b)


def fma(x: Operand, y: Operand, z: Operand) -> Any:
    """x * y + z, emitted so that it is rounded once."""
    return x.fma(y, z) if isinstance(x, Value) else x * y + z


def in_unit_interval(x: Operand, y: Operand) -> Any:
    """Whether both lie in [0, 1]."""
    if not isinstance(x, Value) or x.elem == F64:
        return (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    # Bits of floats that are not negative are ordered as these are; all others, once -0.0 is 0.0, lie above as unsigned
    # integers. One comparison: AVX2 packs masks before it combines them.
    a, b = (x + 0.0).bits(I32), (y + 0.0).bits(I32)
    return a.below(b).select(b, a).below(0x3F800001)


def outside_unit_interval(x: Value, y: Value) -> Value:
    """Negative int32 where a float32 lies outside [0, 1], or is -0.0, unless NaN."""
    return x.bits(I32) | (1.0 - x).bits(I32) | y.bits(I32) | (1.0 - y).bits(I32)


def variance(p: Operand) -> Any:
    """p (1 - p) for p in [0, 1], in float32 rounded once."""
    if isinstance(p, Value) and p.elem == F32:  # float64 may have to do without a fused instruction
        return (-p).fma(p, p)
    return (1 - p) * p


def minimum(x: Operand, y: Operand) -> Any:
    """The lesser of the two; y where one is NaN."""
    return where(x < y, x, y)


def horner(x: Value, coefficients: Sequence[float]) -> Value:
    """coefficients[0] + coefficients[1] * x + coefficients[2] * x**2 + ..."""
    p = x.lift(coefficients[-1])
    for c in coefficients[-2::-1]:
        p = p.fma(x, c)
    return p


def even_odd(x: Value, square: Value, coefficients: Sequence[float]) -> Value:
    """`horner` of as many instructions, given x * x, as two chains of half the length: for what waits on them."""
    return horner(square, coefficients[1::2]).fma(x, horner(square, coefficients[::2]))


def _shift_right(x: Value, bits: int) -> Value:
    """Zeros come in from the left: AVX2 has no other right shift of 64-bit integers."""
    return x._new(x.b.lshr(x.v, x.lift(bits).v))


def _in_registers(emit: Callable[..., Value], *values: Value, width: int = 16) -> Value:
    """`emit`, which takes `width` 32-bit numbers, on any number of lanes: fewer are repeated, more are cut."""
    lanes = values[0].lanes
    if lanes == width:
        return emit(*values)
    if lanes > width:
        cut = zip(*(value.parts(width) for value in values), strict=True)
        return joined([emit(*parts) for parts in cut])
    whole = emit(*(value.splat(width).shuffle(None, [k % lanes for k in range(width)]) for value in values))
    return whole.shuffle(None, range(lanes)) if lanes > 1 else whole.lane(0)


def _avx512(name: str, *operands: Value, immediate: int | None = None) -> Value:
    """An instruction of AVX-512 on float32, rounding as ever, no lane masked."""

    def emit(x: Value, *more: Value) -> Value:
        numbers = [] if immediate is None else [Value(x.b, I32(immediate))]
        unmasked = [Value(x.b, ir.Constant(x.type, ir.Undefined)), Value(x.b, ir.IntType(16)(-1)), Value(x.b, I32(4))]
        return x.named(f"llvm.x86.avx512.mask.{name}.ps.512", *more, *numbers, *unmasked)

    return _in_registers(emit, *operands)


def looked_up(numbers: Sequence[int], index: Value, flipped: Value | None = None) -> Value:
    """numbers[index % len(numbers)], int32 as index is: 32 of them in two registers of AVX-512, or 8 in one of AVX2;
    the bits of a number `flipped` are."""
    if len(numbers) == 8:
        table = full_of(index.b, I32, numbers)
        return _in_registers(lambda part: table.named("llvm.x86.avx2.permd", part), index, width=8)
    low, high = (full_of(index.b, I32, numbers[k : k + 16]).held() for k in (0, 16))
    if flipped is not None:
        low, high = low ^ flipped, high ^ flipped
    return _in_registers(lambda part: low.named("llvm.x86.avx512.vpermi2var.d.512", part, high), index)


def _float32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def _bits(x: float) -> int:
    """Those of a float32, as an int32."""
    return int(struct.unpack("i", struct.pack("f", x))[0])


@cache
def _inverses(numbers: tuple[float, ...]) -> tuple[list[int], list[int]]:
    """Bits of float32 c near the inverses of numbers, and of -log c. Of the c near an inverse the one whose logarithm
    is nearest to a float32: the table then adds no error of its own."""

    def lost(c: float) -> float:
        return abs(_float32(math.log(c)) - math.log(c))

    near = [round(2**20 / x) for x in numbers]
    chosen = [1.0 if n == 2**20 else min(((n + j) / 2**20 for j in range(-64, 65)), key=lost) for n in near]
    return [_bits(c) for c in chosen], [_bits(-math.log(c)) for c in chosen]


def power_of_2(n: Value) -> Value:
    """2**(n - bias) for an integer of which only the low bits count."""
    elem, k = (F32, FORMATS[F32]) if n.elem == I32 else (F64, FORMATS[F64])
    return (n << k.mantissa).bits(elem)


def _with_sign_of(x: Value, y: Value) -> Value:
    """y, of which the sign is + or already that of x, with the sign of x: for zeros."""
    k = FORMATS[x.elem]
    sign = x.bits(k.integer) & (-1 << (k.integer.width - 1))
    return (y.bits(k.integer) | sign).bits(x.elem)


def _reduce(x: Value, bias: int) -> tuple[Value, Value, Value]:
    """r, low, bits: r + low = x - n * ln 2 for n = rint(x / ln 2); the bits end in those of n + bias."""
    k = FORMATS[x.elem]
    t = x.fma(LOG2E, k.magic + bias)  # no conversion: that of NaN is undefined, and AVX2 has none to 64 bits
    n = t - (k.magic + bias)
    # float64: exact without an fma too; float32 without one computes in float64
    ln2, rest = (k.ln2, k.ln2_low) if x.elem == F32 else (k.ln2_short, k.ln2_short_low)
    exact = n.fma(-ln2, x)
    r = n.fma(-rest, exact)
    return r, n.fma(-rest, exact - r), t.bits(k.integer)


@on_arrays(lambda np, x: np.exp(x))
def exp(x: Value) -> Value:
    """e**x."""
    k = FORMATS[x.elem]
    r, _, n = _reduce(x.at_least(k.floor).at_most(k.ceiling), 2 * k.bias)
    half = _shift_right(n, 1)  # two factors: 2**n may be subnormal or infinite where the result is not
    return horner(r, k.exp) * power_of_2(half) * power_of_2(n - half)


@on_arrays(lambda np, x: np.expm1(x))
def expm1(x: Value) -> Value:
    """e**x - 1."""
    k = FORMATS[x.elem]
    r, low, n = _reduce(x.at_least(-2.0 * k.mantissa).at_most(k.ceiling), k.bias - 1)
    p = (r * r).fma(horner(r, k.exp[2:]), low) + r
    half = power_of_2(n)  # 2**n / 2, since 2**n may be infinite where the result is not
    y = (half == 0.5).select(p, half.fma(p, half - 0.5) * 2.0)
    return _with_sign_of(x, y)


def _split(x: Value) -> tuple[Value, Value]:
    """Of `split` e before the last shift, and m."""
    k = FORMATS[x.elem]
    i = x.bits(k.integer) - k.middle
    return i, ((i & ((1 << k.mantissa) - 1)) + k.middle).bits(x.elem)


def split(x: Value) -> tuple[Value, Value]:
    """x = 2**e * m for positive normal x, with m in [0.75, 1.5); e as a float."""
    k = FORMATS[x.elem]
    i, m = _split(x)
    if x.elem == F32:
        return (i >> k.mantissa).to(F32), m
    # AVX2 converts no 64-bit integers: e + bias becomes the low bits of 2**52
    e = _shift_right(i + (k.bias << k.mantissa), k.mantissa) | (0x433 << k.mantissa)
    return e.bits(F64) - (2.0**52 + k.bias), m


def split_float32(x: Value) -> tuple[Value, Value]:
    """The same of float32, e as an int32."""
    i, m = _split(x)
    return i >> FORMATS[F32].mantissa, m


def _log_sum(e: Value, f: Value, rest: float | Value = 0.0) -> Value:
    """e * ln 2 + log(1 + f) + rest for f in [-1/4, 1/2] and a small rest."""
    k = FORMATS[f.elem]
    low, square = e.fma(k.ln2_short_low, rest), f * f
    if f.elem == F32:
        return e.fma(k.ln2_short, square.fma(horner(f, LOG), low) + f)
    s = f / (f + 2.0)  # log(1 + f) = 2 atanh(s) = f - s * (f - ...), in fdlibm's order
    z, half = s * s, square * 0.5
    return e.fma(k.ln2_short, f - (half - s.fma(z.fma(horner(z, ATANH), half), low)))


@on_arrays(lambda np, x: np.log(x))
def log(x: Value) -> Value:
    """The natural logarithm: -inf of 0, NaN below."""
    k = FORMATS[x.elem]
    subnormal = x < 2.0 ** (1 - k.bias)
    e, m = split(subnormal.select(x * 2.0**k.precision, x))
    y = _log_sum(e - subnormal.select(x.lift(k.precision), 0.0), m - 1.0)
    y = (x <= 0.0).select((x == 0.0).select(x.lift(float("-inf")), float("nan")), y)
    return (x < float("inf")).select(y, x)


@on_arrays(lambda np, x: np.log(x))
def log_of_normal(x: Value) -> Value:
    """The natural logarithm of positive normal numbers; NaN of NaN, infinity of infinity."""
    e, m = split(x)
    return (x < float("inf")).select(_log_sum(e, m - 1.0), x)


@on_arrays(lambda np, x: np.log1p(x))
def log1p(x: Value) -> Value:
    """log(1 + x)."""
    k = FORMATS[x.elem]
    y = x + 1.0
    e, m = split(y)
    lost = x - (y - 1.0)  # exact up to 2**mantissa, of no weight above
    inverse = ((k.bias << k.mantissa) - (y.bits(k.integer) - m.bits(k.integer))).bits(x.elem)  # 2**-e
    f = m - 1.0
    f = (y < 2.0**k.precision).select(lost.fma(inverse, f), f)
    r = _log_sum(e, (e == 0.0).select(x, f))
    r = (x <= -1.0).select((x == -1.0).select(x.lift(float("-inf")), float("nan")), r)
    return (x < float("inf")).select(_with_sign_of(x, r), x)


def _exp_neg(a: Value) -> tuple[Value, Value, Value]:
    """p, low, scale: exp(-a) = (p + low) * scale for a >= 0, low being what the rounding of p took away."""
    k = FORMATS[a.elem]
    r, _, n = _reduce((-a).at_least(k.floor), k.bias + k.precision)
    q = horner(r, k.exp[1:])
    p = q.fma(r, 1.0)
    return p, q.fma(r, 1.0 - p), power_of_2(n) * 2.0**-k.precision


def _log1p_exp_neg_looked_up(a: Value) -> tuple[Value, Value, Value]:
    """f, rise, log c in float32 by AVX-512, where (1 + exp(-a)) c = 1 + f and exp(-a) c = f + rise.

    c is looked up by a: it is there before the exponential is. exp(-a) = 2**n * exp(r), n in 32nds, is not rounded by
    itself: what waits for it is as much as the processor can hold.
    """
    k, size, cell = FORMATS[F32], 32, 8  # n that share a c
    x, magic, shift = (-a).at_least(k.floor), k.magic / size, k.mantissa - 5
    t = x.fma(LOG2E, magic)
    n, bits = t - magic, t.bits(I32)
    r = n.fma(-k.ln2, x)
    # the bits of 2**(j / 32 + precision), less what the shifted n adds to them
    powers = [_bits(2 ** (j / size + k.precision)) - (j << shift) for j in range(size)]
    power = (looked_up(powers, bits) + (bits << shift)).bits(F32)
    ends = [[2 ** (-max(0, end) / size) for end in (cell * j - cell + 0.5, cell * j + 0.5)] for j in range(size - 1)]
    middles = [1 + sum(pair) / 2 for pair in ends] + [1.0]
    inverses, logs = _inverses(tuple(middles[-j] for j in range(size)))
    index = bits.at_least(k.magic_bits - (5 << k.mantissa) - (size - 1) * cell) >> 3
    # times 2**-precision: below, all numbers are normal
    c = looked_up([inverse - (k.precision << k.mantissa) for inverse in inverses], index).bits(F32)
    fall = c.fma(2.0**k.precision, -1.0)
    # |r| <= 0.011: 6e-10. What ln2 lacks is for the first power of r only, and no other waits for it.
    part = power * c * n.fma(-k.ln2_low, r)
    f = part.fma(horner(r, [1.0, 0.5, 1 / 6]), power.fma(c, fall))
    return f, -fall, looked_up(logs, index).bits(F32)


@on_arrays(lambda np, a: np.exp(-a))
def exp_neg(a: Value) -> Value:
    """exp(-a) for a >= 0, out of what `log1p_exp_neg` and `sigmoid` compute as well."""
    p, _, scale = _exp_neg(a)
    return p * scale


@on_arrays(lambda np, x: 1 / x)
def reciprocal(x: Value) -> Value:
    """1 / x where both are normal numbers; NaN of NaN."""
    return x.reciprocal()


def quotient(x: Operand, y: Operand) -> Any:
    """x / y where y and 1 / y are normal numbers: by a product where a target has a reciprocal of its own."""
    if isinstance(y, Value) and type(y).reciprocal is not Value.reciprocal:
        return x * y.reciprocal()
    return x / y


@on_arrays(lambda np, a: np.log1p(np.exp(-a)))
def log1p_exp_neg(a: Value) -> Value:
    """log(1 + exp(-a)) for a >= 0, to the last bits of its tail."""
    p, low, scale = _exp_neg(a)
    u = p * scale
    upper = u > 0.5  # there 1 + u = 2 * (1 + f), f exact
    one = upper.select(u.lift(1.0), 0.0)
    half_scale = upper.select(scale * 0.5, scale)
    return _log_sum(one, upper.select(u.fma(0.5, -0.5), u), low * half_scale)


def log1p_exp_neg_plus(a: Operand, x: Operand, y: Operand) -> Any:
    """log(1 + exp(-a)) + x * y for a >= 0; without the product a fifth fewer instructions than `log1p_exp_neg` in
    float32, and 1.9 ulp instead of 1.14."""
    if not isinstance(a, Value) or a.elem == F64:
        return fma(x, y, log1p_exp_neg(a))
    k = FORMATS[a.elem]
    if a.may_use("avx512"):
        f, _, log_c = _log1p_exp_neg_looked_up(a)
        return x.fma(y, f.fma(horner(f, [1.0, *SOFTPLUS_LOOKED_UP]), log_c))
    u = exp_neg(a)
    upper = u > 0.5  # as above
    f = upper.select(u.fma(0.5, -0.5), u)
    square = f * f
    low = x.fma(y, square.fma(even_odd(f, square, LOG), f))
    return low + upper.select(a.lift(k.ln2), 0.0)


def _logistic_tail_of_arrays(np: Any, a: Any) -> Any:
    u = np.exp(-a)
    return u / (1 + u)


@on_arrays(_logistic_tail_of_arrays)
def logistic_tail(a: Value) -> Value:
    """1 / (1 + exp(a)) for a >= 0, out of what `log1p_exp_neg_plus` computes as well."""
    if a.elem == F32 and a.may_use("avx512"):
        f, rise, _ = _log1p_exp_neg_looked_up(a)
        u = f + rise
        return (-f).fma(u / (f + 1.0), u)  # u / (1 + f), rounded once where that was rounded twice
    u = exp_neg(a)
    return quotient(u, u + 1.0)


@on_arrays(lambda np, x: np.maximum(x, 0) + np.log1p(np.exp(-abs(x))))
def softplus(x: Value) -> Value:
    """log(1 + exp(x)); float32 by way of float64, since a sum of parts that are each rounded is off by 1.3 ulp."""
    if x.elem == F32:
        return softplus(x.to(F64)).to(F32)
    return x.at_least(0.0) + log1p_exp_neg(abs(x))


def _sigmoid_of_arrays(np: Any, x: Any) -> Any:
    u = np.exp(-abs(x))
    return np.where(x < 0, u, 1) / (1 + u)


@on_arrays(_sigmoid_of_arrays)
def sigmoid(x: Value) -> Value:
    """1 / (1 + exp(-x))."""
    p, low, scale = _exp_neg(abs(x))
    u, negative = p * scale, x < 0.0
    below = u + 1.0
    above = negative.select(u, 1.0)
    y = above / below
    # what the quotient, the denominator and the numerator had lost: without it more than 2.3 ulp in float32
    rest = (-y).fma(below, above)
    lost = low.fma(scale, 1.0 - below + u)
    more = rest + y.fma(-lost, negative.select(low * scale, 0.0))
    return more.fma(negative.select(1.0 - y, y), y)


@on_arrays(lambda np, x: np.tanh(x))
def tanh(x: Value) -> Value:
    """The hyperbolic tangent."""
    k = FORMATS[x.elem]
    a = abs(x)
    square = a * a
    small = (a * square).fma(horner(square, k.tanh), a)
    r, _, n = _reduce((a * 2.0).at_most(0.8 * k.mantissa), k.bias)  # above, 1
    large = 1.0 - 2.0 / horner(r, k.exp).fma(power_of_2(n), 1.0)
    return _with_sign_of(x, (a < 0.55).select(small, large))


def _bce_logs_of_arrays(np: Any, s: Any) -> tuple[Any, Any, Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(np.log(s), -100), 0.0 * s, np.log1p(-s)


@on_arrays(_bce_logs_of_arrays)
def bce_logs(s: Value) -> tuple[Value, Value, Value]:
    """high, low, rest: high + low = max(log(s), -100), rest = log(1 - s) for s in [0, 1/2]; anything for other s.

    The sum of high and low, were it rounded, would cost an ulp of a result that is a little less.
    """
    k = FORMATS[s.elem]
    if s.elem == F64:
        e, m = split((s * 2.0**k.precision).at_least(2.0 ** (1 - k.bias)))
        halved = s > 0.29
        # -0.0 for e = 0: log(1 - 0) is -0.0, as in float32, so that a loss of 0 has no sign
        rest = _log_sum(halved.select(s.lift(-1.0), -0.0), halved.select(s.fma(-2.0, 1.0), -s))
        high = _log_sum(e - k.precision, m - 1.0).at_least(-100.0)
        return high, s.lift(0.0), rest
    # s = 2**e * (1 + f), as `split` has it; far from the subnormal numbers, and e as a float times 2**23
    start, up = 0x3F3504F3, 48
    i = (s * 2.0**up).at_least(2.0**up * 3.720075976020836e-44).bits(I32) - (start + (up << k.mantissa))  # e**-100
    f = ((i & ((1 << k.mantissa) - 1)) + start).bits(F32) - 1.0
    e = (i & -(1 << k.mantissa)).to(F32)
    square, small = f * f, s * s
    log_f = square.fma(even_odd(f, square, LOG_SHORT), f)
    rest = small.fma(even_odd(s, small, [c * (-1) ** n for n, c in enumerate(LOG_LOWER)]), -s)
    unit = 2.0**-k.mantissa
    return e * (k.ln2_short * unit), e.fma(k.ln2_short_low * unit, log_f), rest


def bce_logs_short(s: Value) -> tuple[Value, Value, Value]:
    """`bce_logs` for sums: by AVX-512 in two thirds of the instructions, and 1.6 and 1.4 ulp instead of 1.0 and 1.0.

    s = 2**e m, and log m = log(1 + f) - log c for m c = 1 + f, c near 1 / m from a table; log(1 - s) likewise.
    """
    if s.elem == F64 or not s.may_use("avx512"):
        return bce_logs(s)
    k = FORMATS[F32]
    e, m = _avx512("getexp", s), _avx512("getmant", s, immediate=0)  # m in [1, 2); of 0 e is -inf
    inverses, logs = _inverses(tuple(1 + (j + 0.5) / 32 for j in range(32)))
    index = m.bits(I32) >> (k.mantissa - 5)
    f = m.fma(looked_up(inverses, index).bits(F32), -1.0)
    log_s = f.fma(horner(f, [1.0, *LOG_LOOKED_UP]), e.fma(k.ln2, looked_up(logs, index).bits(F32)))
    inverses, logs = _inverses(tuple(1 - j / 62 for j in range(32)))
    index = s.fma(62.0, k.magic).bits(I32)
    c = looked_up(inverses, index).bits(F32)
    f = (-s).fma(c, -(1.0 - c))  # -0.0 at 0, as the logarithm then is
    rest = (f * f).fma(horner(f, LOG_LOOKED_UP), f + looked_up(logs, index).bits(F32))
    return log_s.at_least(-100.0), s.lift(-0.0), rest
