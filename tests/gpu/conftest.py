"""Every test here runs on a GPU in two layouts: its own, and the simulator's, where small arrays reach all branches."""

import zlib
from collections.abc import Iterator
from typing import Any

import on_device
import pytest

from fastloss import losses
from fastloss.backends.cuda import driver, tuning
from fastloss.backends.cuda.driver import Device, Launch
from fastloss.kernels.cuda import device
from fastloss.kernels.cuda import memory as device_memory
from fastloss.plans import Plans

LAYOUTS = ["small"] if device.SIMULATED else ["small", "own"]


def lay_out(monkeypatch: pytest.MonkeyPatch, sizes: tuning.Tuning) -> None:
    """Let the device work in blocks of these sizes, and as few of them as the simulator has."""
    monkeypatch.setattr(driver.device(0), "tuning", sizes)
    monkeypatch.setattr(driver.device(0), "multiprocessors", 4)


@pytest.fixture(autouse=True, params=LAYOUTS)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """How kernels are laid out; the sizes themselves where a test asks for others."""
    for loss in filter(lambda value: isinstance(value, losses.Loss), vars(losses).values()):
        loss._plans = Plans()  # of another layout
    if request.param != "own":
        lay_out(monkeypatch, tuning.SIMULATOR if request.param == "small" else request.param)
    return request.param


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch, variants: set[str]) -> Iterator[list[Launch]]:
    """What the test has launched so far."""
    launched: list[Launch] = []
    launch = Device.launch

    def noting(self: Device, launches: list[Launch], *rest: Any) -> None:
        launched.extend(launches)
        launch(self, launches, *rest)

    monkeypatch.setattr(Device, "launch", noting)
    yield launched
    keys = {(type(one.kernel).__name__, repr(one.kernel.key)) for one in launched}
    variants.update(f"{name} {zlib.crc32(key.encode()):08x}" for name, key in keys)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the simulator: an access that a GPU would refuse, or that leaves an array for what lies beside it, fails."""
    on_device.margins.clear()
    if device.SIMULATED:
        touch = device_memory._array

        def touching(address: int, count: int, storage: str) -> Any:
            array = touch(address, count, storage)
            assert on_device.aligned(address, array.nbytes), f"{array.nbytes} bytes at {address:#x} are not aligned"
            assert not on_device.in_margin(address, array.nbytes), "a kernel left its arrays"
            return array

        monkeypatch.setattr(device_memory, "_array", touching)
    yield
    on_device.margins.clear()
