"""torch.nn's loss modules, evaluated by fastloss: torch's own classes with another forward pass.

So constructors, buffers, state_dict, extra_repr and isinstance are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional


class L1Loss(nn.L1Loss):
    """`fastloss.torch.l1_loss` as torch.nn.L1Loss.

    >>> import torch, fastloss.torch as ft
    >>> ft.L1Loss()(torch.tensor([1.0, 2.0]), torch.zeros(2))
    tensor(1.5000)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.l1_loss(input, target, reduction=self.reduction)


class MSELoss(nn.MSELoss):
    """`fastloss.torch.mse_loss` as torch.nn.MSELoss.

    >>> import torch, fastloss.torch as ft
    >>> ft.MSELoss(reduction="sum")(torch.tensor([1.0, 2.0]), torch.zeros(2))
    tensor(5.)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.mse_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(nn.SmoothL1Loss):
    """`fastloss.torch.smooth_l1_loss` as torch.nn.SmoothL1Loss.

    >>> import torch, fastloss.torch as ft
    >>> ft.SmoothL1Loss(beta=2.0)(torch.tensor([1.0]), torch.zeros(1))
    tensor(0.2500)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(nn.HuberLoss):
    """`fastloss.torch.huber_loss` as torch.nn.HuberLoss.

    >>> import torch, fastloss.torch as ft
    >>> ft.HuberLoss(delta=2.0)(torch.tensor([4.0]), torch.zeros(1))
    tensor(6.)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCELoss(nn.BCELoss):
    """`fastloss.torch.binary_cross_entropy` as torch.nn.BCELoss.

    >>> import torch, fastloss.torch as ft
    >>> ft.BCELoss()(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    tensor(50.)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """`fastloss.torch.binary_cross_entropy_with_logits` as torch.nn.BCEWithLogitsLoss.

    >>> import torch, fastloss.torch as ft
    >>> ft.BCEWithLogitsLoss()(torch.zeros(3), torch.tensor([0.0, 1.0, 1.0]))
    tensor(0.6931)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.binary_cross_entropy_with_logits(
            input, target, weight=self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(nn.KLDivLoss):
    """`fastloss.torch.kl_div` as torch.nn.KLDivLoss.

    >>> import torch, fastloss.torch as ft
    >>> ft.KLDivLoss(reduction="batchmean")(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]))
    tensor(0.6931)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class NLLLoss(nn.NLLLoss):
    """`fastloss.torch.nll_loss` as torch.nn.NLLLoss.

    >>> import torch, fastloss.torch as ft
    >>> ft.NLLLoss()(torch.tensor([[0.7, 0.3]]).log(), torch.tensor([0]))
    tensor(0.3567)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.nll_loss(
            input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`fastloss.torch.cross_entropy` as torch.nn.CrossEntropyLoss, with its options that torch has not.

    >>> import torch, fastloss.torch as ft
    >>> ft.CrossEntropyLoss(label_smoothing=0.1)(torch.tensor([[0.8, 0.1, 0.2]]), torch.tensor([0]))
    tensor(0.7589)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        dtype: torch.dtype | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.lse_square_scale, self.softcap = lse_square_scale, softcap
        self.dtype, self.process_group = dtype, process_group

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            dtype=self.dtype,
            process_group=self.process_group,
        )
