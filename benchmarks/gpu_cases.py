"""The work that is timed on a GPU: issue 6's table with its goals, and a sweep over dtypes and sizes for the plots.

Nothing here imports an array library: the supervising process reads it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
CONTENDERS = ("fastloss", "torch", "torch.compile", "CuPy", "JAX", "Liger")
CLASS_INDICES = CONTENDERS
OTHERS = CONTENDERS[:-1]  # Liger has cross-entropy of class indices only
HOST_TIME = "host time of one call, cross_entropy float32 32 x 10"
HOST_CONTENDERS = ("fastloss", "torch", "torch.compile")


@dataclass(frozen=True)
class Work:
    """One call: a loss by name on (rows, classes), (N, C, d...) or (elements,); targets are int64 indices or floats."""

    loss: str
    dtype: str
    shape: tuple[int, ...]
    gradient: bool = False
    probabilities: bool = False
    goal: dict[str, Any] | None = None
    contenders: tuple[str, ...] = OTHERS
    section: str = "goals"

    @property
    def name(self) -> str:
        words = [self.loss, "probabilities" * self.probabilities, "value and gradient" * self.gradient, self.dtype]
        return " ".join([word for word in words if word] + [" x ".join(f"{extent:,}" for extent in self.shape)])

    @property
    def indices(self) -> bool:
        return self.loss in ("cross_entropy", "nll_loss") and not self.probabilities

    @property
    def samples(self) -> tuple[int, ...]:
        """The shape of the losses without a reduction."""
        return self.shape if len(self.shape) == 1 else self.shape[:1] + self.shape[2:]

    @property
    def nbytes(self) -> int:
        """Inputs read once, the gradient or the result written once."""
        floats = ITEMSIZE[self.dtype] * math.prod(self.shape)
        target = 8 * math.prod(self.samples) if self.indices else floats
        return floats + target + (floats if self.gradient else 0) + ITEMSIZE[self.dtype]

    def tiny(self) -> Work:
        """The same call, small enough for Numba's simulator."""
        return replace(self, shape=(5, 24) if len(self.shape) == 2 else (40,))


def cross_entropy(dtype: str, rows: int, classes: int, **more: Any) -> Work:
    indices = not more.get("probabilities")
    return Work("cross_entropy", dtype, (rows, classes), **{"contenders": CLASS_INDICES if indices else OTHERS} | more)


def _goals() -> list[Work]:
    forward = [(32_768, 1_024, 0.75), (32_768, 4_096, 0.90), (32_768, 32_768, 0.95), (8_192, 131_072, 0.93)]
    fused = [(32_768, 4_096, 0.85), (8_192, 32_000, 0.85), (4_096, 128_256, 0.75)]
    pointwise = ("mse_loss", "l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits")
    return [
        *(
            cross_entropy("bfloat16", rows, classes, goal={"fraction": fraction, "versus": {"torch.compile": 2.0}})
            for rows, classes, fraction in forward
        ),
        *(
            cross_entropy(
                "bfloat16", rows, classes, gradient=True, goal={"fraction": fraction, "versus": {"Liger": 1.3}}
            )
            for rows, classes, fraction in fused
        ),
        cross_entropy("float32", 8, 1 << 20, goal={"fraction": 0.6}),
        cross_entropy("float32", 8, 1 << 20, gradient=True, goal={"fraction": 0.6}),
        cross_entropy("float32", 1 << 20, 10, goal={"fraction": 0.75}),
        cross_entropy("float32", 32_768, 1_024, probabilities=True, goal={"fraction": 0.85}),
        *(Work(loss, "float32", (1 << 28,), goal={"fraction": 0.92}) for loss in pointwise),
    ]


def _sweep() -> list[Work]:
    """Class counts at 2**28 elements (2**27 of float64), and pointwise sizes; what matters most comes first.

    torch.compile takes seconds to compile each, so it runs beside one dtype.
    """
    classes = (2, 10, 32, 100, 256, 1_024, 4_096, 16_384, 65_536, 262_144)
    plain, compiled = ("fastloss", "torch"), ("fastloss", "torch", "torch.compile")

    def by_classes(dtype: str, contenders: tuple[str, ...]) -> list[Work]:
        elements = 1 << (27 if dtype == "float64" else 28)
        more: dict[str, Any] = {"contenders": contenders, "section": "sweep"}
        return [
            cross_entropy(dtype, elements // count, count, gradient=gradient, **more)
            for gradient in (False, True)
            for count in classes
        ]

    sizes = [Work("mse_loss", "float32", (1 << k,), contenders=compiled, section="sweep") for k in range(16, 29, 2)]
    others = [work for dtype in ("float32", "float16", "float64") for work in by_classes(dtype, plain)]
    return [*by_classes("bfloat16", compiled), *sizes, *others]


GOALS = _goals()
# What the goals' table times already is not timed again.
SWEEP = [work for work in _sweep() if work.name not in {goal.name for goal in GOALS}]
BY_NAME = {work.name: work for work in (*GOALS, *SWEEP)}
HOST_GOAL = {"ms": 0.015}

# One call for each way that kernels go over memory; the second shape is for Numba's simulator.
_KINDS: tuple[tuple[Work, tuple[int, ...]], ...] = (
    (cross_entropy("float32", 50_000, 10), (6, 5)),
    (cross_entropy("bfloat16", 2_048, 1_000), (2, 70)),
    (cross_entropy("float16", 128, 32_003), (2, 33)),
    (cross_entropy("float32", 4, 1_000_003), (1, 130)),
    (cross_entropy("bfloat16", 8, 1 << 20), (2, 64)),
    (Work("cross_entropy", "float32", (8, 21, 64, 65)), (2, 3, 2, 2)),
    (cross_entropy("float32", 1_024, 1_001, probabilities=True), (3, 17)),
    (cross_entropy("float64", 1_000, 257), (3, 9)),
    (Work("mse_loss", "float32", ((1 << 22) + 3,)), (70,)),
    (Work("l1_loss", "bfloat16", ((1 << 22) + 5,)), (41,)),
    (Work("binary_cross_entropy", "float32", ((1 << 20) + 1,)), (33,)),
    (Work("binary_cross_entropy_with_logits", "float16", ((1 << 20) + 7,)), (35,)),
)


def kinds(simulated: bool) -> list[Work]:
    """What the checks run over."""
    return [replace(work, shape=tiny) if simulated else work for work, tiny in _KINDS]
