"""Remembers how a call was run, so that the next one on arrays of the same kind goes straight to its kernel.

What an array's `key` and the options prove (shapes, dtypes, strides, which kernel, which chunks) is not looked at
again; what only the numbers can tell (class indices, probabilities out of range) the kernel reports, and such a call
is made anew the long way, which knows the message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from . import dispatch
from .backends.cpu import Task
from .kernels.pointwise import SUMS
from .reductions import Sums, rounded

if TYPE_CHECKING:
    from .backends.cuda.plan import GPUPlan

_PLAIN = frozenset({str, int, float, bool, type(None)})  # types of options that a key may hold
_WARNING = frozenset({"size_average", "reduce"})  # options that warn, each time
_INVALID = SUMS.index("invalid")
_LIMIT = 512  # plans of one loss; a program that needs more gains nothing from them
_ALIGNED = 7  # an address with one of these bits set may need staging that the plan does not have


class Plan:
    """One way to run a loss that is reduced and has no arrays but input and target."""

    def __init__(
        self,
        task: Task,
        numbers: tuple[int, int],
        samples: int,
        rows: int,
        reduction: str,
        weighted_mean: bool,
        dtype: str,
        wrap: Callable[..., Any],
    ) -> None:
        # no call, no array: a plan outlives both
        self.task, self.numbers, self.samples, self.rows = task, numbers, samples, rows
        self.reduction, self.weighted_mean, self.dtype, self.wrap = reduction, weighted_mean, dtype, wrap

    def run(self, x: int, y: int, like: Any) -> Any:
        """The loss of arrays at these addresses; None where the call must be made the long way."""
        if (x | y) & _ALIGNED:
            return None
        raw = self.task.run({self.numbers[0]: x, self.numbers[1]: y})
        if raw[_INVALID]:
            return None
        value = Sums(raw, self.samples, self.rows).value(self.reduction, self.weighted_mean)
        return self.wrap(rounded(value, self.dtype), self.dtype, like)


class Plans:
    """The plans of one loss function."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan | GPUPlan] = {}
        self._lock = threading.Lock()

    def key(self, args: tuple[Any, ...], options: dict[str, Any]) -> Hashable:
        """What a plan depends on; None for calls that have none."""
        if len(args) != 2:
            return None
        x, y = (dispatch.known(array) for array in args)
        if x is None or y is None:
            return None
        for name, value in options.items():
            if type(value) not in _PLAIN or name in _WARNING:
                return None
        x_key, y_key = x.key(args[0]), y.key(args[1])
        if x_key is None or y_key is None:
            return None
        return (x_key, y_key, *options.items()) if options else (x_key, y_key)

    def run(self, key: Hashable, args: tuple[Any, ...]) -> Any:
        """The result, or None where there is no plan or it does not apply."""
        plan = self._plans.get(key)
        if plan is None:
            return None
        x, y = args
        return plan.run(dispatch.adapter_of(x).address(x), dispatch.adapter_of(y).address(y), x)

    def keep(self, key: Hashable, plan: Plan | GPUPlan | None) -> None:
        """Remember a plan."""
        if plan is not None:
            with self._lock:
                if len(self._plans) >= _LIMIT:
                    self._plans.clear()
                self._plans[key] = plan
