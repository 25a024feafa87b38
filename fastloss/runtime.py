"""Threads, forks, caches and versions: where and how kernels run in this process."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

_CUDA_EXTRA = 'pip install "fastloss[cuda12]" or "fastloss[cuda13]", by the CUDA that the driver supports'
_TBB_LIBRARIES = ("libtbb.so.12", "libtbb.12.dylib", "tbb12.dll")
_workqueue_lock = threading.Lock()
_together = False  # whether a threading layer runs that takes parallel kernels from several Python threads at once
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


@cache
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


def run_parallel(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that runs on Numba's threads; other Python threads are held off where the threading layer allows
    one parallel kernel at a time."""
    global _together
    if _together:
        return function(*args)
    with _workqueue_lock:  # also around the first launch, which starts the layer
        result = function(*args)
        _together = threading_layer() in ("tbb", "omp")
        return result


def set_num_threads(n: int) -> None:
    """Let kernels called from this thread use at most `n` threads, 1 to `numba.config.NUMBA_NUM_THREADS`."""
    _numba().set_num_threads(n)


def get_num_threads() -> int:
    """Number of threads that a kernel called from this thread may use."""
    return int(_numba().get_num_threads())


@cache
def require_cuda() -> None:
    """Raise an ImportError that says what to install where kernels for GPUs cannot be compiled."""
    if importlib.util.find_spec("numba_cuda") is None:
        raise ImportError(f"arrays on a GPU need numba-cuda, which is not installed: {_CUDA_EXTRA}")


def _version_of(*distributions: str) -> str | None:
    """The version of the first that is installed."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _gpus() -> dict[str, str]:
    """The driver and each GPU, or what stands in the way of them; starts CUDA in this process where there is one."""
    try:
        from cuda.bindings import driver
        from cuda.core import Device, system
    except ImportError:
        return {"NVIDIA driver": "not looked for without cuda-core"}
    try:
        devices = Device.get_all_devices()
        _, supported = driver.cuDriverGetVersion()
    except RuntimeError:  # the driver's library is not there
        return {"NVIDIA driver": "no NVIDIA driver found"}
    except Exception as error:  # noqa: BLE001 - a report says what fails, it does not fail with it
        return {"NVIDIA driver": f"does not work: {error}"}
    number = ""
    with contextlib.suppress(Exception):  # some containers lack the library that knows it
        number = ".".join(f"{part:02}" for part in system.get_kernel_mode_driver_version()) + ", "
    facts = {"NVIDIA driver": f"{number}for CUDA up to {supported // 1000}.{supported % 1000 // 10}"}
    for device in devices:
        capability = ".".join(map(str, device.compute_capability))
        facts[f"GPU {device.device_id}"] = f"{device.name}, compute capability {capability}"
    return facts if devices else facts | {"GPUs": "none"}


def versions() -> dict[str, str]:
    """What a bug report needs: versions, CPU, threads, cache and GPUs."""
    import llvmlite.binding as llvm

    from . import __version__
    from .kernels import compiler

    facts = {"fastloss": __version__, "python": sys.version.split()[0], "platform": platform.platform()}
    packages = ("numpy", "numba", "llvmlite", "tbb", "torch", "jax", "dask", "numba-cuda", "cuda-core", "cuda-bindings")
    for package in packages:
        facts[package] = _version_of(package) or "not installed"
    facts["cupy"] = _version_of("cupy-cuda13x", "cupy-cuda12x", "cupy") or "not installed"
    if importlib.util.find_spec("numba_cuda") is None:
        facts["numba-cuda"] += f"; for arrays on a GPU: {_CUDA_EXTRA}"
    facts["cpu"] = str(llvm.get_host_cpu_name())
    facts["threads"] = str(get_num_threads())
    facts["tbb library"] = "loaded" if preload_tbb() else "not found"
    facts["threading layer"] = threading_layer() or "not started"
    facts["kernel cache"] = str(compiler.cache_directory())
    if _numba().config.ENABLE_CUDASIM:
        facts["CUDA simulator"] = "in place of GPUs (NUMBA_ENABLE_CUDASIM)"
    return facts | _gpus()


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
