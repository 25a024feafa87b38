"""Compiles kernels into the disk cache ahead of use, by making the calls that need them.

A kernel depends on the loss and its options, on dtypes, on the layout and on whether results are larger than the cache;
never on the numbers. So each item is called on arrays of zeros (weights are 1), on small ones and on large ones.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fastloss
from fastloss.evaluate import LOSSES, Loss
from fastloss.files import InputError

DTYPES = ("float16", "bfloat16", "float32", "float64")
LARGE = 1 << 23  # elements: past the sizes from which threads and streaming stores are used, in every dtype

# Shapes (N, C) and (N, C, d) by class count; N and d follow from the number of elements. Each count up to 16, of calls
# with options up to 32, has kernels of its own, and so have short rows, long ones, and classes that lie apart. Class
# indices are int64.
CLASSES = (2, 10, 100, 1000)
SEGMENTED_CLASSES = 21

ARRAY_OPTIONS = ("weight", "pos_weight", "probabilities")  # of an Item: arrays, made here


@dataclass(frozen=True)
class Item:
    """Calls of one loss that share their kernels."""

    loss: Loss
    dtype: str
    reduction: str
    gradient: bool
    classes: int = 0  # 0: arrays without classes
    segmented: bool = False  # (N, C, d) rather than (N, C)
    options: Mapping[str, Any] = field(default_factory=dict)  # numbers as given; `ARRAY_OPTIONS` as True

    def __str__(self) -> str:
        words = [self.loss.name, self.dtype, self.reduction, "value and gradient" if self.gradient else "value"]
        options = [name if value is True else f"{name}={value:g}" for name, value in self.options.items()]
        layout = f"{'(N, C, d)' if self.segmented else '(N, C)'}, {self.classes:,} classes" if self.classes else ""
        return ", ".join([" ".join(words), *filter(None, [layout]), *options]).replace("_", "-")

    def run(self) -> float:
        """Make the calls; seconds that they took. Raises InputError where the loss refuses an option."""
        start = time.perf_counter()
        try:
            for elements in (2 * max(1, self.classes), LARGE):  # one sample's classes lie side by side in any layout
                self._call(elements)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.loss.name}: {error}") from None
        return time.perf_counter() - start

    def _shape(self, elements: int) -> tuple[int, ...]:
        if not self.classes:
            return (elements,)
        samples = max(1, elements // self.classes)
        return (1, self.classes, samples) if self.segmented else (samples, self.classes)

    def _call(self, elements: int) -> None:
        shape = self._shape(elements)
        x = zeros(shape, self.dtype)
        by_class = self.loss.over_classes and not self.options.get("probabilities")
        samples = (*shape[:1], *shape[2:]) if self.loss.over_classes else shape
        target = np.zeros(samples, np.int64) if by_class else zeros(shape, self.dtype)
        options = {name: value for name, value in self.options.items() if name not in ARRAY_OPTIONS}
        for name in ("weight", "pos_weight"):
            if self.options.get(name):
                options[name] = zeros(shape[1:2] if self.loss.weight == "class" else shape, self.dtype) + 1
        function = getattr(fastloss, self.loss.function)
        function(x, target, reduction=self.reduction, **options)
        if self.gradient:
            upstream = zeros(samples, self.dtype) if self.reduction == "none" else None
            fastloss.value_and_grad(function)(x, target, reduction=self.reduction, grad_output=upstream, **options)


def zeros(shape: tuple[int, ...], dtype: str) -> Any:
    """An array of zeros: NumPy's, or for bfloat16 of whichever library is installed that has it."""
    if dtype != "bfloat16":
        return np.zeros(shape, dtype)
    for library in ("ml_dtypes", "torch"):
        try:
            module = importlib.import_module(library)
        except ImportError:
            continue
        return module.zeros(shape, dtype=module.bfloat16) if library == "torch" else np.zeros(shape, module.bfloat16)
    raise InputError("bfloat16 needs ml_dtypes or torch, and neither is installed")


def items(
    losses: Sequence[Loss] = LOSSES,
    dtypes: Sequence[str] = ("float32",),
    reductions: Sequence[str] = ("mean",),
    gradient: bool = True,
    options: Mapping[str, Any] | None = None,
    classes: Sequence[int] = CLASSES,
) -> list[Item]:
    """What to compile; without arguments what most programs use: every loss of float32, its mean and gradient."""
    made: list[Item] = []
    for loss in losses:
        layouts: list[dict[str, Any]] = [{}]
        if loss.over_classes:
            layouts = [{"classes": count} for count in classes]
            layouts.append({"classes": SEGMENTED_CLASSES, "segmented": True})
        made += [
            Item(loss, dtype, reduction, gradient, options=options or {}, **layout)
            for dtype in dtypes
            for reduction in reductions
            for layout in layouts
        ]
    return made


def run(items: Iterable[Item], jobs: int) -> Iterator[tuple[Item, float]]:
    """Run items in this process, or in `jobs` new ones; each with its seconds as it ends."""
    if jobs == 1:
        for item in items:
            yield item, item.run()
        return
    # Not forked: the threads of a parent that has run kernels would be missing.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_leave_signals) as pool:
        waiting = {pool.submit(item.run): item for item in items}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _leave_signals() -> None:
    """An interrupt from the keyboard goes to all processes: the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def default_jobs(count: int) -> int:
    """Processes for so many items: a new one takes a second to start, as long as some items take."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, count // 2))


def compiled_kernels() -> set[str]:
    """Names of the files in the kernel cache. Raises InputError where nothing can be kept there."""
    from fastloss.kernels.compiler import cache_directory

    folder = cache_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"warmup-{os.getpid()}"
        probe.touch()
        probe.unlink()
        return {path.name for path in folder.glob("*.o")}
    except OSError as error:
        raise InputError(f"the kernel cache {folder} cannot be written: {error.strerror}") from None
