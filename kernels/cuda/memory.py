"""Reading and writing arrays, 16 bytes at a time where they are aligned; numbers are widened and rounded on the way."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir

from .. import storage as formats
from .. import values
from ..storage import itemsize
from ..values import F32, I8, I16, I32, I64, INT_OF, SIZE, Value
from .device import COMPUTE, DeviceValue, Int, Lane, Lanes, integer

VECTOR_BYTES = 16  # the widest load and store of one thread


def _array(address: Int, count: int, storage: str) -> Any:
    """The simulator's view of memory."""
    dtype = np.dtype("uint16" if storage == "bfloat16" else storage)
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(int(address))
    return np.frombuffer(memoryview(buffer), dtype)


def load(address: Int, storage: str, compute: str) -> Lane:
    """One number."""
    return load_lanes(address, storage, compute, 1)[0]


def load_int(address: Int, storage: str = "int64") -> Int:
    """One integer of any width, as 64 bits."""
    if not isinstance(address, Value):
        return int(_array(address, 1, storage)[0])
    raw = address.load(formats.MEMORY[storage])
    if raw.elem == I64:
        return raw
    return raw._new((raw.b.zext if storage.startswith("u") else raw.b.sext)(raw.v, I64))


def load_lanes(address: Int, storage: str, compute: str, lanes: int) -> Any:
    """Neighbours, in loads as wide as they are together, to which `address` is aligned (16 bytes at most)."""
    if not isinstance(address, Value):
        raw = _array(address, lanes, storage)
        raw = (raw.astype(np.uint32) << 16).view(np.float32) if storage == "bfloat16" else raw
        return raw.astype(compute)
    size = itemsize(storage)
    in_memory, whole = formats.MEMORY[storage], COMPUTE[compute]
    if lanes == 1:
        return Lanes([formats.widened(address.load(in_memory), storage, whole)])
    word = {8: I64, 4: I32}.get(size) or {1: I8, 2: I16}.get(size * lanes) or I32
    per_word = SIZE[word] // size
    width = min(VECTOR_BYTES, size * lanes)
    out = Lanes()
    for at in range(0, size * lanes, width):
        loaded = (address + at).load(word, width // SIZE[word], align=width)
        for k in range(width // SIZE[word]):
            piece = loaded.lane(k)
            for part in range(per_word):
                raw = piece._new(piece.b.lshr(piece.v, piece.lift(8 * size * part).v)) if part else piece
                raw = raw.trunc(values.INT_OF.get(in_memory, in_memory)) if per_word > 1 else raw
                raw = raw.bits(in_memory) if in_memory in INT_OF else raw
                out.append(formats.widened(raw, storage, whole))
    return out


def store(address: Int, value: Lane, storage: str) -> None:
    """One float, rounded to nearest even."""
    store_lanes(address, Lanes([value]) if isinstance(value, Value) else np.array([value]), storage, False)


def store_int(address: Int, n: Int) -> None:
    """One 64-bit integer."""
    if isinstance(address, Value):
        address.store(n if isinstance(n, Value) else integer(address, n))
    else:
        _array(address, 1, "int64")[0] = n


def store_lanes(address: Int, lanes: Any, storage: str, pairs: bool) -> None:
    """Neighbours, in stores as wide as they are together; `pairs`: two halves are rounded by one instruction, which
    sm_80 and newer have."""
    if not isinstance(address, Value):
        _store_simulated(address, lanes, storage)
        return
    size = itemsize(storage)
    if len(lanes) == 1:
        address.store(formats.narrowed(lanes[0], storage))
        return
    words: list[Any] = []
    if size == 2:
        for low, high in zip(lanes[::2], lanes[1::2], strict=True):
            words.append(_pair(low, high, storage, pairs))
        elem: ir.Type = I32
    else:
        words = [formats.narrowed(lane, storage) for lane in lanes]
        elem = formats.MEMORY[storage]
    count = min(VECTOR_BYTES, size * len(lanes)) // SIZE[elem]
    for first in range(0, len(words), count):
        vector: Value = DeviceValue(address.b, ir.Constant(values.vector(elem, count), ir.Undefined))
        for k in range(count):
            vector = vector.with_lane(k, words[first + k])
        (address + first * SIZE[elem]).store(vector, align=count * SIZE[elem])


def _pair(low: Value, high: Value, storage: str, pairs: bool) -> Value:
    """Two halves in a word."""
    if not pairs:
        a, b = (formats.narrowed(x, storage).bits(I16).zext(I32) for x in (low, high))
        return a | (b << 16)
    low, high = low.to(F32), high.to(F32)
    name = "bf16x2" if storage == "bfloat16" else "f16x2"
    signature = ir.FunctionType(I32, [F32, F32])
    convert = ir.InlineAsm(signature, f"cvt.rn.{name}.f32 $0, $1, $2;", "=r,f,f")
    return low._new(low.b.call(convert, [high.v, low.v]))


def _store_simulated(address: int, lanes: Any, storage: str) -> None:
    with np.errstate(all="ignore"):
        if storage != "bfloat16":
            _array(address, len(lanes), storage)[:] = lanes.astype(storage)
            return
        raw = lanes.astype(np.float32).view(np.uint32)
        rounded = (raw + (((raw >> 16) & 1) + 0x7FFF)) >> 16
        _array(address, len(lanes), storage)[:] = np.where(np.isnan(lanes), (raw >> 16) | 0x40, rounded)
