"""From emitted LLVM to the address of machine code, kept in a disk cache that is never stale and never an error."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from .values import CACHE_LINE, F64, I64, Value, element

Emit = Callable[..., Value | None]
Features = frozenset[str]

_engines: list[llvm.ExecutionEngine] = []  # an engine owns its machine code: kept as long as the process
_lock = threading.Lock()  # LLVM contexts are not thread-safe


def _renew_lock() -> None:
    """In a forked child: the thread that held the lock, if one did, is not there to release it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def module_of(emit: Emit, arity: int, features: Features = frozenset()) -> ir.Module:
    """An LLVM module with one function `void kernel(i64, ...)` whose body `emit(*arguments)` writes;
    `i64 kernel(i64, ...)` where that is annotated to return a Value. It may use what `features` has."""
    returns = getattr(emit, "__annotations__", {}).get("return") == "Value"
    name = "kernel"
    module = ir.Module(name)
    module.features = features
    function = ir.Function(module, ir.FunctionType(I64 if returns else ir.VoidType(), [I64] * arity), name)
    # What a loop spills must not straddle lines, or pages: BCE's gradient took 13 ms with some threads' stacks, not 10.
    function.attributes.alignstack = CACHE_LINE
    function.attributes.add("nounwind")  # llvmlite writes no attributes where there is none of this kind
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    out = emit(*(Value(builder, argument) for argument in function.args))
    if out is None:
        builder.ret_void()
    else:
        builder.ret(out.v)
    return module


def machine(triple: str | None = None, cpu: str | None = None, features: str | None = None) -> llvm.TargetMachine:
    """LLVM's description of a CPU; of this one where nothing is named."""
    if triple is not None:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    else:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(triple or llvm.get_process_triple())
    if cpu is None:
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    # The JIT code model: an engine may place code and constants more than 2 GB apart.
    return target.create_target_machine(cpu=cpu, features=features or "", opt=3, codemodel="jitdefault", jit=True)


_PROBE = """
declare float @llvm.fma.f32(float, float, float)
define float @square(float %x) {
  %y = call float @llvm.fma.f32(float %x, float %x, float %x)
  ret float %y
}
define <16 x i32> @twice(<16 x i32> %x) {
  %y = add <16 x i32> %x, %x
  ret <16 x i32> %y
}
define <16 x bfloat> @halved(<16 x float> %x) {
  %y = fptrunc <16 x float> %x to <16 x bfloat>
  ret <16 x bfloat> %y
}
define <16 x half> @narrowed(<16 x float> %x) {
  %y = fptrunc <16 x float> %x to <16 x half>
  ret <16 x half> %y
}"""


def features_of(target: llvm.TargetMachine) -> Features:
    """What kernels may use beyond what LLVM does well everywhere: "fma" (a CPU without it calls the C library), "avx2",
    "avx512", "bfloat16" (rounds to it in one instruction), "float16" (converts it; without, LLVM calls a library that
    is not there). Read off what LLVM writes for the target."""
    text = target.emit_assembly(_parsed(_PROBE, target))
    avx512 = "%zmm" in text
    found = {
        "fma": "fmaf" not in text,
        "avx2": "%ymm" in text or avx512,
        "avx512": avx512,
        "bfloat16": "vcvtneps2bf16" in text,
        "float16": "truncsfhf2" not in text,
    }
    return frozenset(name for name, there in found.items() if there)


@cache
def host_features() -> Features:
    """What kernels may use on this CPU."""
    with _lock:
        return features_of(machine())


def _parsed(text: str, target: llvm.TargetMachine) -> llvm.ModuleRef:
    parsed = llvm.parse_assembly(text)
    parsed.triple, parsed.data_layout = target.triple, str(target.target_data)
    parsed.verify()
    return parsed


def _spell_out_fma(module: ir.Module) -> None:
    """Fused multiply-adds by other instructions, of float32 in float64: rounded once, but for one tie in 2**29.

    Of float64 by a product and a sum, each rounded.
    """
    for name in [name for name in module.globals if name.startswith("llvm.fma.")]:
        function = module.globals[name]
        function.name, function.linkage = name.removeprefix("llvm."), "internal"
        function.attributes.add("alwaysinline")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        x, y, z = (Value(builder, argument).to(F64) for argument in function.args)
        builder.ret((x * y + z).to(element(function.args[0].type)).v)


def optimised(module: ir.Module, target: llvm.TargetMachine) -> llvm.ModuleRef:
    """`module` through LLVM's -O3 for `target`."""
    if "fma" not in features_of(target):
        _spell_out_fma(module)
    parsed = _parsed(str(module), target)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    # The kernels choose their own vectors and unrolling; LLVM's loop vectoriser only adds compile time.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(parsed, passes)
    return parsed


def assembly(emit: Emit, arity: int, triple: str | None = None, cpu: str | None = None, features: str = "") -> str:
    """Assembly text of an emitted function for any CPU, to read its instructions."""
    target = machine(triple, cpu, features)
    return str(target.emit_assembly(optimised(module_of(emit, arity, features_of(target)), target)))


@cache
def fingerprint() -> str:
    """What compiled code depends on besides its own options: our sources, LLVM, Python's IR printer, the CPU."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    for fact in (llvmlite.__version__, llvm.llvm_version_info, llvm.get_host_cpu_name(), sys.byteorder):
        digest.update(repr(fact).encode())
    digest.update(llvm.get_host_cpu_features().flatten().encode())
    return digest.hexdigest()


def cache_directory() -> Path:
    """FASTLOSS_CACHE_DIR, or the user's cache directory."""
    if chosen := os.environ.get("FASTLOSS_CACHE_DIR"):
        return Path(chosen)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", "~")).expanduser() / "fastloss" / "cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/fastloss").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastloss"


def _read(path: Path) -> bytes | None:
    """The object code of a cache file; None where it is missing, unreadable or not what was written."""
    try:
        content = path.read_bytes()
    except (OSError, RuntimeError):
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Keep `code`, whole or not at all; a directory that refuses is no error: the next process compiles again."""
    with contextlib.suppress(OSError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def cached(key: object, make: Callable[[], bytes]) -> bytes:
    """Machine code from the disk cache, or made and kept there.

    `key` must tell everything that the code depends on (its repr is hashed with the sources of this package), since a
    hit skips `make` altogether. None: no disk cache.
    """
    if key is None:
        return make()
    path = cache_directory() / (hashlib.sha256(f"{fingerprint()}{key!r}".encode()).hexdigest() + ".o")
    code = _read(path)
    if code is None:
        code = make()
        _write(path, code)
    return code


def compile_function(emit: Emit, arity: int, key: object) -> int:
    """Address of the C function `void f(int64_t, ...)` that `emit` writes; `key` as in `cached`."""
    with _lock:
        target = machine()
        code = cached(key, lambda: target.emit_object(optimised(module_of(emit, arity, features_of(target)), target)))
        empty = llvm.parse_assembly("")
        engine = llvm.create_mcjit_compiler(empty, target)
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _engines.append(engine)
        return int(engine.get_function_address("kernel"))


def callable_of(emit: Emit, arity: int, key: object) -> Callable[..., None]:
    """The compiled function as something Python can call (tests, accuracy tables)."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arity)(compile_function(emit, arity, key))


class Variant(ABC):
    """A kernel of the drivers' signature, `void kernel(n, arrays, parameters, sums)`, compiled when first used."""

    @property
    @abstractmethod
    def key(self) -> tuple[object, ...] | None:
        """What tells this kernel from every other, for the disk cache; None keeps it out."""

    @abstractmethod
    def emit(self, n: Value, arrays: Value, parameters: Value, sums: Value) -> None:
        """Write the kernel's body."""

    @cached_property
    def address(self) -> int:
        """Where the machine code lies."""
        return compile_function(self.emit, 4, self.key)
