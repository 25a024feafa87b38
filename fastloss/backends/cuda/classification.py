"""Losses over classes on a GPU: which kernels run, by the number of classes and how they lie."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...arrays import View
from ...kernels.cuda.device import WARP
from ...kernels.cuda.memory import VECTOR_BYTES
from ...kernels.cuda.nll import NLLKernel
from ...kernels.cuda.rows import SAVED_BYTES, RowsKernel
from ...kernels.cuda.samples import SamplesKernel
from ...kernels.cuda.softmax import CLASSY
from ...kernels.cuda.sums import ROW_BYTES, Reduction
from ..layout import Shape, collapse
from .run import LONG, Run, Values

if TYPE_CHECKING:
    from ...classification import NLLCall, SoftmaxCall

MIN_ROW = 16  # classes that a warp is not wasted on


@dataclass
class Arrays:
    """A row loss's arrays by name, their samples' dimensions collapsed into as few as describe them."""

    views: dict[str, View]
    extents: Shape
    strides: dict[str, tuple[int, ...]]  # of samples
    steps: Values  # of classes

    @property
    def samples(self) -> int:
        """Number of samples."""
        return math.prod(self.extents)

    @property
    def classy(self) -> list[str]:
        """Names of the arrays that have classes."""
        return [name for name in self.views if name in CLASSY]

    @property
    def narrowest(self) -> int:
        """Bytes of the narrowest element among them."""
        return min(self.views[name].data.itemsize for name in self.classy)

    def adjoin(self) -> bool:
        """Whether classes lie side by side in every array."""
        return all(self.steps[name] == self.views[name].data.itemsize for name in self.classy)

    def row_lanes(self) -> int:
        """Classes of a vector: 16 bytes of the narrowest array where rows of all arrays are aligned alike, else 1."""
        lanes = VECTOR_BYTES // self.narrowest
        places = set()
        for name in self.classy:
            memory = self.views[name].data
            if any(n % memory.itemsize for n in (memory.address, *self.strides[name])):
                return 1
            places.add(tuple(n // memory.itemsize % lanes for n in (memory.address, *self.strides[name])))
        return lanes if len(places) == 1 else 1

    def sample_lanes(self) -> int:
        """Neighbouring samples that a vector holds, 1 where they do not lie side by side and aligned."""
        lanes = VECTOR_BYTES // self.narrowest
        if self.extents[-1] % lanes:
            return 1
        for name in self.classy:
            memory, strides = self.views[name].data, self.strides[name]
            if strides[-1] != memory.itemsize:
                return 1
            if any(n % (lanes * memory.itemsize) for n in (memory.address, self.steps[name], *strides[:-1])):
                return 1
        return lanes

    def tiled(self) -> bool:
        """Whether logits (and gradients) are one piece of memory, row after row."""
        for name in ("logits", "grad"):
            if name in self.views:
                memory, classes = self.views[name].data, self.views["logits"].shape[1]
                dense = self.samples == 1 or self.strides[name] == (classes * memory.itemsize,)
                if not dense or len(self.extents) > 1 or memory.address % VECTOR_BYTES:
                    return False
        return True


class _ClassRun(Run[Any]):
    """What the losses over classes share."""

    call: Any

    def __init__(self, call: Any, number: int) -> None:
        super().__init__(call, number)
        self.compute = "float64" if any(view.dtype == "float64" for view in (call.x, call.t)) else "float32"

    def arrays(self, **views: View | None) -> Arrays:
        """The call's arrays; of shape (1, C) and (1,) where the input has no samples' dimension."""
        present = {name: self._with_sample(view) for name, view in views.items() if view is not None}
        outer = {
            name: (view.data.strides[0], *view.data.strides[2:]) if name in CLASSY else view.data.strides
            for name, view in present.items()
        }
        logits = present["logits"]
        extents, strides = collapse((logits.shape[0], *logits.shape[2:]), list(outer.values()))
        steps = {name: present[name].data.strides[1] for name in present if name in CLASSY}
        return Arrays(present, extents, dict(zip(present, strides, strict=True)), steps)

    def _with_sample(self, view: View) -> View:
        if len(self.call.x.shape) > 1:
            return view
        memory = dataclasses.replace(view.data, shape=(1, *view.data.shape), strides=(0, *view.data.strides))
        return view._replace(data=memory)

    def values(self, arrays: Arrays) -> Values:
        """The arguments that all kernels over classes take."""
        call, w = self.call, self.call.w
        values: Values = dict(arrays.views)
        values |= {f"{name}_step": step for name, step in arrays.steps.items()}
        values |= {f"extent{d}": extent for d, extent in enumerate(arrays.extents)}
        for name, strides in arrays.strides.items():
            values |= {f"{name}_stride{d}": stride for d, stride in enumerate(strides)}
        values |= {"samples": arrays.samples, "classes": call.classes, "ignore_index": call.ignore_index}
        if w is not None:
            values |= {"weight": w, "weight_step": w.data.strides[0]}
        return values

    def options(self, arrays: Arrays, upstream: Any) -> dict[str, Any]:
        """The options that all kernels over classes take."""
        dtypes = {name: view.dtype for name, view in arrays.views.items()}
        factor = upstream.dtype if isinstance(upstream, View) and self.call.reduction != "none" else None
        weight = self.call.w.dtype if self.call.w else None
        ndim, long = len(arrays.extents), max(arrays.samples, self.call.classes) >= LONG
        return {"compute": self.compute, "factor": factor, "weight": weight, "ndim": ndim, "long": long, **dtypes}

    def statistics(self) -> View:
        """A row of sums: of the targets' weights, with the numbers of samples that count and of invalid ones."""
        row = self.scratch(ROW_BYTES)
        arrays = self.arrays(logits=self.call.x, index=self.call.t)
        threads = self.device.tuning.pointwise_threads
        reduction = Reduction(self.compute, "sums")
        kernel = NLLKernel(**self.options(arrays, None), phase="weights", reduction=reduction, threads=threads)
        blocks = min(-(-arrays.samples // threads), self.grid(self.device.tuning.pointwise_blocks))
        self.add_reduced(kernel, blocks, self.values(arrays), row)
        return row

    def replaceable(self, source: View) -> bool:
        return source is self.call.x or (self.call.by_probability and source is self.call.t)

    def check(self) -> None:
        if not self.call.by_probability:
            self.look(self.statistics())

    def raise_invalid(self) -> None:
        self.call.raise_invalid(self.host(self.call.t))

    def scales(self, upstream: Any, gradient: bool) -> Values:
        """The arguments that gradients are multiplied by."""
        call = self.call
        number = 1.0 if upstream is None or isinstance(upstream, View) else upstream
        mean = gradient and call.reduction == "mean"
        constant = number / call.samples if mean and call.by_probability and call.samples else number
        values: Values = {"scale": self.bits(constant), "scale_z": self.bits(constant)}
        if mean and not call.by_probability:
            values["stats"] = self.statistics()
        if isinstance(upstream, View) and call.reduction != "none":
            values["factor"] = upstream
        return values

    def by_weight(self, gradient: bool) -> bool:
        """Whether gradients are divided by the sum of weights, which the GPU finds."""
        return gradient and self.call.reduction == "mean" and not self.call.by_probability

    def reduction(self, result: View | None, raw: bool, z: bool) -> Reduction | None:
        """What is made of the sums."""
        if result is None:
            return None
        if raw:
            return Reduction(self.compute, "sums")
        divisor = "constant" if self.call.by_probability else "weight"
        return Reduction(self.compute, result.dtype, divisor if self.call.reduction == "mean" else "one", z)


class SoftmaxRun(_ClassRun):
    """One call of cross_entropy."""

    call: SoftmaxCall

    def queue(
        self, losses: View | None, result: View | None, grads: Mapping[str, View], upstream: Any, raw: bool = False
    ) -> None:
        sinks = {name: grads[name] for name in ("input", "target") if name in grads}
        terms = None
        if "weight" in grads:  # before the input's gradient, which may replace the logits
            terms = self.temporary(self.call.x.shape, self.compute)
            self._queue(None, None, {"target": terms}, upstream, weight_terms=True)
        self._queue(losses, result, sinks, upstream, raw=raw)
        if terms is not None:
            to: list[int | None] = [None] * len(terms.shape)
            to[min(1, len(to) - 1)] = grads["weight"].data.strides[0]
            self.fold(terms, grads["weight"], to)

    def _queue(
        self,
        losses: View | None,
        result: View | None,
        grads: Mapping[str, View],
        upstream: Any,
        raw: bool = False,
        weight_terms: bool = False,
    ) -> None:
        call = self.call
        none = call.reduction == "none"
        arrays = self.arrays(
            logits=call.x,
            probabilities=call.t if call.by_probability else None,
            grad=grads.get("input"),
            grad_target=grads.get("target"),
            index=None if call.by_probability else call.t,
            upstream=upstream if none and isinstance(upstream, View) else None,
            losses=losses,
        )
        z_loss = call.lse_square_scale > 0
        options = self.options(arrays, upstream) | {
            "smoothing": call.label_smoothing > 0,
            "z_loss": z_loss,
            "softcap": call.softcap is not None,
            "by_weight": self.by_weight(bool(grads)),
            "weight_terms": weight_terms,
            "reduction": self.reduction(result, raw, z_loss),
        }
        smoothing = call.label_smoothing
        values = {**self.values(arrays), **self.scales(upstream, bool(grads)), "divisor": call.samples}
        values |= {
            "keep": self.bits(1.0 - smoothing),
            "share": self.bits(smoothing / max(call.classes, 1)),
            "lse_square_scale": self.bits(call.lse_square_scale),
            "softcap": self.bits(call.softcap or 0.0),
        }
        if arrays.adjoin() and not self._few(arrays):
            self._queue_rows(arrays, options, values, result, bool(grads))
        else:
            self._queue_samples(arrays, options, values, result)

    def _few(self, arrays: Arrays) -> bool:
        """Whether a thread takes a sample even though its classes lie side by side."""
        classes, tuning = self.call.classes, self.device.tuning
        if classes < MIN_ROW:
            return True
        return classes <= tuning.tile_classes and not self.call.by_probability and arrays.tiled()

    def _queue_samples(
        self, arrays: Arrays, options: dict[str, Any], values: Values, result: View | None
    ) -> None:
        classes, tuning = self.call.classes, self.device.tuning
        threads, tile, lanes = tuning.sample_threads, 0, 1
        if arrays.adjoin() and arrays.tiled() and classes <= tuning.tile_classes:
            tile = max(4, 1 << (classes - 1).bit_length()) if classes else 0
            threads = threads // 2 if self.compute == "float64" and tile > 32 else threads
        elif not arrays.adjoin():
            lanes = arrays.sample_lanes()
        kernel = SamplesKernel(**options, tile=tile, lanes=lanes, threads=max(WARP, threads))
        blocks = -(-arrays.samples // (kernel.lanes * kernel.threads))
        self.add_reduced(kernel, min(blocks, self.grid(tuning.row_blocks)), values, result)

    def _queue_rows(
        self, arrays: Arrays, options: dict[str, Any], values: Values, result: View | None, gradient: bool
    ) -> None:
        classes, tuning = self.call.classes, self.device.tuning
        lanes = arrays.row_lanes()
        vectors = max(1, tuning.vectors * (2 if lanes == 1 else 1) // (2 if self.compute == "float64" else 1))
        slices = self._slices(arrays.samples)
        if slices > 1:
            self._queue_slices(arrays, options | {"lanes": lanes, "vectors": vectors}, values, result, gradient, slices)
            return
        held = lanes * vectors  # classes that a thread's registers hold
        if classes <= WARP * held:
            group, threads, resident = WARP, tuning.row_threads[0], True
        else:
            fitting = [n for n in tuning.row_threads if classes <= n * held]
            group = threads = fitting[0] if fitting else tuning.long_row_threads
            resident = bool(fitting)
        kernel = RowsKernel(
            **options, lanes=lanes, vectors=vectors, group=group, threads=threads, resident=resident
        )
        blocks = -(-arrays.samples // (threads // group))
        self.add_reduced(kernel, min(blocks, self.grid(tuning.row_blocks)), values, result)

    def _slices(self, samples: int) -> int:
        """Into how many blocks a row is cut: 1 where there are rows enough to keep the GPU busy."""
        tuning = self.device.tuning
        wanted = self.grid(tuning.slice_blocks) // max(samples, 1)
        return max(1, min(wanted, self.call.classes // tuning.slice_classes))

    def _queue_slices(
        self,
        arrays: Arrays,
        options: dict[str, Any],
        values: Values,
        result: View | None,
        gradient: bool,
        slices: int,
    ) -> None:
        tuning, samples = self.device.tuning, arrays.samples
        threads = tuning.long_row_threads
        states = self.scratch((slices + 1) * samples * SAVED_BYTES)
        values = {**values, "slices": slices, "states": states}
        of_slices = {**options, "reduction": None, "group": threads, "threads": threads}
        self.add(RowsKernel(**of_slices, phase="part"), samples * slices, values)
        merge = RowsKernel(**options, phase="merge", group=WARP, threads=tuning.row_threads[0])
        self.add_reduced(merge, -(-samples // (merge.threads // WARP)), values, result)
        if gradient:
            self.add(RowsKernel(**of_slices, phase="spread"), samples * slices, values)


class NLLRun(_ClassRun):
    """One call of nll_loss."""

    call: NLLCall

    def queue(
        self, losses: View | None, result: View | None, grads: Mapping[str, View], upstream: Any, raw: bool = False
    ) -> None:
        tuning, call = self.device.tuning, self.call
        threads = tuning.pointwise_threads
        arrays = self.arrays(logits=call.x, index=call.t, losses=losses)
        reduction = self.reduction(result, raw, False)
        kernel = NLLKernel(**self.options(arrays, None), reduction=reduction, threads=threads)
        blocks = min(-(-arrays.samples // threads), self.grid(tuning.pointwise_blocks))
        self.add_reduced(kernel, blocks, self.values(arrays), result)
        if "input" in grads:
            up = upstream if call.reduction == "none" and isinstance(upstream, View) else None
            arrays = self.arrays(logits=call.x, index=call.t, grad=grads["input"], upstream=up)
            adjoin = arrays.steps["grad"] == grads["input"].data.itemsize
            group = min(threads, 1 << max(0, (call.classes - 1).bit_length())) if adjoin else 1
            kernel = NLLKernel(
                **self.options(arrays, upstream),
                by_weight=self.by_weight(True),
                phase="gradient",
                group=group,
                threads=threads,
            )
            blocks = min(-(-arrays.samples * group // threads), self.grid(tuning.pointwise_blocks) * 4)
            self.add(kernel, blocks, {**self.values(arrays), **self.scales(upstream, True)})
