"""Runs a task's chunks on Numba's threads: the one loop that Numba compiles, on integers and addresses.

The chunks, and the order in which their sums are added, do not depend on the number of threads, so neither does any bit
of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import cfunc, prange, types
from numba.extending import intrinsic

from .values import I64


@intrinsic
def _drive(typingctx, driver, block, chunk):  # type: ignore[no-untyped-def]
    """Call the driver at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        type_ = ir.FunctionType(ir.VoidType(), [I64] * 2)
        address, *rest = arguments
        builder.call(builder.inttoptr(address, type_.as_pointer()), rest)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def _run_parallel(driver, block, chunks):  # type: ignore[no-untyped-def]
    for chunk in prange(chunks):
        _drive(driver, block, chunk)


def _cached(compile_: Callable[[bool], Any]) -> Any:
    """`compile_(cache)` with Numba's disk cache, or without it where that is unwritable or spoilt."""
    try:
        return compile_(True)
    except Exception:  # noqa: BLE001  # a spoilt cache file raises whatever unpickling it raises
        return compile_(False)


@cache
def runner() -> int:
    """Address of the function that calls a driver for every chunk, on Numba's threads: (driver, block, chunks)."""
    signature = types.void(types.int64, types.int64, types.int64)
    compiled = _cached(lambda cache: cfunc(signature, cache=cache, nogil=True, parallel=True)(_run_parallel))
    return int(compiled.address)
