"""From a kernel's options to machine code for a GPU, kept in the disk cache beside the CPU's."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from ..compiler import cached

Capability = tuple[int, int]  # (9, 0) is sm_90


@dataclass(frozen=True, kw_only=True)
class Kernel(ABC):
    """A kernel `k(a)` over one tuple of 64-bit integers, `fields`."""

    threads: int = 256  # of a block, a power of 2 and at least a warp
    pairs: bool = True  # sm_80 and newer round two halves by one instruction
    long: bool = False  # there are more than 2**31 - 1 elements or samples

    @property
    def wanted_threads(self) -> int:
        """Threads of a multiprocessor that its registers are to suffice for."""
        return 512

    @property
    @abstractmethod
    def key(self) -> tuple[object, ...] | None:
        """What tells this kernel from every other, for the disk cache; None keeps it out."""

    @property
    @abstractmethod
    def fields(self) -> tuple[str, ...]:
        """Names of the arguments, in order."""

    @abstractmethod
    def build(self) -> Callable[[Any], None]:
        """The Python function that Numba compiles, or that its simulator runs."""


@cache
def _versions() -> tuple[str, ...]:
    packages = ("numba-cuda", "cuda-core", "cuda-bindings")
    return tuple(version(package) for package in packages)


def cubin(kernel: Kernel, capability: Capability) -> tuple[bytes, str]:
    """Machine code and the name of its entry; no GPU and no driver is needed."""
    key = kernel.key
    if key is not None:
        key = ("cubin", key, kernel.threads, kernel.pairs, kernel.long, capability, _versions())
    content = cached(key, lambda: _compiled(kernel, capability))
    name, _, code = content.partition(b"\0")
    return code, name.decode()


def _compiled(kernel: Kernel, capability: Capability) -> bytes:
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda
    from numba.cuda import types

    signature = types.void(types.UniTuple(types.int64, len(kernel.fields)))
    function = kernel.build()
    function.__name__ = function.__qualname__ = "kernel"
    ltoir, _ = cuda.compile(
        function,
        signature,
        cc=capability,
        device=False,
        abi="numba",
        output="ltoir",
        launch_bounds=(kernel.threads, max(1, kernel.wanted_threads // kernel.threads)),
    )
    arch = "sm_{}{}".format(*capability)
    linker = Linker(ObjectCode.from_ltoir(ltoir), options=LinkerOptions(arch=arch, link_time_optimization=True))
    code = bytes(linker.link("cubin").code)
    entry = re.search(rb"\.text\.(\w+)\0", code)  # the section that holds the kernel
    if entry is None:
        raise RuntimeError("the linked cubin holds no kernel")
    return entry[1] + b"\0" + code
