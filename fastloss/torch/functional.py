"""torch.nn.functional's losses, argument for argument, and which way a call of them takes.

An eager call that needs no gradient goes straight to the kernel; one that does is recorded with the gradients that the
kernel wrote (`autograd`); what is traced or intercepted sees an operator (`ops`); where functions are transformed, or
a kernel has no gradient, torch differentiates its own operations (`composite`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn._reduction import legacy_get_string
from torch.overrides import handle_torch_function, has_torch_function

from . import ops
from .autograd import Fused
from .errors import translated
from .spec import (
    BCE,
    BCE_WITH_LOGITS,
    CROSS_ENTROPY,
    HUBER,
    KL_DIV,
    L1,
    MSE,
    NLL,
    SMOOTH_L1,
    Spec,
)

P = ParamSpec("P")
Arguments = tuple[Sequence[Tensor | None], dict[str, Any]]  # of a loss: its tensors, and all of its options

_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_autocasts = torch._C._is_any_autocast_enabled
_compiling = torch.compiler.is_compiling
_PLAIN = (Tensor, torch.nn.Parameter)
_READ = ("cpu", "cuda")  # devices whose memory kernels read


def _drop_in(spec: Spec) -> Callable[[Callable[P, Arguments]], Callable[P, Tensor]]:
    """A function of torch's signature that evaluates the loss; the decorated one says what its arguments are."""
    plans = spec.loss.plans

    def decorate(arguments: Callable[P, Arguments]) -> Callable[P, Tensor]:
        @wraps(arguments)
        def function(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            key = None
            if _ordinary():
                key = plans.key(args, kwargs)
                plan = plans.find(key)
                if plan is not None and (result := plan(*args)) is not None:
                    return result
            tensors, options = arguments(*args, **kwargs)
            given = [tensor for tensor in tensors if tensor is not None]
            if has_torch_function(given):
                found: Tensor = handle_torch_function(function, given, *args, **kwargs)
                return found
            options = _autocast(tensors, options)
            if (group := options.pop("process_group", None)) is not None:
                return _vocab_parallel(group, tensors, options)
            if _compiling():
                return _traced(spec, tensors, options)
            value = _evaluate(spec, tensors, options)
            if key is not None:  # the library knows its plan by the arguments that are not at their defaults
                plans.keep(key, plans.find(plans.key(args[:2], spec.given(tensors, options))))
            return value

        return function

    return decorate


def _ordinary() -> bool:
    """Whether nothing traces, transforms or intercepts what is called now."""
    return not (
        _compiling()
        or _transforms_active()
        or _dispatch_modes()
        or _function_modes()
        or _autocasts()
        or forward_ad._current_level >= 0
    )


@translated
def _evaluate(spec: Spec, tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Tensor:
    """A call that is not being compiled."""
    wanted = _wanted(spec, tensors)
    has_kernels = not wanted or set(wanted) <= set(spec.differentiable(tensors))
    if not has_kernels or _transforms_active() or forward_ad._current_level >= 0:
        spec.loss.call(None, None, **spec.given((), options))  # options are checked as anywhere
        return spec.composite(*tensors, **options)
    if _dispatch_modes() or any(t is not None and (type(t) not in _PLAIN or t.is_meta) for t in tensors):
        return ops.call(spec, tensors, options)
    found: Tensor
    if wanted:
        found = Fused.apply(spec, options, wanted, *tensors)
    else:
        found = spec.loss(*tensors[:2], **spec.given(tensors, options))
    return found


def _traced(spec: Spec, tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Tensor:
    """A call that torch.compile sees."""
    if set(_wanted(spec, tensors)) <= set(spec.differentiable(tensors)):
        return ops.call(spec, tensors, options)
    return spec.composite(*tensors, **options)


@translated
def _vocab_parallel(group: Any, tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Tensor:
    """Cross-entropy of logits whose classes are spread over the ranks of the group."""
    from .parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(*tensors, process_group=group, **options)


def _autocast(tensors: Sequence[Tensor | None], options: dict[str, Any]) -> dict[str, Any]:
    """Autocast runs losses in float32; our kernels do so without a copy."""
    if not _autocasts() or options["dtype"] is not None:
        return options
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device.type
    if device in _READ and torch.is_autocast_enabled(device) and _half(given):
        return options | {"dtype": torch.float32}
    return options


def _wanted(spec: Spec, tensors: Sequence[Tensor | None]) -> tuple[str, ...]:
    """The arguments that a gradient is wanted for."""
    if not torch.is_grad_enabled():
        return ()
    pairs = zip(spec.tensors, tensors, strict=True)
    return tuple([name for name, tensor in pairs if tensor is not None and tensor.requires_grad])


def _half(tensors: Sequence[Tensor]) -> bool:
    floats = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return bool(floats & {torch.float16, torch.bfloat16}) and torch.float64 not in floats


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction that torch's legacy arguments ask for, with torch's warning."""
    if size_average is None and reduce is None:
        return reduction
    return legacy_get_string(size_average, reduce)


@_drop_in(L1)
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Arguments:
    """Absolute error, |input - target|: `fastloss.l1_loss`, recorded for autograd.

    Args:
        input, target: tensors of one shape; different shapes are broadcast with a `fastloss.BroadcastWarning`.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none', 'mean' (with weight: sum(weight * loss) / sum(weight)) or 'sum'.
        weight: element weights of the shape of input.
        dtype: of the result; otherwise the promoted dtype of input and target.

    Returns:
        A tensor of shape (), or for 'none' of the broadcast shape.

    Raises:
        ValueError, TypeError (both RuntimeError too): shapes, options; dtypes.

    Source: torch.nn.functional.l1_loss.

    >>> import torch, fastloss.torch as ft
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> ft.l1_loss(x, torch.zeros(2)).backward()
    >>> x.grad
    tensor([0.5000, 0.5000])
    """
    reduction = _reduction(size_average, reduce, reduction)
    return (input, target, weight), {"reduction": reduction, "dtype": dtype}


@_drop_in(MSE)
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Arguments:
    """Squared error, (input - target)**2, no 1/2: `fastloss.mse_loss`, recorded for autograd.

    Args:
        input, target: tensors of one shape; different shapes are broadcast with a `fastloss.BroadcastWarning`.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none', 'mean' (with weight: sum(weight * loss) / sum(weight)) or 'sum'.
        weight: element weights of the shape of input.
        dtype: of the result; otherwise the promoted dtype of input and target.

    Returns:
        A tensor of shape (), or for 'none' of the broadcast shape.

    Raises:
        ValueError, TypeError (both RuntimeError too): shapes, options; dtypes.

    Source: torch.nn.functional.mse_loss.

    >>> import torch, fastloss.torch as ft
    >>> ft.mse_loss(torch.tensor([1.0, 2.0]), torch.zeros(2), reduction="sum")
    tensor(5.)
    """
    reduction = _reduction(size_average, reduce, reduction)
    return (input, target, weight), {"reduction": reduction, "dtype": dtype}


@_drop_in(SMOOTH_L1)
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
    *,
    dtype: torch.dtype | None = None,
) -> Arguments:
    """d**2 / (2 beta) where d = |input - target| is under beta, else d - beta / 2: `fastloss.smooth_l1_loss`.

    Args:
        input, target: tensors of one shape; different shapes are broadcast with a `fastloss.BroadcastWarning`.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none', 'mean' or 'sum'.
        beta: where the square ends, at least 0; 0 is `l1_loss`.
        dtype: of the result; otherwise the promoted dtype of input and target.

    Returns:
        A tensor of shape (), or for 'none' of the broadcast shape.

    Raises:
        ValueError, TypeError (both RuntimeError too): shapes, options; dtypes.

    Source: torch.nn.functional.smooth_l1_loss; Girshick, Fast R-CNN (2015).

    >>> import torch, fastloss.torch as ft
    >>> ft.smooth_l1_loss(torch.tensor([0.5, 3.0]), torch.zeros(2), reduction="none")
    tensor([0.1250, 2.5000])
    """
    reduction = _reduction(size_average, reduce, reduction)
    return (input, target), {"reduction": reduction, "beta": beta, "dtype": dtype}


@_drop_in(HUBER)
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Arguments:
    """d**2 / 2 where d = |input - target| is at most delta, else delta * (d - delta / 2): `fastloss.huber_loss`.

    Args:
        input, target: tensors of one shape; different shapes are broadcast with a `fastloss.BroadcastWarning`.
        reduction: 'none', 'mean' (divides by the number of elements, weighted or not) or 'sum'.
        delta: where the square ends, greater than 0.
        weight: element weights of the shape of input.
        dtype: of the result; otherwise the promoted dtype of input and target.

    Returns:
        A tensor of shape (), or for 'none' of the broadcast shape.

    Raises:
        ValueError, TypeError (both RuntimeError too): shapes, options; dtypes.

    Source: torch.nn.functional.huber_loss; Huber, Robust estimation of a location parameter (1964).

    >>> import torch, fastloss.torch as ft
    >>> ft.huber_loss(torch.tensor([0.5, 3.0]), torch.zeros(2), reduction="none", delta=2.0)
    tensor([0.1250, 4.0000])
    """
    return (input, target, weight), {"reduction": reduction, "delta": delta, "dtype": dtype}


@_drop_in(BCE)
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    dtype: torch.dtype | None = None,
) -> Arguments:
    """-(target * log(input) + (1 - target) * log(1 - input)), each logarithm at least -100:
    `fastloss.binary_cross_entropy`.

    Args:
        input: probabilities, 0 to 1, any shape.
        target: probabilities or labels, 0 to 1, of the shape of input.
        weight: factors of the elements' losses, broadcast to the shape of input.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none', 'mean' (divides by the number of elements, weighted or not) or 'sum'.
        dtype: of the result; otherwise the promoted dtype of input and target.

    Returns:
        A tensor of shape (), or for 'none' of the shape of input.

    Raises:
        ValueError, TypeError (both RuntimeError too): shapes, options, a number outside 0 to 1; dtypes.

    Source: torch.nn.functional.binary_cross_entropy.

    >>> import torch, fastloss.torch as ft
    >>> ft.binary_cross_entropy(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    tensor(50.)
    """
    reduction = _reduction(size_average, reduce, reduction)
    return (input, target, weight), {"reduction": reduction, "dtype": dtype}


@_drop_in(BCE_WITH_LOGITS)
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Arguments:
    """-(pos_weight * target * log(sigmoid(input)) + (1 - target) * log(1 - sigmoid(input))):
    `fastloss.binary_cross_entropy_with_logits`.

    Args:
        input: logits, any shape.
        target: probabilities or labels of the shape of input.
        weight: factors of the elements' losses, broadcast to the shape of input.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none', 'mean' (divides by the number of elements, weighted or not) or 'sum'.
        pos_weight: weight of the positive class, broadcast to the shape of input.
        dtype: of the result; otherwise the promoted dtype of input and target.

    Returns:
        A tensor of shape (), or for 'none' of the shape of input.

    Raises:
        ValueError, TypeError (both RuntimeError too): shapes, options; dtypes.

    Source: torch.nn.functional.binary_cross_entropy_with_logits.

    >>> import torch, fastloss.torch as ft
    >>> ft.binary_cross_entropy_with_logits(torch.zeros(2), torch.tensor([0.0, 1.0]))
    tensor(0.6931)
    """
    reduction = _reduction(size_average, reduce, reduction)
    return (input, target, weight, pos_weight), {"reduction": reduction, "dtype": dtype}


@_drop_in(KL_DIV)
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Arguments:
    """target * (log(target) - input), 0 where target is 0: `fastloss.kl_div`.

    Args:
        input: log-probabilities, any shape.
        target: probabilities of the same shape (others are broadcast with a `fastloss.BroadcastWarning`), or their
            logarithms.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none', 'mean' (over all elements), 'batchmean' (sum / shape[0], the divergence itself) or 'sum'.
        log_target: whether target holds logarithms: exp(target) * (target - input).
        dtype: of the result; otherwise the promoted dtype of input and target.

    Returns:
        A tensor of shape (), or for 'none' of the broadcast shape.

    Raises:
        ValueError, TypeError (both RuntimeError too): shapes, options; dtypes.

    Source: torch.nn.functional.kl_div; Kullback and Leibler, On information and sufficiency (1951).

    >>> import torch, fastloss.torch as ft
    >>> ft.kl_div(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]), reduction="batchmean")
    tensor(0.6931)
    """
    if reduction != "batchmean":
        reduction = _reduction(size_average, reduce, reduction)
    return (input, target), {"reduction": reduction, "log_target": log_target, "dtype": dtype}


@_drop_in(CROSS_ENTROPY)
def cross_entropy(
    input: Tensor,
    target: Tensor,
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
) -> Arguments:
    """-log(softmax(input)[target]): `fastloss.cross_entropy`, recorded for autograd.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK) for C classes.
        target: class indices of any integer dtype and shape (), (N) or (N, d1, ..., dK); or class probabilities of the
            shape of input.
        weight: (C) class weights.
        size_average, reduce: deprecated, as in torch.
        ignore_index: samples of this class index cost nothing and count for nothing.
        reduction: 'none'; 'mean', which divides by the sum of weight[t] over the samples not ignored (class
            probabilities: by the number of samples); or 'sum'.
        label_smoothing: e in 0 to 1: probabilities (1 - e) * q + e / C replace q.
        lse_square_scale: z-loss, adds lse_square_scale * log(sum_c exp(input[c]))**2 to each sample not ignored.
        softcap: softcap * tanh(input / softcap) replaces input; greater than 0.
        dtype: of the result; otherwise the dtype of input.
        process_group: of torch.distributed: input, weight and class probabilities are this rank's classes of a
            vocabulary that is spread over the group in the order of ranks; target holds class indices of the whole.

    Returns:
        A tensor of shape (), or for 'none' of the shape of the samples.

    Raises:
        ValueError, TypeError (both RuntimeError too): shapes, options; dtypes. IndexError: a class index out of range.

    Source: torch.nn.functional.cross_entropy; lse_square_scale and softcap as in Liger-Kernel.

    >>> import torch, fastloss.torch as ft
    >>> logits = torch.tensor([[0.8, 0.1, 0.2]], requires_grad=True)
    >>> ft.cross_entropy(logits, torch.tensor([0])).backward()
    >>> logits.grad
    tensor([[-0.5111,  0.2428,  0.2683]])
    """
    options = {
        "reduction": _reduction(size_average, reduce, reduction),
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
        "dtype": dtype,
    }
    if process_group is not None:
        options["process_group"] = process_group
    return (input, target, weight), options


@_drop_in(NLL)
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    dtype: torch.dtype | None = None,
) -> Arguments:
    """-input[target], of log-probabilities: `fastloss.nll_loss`, recorded for autograd.

    Args:
        input: log-probabilities of shape (C), (N, C) or (N, C, d1, ..., dK) for C classes.
        target: class indices of any integer dtype and shape (), (N) or (N, d1, ..., dK).
        weight: (C) class weights.
        size_average, reduce: deprecated, as in torch.
        ignore_index: samples of this class index cost nothing and count for nothing.
        reduction: 'none'; 'mean', which divides by the sum of weight[t] over the samples not ignored; or 'sum'.
        dtype: of the result; otherwise the dtype of input.

    Returns:
        A tensor of shape (), or for 'none' of the shape of the samples.

    Raises:
        ValueError, TypeError (both RuntimeError too): shapes, options; dtypes. IndexError: a class index out of range.

    Source: torch.nn.functional.nll_loss.

    >>> import torch, fastloss.torch as ft
    >>> ft.nll_loss(torch.tensor([[0.7, 0.3]]).log(), torch.tensor([0]))
    tensor(0.3567)
    """
    reduction = _reduction(size_average, reduce, reduction)
    return (input, target, weight), {"reduction": reduction, "ignore_index": ignore_index, "dtype": dtype}
