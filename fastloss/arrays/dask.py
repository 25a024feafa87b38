"""Dask arrays: they hold no numbers yet, and losses of them are graphs (`fastloss.backends.dask`)."""

from __future__ import annotations

from typing import Any

import dask.array

from . import Engine, View


def view(array: Any, differentiable: bool = False) -> View:
    raise TypeError(
        f"a {type(array).__name__} of Dask holds no numbers yet: call fastloss's functions, classes and value_and_grad "
        "on Dask arrays, or .compute() it first"
    )


def engine(array: Any) -> Engine | None:
    if not isinstance(array, dask.array.Array):
        return None
    from ..backends.dask import Lazily

    return Lazily()
