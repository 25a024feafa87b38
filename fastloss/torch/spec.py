"""What there is to know of each loss: the function that evaluates it, its arguments, and its composition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..transforms import value_and_grad
from . import composite

# Options that every loss has, and what they are where nobody says.
_REDUCTION: dict[str, tuple[str, Any]] = {"reduction": ("str", "mean")}
_DTYPE: dict[str, tuple[str, Any]] = {"dtype": ("ScalarType?", None)}
_IGNORE: dict[str, tuple[str, Any]] = {"ignore_index": ("int", -100)}


@dataclass(frozen=True, eq=False)
class Spec:
    """One loss."""

    loss: losses.Loss[Any]
    composite: Callable[..., Tensor]
    tensors: tuple[str, ...] = ("input", "target")  # its arguments that are tensors, in this order
    own: Mapping[str, tuple[str, Any]] = field(default_factory=dict)  # options of its own: type in a schema, default
    classes: bool = False  # the input is (C), (N, C) or (N, C, d1, ...): a sample is a row of it
    target_learns: bool = True  # whether the kernel has a gradient by target

    @cached_property
    def name(self) -> str:
        """Of the function, here and in torch."""
        return self.loss.call.__name__

    @cached_property
    def options(self) -> dict[str, tuple[str, Any]]:
        """Every option: its type in a schema and its default."""
        return {**_REDUCTION, **self.own, **_DTYPE}

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return {name: default for name, (_, default) in self.options.items()}

    def given(self, tensors: Sequence[Tensor | None], options: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `loss` for what is not at its default."""
        defaults = self._defaults
        found: dict[str, Any] = {}
        if options != defaults:
            found = {name: value for name, value in options.items() if value != defaults[name]}
        for name, tensor in zip(self.tensors[2:], tensors[2:], strict=bool(tensors)):
            if tensor is not None:
                found[name] = tensor
        return found

    def by_probability(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the target holds class probabilities."""
        target = tensors[1]
        return self.classes and self.target_learns and target is not None and target.is_floating_point()

    def differentiable(self, tensors: Sequence[Tensor | None]) -> tuple[str, ...]:
        """The arguments by which the kernel has a gradient."""
        if not self.classes:
            return "input", "target"
        return ("input", "target", "weight") if self.by_probability(tensors) else ("input",)

    def losses_shape(self, input: Tensor, target: Tensor) -> torch.Size:
        """The shape of the samples' losses; raises ValueError where input and target do not belong together."""
        if not self.classes:
            return torch.broadcast_shapes(input.shape, target.shape)
        axis = min(input.ndim - 1, 1)
        shape = input.shape[:axis] + input.shape[axis + 1 :]
        if target.shape != (input.shape if self.by_probability((input, target)) else shape):
            raise ValueError(
                f"target has shape {tuple(target.shape)}, expected {tuple(shape)} to match input of shape "
                f"{tuple(input.shape)}"
            )
        return shape

    def result_dtype(self, input: Tensor, target: Tensor, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of the loss."""
        if dtype is not None:
            return dtype
        plain = self.classes and not self.by_probability((input, target))
        return input.dtype if plain else composite.result_dtype(input, target)

    def fused(self, names: tuple[str, ...]) -> Callable[..., Any]:
        """`loss` with its gradients by these arguments."""
        return _fused(self.loss, names)


@cache
def _fused(loss: losses.Loss[Any], names: tuple[str, ...]) -> Callable[..., Any]:
    return value_and_grad(loss, argnums=tuple(("input", "target", "weight").index(name) for name in names))


L1 = Spec(losses.l1_loss, composite.pointwise(composite.l1, weighted_mean=True), ("input", "target", "weight"))
MSE = Spec(losses.mse_loss, composite.pointwise(composite.mse, weighted_mean=True), ("input", "target", "weight"))
SMOOTH_L1 = Spec(losses.smooth_l1_loss, composite.pointwise(composite.smooth_l1), own={"beta": ("float", 1.0)})
HUBER = Spec(
    losses.huber_loss,
    composite.pointwise(composite.huber),
    ("input", "target", "weight"),
    {"delta": ("float", 1.0)},
)
BCE = Spec(losses.binary_cross_entropy, composite.pointwise(composite.bce), ("input", "target", "weight"))
BCE_WITH_LOGITS = Spec(
    losses.binary_cross_entropy_with_logits,
    composite.pointwise(composite.bce_with_logits),
    ("input", "target", "weight", "pos_weight"),
)
KL_DIV = Spec(losses.kl_div, composite.pointwise(composite.kl_div), own={"log_target": ("bool", False)})
CROSS_ENTROPY = Spec(
    losses.cross_entropy,
    composite.cross_entropy,
    ("input", "target", "weight"),
    {
        **_IGNORE,
        "label_smoothing": ("float", 0.0),
        "lse_square_scale": ("float", 0.0),
        "softcap": ("float?", None),
    },
    classes=True,
)
NLL = Spec(
    losses.nll_loss, composite.nll_loss, ("input", "target", "weight"), _IGNORE, classes=True, target_learns=False
)

SPECS = (L1, MSE, SMOOTH_L1, HUBER, BCE, BCE_WITH_LOGITS, KL_DIV, CROSS_ENTROPY, NLL)
