"""The losses as compositions of torch's own differentiable operations.

Where a fused kernel cannot serve (second derivatives, forward mode, torch.func's transforms, a weight that learns),
torch differentiates these. Halves are computed in float32 and rounded once, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Bound here: `patched` replaces them in torch.nn.functional, and a composition must not come back to us.
_binary_cross_entropy, _cross_entropy, _huber_loss = F.binary_cross_entropy, F.cross_entropy, F.huber_loss
_logsigmoid, _nll_loss, _smooth_l1_loss = F.logsigmoid, F.nll_loss, F.smooth_l1_loss


def pointwise(elementwise: Callable[..., Tensor], *, weighted_mean: bool = False) -> Callable[..., Tensor]:
    """A loss out of its elements' losses. `weighted_mean`: whether a mean divides by the sum of weights."""

    def composite(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *operands: Tensor | None,
        reduction: str,
        dtype: torch.dtype | None,
        **parameters: Any,
    ) -> Tensor:
        result = dtype or result_dtype(input, target)
        compute = torch.float64 if torch.float64 in (input.dtype, target.dtype) else torch.float32
        given = (None if operand is None else operand.to(compute) for operand in operands)
        loss = elementwise(input.to(compute), target.to(compute), *given, **parameters)
        if weight is not None:
            loss = loss * weight
        if reduction == "mean":
            weighted = weighted_mean and weight is not None
            loss = loss.sum() / weight.sum() if weighted else loss.mean()  # type: ignore[union-attr]  # weighted
        elif reduction == "batchmean":
            loss = loss.sum() / (input.shape[0] if input.ndim else 1)
        elif reduction == "sum":
            loss = loss.sum()
        return loss.to(result)

    return composite


def l1(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|"""
    d = x - y
    return d * d.detach().sign()  # abs would leave a tensor of zeros without memory in traced second derivatives


def mse(x: Tensor, y: Tensor) -> Tensor:
    """(x - y)**2"""
    return (x - y) ** 2


def smooth_l1(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """(x - y)**2 / (2 beta) under beta, else |x - y| - beta / 2"""
    x, y = torch.broadcast_tensors(x, y)
    return _smooth_l1_loss(x, y, reduction="none", beta=beta)


def huber(x: Tensor, y: Tensor, delta: float) -> Tensor:
    """(x - y)**2 / 2 up to delta, else delta (|x - y| - delta / 2)"""
    x, y = torch.broadcast_tensors(x, y)
    return _huber_loss(x, y, reduction="none", delta=delta)


def bce(x: Tensor, y: Tensor) -> Tensor:
    """-(y log x + (1 - y) log(1 - x)), each logarithm at least -100"""
    return _binary_cross_entropy(x, y, reduction="none")


def bce_with_logits(x: Tensor, y: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """-(p y log sigmoid(x) + (1 - y) log sigmoid(-x))"""
    positive = y if pos_weight is None else y * pos_weight
    # a label that has no share costs nothing, even at an infinite logit
    cost = torch.where(positive == 0, positive * 0, positive * _logsigmoid(x))
    return -(cost + torch.where(y == 1, (1 - y) * 0, (1 - y) * _logsigmoid(-x)))


def kl_div(x: Tensor, y: Tensor, log_target: bool) -> Tensor:
    """y (log y - x), 0 where y is 0, or exp(y) (y - x)"""
    if log_target:
        return y.exp() * (y - x)
    return torch.xlogy(y, y) - torch.where(y == 0, 0.0, y * x)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str,
    dtype: torch.dtype | None,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale: float,
    softcap: float | None,
) -> Tensor:
    """Softmax cross-entropy, with z-loss and capped logits."""
    by_probability = target.is_floating_point()
    result = dtype or (result_dtype(input, target) if by_probability else input.dtype)
    logits, target, weight = _promoted(input, target, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    axis = min(logits.ndim - 1, 1)
    ignored = torch.zeros_like(logits.select(axis, 0), dtype=torch.bool) if by_probability else target == ignore_index
    logits = torch.where(ignored.unsqueeze(axis), 0.0, logits)  # what it holds must not reach the others' gradients
    loss = _cross_entropy(
        logits, target, weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    if lse_square_scale:
        square = torch.where(ignored, 0.0, lse_square_scale * logits.logsumexp(axis) ** 2)
        if reduction != "none":
            square = square.sum()
        loss = loss + (square / (~ignored).sum() if reduction == "mean" else square)
    return loss.to(result)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str,
    dtype: torch.dtype | None,
    ignore_index: int,
) -> Tensor:
    """The negative of the target class's log-probability."""
    result = dtype or input.dtype
    logits, target, weight = _promoted(input, target, weight)
    return _nll_loss(logits, target, weight, reduction=reduction, ignore_index=ignore_index).to(result)


def result_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """The dtype of a loss of these, where the caller asked for none: floats win over integers."""
    floats = [tensor.dtype for tensor in (input, target) if tensor.is_floating_point()]
    if not floats:
        raise TypeError(
            f"input has dtype {input.dtype} and target {target.dtype}; a loss needs floating-point numbers: cast one "
            "of them, for example to torch.float32"
        )
    return floats[0] if len(floats) == 1 else torch.promote_types(*floats)


def _promoted(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, target and class weights as torch's own losses take them."""
    compute = torch.float64 if torch.float64 in (input.dtype, target.dtype) else torch.float32
    target = target.to(compute if target.is_floating_point() else torch.int64)
    return input.to(compute), target, None if weight is None else weight.to(compute)
