"""How numbers lie in memory: read as the compute type, written with rounding to nearest even."""

from __future__ import annotations

from llvmlite import ir

from .values import F16, F32, F64, I8, I16, I32, I64, SIZE, Value

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

# name -> LLVM element type in memory
MEMORY: dict[str, ir.Type] = {
    "float16": F16, "bfloat16": I16, "float32": F32, "float64": F64, "bool": I8,
    "int8": I8, "int16": I16, "int32": I32, "int64": I64, "uint8": I8, "uint16": I16, "uint32": I32, "uint64": I64,
}  # fmt: skip
COMPUTE = {"float32": F32, "float64": F64}


def itemsize(storage: str) -> int:
    """Bytes of one element."""
    return SIZE[MEMORY[storage]]


def load(address: Value, storage: str, compute: ir.Type, lanes: int = 1) -> Value:
    """`lanes` elements at `address` as numbers of the compute type, exactly where it is at least as wide."""
    return widened(address.load(MEMORY[storage], lanes), storage, compute)


def load_pair(address: Value, storage: str, compute: ir.Type, lanes: int) -> list[Value]:
    """Twice as many elements as two vectors, in any order: for sums."""
    if storage == "bfloat16":  # two in a word: one instruction for each vector, not two
        words = address.load(I32, lanes, align=itemsize(storage))
        return [(words << 16).bits(F32).to(compute), (words & words.lift(-(1 << 16)).held()).bits(F32).to(compute)]
    return [load(address + k * lanes * itemsize(storage), storage, compute, lanes) for k in range(2)]


def widened(raw: Value, storage: str, compute: ir.Type) -> Value:
    """What was read from memory as numbers of the compute type."""
    if storage == "bfloat16":  # the upper half of a float32
        raw = (raw.zext(I32) << 16).bits(F32)
    elif storage == "float16":  # by way of float32: the one conversion that CPUs have
        raw = raw.to(F32) if raw.may_use("float16") else _from_half(raw.bits(I16))
    return raw.to(compute, unsigned=storage == "bool" or storage.startswith("u"))


def store(address: Value, value: Value, storage: str, stream: bool = False) -> None:
    """Write floats, rounded to nearest even; `stream` as in `Value.store`."""
    address.store(narrowed(value, storage), stream)


def narrowed(value: Value, storage: str) -> Value:
    """Floats as they lie in memory."""
    if storage == "bfloat16":
        value = value.to(F32)
        if value.lanes > 1 and value.may_use("bfloat16"):
            return value.bfloat()
        bits = value.bits(I32)
        odd = (bits >> 16) & 1
        # a NaN must not round up to infinity: keep its sign and upper bits, and make it quiet
        return value.isnan().select((bits >> 16) | 0x40, (bits + odd + 0x7FFF) >> 16).trunc(I16)
    if storage == "float16":  # LLVM has no single instruction from float64 to float16
        value = value.to(F32)
        return value.to(F16) if value.may_use("float16") else _to_half(value).bits(F16)
    return value.to(MEMORY[storage])


# ---- float16 on CPUs that do not convert it

_SHIFT = 13  # bits of float32's mantissa that float16 lacks
_TO_FLOAT = 2.0**112  # between numbers whose exponents have the same bits in the two
_HALF_INF, _INF = 0x7C00, 0x7F800000


def _from_half(raw: Value) -> Value:
    """float16's bits as float32."""
    word = raw.zext(I32)
    magnitude, sign = (word & 0x7FFF) << _SHIFT, (word & 0x8000) << 16
    number = (magnitude.bits(F32) * _TO_FLOAT).bits(I32)
    return ((magnitude < _HALF_INF << _SHIFT).select(number, magnitude | _INF) | sign).bits(F32)


def _to_half(value: Value) -> Value:
    """float32 as float16's bits."""
    word = value.bits(I32)
    sign = (word >> 16) & 0x8000
    magnitude = word & 0x7FFFFFFF
    odd = (magnitude >> _SHIFT) & 1
    normal = (magnitude - (112 << 23) + ((1 << (_SHIFT - 1)) - 1) + odd) >> _SHIFT
    # beside 0.5 a subnormal number of float16 is rounded to its own last place
    half = value.lift(0.5)
    subnormal = (abs(value) + half).bits(I32) - half.bits(I32)
    special = (magnitude > _INF).select((magnitude >> _SHIFT) & 0x1FF | _HALF_INF | 0x200, _HALF_INF)
    number = (magnitude < (127 - 14) << 23).select(subnormal, normal)
    number = (magnitude < (127 + 16) << 23).select(number, special)
    return (number | sign).trunc(I16)
