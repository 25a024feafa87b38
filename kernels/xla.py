"""What XLA calls: a function of its foreign function interface that runs a task's entry on XLA's buffers.

`XLA_FFI_Error *handler(XLA_FFI_CallFrame *)`. A call names its site by a number, under which a table has what is known
of it: the entry of its task, and which buffers are the operands. An entry takes Python's objects; what it reads of an
array, the type and where the data lies, is put together here. Calls of unknown sites, and those that an entry hands
back (numbers outside a loss's domain), go to a function of Python's.

The structures are those of xla/ffi/api/c_api.h, as far as they are read here.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from typing import NamedTuple

from llvmlite import ir

from . import compiler, entry
from .entry import OBJECT, Entry
from .values import I1, I32, I64, Value, full, loop, when


class Extension(ctypes.Structure):
    """XLA_FFI_Extension_Base."""

    _fields_ = (("struct_size", c_size_t), ("type", c_int), ("next", c_void_p))


class Args(ctypes.Structure):
    """XLA_FFI_Args."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("args", c_void_p),
    )


class Rets(ctypes.Structure):
    """XLA_FFI_Rets."""

    _fields_ = (*Args._fields_[:4], ("rets", c_void_p))


class Attrs(ctypes.Structure):
    """XLA_FFI_Attrs."""

    _fields_ = (*Args._fields_[:4], ("names", c_void_p), ("attrs", c_void_p))


class CallFrame(ctypes.Structure):
    """XLA_FFI_CallFrame."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("api", c_void_p),
        ("ctx", c_void_p),
        ("stage", c_int),
        ("args", Args),
        ("rets", Rets),
        ("attrs", Attrs),
    )


class Buffer(ctypes.Structure):
    """XLA_FFI_Buffer."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", ctypes.POINTER(c_int64)),
    )


class Scalar(ctypes.Structure):
    """XLA_FFI_Scalar."""

    _fields_ = (("dtype", c_int), ("value", c_void_p))


class ByteSpan(ctypes.Structure):
    """XLA_FFI_ByteSpan."""

    _fields_ = (("ptr", c_void_p), ("len", c_size_t))


class ApiVersion(ctypes.Structure):
    """XLA_FFI_Api_Version."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("major_version", c_int),
        ("minor_version", c_int),
    )


class Metadata(ctypes.Structure):
    """XLA_FFI_Metadata."""

    _fields_ = (("struct_size", c_size_t), ("api_version", ApiVersion), ("traits", c_uint32))


class MetadataExtension(ctypes.Structure):
    """XLA_FFI_Metadata_Extension."""

    _fields_ = (("extension_base", Extension), ("metadata", c_void_p))


class Api(ctypes.Structure):
    """XLA_FFI_Api."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("api_version", ApiVersion),
        ("internal_api", c_void_p),
        ("XLA_FFI_Error_Create", c_void_p),
    )


class ErrorCreateArgs(ctypes.Structure):
    """XLA_FFI_Error_Create_Args."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("message", c_char_p),
        ("errc", c_int),
    )


_STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    Extension, Args, Rets, Attrs, CallFrame, Buffer, Scalar, ByteSpan, ApiVersion, Metadata, MetadataExtension, Api,
    ErrorCreateArgs,
)  # fmt: skip
_METADATA = 1  # XLA_FFI_Extension_Metadata


def api_version(header: str) -> tuple[int, int] | None:
    """Major and minor version of the interface that a c_api.h declares; None where a structure begins otherwise."""
    text = re.sub(r"//.*", "", header)
    for structure in _STRUCTURES:
        declared = re.search(rf"struct {(structure.__doc__ or '').rstrip('.')} {{(.*?)}}", text, re.DOTALL)
        if declared is None:
            return None
        members = [re.findall(r"\w+", member)[-1] for member in declared[1].split(";") if member.strip()]
        expected = [field[0] for field in structure._fields_]
        if members[: len(expected)] != expected:
            return None
    numbers = [re.search(rf"#define XLA_FFI_API_{name} (\d+)", text) for name in ("MAJOR", "MINOR")]
    major, minor = (int(number[1]) if number else -1 for number in numbers)
    return (major, minor) if major == 0 and minor >= 0 else None


class Environment(NamedTuple):
    """What the handler knows of its process."""

    table: int  # address of the sites: how many slots less one, then each slot's number and site's address
    python: int  # the function for all other calls
    entry: int  # of tasks
    major: int  # version of the interface
    minor: int
    advise: int  # C's madvise; 0 where there is none


class Known(NamedTuple):
    """The first words of what is known of a site; the operands' places follow."""

    state: int  # a NumPy array, as an object: the entry's
    operands: int  # how many
    batch: int  # calls of the entry, one after the other
    out: int  # the result that takes the number, -1: none
    itemsize: int  # of it


class Operand(NamedTuple):
    """A buffer that the entry takes."""

    result: int  # 1 for one of the results, 0 for one of the arguments
    number: int
    step: int  # bytes to the next call's of a batch
    fresh: int  # bytes of memory, whole calls of a batch together, that large pages are asked for; 0: none


PAGE, HUGEPAGE = 4096, 14  # bytes; MADV_HUGEPAGE of Linux
PROBES = 8  # slots in which a site may be
MAX_OPERANDS = 8
_TYPE = 1  # what stands for the type of arrays
_NOTHING = 0x7FF8_F001_F001_F001  # what an entry hands back instead of a number: a NaN that no arithmetic makes
_OBJECT_WORDS = OBJECT // 8 + 1


def _field(words: Value, names: tuple[str, ...], name: str) -> Value:
    return (words + 8 * names.index(name)).load(I64)


def _emit_handler(frame: Value, environment: Value) -> Value:
    b = frame.b
    zero = Value(b, I64(0))
    # on the stack: the objects, and the pointers to them that the entry takes
    room = b.alloca(ir.ArrayType(I64, (_OBJECT_WORDS + 1) * MAX_OPERANDS))
    objects = Value(b, b.ptrtoint(room, I64))
    pointers = objects + 8 * _OBJECT_WORDS * MAX_OPERANDS
    extension = (frame + CallFrame.extension_start.offset).load(I64)
    args, rets, attrs = (frame + getattr(CallFrame, name).offset for name in ("args", "rets", "attrs"))
    arguments = (args + Args.args.offset).load(I64)
    results = (rets + Rets.rets.offset).load(I64)

    def describe() -> list[Value]:
        metadata = (extension + MetadataExtension.metadata.offset).load(I64)
        version = metadata + Metadata.api_version.offset
        for field, name in ((ApiVersion.major_version, "major"), (ApiVersion.minor_version, "minor")):
            number = _field(environment, Environment._fields, name)
            (version + field.offset).store(number.trunc(I32))
        (metadata + Metadata.traits.offset).store(full(b, I32, 1, 0))
        return [zero]

    def find() -> Value:
        # attributes are sorted by name: description, site
        scalar = (attrs + Attrs.attrs.offset).load(I64) + 8
        number = (scalar.load(I64) + Scalar.value.offset).load(I64).load(I64)
        table = _field(environment, Environment._fields, "table")
        mask = table.load(I64)

        def probe(i: Value, found: Value) -> list[Value]:
            slot = table + 8 + 16 * ((number + i) & mask)
            return [(slot.load(I64) == number).select((slot + 8).load(I64), found)]

        return loop(zero, zero + PROBES, 1, [zero], probe)[1][0]

    def advise(data: Value, nbytes: Value) -> None:
        start = (data + (PAGE - 1)) & -PAGE
        length = data + nbytes - start
        entry.call(_field(environment, Environment._fields, "advise"), [start, length, zero + HUGEPAGE], I32)

    def run(site: Value) -> list[Value]:
        state, operands, batch, out, itemsize = (_field(site, Known._fields, name) for name in Known._fields)
        places = site + 8 * len(Known._fields)

        def once(i: Value, good: Value) -> list[Value]:
            def place(k: Value) -> None:
                at = places + 8 * len(Operand._fields) * k
                result, number, step, fresh = (_field(at, Operand._fields, name) for name in Operand._fields)
                buffer = ((result == 1).select(results, arguments) + 8 * number).load(I64)
                data = (buffer + Buffer.data.offset).load(I64)
                when((fresh != 0) & (i == 0), lambda: advise(data, fresh))
                made = objects + 8 * _OBJECT_WORDS * k
                (made + (OBJECT - 8)).store(full(b, I64, 1, _TYPE))
                (made + OBJECT).store(data + step * i)
                (pointers + 8 * k).store(made)

            loop(zero, operands, 1, [], place)
            found = entry.call(_field(environment, Environment._fields, "entry"), [state, pointers, operands], I64)

            def write() -> None:
                buffer = (results + 8 * out).load(I64)
                at = (buffer + Buffer.data.offset).load(I64) + itemsize * i
                when(itemsize == 8, lambda: at.store(found), lambda: at.store(found.trunc(I32)))

            when((found != _NOTHING) & (out >= 0), write)
            return [good & (found != _NOTHING)]

        return loop(zero, batch, 1, [full(b, I1, 1, 1)], once)[1]

    def execute() -> list[Value]:
        site = find()
        (done,) = when(site != 0, lambda: run(site), lambda: [full(b, I1, 1, 0)])
        python = _field(environment, Environment._fields, "python")
        return when(done, lambda: [zero], lambda: [entry.call(python, [frame], I64)])

    def of_metadata() -> list[Value]:
        return [(extension + Extension.type.offset).load(I32) == _METADATA]

    (asked,) = when(extension != 0, of_metadata, lambda: [full(b, I1, 1, 0)])
    return when(asked, describe, execute)[0]


def _emit_load(data: Value, dtype: Value, base: Value) -> Value:
    """In place of PyArray_Scalar: the number's bits."""
    return data.load(I64)


def _emit_nothing(object: Value) -> None:
    """In place of Py_IncRef."""


@cache
def replacements() -> dict[str, int]:
    """An entry's fields where it takes and gives no objects of Python's, and never holds its lock."""
    return {
        "arrays": _TYPE,
        "none": _NOTHING,
        "scalar": compiler.compile_function(_emit_load, 3, "xla-load"),
        "retain": compiler.compile_function(_emit_nothing, 1, "xla-nothing"),
        "shared": 0,
    }


def handler(environment: int) -> int:
    """Address of the function that XLA calls, for the process whose `Environment` lies at an address."""
    general = compiler.compile_function(_emit_handler, 2, ("xla-handler", OBJECT, Entry._fields))

    def with_environment(frame: Value) -> Value:
        b = frame.b
        return entry.call(Value(b, I64(general)), [frame, Value(b, I64(environment))], I64)

    return compiler.compile_function(with_environment, 1, None)  # of this process only
