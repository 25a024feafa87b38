"""The losses as objects that keep their options, with torch.nn's names and constructor arguments.

They are callables over any array that the functions take; what the options mean stands in the functions' docstrings.
"""

from __future__ import annotations

from typing import Any, ClassVar

from . import checks, dispatch, losses
from .call import Call

Array = Any


class _Module:
    """A function of `losses` with its options bound."""

    function: ClassVar[losses.Loss[Any]]
    options: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        # Legacy arguments become a reduction here, so that the warning comes once and points at the constructor.
        if "size_average" in options:
            legacy = options.pop("size_average"), options.pop("reduce")
            allowed = (*checks.REDUCTIONS, "batchmean") if self.function is losses.kl_div else checks.REDUCTIONS
            options["reduction"] = checks.reduction_of(*legacy, options["reduction"], allowed)
        self.options = options

    def call(self, input: Array, target: Array) -> Call:
        """The call that these arrays and my options make, not evaluated."""
        return self.function.call(input, target, **self.options)

    def arguments(self, input: Array, target: Array) -> dict[str, Any]:
        """What these arrays and my options give to the function, by name."""
        return {"input": input, "target": target, **self.options}

    def __call__(self, input: Array, target: Array) -> Array:
        if (engine := dispatch.engine((input, target, *self.options.values()))) is not None:
            return engine.evaluate(self.function, self.arguments(input, target))
        return self.call(input, target).evaluate()

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
        return f"{type(self).__name__}({options})"


class L1Loss(_Module):
    """`fastloss.l1_loss` with its options kept.

    >>> import numpy as np, fastloss
    >>> float(fastloss.L1Loss()(np.array([1.0, 2.0]), np.zeros(2)))
    1.5
    """

    function = losses.l1_loss

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        dtype: Any = None,
    ) -> None:
        super().__init__(size_average=size_average, reduce=reduce, reduction=reduction, dtype=dtype)


class MSELoss(_Module):
    """`fastloss.mse_loss` with its options kept.

    >>> import numpy as np, fastloss
    >>> float(fastloss.MSELoss(reduction="sum")(np.array([1.0, 2.0]), np.zeros(2)))
    5.0
    """

    function = losses.mse_loss

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        dtype: Any = None,
    ) -> None:
        super().__init__(size_average=size_average, reduce=reduce, reduction=reduction, dtype=dtype)


class CrossEntropyLoss(_Module):
    """`fastloss.cross_entropy` with its options kept.

    >>> import numpy as np, fastloss
    >>> loss = fastloss.CrossEntropyLoss(label_smoothing=0.1)
    >>> round(float(loss(np.array([[0.8, 0.1, 0.2]]), np.array([0]))), 4)
    0.7589
    """

    function = losses.cross_entropy

    def __init__(
        self,
        weight: Array = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        dtype: Any = None,
        check: bool | None = None,
    ) -> None:
        super().__init__(
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            lse_square_scale=lse_square_scale,
            softcap=softcap,
            dtype=dtype,
            check=check,
        )


class NLLLoss(_Module):
    """`fastloss.nll_loss` with its options kept.

    >>> import numpy as np, fastloss
    >>> round(float(fastloss.NLLLoss()(np.log([[0.7, 0.3]]), [0])), 4)
    0.3567
    """

    function = losses.nll_loss

    def __init__(
        self,
        weight: Array = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        dtype: Any = None,
        check: bool | None = None,
    ) -> None:
        super().__init__(
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            dtype=dtype,
            check=check,
        )


class BCELoss(_Module):
    """`fastloss.binary_cross_entropy` with its options kept.

    >>> import numpy as np, fastloss
    >>> float(fastloss.BCELoss()(np.array([0.0, 1.0]), np.array([1.0, 1.0])))
    50.0
    """

    function = losses.binary_cross_entropy

    def __init__(
        self,
        weight: Array = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        dtype: Any = None,
        check: bool | None = None,
    ) -> None:
        super().__init__(
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            dtype=dtype,
            check=check,
        )


class BCEWithLogitsLoss(_Module):
    """`fastloss.binary_cross_entropy_with_logits` with its options kept.

    >>> import numpy as np, fastloss
    >>> round(float(fastloss.BCEWithLogitsLoss()(np.zeros(3), np.array([0.0, 1.0, 1.0]))), 6)
    0.693147
    """

    function = losses.binary_cross_entropy_with_logits

    def __init__(
        self,
        weight: Array = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Array = None,
        *,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            pos_weight=pos_weight,
            dtype=dtype,
        )


class SmoothL1Loss(_Module):
    """`fastloss.smooth_l1_loss` with its options kept.

    >>> import numpy as np, fastloss
    >>> float(fastloss.SmoothL1Loss(beta=2.0)(np.array([1.0]), np.zeros(1)))
    0.25
    """

    function = losses.smooth_l1_loss

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        beta: float = 1.0,
        *,
        dtype: Any = None,
    ) -> None:
        super().__init__(size_average=size_average, reduce=reduce, reduction=reduction, beta=beta, dtype=dtype)


class HuberLoss(_Module):
    """`fastloss.huber_loss` with its options kept.

    >>> import numpy as np, fastloss
    >>> float(fastloss.HuberLoss(delta=2.0)(np.array([4.0]), np.zeros(1)))
    6.0
    """

    function = losses.huber_loss

    def __init__(self, reduction: str = "mean", delta: float = 1.0, *, dtype: Any = None) -> None:
        super().__init__(
            reduction=checks.reduction_of(None, None, reduction, checks.REDUCTIONS), delta=delta, dtype=dtype
        )


class KLDivLoss(_Module):
    """`fastloss.kl_div` with its options kept.

    >>> import numpy as np, fastloss
    >>> loss = fastloss.KLDivLoss(reduction="batchmean")
    >>> round(float(loss(np.log([[0.5, 0.5]]), np.array([[1.0, 0.0]]))), 6)
    0.693147
    """

    function = losses.kl_div

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
        *,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            size_average=size_average, reduce=reduce, reduction=reduction, log_target=log_target, dtype=dtype
        )
