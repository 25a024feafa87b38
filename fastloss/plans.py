"""Remembers how a call was run, so that the next one on arrays of the same kind goes straight to its kernel.

What an array's `key` and the options prove (shapes, dtypes, strides, which kernel, which chunks) is not looked at
again; what only the numbers can tell (class indices, probabilities out of range) the kernel reports, and such a call
is made anew the long way, which knows the message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import dispatch, runtime
from .backends.cpu import Task
from .kernels.entry import OVER_COUNT, OVER_ROWS, OVER_WEIGHT, SUM
from .memory import LARGE, empty_like
from .reductions import rounded

if TYPE_CHECKING:
    from .backends.cuda.plan import GPUPlan

# A plan: a function of input and target (and of memory for a gradient, where its key says so) that gives what the call
# would, or None where the call must be made the long way.
Plan = Callable[..., Any]

_PLAIN = frozenset({str, int, float, bool, type(None)})  # types of options that a key may hold
_WARNING = frozenset({"size_average", "reduce"})  # options that warn, each time
_LIMIT = 512  # plans of one loss; a program that needs more gains nothing from them
_SCALARS = frozenset({"float32", "float64"})  # dtypes in which entries make NumPy's scalars themselves


class Plans:
    """The plans of one loss function."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}
        self._lock = threading.Lock()
        self.find = self._plans.get
        # The entry that ran last without options: it looks itself whether arrays are of its kind, in a tenth of the
        # time that a key takes.
        self.recent: Plan = _nothing

    def key(self, args: tuple[Any, ...], options: dict[str, Any], *more: Any) -> Hashable:
        """What a plan depends on; None for calls that have none. `more`: further arrays."""
        if len(args) != 2:
            return None
        x, y = args
        keys = dispatch.keys
        x_key, y_key = keys.get(type(x)), keys.get(type(y))
        if x_key is None or y_key is None:
            return None
        kinds = x_kind, y_kind = x_key(x), y_key(y)
        if x_kind is None or y_kind is None:
            return None
        if not options and not more:
            return kinds
        types = tuple(map(type, options.values()))  # 1, 1.0 and True are one key otherwise
        if not (_PLAIN.issuperset(types) and _WARNING.isdisjoint(options)):
            return None
        rest = []
        for array in more:
            of = keys.get(type(array))
            kind = of(array) if of else None
            if kind is None:
                return None
            rest.append(kind)
        return kinds, tuple(rest), types, *options.items()

    def keep(self, key: Hashable, plan: Plan | None) -> None:
        """Remember a plan."""
        if plan is not None:
            with self._lock:
                if len(self._plans) >= _LIMIT:
                    self._plans.clear()
                self._plans[key] = plan

    def note(self, plan: Plan) -> None:
        """Try this plan first for calls without options, if it is an entry."""
        if type(plan) is BuiltinFunctionType:
            self.recent = plan


class Launch:
    """A task that is run anew, on threads where that is safe, for operands as its entry takes them."""

    def __init__(self, task: Task, operands: Sequence[int], options: dict[str, Any]) -> None:
        self._task, self._operands, self._options = task, operands, options
        self._serial = task.entry(operands, **options)

    @cached_property
    def _parallel(self) -> Callable[..., Any]:
        return self._task.entry(self._operands, parallel=True, **self._options)

    def __call__(self, *operands: Any) -> Any:
        if runtime.may_run_parallel():
            return runtime.run_parallel(self._parallel, *operands)
        return self._serial(*operands)


def _launch(task: Task, operands: Sequence[int], options: dict[str, Any]) -> Callable[..., Any]:
    return Launch(task, operands, options) if task.parallel else task.entry(operands, **options)


class Memory(NamedTuple):
    """Memory for an array of a result, made anew in each call."""

    number: int  # of the array in the task
    prototype: np.ndarray  # of its layout, without memory of its own
    dtype: str
    argument: int  # whose library the array belongs to: 0 is input, 1 target
    given: bool  # whether the caller brings it


class Reduced(NamedTuple):
    """What is made of a loss's sums."""

    reduction: str
    weighted_mean: bool
    rows: int
    dtype: str

    @property
    def options(self) -> dict[str, Any]:
        """The same for an entry. Where the losses themselves are the result, it reduces them for nothing."""
        mean = OVER_WEIGHT if self.weighted_mean else OVER_COUNT
        code = {"none": SUM, "sum": SUM, "mean": mean, "batchmean": OVER_ROWS}[self.reduction]
        return {"reduction": code, "rows": self.rows}


def reduced(task: Task, numbers: tuple[int, int], like: tuple[Any, Any], how: Reduced) -> Plan | None:
    """How to find a loss that is a number. `like`: input and target of the first call."""
    if not task.aligned(numbers):
        return None
    dtype, arrays = how.dtype, _arrays(like)
    # entries compare dtypes by their addresses, which only those of NumPy's own keep
    if arrays and dtype in _SCALARS and all(array.dtype is np.dtype(array.dtype.name) for array in like):
        return _launch(task, numbers, how.options | {"dtype": dtype, "kinds": like})
    scalar = dtype if dtype in _SCALARS else None
    launch, wrap = _launch(task, numbers, how.options | {"dtype": scalar}), dispatch.adapter_of(like[0]).wrap
    x_address, y_address = (_same if arrays else dispatch.adapter_of(array).address for array in like)

    def run(x: Any, y: Any) -> Any:
        value = launch(x_address(x), y_address(y))
        if value is None:
            return None
        return wrap(np.asarray(value) if scalar else rounded(value, dtype), dtype, x)

    return run


def with_arrays(
    task: Task,
    numbers: tuple[int, int],
    like: tuple[Any, Any],
    how: Reduced,
    memory: Sequence[Memory],
    counted: dict[str, int] | None,
) -> Plan | None:
    """How to find a loss with its gradients, a list, or (`counted` is None) the samples' losses. A plan takes input,
    target and the arrays that the caller brings, all of them NumPy's then."""
    arrays, brings = _arrays(like), [m.number for m in memory if m.given]
    if (brings and not arrays) or not task.aligned((*numbers, *brings)):
        return None
    operands = (*numbers, *(m.number for m in memory))
    launch = _launch(task, operands, how.options | {"counted": counted or {}})
    adapters = [dispatch.adapter_of(array) for array in like]
    x_address, y_address = (_same if arrays else adapter.address for adapter in adapters)
    wraps = [adapter.wrap for adapter in adapters]
    dtype, number, gradients = how.dtype, how.reduction != "none", counted is not None
    makers = [np.empty_like if m.prototype.nbytes < LARGE else empty_like for m in memory]

    def run(x: Any, y: Any, *brought: Any) -> Any:
        for out in brought:
            if not out.flags.writeable or any(a is not out and np.may_share_memory(out, a) for a in (x, y)):
                return None
        rest = iter(brought)
        made = [next(rest) if m.given else make(m.prototype) for m, make in zip(memory, makers, strict=True)]
        value = launch(x_address(x), y_address(y), *made)
        if value is None:
            return None
        pair = x, y
        results = [wraps[0](rounded(value, dtype), dtype, x)] if number else []
        for array, m in zip(made, memory, strict=True):
            results.append(array if m.given else wraps[m.argument](array, m.dtype, pair[m.argument]))
        return results if gradients else results[0]

    return run


def _arrays(like: Sequence[Any]) -> bool:
    """Whether entries take these as they are; of other arrays they take the addresses."""
    return all(type(array) is np.ndarray for array in like)


def _nothing(*args: Any) -> None:
    """The plan that never applies."""


def _same(array: Any) -> Any:
    return array


def on_gpu(plan: GPUPlan | None) -> Plan | None:
    """A plan out of a GPU's."""
    if plan is None:
        return None
    known = plan

    def run(x: Any, y: Any) -> Any:
        return known.run(dispatch.adapter_of(x).address(x), dispatch.adapter_of(y).address(y), x)

    return run
