"""What kernels are written with: instructions on a GPU, plain Python in Numba's CUDA simulator, from one source.

`emitted` functions compute with values. On a GPU these are `DeviceValue`s, which write LLVM as they are computed
with; in the simulator they are numbers, and memory is read at its address. Several values of one thread are `Lanes` on
a GPU (a register each) and a NumPy array in the simulator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda as _cuda
from numba.cuda import types
from numba.cuda.core import config

from .. import storage, values, vecmath
from ..values import F32, F64, I1, I8, I32, I64, INT_OF, SIZE, Value, declare
from ..vecmath import where

SIMULATED = bool(config.ENABLE_CUDASIM)
WARP = 32
_ALIGNMENT = 16  # of shared memory
COMPUTE = storage.COMPUTE

Lane = Any  # a DeviceValue, a number or a NumPy array
Int = Any

_GLOBAL, _SHARED = 1, 3  # address spaces


class DeviceValue(Value):
    """A scalar on a GPU, in the LLVM 7 dialect that NVVM takes for every architecture up to sm_90."""

    __slots__ = ()
    space = _GLOBAL

    def may_use(self, feature: str) -> bool:
        return feature == "float16"  # which every GPU converts

    def __neg__(self) -> Value:
        return self._new(self.b.fsub(self.lift(-0.0).v, self.v)) if self.is_float else super().__neg__()

    def __abs__(self) -> Value:
        integer = INT_OF[self.elem]
        return (self.bits(integer) & ((1 << (integer.width - 1)) - 1)).bits(self.elem)

    def __floordiv__(self, other: Any) -> Value:
        """Of integers that are not negative."""
        return self._new(self.b.udiv(self.v, self.lift(other).v))

    def __mod__(self, other: Any) -> Value:
        """Of integers that are not negative."""
        return self._new(self.b.urem(self.v, self.lift(other).v))

    def wide(self) -> Value:
        """float32 stays float32: most GPUs have next to no float64."""
        return self

    def reciprocal(self) -> Value:
        """Of float32 by rcp.approx and a step of Newton's: a division has a slow path for what is not normal."""
        if self.elem == F64:
            return super().reciprocal()
        r = _ptx(self, "rcp.approx.ftz.f32")
        return r.fma((-self).fma(r, 1.0), r)

    def pointer(self, type_: ir.Type) -> Any:
        """Me, an address, as a pointer."""
        return self.b.inttoptr(self.v, ir.PointerType(type_, self.space))

    def load(self, elem: ir.Type, lanes: int = 1, align: int | None = None) -> Value:
        type_ = values.vector(elem, lanes)
        raw = self.b.load(self.pointer(type_), align=align or SIZE[elem], typ=type_)
        return DeviceValue(self.b, raw)

    def store(self, value: Value, stream: bool = False, align: int | None = None) -> None:
        self.b.store(value.v, self.pointer(value.type), align=align or SIZE[value.elem])


def _ptx(x: Value, instruction: str, *others: Any) -> Value:
    """One PTX instruction on operands and a result of the type of x."""
    letter = {F32: "f", F64: "d"}[x.type]
    operands = [x.v, *(x.lift(other).v for other in others)]
    places = ", ".join(f"${k}" for k in range(len(operands) + 1))
    signature = ir.FunctionType(x.type, [x.type] * len(operands))
    constraints = ",".join([f"={letter}"] + [letter] * len(operands))
    return x._new(x.b.call(ir.InlineAsm(signature, f"{instruction} {places};", constraints), operands))


class _SharedAddress(DeviceValue):
    """An address of shared memory, 32 bits: whatever is added to it, `pointer` keeps to that address space."""

    __slots__ = ()
    space = _SHARED

    def lift(self, other: Any) -> Value:
        return super().lift(short(other))


class Lanes(list[Any]):
    """Several values of one thread."""


# ---- emitted functions


def emitted(function: Callable[..., Any]) -> Any:
    """A function over values, inlined into the kernels that call it.

    Its arguments are scalars and tuples: a tuple of floats arrives as lanes, a tuple of integers as a tuple. It
    returns a value, lanes, or a Python tuple of these; None for nothing. All integers have 64 bits.
    """
    return _simulated(function) if SIMULATED else _intrinsic(function)


def _simulated(function: Callable[..., Any]) -> Callable[..., Any]:
    def lanes_in(argument: Any) -> Any:
        if not isinstance(argument, tuple) or not argument:
            return argument
        return np.array(argument) if isinstance(argument[0], np.floating) else tuple(map(lanes_in, argument))

    def plain(result: Any) -> Any:
        if isinstance(result, np.ndarray):
            return tuple(result) if result.ndim else result[()]
        return tuple(map(plain, result)) if isinstance(result, Lanes | tuple) else result

    def call(*arguments: Any) -> Any:
        with np.errstate(all="ignore"):
            return plain(function(*map(lanes_in, arguments)))

    return call


def _intrinsic(function: Callable[..., Any]) -> Any:
    from numba.cuda import cgutils
    from numba.cuda.descriptor import cuda_target
    from numba.cuda.extending import intrinsic

    def value_in(builder: ir.IRBuilder, kind: Any, argument: Any) -> Any:
        if isinstance(kind, types.BaseTuple):
            parts = [value_in(builder, part, builder.extract_value(argument, k)) for k, part in enumerate(kind)]
            floats = bool(parts) and isinstance(parts[0], Value) and parts[0].is_float
            return Lanes(parts) if floats else tuple(parts)
        value = DeviceValue(builder, argument)
        if value.is_float or value.type in (I1, I64):
            return value
        return value._new((builder.sext if kind.signed else builder.zext)(argument, I64))

    def numba_type(result: Any) -> Any:
        if isinstance(result, Lanes):
            return types.UniTuple(numba_type(result[0]), len(result))
        if isinstance(result, tuple):
            return types.Tuple([numba_type(part) for part in result])
        names = {F32: types.float32, F64: types.float64, I1: types.boolean, I64: types.int64}
        return types.void if result is None else names[result.type]

    def packed(context: Any, builder: ir.IRBuilder, result: Any) -> Any:
        if result is None:
            return context.get_dummy_value()
        if not isinstance(result, Lanes | tuple):
            return result.v
        parts = [packed(context, builder, part) for part in result]
        alike = isinstance(numba_type(result), types.UniTuple)
        return (cgutils.pack_array if alike else cgutils.pack_struct)(builder, parts)

    def typed(*kinds: Any) -> Any:
        """The signature for these argument types, found by writing the instructions once to nowhere."""
        kinds = tuple(types.int64 if isinstance(kind, types.IntegerLiteral) else kind for kind in kinds)
        operands = [cuda_target.target_context.get_value_type(kind) for kind in kinds]
        nowhere = ir.Function(ir.Module("nowhere"), ir.FunctionType(ir.VoidType(), operands), "nowhere")
        builder = ir.IRBuilder(nowhere.append_basic_block())

        def run(builder: ir.IRBuilder, arguments: Sequence[Any]) -> Any:
            return function(*(value_in(builder, kind, v) for kind, v in zip(kinds, arguments, strict=True)))

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[Any]) -> Any:
            return packed(context, builder, run(builder, arguments))

        return numba_type(run(builder, nowhere.args))(*kinds), generate

    return intrinsic(_OF_ARITY[len(inspect.signature(function).parameters)](typed))


# Numba reads the number of arguments off a function, and has no place for *args.
_OF_ARITY: dict[int, Callable[[Any], Any]] = {
    1: lambda f: lambda context, a: f(a),
    2: lambda f: lambda context, a, b: f(a, b),
    3: lambda f: lambda context, a, b, c: f(a, b, c),
    4: lambda f: lambda context, a, b, c, d: f(a, b, c, d),
    5: lambda f: lambda context, a, b, c, d, e: f(a, b, c, d, e),
    6: lambda f: lambda context, a, b, c, d, e, g: f(a, b, c, d, e, g),
    7: lambda f: lambda context, a, b, c, d, e, g, h: f(a, b, c, d, e, g, h),
}


# ---- values


def each(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of every lane; scalars go to all of them. A tuple of results becomes a tuple of lanes."""
    if not any(isinstance(argument, Lanes) for argument in arguments):
        return function(*arguments)
    count = next(len(argument) for argument in arguments if isinstance(argument, Lanes))
    rows = [
        function(*(argument[k] if isinstance(argument, Lanes) else argument for argument in arguments))
        for k in range(count)
    ]
    return tuple(Lanes(column) for column in zip(*rows, strict=True)) if isinstance(rows[0], tuple) else Lanes(rows)


def lanes_of(parts: Iterable[Any]) -> Any:
    """Lanes of these values."""
    parts = list(parts)
    return Lanes(parts) if isinstance(parts[0], Value) else np.array(parts)


def fold(function: Callable[[Any, Any], Any], lanes: Any) -> Any:
    """All lanes combined pairwise, in a fixed order, into one value."""
    parts = list(lanes)
    while len(parts) > 1:
        pairs = [function(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(parts) // 2 * 2 :]
    return parts[0]


def full(like: Any, compute: str, number: float, count: int = 0) -> Any:
    """`number` in a scalar, or in `count` lanes; `like` is any value of the function."""
    if isinstance(like, Value):
        one = DeviceValue(like.b, values.constant(COMPUTE[compute], number))
        return Lanes([one] * count) if count else one
    return np.full(count, number, compute) if count else np.dtype(compute).type(number)


def integer(like: Any, number: int) -> Int:
    """A 64-bit integer beside the value `like`."""
    return DeviceValue(like.b, values.constant(I64, number)) if isinstance(like, Value) else number


def number(bits: Int, compute: str) -> Lane:
    """A float whose bits were passed as an integer: a kernel's arguments are all integers."""
    if isinstance(bits, Value):
        return bits.trunc(I32).bits(F32) if compute == "float32" else bits.bits(F64)
    if compute == "float32":
        return np.uint32(bits & 0xFFFFFFFF).view(np.float32)
    return np.uint64(bits & 0xFFFFFFFFFFFFFFFF).view(np.float64)


def bits(value: float, compute: str) -> int:
    """The integer that `number` makes `value` of."""
    return int(np.dtype(compute).type(value).view("i4" if compute == "float32" else "i8"))


def to_float(n: Int, compute: str) -> Lane:
    """An integer, rounded."""
    return n.to(COMPUTE[compute]) if isinstance(n, Value) else np.dtype(compute).type(n)


def to_int(x: Lane) -> Int:
    """A float without its fraction."""
    return x.to_int(I64) if isinstance(x, Value) else int(x)


def convert(x: Lane, compute: str) -> Lane:
    """A float as one of another type."""
    return x.to(COMPUTE[compute]) if isinstance(x, Value) else x.astype(compute)


def both(a: Any, b: Any) -> Any:
    """a and b, which are conditions."""
    return a & b


def below(n: Int, bound: Int) -> Any:
    """0 <= n < bound."""
    return n.below(bound) if isinstance(n, Value) else 0 <= n < bound


def divided(n: Int, by: Int, long: bool) -> tuple[Int, Int]:
    """Quotient and remainder; in 32 bits, a fifth of the instructions, unless `long`."""
    if not isinstance(n, Value) or long:
        return n // by, n % by
    low, small = n.trunc(I32), n.lift(by).trunc(I32)
    quotient = low._new(low.b.udiv(low.v, small.v))
    return quotient.zext(I64), (low - quotient * small).zext(I64)


def short(n: Int) -> Int:
    """An integer that is known to be small, in 32 bits: a GPU's integers have no more, 64 take several instructions."""
    return n.trunc(I32) if isinstance(n, Value) and n.type == I64 else n


def smaller(a: Int, b: Int) -> Int:
    """The smaller of two integers."""
    return where(a < b, a, b)


def larger(a: Lane, b: Lane) -> Lane:
    """The larger of two floats, a NaN left out."""
    if isinstance(a, Value):
        return _ptx(a, "max.f32" if a.elem == F32 else "max.f64", b)
    return np.fmax(a, b)


def fma(x: Lane, y: Any, z: Any) -> Lane:
    """x * y + z rounded once on a GPU."""
    return x.fma(y, z) if isinstance(x, Value) else x * y + z


def isfinite(x: Lane) -> Any:
    return abs(x) < float("inf")


def exp_of_negative(x: Lane, exact: bool = True) -> Lane:
    """exp(x) for x <= 0 (-inf gives 0): of float32 by one ex2.approx, within 2**-22 relative.

    `exact` corrects the rounding of x * log2(e), which would add up to |x| * 2**-24.
    """
    if not isinstance(x, Value):
        return np.exp(x)
    if x.elem == F64:
        return vecmath.exp(x)
    t = x * vecmath.LOG2E
    power = _ptx(t, "ex2.approx.ftz.f32")
    if not exact:
        return power
    lost = x.fma(_LOG2E_LOW, x.fma(vecmath.LOG2E, -t))
    return where(power == 0.0, 0.0, power.fma(lost * _LN2, power))  # below 2**-126 `lost` may be inf - inf


_LN2 = 0.6931471805599453
_LOG2E_LOW = 1.925963033500911e-08  # what log2(e) rounded to float32 lacks


def when(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any] | None = None) -> list[Any]:
    """`values.when` for conditions that the simulator knows."""
    if isinstance(condition, Value):
        return values.when(condition, then, otherwise)
    chosen = then if condition else otherwise
    return list((chosen() if chosen else None) or [])


def loop(start: Int, stop: Int, step: int, state: Sequence[Any], body: Callable[..., Any]) -> tuple[Int, list[Any]]:
    """`values.loop` for bounds that the simulator knows."""
    if isinstance(stop, Value):
        return values.loop(start, stop, step, state, body)
    state = list(state)
    while start + step <= stop:
        state = list(body(start, *state) or [])
        start += step
    return start, state


# ---- threads


class _Simulator:
    """`numba.cuda` as the thread that runs sees it, whichever module a function of the kernel stands in."""

    def __getattr__(self, name: str) -> Any:
        if name in ("threadIdx", "blockIdx"):
            return getattr(_current(), name)
        from numba.cuda.simulator.kernel import _get_kernel_context

        return getattr(_get_kernel_context(), name)


cuda: Any = _Simulator() if SIMULATED else _cuda


def _current() -> Any:
    """The simulator's thread that runs."""
    from .simulator import current

    return current()


def shared(like: Any, name: str, nbytes: int) -> Any:
    """The address of shared memory of this name, aligned to 16 bytes: the same in every function of a kernel."""
    if not isinstance(like, Value):
        kept = _current().block.memory
        if name not in kept:
            kept[name] = np.full(nbytes + _ALIGNMENT, 0xFF, np.uint8)
        return -(-kept[name].ctypes.data // _ALIGNMENT) * _ALIGNMENT
    module = like.b.module
    type_ = ir.ArrayType(I8, nbytes)
    if name not in module.globals:
        place = ir.GlobalVariable(module, type_, name, addrspace=_SHARED)
        place.linkage, place.align = "internal", _ALIGNMENT
        place.initializer = ir.Constant(type_, ir.Undefined)
    return _SharedAddress(like.b, like.b.ptrtoint(module.globals[name], I32))


def _register(like: Any, name: str, simulated: str) -> Int:
    if not isinstance(like, Value):
        return int(getattr(cuda, simulated).x)
    read = declare(like.b.module, f"llvm.nvvm.read.ptx.sreg.{name}.x", ir.FunctionType(I32, []))
    return DeviceValue(like.b, like.b.zext(like.b.call(read, []), I64))


def thread_index(like: Any) -> Int:
    """The number of this thread in its block."""
    return _register(like, "tid", "threadIdx")


def block_index(like: Any) -> Int:
    """The number of this thread's block."""
    return _register(like, "ctaid", "blockIdx")


def block_count(like: Any) -> Int:
    """How many blocks the kernel was launched with."""
    return _register(like, "nctaid", "gridDim")


def barrier(like: Any) -> None:
    """Waits for all threads of the block."""
    if not isinstance(like, Value):
        _current().wait("block")
        return
    like.b.call(declare(like.b.module, "llvm.nvvm.barrier0", ir.FunctionType(ir.VoidType(), [])), [])


def exchange(value: Any, mask: int) -> Any:
    """The value of the thread of this warp whose number differs from mine in the bits of `mask`."""
    if not isinstance(value, Value):
        return _current().exchange(value, mask)
    if value.type == F32:
        return exchange(value.bits(I32), mask).bits(F32)
    if value.type == F64:
        return exchange(value.bits(I64), mask).bits(F64)
    if value.type == I64:
        low, high = (exchange(part.trunc(I32), mask).zext(I64) for part in (value, value >> 32))
        return low | (high << 32)
    shuffle = declare(
        value.b.module, "llvm.nvvm.shfl.sync.bfly.i32", ir.FunctionType(I32, [I32, I32, I32, I32])
    )
    return value._new(value.b.call(shuffle, [I32(-1), value.v, I32(mask), I32(WARP - 1)]))


def exchange_all(parts: Sequence[Any], mask: int) -> list[Any]:
    """`exchange` of several values."""
    if isinstance(parts[0], Value):
        return [exchange(value, mask) for value in parts]
    return list(_current().exchange(list(parts), mask))
