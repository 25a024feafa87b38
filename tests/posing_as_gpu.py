"""An array library whose arrays pose as a GPU's, and a CUDA driver that only writes down what it is asked for.

`python tests/posing_as_gpu.py` prints, as JSON, what fastloss asked of the driver: the path from a call to a launched
kernel, on a machine without a GPU. With `--time` it prints how long that path takes.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import fastloss
from fastloss.arrays import DeviceMemory, View

DEVICE, STREAM = 1, 0x5EED


class Array:
    """An array "on GPU 1"; its memory is NumPy's, and nothing reads it."""

    def __init__(self, data: np.ndarray, named_stream: int | None = None) -> None:
        self.data, self.named_stream = data, named_stream


# ---- the adapter


def view(array: Array, differentiable: bool = False) -> View:
    data, named = array.data, array.named_stream
    memory = DeviceMemory(address(array), data.shape, data.strides, data.itemsize, DEVICE, array, stream=named)
    return View(memory, data.dtype.name)


def empty(shape: tuple[int, ...], dtype: str, like: Array) -> Array:
    return Array(np.empty(shape, dtype))


def stream(like: Array) -> int:
    return STREAM


def key(array: Array) -> Any:
    return Array, array.data.dtype, array.data.shape, array.data.strides


def address(array: Array) -> int:
    return int(array.data.__array_interface__["data"][0])


# ---- the driver


class Driver:
    """Everything of cuda.core and cuda.bindings that a launch touches."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability, self.asked = capability, []
        self.current = 7  # the caller's context: not ours

    def ask(self, *what: Any) -> None:
        self.asked.append(what)

    @contextmanager
    def installed(self) -> Iterator[None]:
        from cuda import core
        from cuda.bindings import driver

        major, minor = self.capability
        properties = SimpleNamespace(
            compute_capability_major=major, compute_capability_minor=minor, multiprocessor_count=100
        )

        def set_context(context: int) -> tuple[int]:
            self.current = context
            self.ask("context", context)
            return (0,)

        def load(code: bytes) -> Any:
            self.ask("load", code[:4] == b"\x7fELF", self.current)
            return SimpleNamespace(get_kernel=lambda name: name)

        def from_handle(handle: int) -> Any:
            return SimpleNamespace(
                handle=handle,
                wait=lambda other: self.ask("wait", handle, other.handle),
                sync=lambda: self.ask("synchronize", handle),
            )

        def launch(stream: Any, config: Any, kernel: str, *arguments: int) -> None:
            self.ask("launch", stream.handle, config.grid, config.block, kernel, arguments, self.current)

        fakes = {
            "cuInit": lambda flags: (0,),
            "cuDeviceGet": lambda number: (0, number),
            "cuDevicePrimaryCtxRetain": lambda number: (0, 40 + number),
            "cuCtxGetCurrent": lambda: (0, self.current),
            "cuCtxSetCurrent": set_context,
            "cuMemcpyDtoHAsync": lambda host, device, n, stream: (self.ask("read", device, n, stream), 0)[1:],
            "cuStreamSynchronize": lambda stream: (self.ask("synchronize", stream), 0)[1:],
        }
        with (
            mock.patch.multiple(driver, **fakes),
            mock.patch.multiple(
                core,
                Device=lambda number: SimpleNamespace(properties=properties),
                LaunchConfig=SimpleNamespace,
                ObjectCode=SimpleNamespace(from_cubin=load, from_ltoir=core.ObjectCode.from_ltoir),
                Stream=SimpleNamespace(from_handle=from_handle),
                launch=launch,
            ),
        ):
            yield


def arrays(shape: tuple[int, int], dtype: str = "float32") -> tuple[Array, Array]:
    """Logits and class indices."""
    rng = np.random.default_rng(0)
    return Array(rng.normal(size=shape).astype(dtype)), Array(rng.integers(0, shape[1], shape[0]))


def main() -> None:
    fastloss.register(Array.__module__.partition(".")[0], __name__)
    logits, target = arrays((32, 10))
    if "--time" in sys.argv:
        driver = Driver((9, 0))
        with driver.installed():
            driver.ask = lambda *what: None  # type: ignore[method-assign]
            fastloss.cross_entropy(logits, target)
            rounds = []
            for _ in range(30):
                start = time.perf_counter()
                for _ in range(300):
                    fastloss.cross_entropy(logits, target)
                rounds.append((time.perf_counter() - start) / 300)
            print(json.dumps({"microseconds": 1e6 * min(rounds)}))
        return
    driver = Driver(tuple(json.loads(sys.argv[1])))
    with driver.installed():
        for _ in range(2):  # the second by a plan
            fastloss.cross_entropy(logits, target)
        many, indices = arrays((4096, 1000), "float16")
        many.named_stream = 0xCAFE
        fastloss.value_and_grad(fastloss.cross_entropy)(many, indices)
        fastloss.Meter("cross_entropy").update(logits, target)
    print(json.dumps(driver.asked))


if __name__ == "__main__":
    main()
