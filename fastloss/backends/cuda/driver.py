"""The GPUs: loaded kernels, launches on the caller's stream, and the few bytes that are read back when asked for."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np

from ...arrays import DeviceMemory
from ...kernels.cuda.build import Kernel, cubin
from ...kernels.cuda.device import SIMULATED
from .tuning import SIMULATOR, Tuning, tuning_for

MAX_BLOCKS = 2**31 - 1


class Launch:
    """A kernel and how it is launched."""

    __slots__ = ("arguments", "blocks", "config", "function", "kernel")

    def __init__(self, kernel: Kernel, blocks: int, arguments: Sequence[int], function: Any, config: Any) -> None:
        self.kernel, self.blocks, self.arguments = kernel, blocks, arguments
        self.function, self.config = function, config


class Device:
    """One GPU, or Numba's simulator."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._functions: dict[Kernel, Any] = {}
        self._lock = threading.Lock()
        if SIMULATED:
            self.capability, self.multiprocessors = (9, 0), 4
            return
        from cuda import core
        from cuda.bindings import driver

        self._driver, self._core = driver, core  # an import in every call would take a microsecond
        properties = core.Device(number).properties
        self.capability = (properties.compute_capability_major, properties.compute_capability_minor)
        self.multiprocessors = properties.multiprocessor_count
        _ok(driver.cuInit(0))
        self._context = _ok(driver.cuDevicePrimaryCtxRetain(_ok(driver.cuDeviceGet(number))))

    @cached_property
    def tuning(self) -> Tuning:
        """The sizes that suit this GPU."""
        return SIMULATOR if SIMULATED else tuning_for(self.capability)

    def _enter(self) -> Any:
        """Make this the thread's GPU; gives the context to go back to, None where it was already."""
        before = _ok(self._driver.cuCtxGetCurrent())
        if int(before) == int(self._context):
            return None
        _ok(self._driver.cuCtxSetCurrent(self._context))
        return before

    def _leave(self, before: Any) -> None:
        if before is not None:
            _ok(self._driver.cuCtxSetCurrent(before))

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes this the thread's GPU, and the one that it was again afterwards."""
        before = self._enter()
        try:
            yield
        finally:
            self._leave(before)

    def prepare(self, kernel: Kernel, blocks: int, arguments: Sequence[int]) -> Launch:
        """A kernel compiled and loaded for this GPU, once."""
        blocks = max(1, min(blocks, MAX_BLOCKS))
        if self.capability < (8, 0):
            kernel = dataclasses.replace(kernel, pairs=False)
        function = self._functions.get(kernel)
        if function is None:
            with self._lock:
                function = self._functions.get(kernel) or self._load(kernel)
                self._functions[kernel] = function
        config = None
        if not SIMULATED:
            config = self._core.LaunchConfig(grid=blocks, block=kernel.threads)
        return Launch(kernel, blocks, arguments, function, config)

    def _load(self, kernel: Kernel) -> Any:
        if SIMULATED:
            return kernel.build()
        code, name = cubin(kernel, self.capability)
        with self.current():
            return self._core.ObjectCode.from_cubin(code).get_kernel(name)

    def launch(
        self, launches: Sequence[Launch], stream: int, arguments: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Queue kernels on a stream, one after the other; with other `arguments` than theirs where these are given."""
        arguments = arguments or [one.arguments for one in launches]
        if SIMULATED:
            from ...kernels.cuda import simulator

            for one, given in zip(launches, arguments, strict=True):
                simulator.launch(one.function, one.blocks, one.kernel.threads, given)
            return
        launch, handle, before = self._core.launch, self._core.Stream.from_handle(stream), self._enter()
        try:
            for one, given in zip(launches, arguments, strict=True):
                launch(handle, one.config, one.function, *given)
        finally:
            self._leave(before)

    def wait_for(self, producers: set[int], stream: int) -> None:
        """Let work that is queued on `stream` from now on wait for what is queued on others."""
        others = {_canonical(producer) for producer in producers} - {_canonical(stream)}
        if SIMULATED or not others:
            return
        of = self._core.Stream.from_handle
        with self.current():
            for other in others:
                of(stream).wait(of(other))

    def synchronize(self, stream: int) -> None:
        """Wait for all that is queued on a stream."""
        if not SIMULATED:
            with self.current():
                self._core.Stream.from_handle(stream).sync()

    def read(self, address: int, nbytes: int, stream: int) -> bytes:
        """Memory of the GPU once the stream's work is done: this waits."""
        if SIMULATED:
            return ctypes.string_at(address, nbytes)
        host = ctypes.create_string_buffer(nbytes)
        with self.current():
            _ok(self._driver.cuMemcpyDtoHAsync(ctypes.addressof(host), address, nbytes, stream))
            _ok(self._driver.cuStreamSynchronize(stream))
        return host.raw

    def to_host(self, memory: DeviceMemory, dtype: np.dtype[Any], stream: int) -> np.ndarray:
        """A copy of an array in the CPU's memory, for messages: all bytes between its first element and its last."""
        if 0 in memory.shape:
            return np.empty(memory.shape, dtype)
        reach = [(extent - 1) * stride for extent, stride in zip(memory.shape, memory.strides, strict=True)]
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        content = self.read(memory.address + low, high - low + memory.itemsize, stream)
        return np.ndarray(memory.shape, dtype, content, -low, memory.strides)


@cache
def device(number: int) -> Device:
    """The GPU of this number, as CUDA counts them."""
    return Device(number)


def _canonical(stream: int) -> int:
    """The legacy default stream has two handles."""
    return 0 if stream == 1 else stream


def _ok(answer: tuple[Any, ...]) -> Any:
    """What a call of the driver gives besides its status."""
    status, *values = answer
    if int(status):
        raise RuntimeError(f"CUDA driver: {status.name}")
    return values[0] if values else None
