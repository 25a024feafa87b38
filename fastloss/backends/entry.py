"""Entries of tasks as functions that Python calls: `kernels.entry`'s machine code, made a built-in function of CPython.

Such a function takes 0.04 us to call; ctypes takes 0.6 us, Numba's dispatcher 0.25 and cannot read every array.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..kernels.entry import Entry, address

_FASTCALL = 0x0080  # METH_FASTCALL: PyObject *(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
_SCALAR = 60  # PyArray_Scalar's place in NumPy's table of functions, which only grows


class _MethodDef(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_definitions: list[_MethodDef] = []  # built-in functions point at them and do not keep them


@cache
def _definition() -> int:
    """The address of the definition of entries; threads whose first calls meet make one each."""
    definition = _MethodDef(b"entry", address(), _FASTCALL, None)
    _definitions.append(definition)
    return ctypes.addressof(definition)


@cache
def environment() -> dict[str, int]:
    """The words of a state that tell where Python and NumPy are in this process."""
    api = ctypes.pythonapi
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
    table = pointer(np._core._multiarray_umath._ARRAY_API, None)  # type: ignore[attr-defined]  # as its headers do
    functions = {
        "as_address": api.PyLong_AsVoidPtr,
        "allocate": api.PyMem_RawCalloc,
        "free": api.PyMem_RawFree,
        "retain": api.Py_IncRef,
        "bytes": api.PyBytes_FromStringAndSize,
        "float": api.PyFloat_FromDouble,
        "release": api.PyEval_SaveThread,
        "acquire": api.PyEval_RestoreThread,
    }
    found = {name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in functions.items()}
    scalar = ctypes.c_void_p.from_address(table + _SCALAR * ctypes.sizeof(ctypes.c_void_p)).value or 0
    return found | {"arrays": id(np.ndarray), "none": id(None), "scalar": scalar}


@cache
def memory() -> dict[str, int]:
    """The functions by which drivers come to memory; neither needs the GIL."""
    functions = {"allocate": ctypes.pythonapi.PyMem_RawMalloc, "free": ctypes.pythonapi.PyMem_RawFree}
    return {name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in functions.items()}


def function(entry: Entry, words: Sequence[Any]) -> Callable[..., Any]:
    """A function of as many arrays (or addresses of other libraries' arrays) as the state has operands: it returns
    what `entry.reduction` says, or None where the call must be made the long way.

    `words` follow the entry in the state: places, block, parameters, template, kinds.
    """
    state = np.concatenate([np.array(part, np.int64) for part in (entry, *words)])
    new = ctypes.pythonapi.PyCFunction_NewEx
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    made: Callable[..., Any] = new(_definition(), state, None)  # which keeps the state
    return made
