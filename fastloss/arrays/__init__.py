"""One small adapter per array library: how to look at an array's memory, and how to hand a result back.

An adapter is a module with two functions::

    view(array, differentiable=False) -> View     # no copy; raises TypeError for what cannot be read
    wrap(data, dtype, like) -> array              # NumPy memory as an array of the library `like` belongs to

and, where calls on small arrays should be fast, two more::

    key(array) -> Hashable | None                 # all that tells how to read it, but its address; None: look again
    address(array) -> int                         # of its first element

`differentiable` says that a gradient was asked for, so an array that records gradients may be read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class View(NamedTuple):
    """An array's memory on the CPU."""

    data: np.ndarray  # bfloat16 is held as uint16
    dtype: str  # "float32", "bfloat16", "int64", ...
    weak: bool = False  # a Python number or list, whose dtype gives way to the others'

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape
