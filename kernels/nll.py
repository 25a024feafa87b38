"""Negative log-likelihood, -weight[t] * x[t]: reads one logit a sample, wherever it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import storage
from .compiler import Variant
from .exact import two_sum
from .pointwise import SUMS
from .records import ARRAYS, NUMBERS
from .targets import INVALID, LIVE, Targets
from .values import F64, I64, Value, full, loop, when


@dataclass(frozen=True)
class NLLVariant(Variant):
    """One kernel over the arrays and parameters of `softmax`, which may lie in any way.
    Only the targets' gradients are written: the others stay the zeros that they are."""

    logits: str
    index: str = "int64"  # storage of the class indices
    weighted: bool = False  # float64 class weights
    upstream: bool = False
    losses: str | None = None
    grad: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this kernel from every other, for the disk cache."""
        return ("nll", self.logits, self.index, self.weighted, self.upstream, self.losses, self.grad)

    def emit(self, n: Value, arrays: Value, parameters: Value, sums: Value) -> None:
        """`void kernel(n, arrays, parameters, sums)` over n samples; adds to the float64 slots `SUMS`."""
        a = {name: (arrays + 8 * k).load(I64) for k, name in enumerate(ARRAYS)}
        scale = (parameters + 8 * NUMBERS.index("scale")).load(F64)
        targets = Targets(a["index"], self.index, a["classes"], a["ignore_index"])
        zero, one = full(n.b, F64, 1), full(n.b, F64, 1, 1.0)

        def sample(i: Value, *state: Value) -> Sequence[Value]:
            t, fate = targets.one(i)

            def live() -> list[Value]:
                row = a["logits"] + i * a["logits_row"]
                x = storage.load(row + t * a["logits_step"], self.logits, F64)
                weight = (a["weight"] + 8 * t).load(F64) if self.weighted else one
                if self.grad:
                    slope = -(weight * scale)
                    if self.upstream:
                        slope = slope * (a["upstream"] + 8 * i).load(F64)
                    target = a["grad"] + i * a["grad_row"] + t * a["grad_step"]
                    storage.store(target, slope, self.grad)
                return [-(weight * x), weight, one]

            loss, weight, count = when(fate == LIVE, live, lambda: [zero] * 3)
            if self.losses:
                storage.store(a["losses"] + i * storage.itemsize(self.losses), loss, self.losses)
            invalid = (fate == INVALID).select(one, state[5])
            return [*two_sum(state[0:2], loss), *two_sum(state[2:4], weight), state[4] + count, invalid]

        names = ("loss", "loss_low", "weight", "weight_low", "count", "invalid")
        slots = [sums + 8 * SUMS.index(name) for name in names]
        _, state = loop(Value(n.b, I64(0)), n, 1, [slot.load(F64) for slot in slots], sample)
        for slot, value in zip(slots, state, strict=True):
            slot.store(value)
