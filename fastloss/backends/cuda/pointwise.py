"""Pointwise losses on a GPU: which kernel runs, over which elements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...arrays import View
from ...kernels.cuda.pointwise import COPY, PointwiseKernel
from ...kernels.cuda.sums import COUNT, ROW_BYTES, WEIGHT, Reduction
from ..layout import Shape, collapse
from .run import LONG, Run, Values, broadcast

if TYPE_CHECKING:
    from ...pointwise import PointwiseCall


class PointwiseRun(Run["PointwiseCall"]):
    """One call of a pointwise loss."""

    def __init__(self, call: PointwiseCall, number: int) -> None:
        super().__init__(call, number)
        self.compute = "float64" if any(view.dtype == "float64" for view in call.sources) else "float32"

    def queue(
        self, losses: View | None, result: View | None, grads: Mapping[str, View], upstream: Any, raw: bool = False
    ) -> None:
        call, none = self.call, self.call.reduction == "none"
        full = {
            name: grad if grad.shape == call.shape else self.temporary(call.shape, self.compute)
            for name, grad in grads.items()
        }
        divided = bool(grads) and call.reduction in ("mean", "batchmean")
        by_weight = divided and call.weighted_mean
        values: Values = {"scale": self.bits(self._scale(upstream, divided and not by_weight))}
        if by_weight:
            values["stats"] = self._sum_of_weights()
        factor = upstream if isinstance(upstream, View) and not none else None
        if factor is not None:
            values["factor"] = factor
        reduction = None if result is None else self._reduction(result, raw)
        values["divisor"] = call.rows if call.reduction == "batchmean" else call.samples
        for k, number in enumerate(call.parameters):
            values[f"parameter{k}"] = self.bits(number)
        views = [*call.sources, *([upstream] if none and isinstance(upstream, View) else [])]
        sinks = [view for view in (losses, full.get("input"), full.get("target")) if view is not None]
        options: dict[str, Any] = {
            "weight": call.w.dtype if call.w else None,
            "upstream": upstream.dtype if none and isinstance(upstream, View) else None,
            "factor": factor.dtype if factor is not None else None,
            "by_weight": by_weight,
            "losses": losses.dtype if losses else None,
            "grad": full["input"].dtype if "input" in full else None,
            "grad_target": full["target"].dtype if "target" in full else None,
            "reduction": reduction,
        }
        self._add(views, sinks, call.shape, options, values, result)
        for name, grad in grads.items():
            if full[name] is not grad:
                self.fold(full[name], grad, _axes(grad, call.shape))

    def _add(
        self,
        sources: list[View],
        sinks: list[View],
        shape: Shape,
        options: dict[str, Any],
        values: Values,
        result: View | None,
    ) -> None:
        call, tuning = self.call, self.device.tuning
        views = [*sources, *sinks]
        inputs = tuple(view.dtype for view in call.inputs)
        extents, strides = collapse(shape, [broadcast(view, shape) for view in views])
        total = math.prod(extents)
        dense = len(extents) == 1 and all(
            stride == (view.data.itemsize,) or total == 1 for stride, view in zip(strides, views, strict=True)
        )
        values |= {f"array{k}": view for k, view in enumerate(views)}
        ndim, threads = 0 if dense else len(extents), tuning.pointwise_threads
        long = total >= LONG
        kernel = PointwiseKernel(call.loss, self.compute, inputs, **options, ndim=ndim, threads=threads, long=long)
        head = self._head(views, kernel.lanes) if dense else 0
        if head is None:
            values |= {"head": total, "tail": total, "rest": total}
            blocks = -(-total // threads)
        else:
            head = min(head, total)
            chunks = (total - head) // kernel.chunk
            tail = head + chunks * kernel.chunk
            rest = total - chunks * kernel.chunk
            values |= {"chunks": chunks, "head": head, "tail": tail, "rest": rest}
            blocks = max(chunks, -(-rest // kernel.threads))
        if not dense:
            for d, extent in enumerate(extents):
                values[f"extent{d}"] = extent
                values |= {f"stride{k}_{d}": stride[d] for k, stride in enumerate(strides)}
        self.add_reduced(kernel, min(blocks, self.grid(tuning.pointwise_blocks)), values, result)

    @staticmethod
    def _head(views: list[View], lanes: int) -> int | None:
        """Elements before the first that is aligned to a vector in every array; None where they are not alike."""
        places = {(view.data.address // view.data.itemsize) % lanes for view in views}
        if len(places) > 1 or any(view.data.address % view.data.itemsize for view in views):
            return None
        return -places.pop() % lanes

    def _reduction(self, result: View, raw: bool) -> Reduction:
        if raw:
            return Reduction(self.compute, "sums")
        divisor = {"mean": "weight" if self.call.weighted_mean else "constant", "batchmean": "constant"}
        return Reduction(self.compute, result.dtype, divisor.get(self.call.reduction, "one"))

    def _scale(self, upstream: Any, divided: bool) -> float:
        """What gradients are multiplied by, as far as the host knows it."""
        number = 1.0 if upstream is None or isinstance(upstream, View) else upstream
        return number * self.call.scale(0.0, self.call.samples, self.call.rows) if divided else number

    def _sum_of_weights(self) -> View:
        """A row of sums whose losses are the weights."""
        w, shape = self.call.w, self.call.shape
        if w is None:
            raise ValueError("there are no weights")
        row = self.scratch(ROW_BYTES)
        extents, strides = collapse(shape, [broadcast(w, shape)])
        kernel = PointwiseKernel(
            COPY,
            self.compute,
            (w.dtype,),
            reduction=Reduction(self.compute, "sums"),
            ndim=len(extents),
            long=math.prod(extents) >= LONG,
            threads=self.device.tuning.pointwise_threads,
        )
        total = math.prod(extents)
        values: Values = {"array0": w, "head": total, "rest": total}
        for d, extent in enumerate(extents):
            values |= {f"extent{d}": extent, f"stride0_{d}": strides[0][d]}
        blocks = min(-(-total // kernel.threads), self.grid(self.device.tuning.pointwise_blocks))
        self.add_reduced(kernel, blocks, values, row)
        return row

    def in_vectors(self, view: View) -> bool:
        return True

    def replaceable(self, source: View) -> bool:
        return source.shape == self.call.shape

    def check(self) -> None:
        if self.call.loss.valid:
            row = self.scratch(ROW_BYTES)
            self.queue(None, row, {}, None, raw=True)
            self.look(row)

    def accumulate(self, per_sample: Any) -> list[float]:
        sums = super().accumulate(per_sample)
        if self.call.w is None:
            sums[WEIGHT] = float(self.call.samples)
        sums[COUNT] = float(self.call.samples)
        return sums

    def raise_invalid(self) -> None:
        self.call.raise_invalid(*(self.host(view) for view in (self.call.x, self.call.y)))


def _axes(grad: View, shape: Shape) -> list[int | None]:
    """The strides of a gradient along the axes of what its argument was broadcast to."""
    lead = len(shape) - len(grad.shape)
    own = zip(grad.shape, grad.data.strides, shape[lead:], strict=True)
    return [*[None] * lead, *(None if extent == 1 and whole != 1 else stride for extent, stride, whole in own)]
