"""The exponential inside softmax, relative to a reference, and the logarithm of sums of it."""

from __future__ import annotations

from .values import F32, F64, Value
from .vecmath import FORMATS, LOG2E, horner, looked_up, power_of_2, split

# feature of a CPU -> how many powers 2**(j / size) its registers hold to be looked up, and exp(r) for
# |r| <= ln(2) / (2 size): 5.4e-8, 2.6e-8
EXP_TABLES = {
    "avx512": (32, [1.0, 1.0000146627426147, 0.4999999403953552]),
    "avx2": (8, [1.0, 1.0, 0.5000647306442261, 0.1666686236858368]),
}


def _looked_up_power_of_2(n: Value, size: int) -> Value:
    """2**(n / size - bias) for int32 of which only the low bits count, as a float32."""
    k, shift = FORMATS[F32], FORMATS[F32].mantissa - (size.bit_length() - 1)
    # the mantissas, less what the shifted n adds to them
    mantissas = [round((2 ** (j / size) - 1) * 2**k.mantissa) - (j << shift) for j in range(size)]
    return (looked_up(mantissas, n) + (n << shift)).bits(F32)


class ShiftedExp:
    """x -> exp(x - count * LN2) for an integer count; LN2 is ln 2, for float32 as rounded to float32.

    Never wraps: far above it saturates near 2**127 (float64: 2**1023); below 2**-126.5 (2**-1022.5) it is 0, or with
    tables some subnormal number, of -inf 0. NaN stays NaN. The relative error does not grow with count.
    hi + lo is what was subtracted, count * LN2, in float64.
    """

    def __init__(self, count: Value, short: bool = False, capped: bool = True) -> None:
        """short: fewer instructions in float32, and a relative error of 2.7e-7 instead of 1.2e-7.
        capped: False where no argument is far above, or `watched` looks for such: that saves an instruction too."""
        k = self.format = FORMATS[count.elem]
        self.coefficients, self.capped = k.exp_short if short else k.exp, capped
        self.floor, self.ceiling = ((count + n) * k.ln2 for n in (-k.bias, k.bias))
        # Powers of 2 that are looked up in registers, where a CPU can do that: 2**(j / size) for j < size.
        self.size = 1
        if short and count.elem == F32:
            self.size, self.coefficients = next(
                (table for feature, table in EXP_TABLES.items() if count.may_use(feature)), (1, self.coefficients)
            )
        self.count, self.magic = count, k.magic + (k.bias - count) * self.size
        wide = count.to(F64)
        self.hi = wide * k.ln2
        # float32: 22 bits times 24 are exact
        self.lo = wide.lift(0.0) if count.elem == F32 else wide.fma(k.ln2_low, wide.fma(k.ln2, -self.hi))

    @staticmethod
    def suits(maximum: Value) -> Value:
        """Whether `count_for` gives a count that makes exp(maximum) about 1."""
        k = FORMATS[maximum.elem]
        return abs(maximum) < k.max_count * k.ln2

    @staticmethod
    def count_for(maximum: Value) -> Value:
        """The count that makes exp(maximum) about 1; some legal count for NaN and for what is too large."""
        k = FORMATS[maximum.elem]
        bound = k.max_count * k.ln2
        m = (maximum > -bound).select(maximum, -bound).at_most(bound)
        return m.fma(LOG2E, k.magic) - k.magic

    def _parts(self, x: Value) -> tuple[Value, Value, Value]:
        """Two factors of the result, and the bits of x in units of ln 2 / size."""
        k = self.format
        x = x.at_least(self.floor)
        x = x.at_most(self.ceiling) if self.capped else x
        t = x.fma(LOG2E * self.size, self.magic)
        n = t - self.magic
        r = n.fma(-k.ln2 / self.size, x)
        if x.elem == F64:
            r = n.fma(-k.ln2_low, r)
        bits = t.bits(k.integer)
        scale = power_of_2(bits) if self.size == 1 else _looked_up_power_of_2(bits, self.size)
        return horner(r, self.coefficients), scale, bits

    def factors(self, x: Value) -> tuple[Value, Value]:
        """Two factors of the result: a sum takes them by one fma."""
        return self._parts(x)[:2]

    def watched(self, x: Value, seen: Value) -> tuple[Value, Value, Value]:
        """`factors`, and the integers `seen` with what `overflowed` must know of x; not with `capped`. One instruction,
        as the ceiling is, but none of those that fused multiply-adds wait for."""
        p, scale, bits = self._parts(x)
        return p, scale, seen | bits

    def overflowed(self, seen: Value) -> Value:
        """Whether any x was NaN, or so far above that its result means nothing."""
        # count and ceiling below, `magic` above: of what is larger some other bit is set
        k = self.format
        legal = k.magic_bits | (2 * (k.bias + 1) * self.size - 1)
        return ((seen & ~legal) != 0).any()

    def __call__(self, x: Value) -> Value:
        p, scale = self.factors(x)
        return p * scale


def scaled_log(s: Value, count: Value, z: Value) -> tuple[Value, Value]:
    """linear, m: linear + log(m) = log(s) + count * LN2 - z, LN2 as in `ShiftedExp`, for positive normal float32 s; NaN
    for others. m lies in [0.75, 1.5).

    The powers of 2 of s and of the reference are one integer, which meets z unrounded: with another reference, where
    exponentials are smaller or larger by a power of 2, not a bit changes. To take its part of s in LN2 too adds 1.9e-9
    for each power of 2 between the sum and what it is mostly made of.
    """
    k = FORMATS[F32]
    e, m = split(s)
    e = e + count
    return e.fma(k.ln2 - k.ln2_short, e.fma(k.ln2_short, -z)), (s > 0.0).select(m, float("nan"))
