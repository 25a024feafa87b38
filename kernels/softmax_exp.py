"""The exponential inside softmax, relative to a reference, and the logarithm of sums of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from .storage import narrowed
from .values import F32, F64, I16, I32, LANES, Value, full
from .vecmath import FORMATS, LOG2E, horner, log_of_normal, looked_up, power_of_2, split

# feature of a CPU -> how many powers 2**(j / size) its registers hold to be looked up
TABLES = {"avx512": 32, "avx2": 8}
# exp(r) for |r| <= ln(2) / (2 size): 2.6e-8 with 8
EXP_OF_EIGHTH = [1.0, 1.0, 0.5000647306442261, 0.1666686236858368]
# With 32 as (SQUARE_CENTRE + r)**2 / 2 + SQUARE_REST / 2: an addition and a fused multiply-add, not two of these, which
# look-ups in two registers keep waiting on Zen 4: 14.8 cycles for 32 numbers of a sum become 13.7. 5.3e-8
SQUARE_CENTRE, SQUARE_REST = 1.0000146627426147, 0.9999706745147705


def _looked_up_power_of_2(n: Value, size: int, sign: Value | None = None) -> Value:
    """2**(n / size - bias) for int32 of which only the low bits count, as a float32 that has `sign`'s sign bit."""
    k, shift = FORMATS[F32], FORMATS[F32].mantissa - (size.bit_length() - 1)
    # the mantissas, less what the shifted n adds to them
    mantissas = [round((2 ** (j / size) - 1) * 2**k.mantissa) - (j << shift) for j in range(size)]
    return (looked_up(mantissas, n, sign) + (n << shift)).bits(F32)


class ShiftedExp:
    """x -> exp(x - count * LN2) for an integer count; LN2 is ln 2, for float32 as rounded to float32.

    Never wraps: far above it saturates near 2**127 (float64: 2**1023); below 2**-125.5 (2**-1022.5) it is 0, or with
    tables some subnormal number, of -inf 0. NaN stays NaN. The relative error does not grow with count.
    hi + lo is what was subtracted, count * LN2, in float64.
    """

    def __init__(self, count: Value, short: bool = False, capped: bool = True) -> None:
        """short: fewer instructions in float32, and a relative error of 3.2e-7 instead of 1.2e-7.
        capped: False where no argument is far above, or `watched` looks for such: that saves an instruction too."""
        k = self.format = FORMATS[count.elem]
        self.coefficients, self.capped = k.exp_short if short else k.exp, capped
        # Powers of 2 that are looked up in registers, where a CPU can do that: 2**(j / size) for j < size.
        self.size = 1
        if short and count.elem == F32:
            self.size = next((size for feature, size in TABLES.items() if count.may_use(feature)), 1)
            self.coefficients = EXP_OF_EIGHTH if self.size == 8 else self.coefficients
        self.square = self.size == 32  # whether what is multiplied by a power of 2 lies near 2
        bias = k.bias - self.square
        self.floor, self.ceiling = (count - bias) * k.ln2, (count + k.bias) * k.ln2
        self.count, self.magic = count, k.magic + (bias - count) * self.size
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

    def _reduced(self, x: Value, floored: bool = True) -> tuple[Value, Value]:
        """What is left of x beside a multiple of ln 2 / size, and that multiple, as bits."""
        k = self.format
        x = x.at_least(self.floor) if floored else x
        x = x.at_most(self.ceiling) if self.capped else x
        t = x.fma(LOG2E * self.size, self.magic)
        n = t - self.magic
        r = n.fma(-k.ln2 / self.size, x)
        if x.elem == F64:
            r = n.fma(-k.ln2_low, r)
        return r, t.bits(k.integer)

    def _factors(self, r: Value, bits: Value) -> tuple[Value, Value]:
        scale = power_of_2(bits) if self.size == 1 else _looked_up_power_of_2(bits, self.size)
        if not self.square:
            return horner(r, self.coefficients), scale
        centred = r + SQUARE_CENTRE
        return centred.fma(centred, SQUARE_REST), scale

    def factors(self, x: Value, floored: bool = True) -> tuple[Value, Value]:
        """Two factors of the result: a sum takes them by one fma. Not `floored` where no argument is far below."""
        return self._factors(*self._reduced(x, floored))

    def watched(self, x: Value, seen: Value) -> tuple[Value, Value, Value]:
        """`factors`, and the integers `seen` with what `overflowed` must know of x; not with `capped`. One instruction,
        as the ceiling is, but none of those that fused multiply-adds wait for."""
        r, bits = self._reduced(x)
        return *self._factors(r, bits), seen | bits

    def overflowed(self, seen: Value) -> Value:
        """Whether any x was NaN, or so far above that its result means nothing, if it is not infinite."""
        # count and ceiling below, `magic` above: of what is larger some other bit is set
        k = self.format
        legal = k.magic_bits | (2 * (k.bias + 1) * self.size - 1)
        return ((seen & ~legal) != 0).any()

    def __call__(self, x: Value) -> Value:
        p, scale = self.factors(x)
        return p * scale

    def times(self, share: Value) -> Callable[[Value], Value]:
        """x -> exp(x - count * LN2) * share."""
        if not self.square:
            return lambda x: self(x) * share
        # Inside the square: one multiplication less. An odd count gives one of its powers of 2 to the share: the root
        # does not depend then on which power of 2 the reference is.
        odd = (self.count.to_int(I32) & 1).to(F32)
        even = ShiftedExp(self.count - odd, short=True, capped=self.capped)
        size = abs(share) * odd.fma(-0.5, 1.0)
        root, sign = size.call("llvm.sqrt"), share.bits(I32) & -(1 << 31)
        centre, rest = root * SQUARE_CENTRE, size * SQUARE_REST

        def scaled(x: Value) -> Value:
            r, bits = even._reduced(x)
            centred = r.fma(root, centre)
            return centred.fma(centred, rest) * _looked_up_power_of_2(bits, even.size, sign)

        return scaled


class HalfRange:
    """Whether numbers of a half type all lie where `ShiftedExp` needs neither floor nor ceiling. It looks at their bits
    as integers, two numbers in a lane of the compute type: half the work of a floor, and that of another kind.
    """

    MAX_COUNT = 60  # so that the bounds lie on both sides of 0
    WITHIN = 80.0  # of the reference

    def __init__(self, shifted: ShiftedExp, half: str) -> None:
        reference = shifted.hi.to(F32)
        self.usable = abs(shifted.count) <= self.MAX_COUNT
        # positive numbers are ordered as their bits are, negative ones the other way round
        self.highest, self.lowest = (
            narrowed(reference + distance, half).bits(I16) for distance in (self.WITHIN, -self.WITHIN)
        )

    @staticmethod
    def start(b: ir.IRBuilder) -> list[Value]:
        """Of no numbers."""
        return [full(b, I16, 2 * LANES, number) for number in (-(1 << 15), 0)]

    @staticmethod
    def more(state: Sequence[Value], words: Value) -> list[Value]:
        """Of some more."""
        signed, unsigned = state
        return [signed.call("llvm.smax", words), unsigned.call("llvm.umax", words)]

    def left(self, state: Sequence[Value]) -> Value:
        """Whether any was NaN or too far from the reference."""
        signed, unsigned = state
        above = (signed > self.highest) | unsigned.above(self.lowest)
        return above.any() | ~self.usable


def _linear(e: Value, z: Value) -> Value:
    """e * LN2 - z, LN2 as in `ShiftedExp`: where the two cancel, what is left is right to its last bits."""
    k = FORMATS[z.elem]
    low = k.ln2 - k.ln2_short if z.elem == F32 else k.ln2_short_low
    return e.fma(low, e.fma(k.ln2_short, -z))


def scaled_log(s: Value, count: Value, z: Value) -> tuple[Value, Value]:
    """linear, m: linear + log(m) = log(s) + count * LN2 - z, LN2 as in `ShiftedExp`, for positive normal s; NaN for
    others. m lies in [0.75, 1.5).

    The powers of 2 of s and of the reference are one integer, which meets z unrounded: with another reference, where
    exponentials are smaller or larger by a power of 2, not a bit changes, and what cancels leaves no error. In float32,
    to take its part of s in LN2 too adds 1.9e-9 for each power of 2 between the sum and what it is mostly made of.
    """
    e, m = split(s)
    return _linear(e + count, z), (s > 0.0).select(m, float("nan"))


def log_of_parts(e: Value, m: Value, z: Value) -> Value:
    """The same log, of 2**e * m instead of s and count."""
    return _linear(e, z) + log_of_normal(m)
