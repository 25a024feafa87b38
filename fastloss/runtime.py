"""Threads, forks, caches and versions: where and how kernels run in this process."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

_TBB_LIBRARIES = ("libtbb.so.12", "libtbb.12.dylib", "tbb12.dll")
_workqueue_lock = threading.Lock()
_parallel_parent: str | None = None  # the threading layer that a parent had started before it forked us


@cache
def preload_tbb() -> bool:
    """Load the tbb wheel's library, which Numba looks for only on the system's own path; whether it is loaded."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
        for file in importlib.metadata.files("tbb") or ():
            if file.name in _TBB_LIBRARIES:
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
                return True
    return False


def _numba() -> Any:
    """Numba, whose threads start only after the tbb wheel's library is loaded."""
    preload_tbb()
    import numba

    return numba


def threading_layer() -> str | None:
    """Numba's threading layer, "tbb", "omp" or "workqueue"; None before the first parallel kernel."""
    if "numba" not in sys.modules:
        return None
    import numba

    try:
        return str(numba.threading_layer())
    except ValueError:  # not started yet
        return None


def _remember_parent() -> None:
    global _parallel_parent, _workqueue_lock
    _parallel_parent = _parallel_parent or threading_layer()
    _workqueue_lock = threading.Lock()  # whoever held it is not here to release it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_parent)


def may_run_parallel() -> bool:
    """False in the forked child of a process whose threads were running: they did not survive the fork. OpenMP then
    kills the child, workqueue waits for ever, and so does TBB where another thread was inside a kernel."""
    return _parallel_parent is None and get_num_threads() > 1


@contextlib.contextmanager
def parallel_region() -> Iterator[None]:
    """Holds off other Python threads where the threading layer allows one parallel kernel at a time."""
    if threading_layer() in ("tbb", "omp"):
        yield
        return
    with _workqueue_lock:  # also around the first launch, which starts the layer
        yield


def set_num_threads(n: int) -> None:
    """Let kernels called from this thread use at most `n` threads, 1 to `numba.config.NUMBA_NUM_THREADS`."""
    _numba().set_num_threads(n)


def get_num_threads() -> int:
    """Number of threads that a kernel called from this thread may use."""
    return int(_numba().get_num_threads())


def versions() -> dict[str, str]:
    """What a bug report needs: versions, CPU, threads and cache."""
    import llvmlite.binding as llvm

    from . import __version__
    from .kernels import compiler

    facts = {"fastloss": __version__, "python": sys.version.split()[0], "platform": platform.platform()}
    for package in ("numpy", "numba", "llvmlite", "tbb", "torch", "jax", "cupy", "dask", "numba-cuda"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["cpu"] = str(llvm.get_host_cpu_name())
    facts["threads"] = str(get_num_threads())
    facts["tbb library"] = "loaded" if preload_tbb() else "not found"
    facts["threading layer"] = threading_layer() or "not started"
    facts["kernel cache"] = str(compiler.cache_directory())
    return facts


def show_versions() -> None:
    """Print `versions()`, a fact a line.

    >>> import fastloss
    >>> fastloss.show_versions()  # doctest: +ELLIPSIS
    fastloss ...
    """
    facts = versions()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
