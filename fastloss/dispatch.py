"""From an array's type to the adapter that reads it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from .arrays import Engine, View

# root module of the type -> adapter; an adapter is imported when the first such array is met
ADAPTERS: dict[str, str] = {
    "numpy": "fastloss.arrays.numpy",
    "ml_dtypes": "fastloss.arrays.numpy",
    "torch": "fastloss.arrays.torch",
    "cupy": "fastloss.arrays.cupy",
    "dask": "fastloss.arrays.dask",
    "jax": "fastloss.arrays.jax",  # tracers
    "jaxlib": "fastloss.arrays.jax",  # arrays
    "numba": "fastloss.arrays.numba_cuda",
}
# how arrays of other libraries may be read -> adapter
PROTOCOLS: dict[str, str] = {
    "__cuda_array_interface__": "fastloss.arrays.cuda_interface",
    "__dlpack__": "fastloss.arrays.dlpack",
}
_BUILTINS = (bool, int, float, list, tuple)
_by_type: dict[type, ModuleType] = {}
# of a type that was met before, whose arrays can be told apart by a key: its adapter's function
keys: dict[type, Callable[[Any], Hashable | None]] = {}


_engines: dict[type, Callable[[Any], Engine | None] | None] = dict.fromkeys((str, int, float, bool, type(None)))


def register(module: str, adapter: str) -> None:
    """Read arrays whose type is defined under the root module `module` with the module named `adapter`.

    A package can do the same without being imported, by an entry point of the group `fastloss.arrays` whose name is
    the root module and whose value is the adapter. See `fastloss.arrays` for what an adapter holds.
    """
    ADAPTERS[module] = adapter
    _by_type.clear()
    keys.clear()
    _engines.clear()


def adapter_of(array: Any) -> ModuleType:
    """The adapter for an array, found by its type once."""
    kind = type(array)
    found = _by_type.get(kind)
    if found is None:
        found = _by_type[kind] = importlib.import_module(_search(array))
        if hasattr(found, "key") and kind in getattr(found, "KEYED", (kind,)):
            keys[kind] = found.key
    return found


def view(array: Any, name: str, differentiable: bool = False) -> View:
    """An array's memory; errors name the argument."""
    try:
        found: View = adapter_of(array).view(array, differentiable)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    return found


def engine(arguments: Iterable[Any]) -> Engine | None:
    """Who evaluates a loss of these arguments, where one of them is an array that holds no numbers yet."""
    for argument in arguments:
        kind = type(argument)
        try:
            find = _engines[kind]
        except KeyError:
            try:
                find = getattr(adapter_of(argument), "engine", None)
            except TypeError:  # an option, or an array of no library that we know: `view` says so, by its name
                find = None
            _engines[kind] = find
        if find is not None and (found := find(argument)) is not None:
            return found
    return None


def one_device(views: Mapping[str, View]) -> int | None:
    """The GPU that all arguments are on, None for the CPU, where Python's numbers are too; nothing is ever moved."""
    devices = {view.device for view in views.values()}
    if len(devices) > 1:
        places = ", ".join(f"{name} on {_place(view.device)}" for name, view in views.items())
        raise TypeError(f"arguments on different devices: {places}; move them to one")
    return devices.pop() if devices else None


def _place(device: int | None) -> str:
    return "the CPU" if device is None else f"GPU {device}"


def _search(array: Any) -> str:
    kind = type(array)
    roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
    for root in roots:
        if root in ADAPTERS:
            return ADAPTERS[root]
    extensions = {point.name: point.value for point in entry_points(group="fastloss.arrays")}
    for root in roots:
        if root in extensions:
            return extensions[root]
    if isinstance(array, _BUILTINS):
        return "fastloss.arrays.builtins"
    for protocol, adapter in PROTOCOLS.items():
        if hasattr(array, protocol):
            return adapter
    raise TypeError(
        f"{kind.__module__}.{kind.__qualname__} is not an array that fastloss reads: it takes NumPy, CuPy, JAX, Dask "
        "and Numba device arrays, torch tensors, lists of numbers, anything with __cuda_array_interface__ or "
        "__dlpack__, and types registered under the entry point fastloss.arrays"
    )
