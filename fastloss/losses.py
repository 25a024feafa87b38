"""The loss functions: signature, docstring, and the one call that each stands for.

All take torch.nn.functional's arguments in torch's order. Arrays may be NumPy arrays of any layout, torch tensors,
CuPy, JAX and Numba device arrays, lists, or anything with `__dlpack__` or `__cuda_array_interface__`; they are
evaluated where they are, in the CPU's memory or on a GPU. The result belongs to the library of `input`, is computed in
at least float32, summed in float64 (on a GPU: in pairs of float32) and rounded once. A failed call changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Generic, ParamSpec

from . import checks, dispatch
from .call import Call
from .checks import REDUCTIONS
from .classification import NLLCall, SoftmaxCall
from .kernels.bce import BCE
from .kernels.bce_with_logits import BCE_WITH_LOGITS, BCE_WITH_LOGITS_POS_WEIGHT
from .kernels.huber import HUBER
from .kernels.kl_div import KL_DIV, KL_DIV_LOG_TARGET
from .kernels.l1 import L1
from .kernels.mse import MSE
from .kernels.pointwise import Pointwise
from .kernels.smooth_l1 import SMOOTH_L1
from .plans import Plans
from .pointwise import PointwiseCall

P = ParamSpec("P")
Array = Any


class Loss(Generic[P]):
    """A public loss function. Calling it evaluates; `call` gives the call unevaluated, for gradients and meters."""

    def __init__(self, call: Callable[P, Call]) -> None:
        self.call = call
        self.plans = Plans()
        update_wrapper(self, call)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Array:
        plans = self.plans
        if not kwargs and (result := plans.recent(*args)) is not None:
            return result
        key = plans.key(args, kwargs)
        plan = plans.find(key)
        if plan is not None and (result := plan(*args)) is not None:
            if not kwargs:
                plans.note(plan)
            return result
        if (engine := dispatch.engine((*args, *kwargs.values()))) is not None:
            return engine.evaluate(self, self.arguments(*args, **kwargs))
        call = self.call(*args, **kwargs)
        result = call.evaluate()
        if key is not None:
            plans.keep(key, call.plan())
        return result

    def arguments(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """What was given, by name."""
        return inspect.signature(self.call).bind(*args, **kwargs).arguments

    def __repr__(self) -> str:
        return f"<loss fastloss.{self.call.__name__}>"

    def __reduce__(self) -> str:
        return self.call.__name__


def pointwise_loss(formulas: Pointwise) -> Loss[Any]:
    """A public loss function out of formulas of one's own: reductions, weights, broadcasting, dtypes, gradients.

    Args:
        formulas: what the loss is, over emitted values x (input) and y (target); its parameters become keyword
            arguments of the function.

    Returns:
        A function `(input, target, reduction="mean", weight=None, *, dtype=None, out=None, check=None, **parameters)`
        that `value_and_grad` takes too; 'mean' with weight is sum(weight * loss) / sum(weight).

    >>> import numpy as np, fastloss
    >>> from fastloss.kernels.pointwise import Pointwise
    >>> square = fastloss.pointwise_loss(Pointwise("square", lambda x, y: (x - y) * (x - y), lambda x, y: 2 * (x - y)))
    >>> float(square(np.array([3.0]), np.array([1.0])))
    4.0
    """

    def call(
        input: Array,
        target: Array,
        reduction: str = "mean",
        weight: Array = None,
        *,
        dtype: Any = None,
        out: Array = None,
        check: bool | None = None,
        **parameters: float,
    ) -> Call:
        if set(parameters) != set(formulas.parameters):
            raise TypeError(f"{formulas.name} takes the parameters {formulas.parameters}, got {tuple(parameters)}")
        reduction = checks.reduction_of(None, None, reduction, REDUCTIONS)
        numbers = [float(parameters[name]) for name in formulas.parameters]
        options = {"weight": weight, "weighted_mean": True, "dtype": dtype, "out": out, "check": check}
        return PointwiseCall(formulas, input, target, reduction, parameters=numbers, **options)

    call.__name__ = call.__qualname__ = formulas.name
    call.__doc__ = formulas.value.__doc__
    return Loss(call)


@Loss
def l1_loss(
    input: Array,
    target: Array,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Array = None,
    *,
    dtype: Any = None,
    out: Array = None,
) -> Call:
    """Absolute error, |input - target|.

    Args:
        input, target: arrays of one shape; different shapes are broadcast with a `BroadcastWarning`.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none' gives each element's loss, 'mean' their mean (with weight: sum(weight * loss) / sum(weight)),
            'sum' their sum.
        weight: element weights of the shape of input.
        dtype: of the result; otherwise the promoted dtype of input and target.
        out: array to write the result into.

    Returns:
        A scalar, or for 'none' an array of the broadcast shape, in input's library.

    Raises:
        ValueError: shapes, reduction. TypeError: array types, and dtypes that are not real numbers.

    The gradient at input == target is 0. Source: torch.nn.functional.l1_loss.

    >>> import numpy as np, fastloss
    >>> float(fastloss.l1_loss(np.array([1.0, 2.0, 4.0]), np.array([1.0, 0.0, 3.0])))
    1.0
    """
    reduction = checks.reduction_of(size_average, reduce, reduction, REDUCTIONS)
    return PointwiseCall(L1, input, target, reduction, weight=weight, weighted_mean=True, dtype=dtype, out=out)


@Loss
def mse_loss(
    input: Array,
    target: Array,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Array = None,
    *,
    dtype: Any = None,
    out: Array = None,
) -> Call:
    """Squared error, (input - target)**2, no 1/2.

    Args:
        input, target: arrays of one shape; different shapes are broadcast with a `BroadcastWarning`.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none' gives each element's loss, 'mean' their mean (with weight: sum(weight * loss) / sum(weight)),
            'sum' their sum.
        weight: element weights of the shape of input.
        dtype: of the result; otherwise the promoted dtype of input and target.
        out: array to write the result into.

    Returns:
        A scalar, or for 'none' an array of the broadcast shape, in input's library.

    Raises:
        ValueError: shapes, reduction. TypeError: array types, and dtypes that are not real numbers.

    Source: torch.nn.functional.mse_loss.

    >>> import numpy as np, fastloss
    >>> float(fastloss.mse_loss(np.array([1.0, 2.0, 4.0]), np.array([1.0, 0.0, 3.0]), reduction="sum"))
    5.0
    """
    reduction = checks.reduction_of(size_average, reduce, reduction, REDUCTIONS)
    return PointwiseCall(MSE, input, target, reduction, weight=weight, weighted_mean=True, dtype=dtype, out=out)


@Loss
def smooth_l1_loss(
    input: Array,
    target: Array,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
    *,
    dtype: Any = None,
    out: Array = None,
) -> Call:
    """d**2 / (2 beta) where d = |input - target| is under beta, else d - beta / 2.

    Args:
        input, target: arrays of one shape; different shapes are broadcast with a `BroadcastWarning`.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none', 'mean' or 'sum'.
        beta: where the square ends, in the units of input, at least 0; 0 is `l1_loss`.
        dtype: of the result; otherwise the promoted dtype of input and target.
        out: array to write the result into.

    Returns:
        A scalar, or for 'none' an array of the broadcast shape, in input's library.

    Raises:
        ValueError: shapes, reduction, beta. TypeError: array types, and dtypes that are not real numbers.

    Source: torch.nn.functional.smooth_l1_loss; Girshick, Fast R-CNN (2015).

    >>> import numpy as np, fastloss
    >>> fastloss.smooth_l1_loss(np.array([0.5, 3.0]), np.zeros(2), reduction="none").tolist()
    [0.125, 2.5]
    """
    reduction = checks.reduction_of(size_average, reduce, reduction, REDUCTIONS)
    beta = checks.option("beta", beta, 0)
    return PointwiseCall(SMOOTH_L1, input, target, reduction, parameters=(beta,), dtype=dtype, out=out)


@Loss
def huber_loss(
    input: Array,
    target: Array,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Array = None,
    *,
    dtype: Any = None,
    out: Array = None,
) -> Call:
    """d**2 / 2 where d = |input - target| is at most delta, else delta * (d - delta / 2).

    Args:
        input, target: arrays of one shape; different shapes are broadcast with a `BroadcastWarning`.
        reduction: 'none', 'mean' (divides by the number of elements, weighted or not) or 'sum'.
        delta: where the square ends, in the units of input, greater than 0.
        weight: element weights of the shape of input.
        dtype: of the result; otherwise the promoted dtype of input and target.
        out: array to write the result into.

    Returns:
        A scalar, or for 'none' an array of the broadcast shape, in input's library.

    Raises:
        ValueError: shapes, reduction, delta. TypeError: array types, and dtypes that are not real numbers.

    Source: torch.nn.functional.huber_loss; Huber, Robust estimation of a location parameter (1964).

    >>> import numpy as np, fastloss
    >>> fastloss.huber_loss(np.array([0.5, 3.0]), np.zeros(2), reduction="none", delta=2.0).tolist()
    [0.125, 4.0]
    """
    reduction = checks.reduction_of(None, None, reduction, REDUCTIONS)
    delta = checks.option("delta", delta, 0, open_low=True)
    return PointwiseCall(HUBER, input, target, reduction, weight=weight, parameters=(delta,), dtype=dtype, out=out)


@Loss
def binary_cross_entropy(
    input: Array,
    target: Array,
    weight: Array = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    dtype: Any = None,
    out: Array = None,
    check: bool | None = None,
) -> Call:
    """-(target * log(input) + (1 - target) * log(1 - input)), each logarithm at least -100.

    Args:
        input: probabilities, 0 to 1, any shape.
        target: probabilities or labels, 0 to 1, of the shape of input.
        weight: factors of the elements' losses, broadcast to the shape of input.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none', 'mean' (divides by the number of elements, weighted or not) or 'sum'.
        dtype: of the result; otherwise the promoted dtype of input and target.
        out: array to write the result into.
        check: for arrays on a GPU: wait, and raise ValueError for a number outside 0 to 1 before anything is
            written; FASTLOSS_CHECK=1 in the environment is the same. Otherwise nothing waits: such an element's own
            loss is NaN, and nothing else is harmed. Arrays in the CPU's memory are always checked.

    Returns:
        A scalar, or for 'none' an array of the shape of input, in its library.

    Raises:
        ValueError: shapes, reduction, an input or target outside 0 to 1 or NaN (naming the first position).
        TypeError: array types, and dtypes that are not real numbers.

    The gradient is weight * (input - target) / max((1 - input) * input, 1e-12). Source:
    torch.nn.functional.binary_cross_entropy.

    >>> import numpy as np, fastloss
    >>> round(float(fastloss.binary_cross_entropy(np.array([0.9, 0.8, 0.3]), np.array([1.0, 1.0, 0.0]))), 4)
    0.2284
    """
    reduction = checks.reduction_of(size_average, reduce, reduction, REDUCTIONS)
    return PointwiseCall(
        BCE,
        input,
        target,
        reduction,
        weight=weight,
        weight_broadcasts=True,
        broadcasts=False,
        dtype=dtype,
        out=out,
        check=check,
    )


@Loss
def binary_cross_entropy_with_logits(
    input: Array,
    target: Array,
    weight: Array = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Array = None,
    *,
    dtype: Any = None,
    out: Array = None,
) -> Call:
    """Binary cross-entropy of sigmoid(input): (1 - y) x + (1 + (p - 1) y) softplus(-x), p = pos_weight (1 if None).

    Args:
        input: logits x, any shape. At +-inf the loss is its limit, 0 or inf, where torch has NaN.
        target: probabilities or labels y of the shape of input.
        weight: factors of the elements' losses, broadcast to the shape of input.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none', 'mean' (divides by the number of elements, weighted or not) or 'sum'.
        pos_weight: weight of the positive class, broadcast to the shape of input.
        dtype: of the result; otherwise the promoted dtype of input and target.
        out: array to write the result into.

    Returns:
        A scalar, or for 'none' an array of the shape of input, in its library.

    Raises:
        ValueError: shapes, reduction. TypeError: array types, and dtypes that are not real numbers.

    Source: torch.nn.functional.binary_cross_entropy_with_logits.

    >>> import numpy as np, fastloss
    >>> round(float(fastloss.binary_cross_entropy_with_logits(np.array([2.0, -1.0]), np.array([1.0, 0.0]))), 6)
    0.220095
    """
    reduction = checks.reduction_of(size_average, reduce, reduction, REDUCTIONS)
    return PointwiseCall(
        BCE_WITH_LOGITS if pos_weight is None else BCE_WITH_LOGITS_POS_WEIGHT,
        input,
        target,
        reduction,
        weight=weight,
        weight_broadcasts=True,
        broadcasts=False,
        operands=() if pos_weight is None else (pos_weight,),
        dtype=dtype,
        out=out,
    )


@Loss
def kl_div(
    input: Array,
    target: Array,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    dtype: Any = None,
    out: Array = None,
) -> Call:
    """Kullback-Leibler divergence's terms, target * (log(target) - input), 0 where target is.

    Args:
        input: log-probabilities, any shape.
        target: probabilities of the same shape (others are broadcast with a `BroadcastWarning`), or their logarithms.
        size_average, reduce: deprecated, as in torch.
        reduction: 'none', 'mean' (over all elements), 'batchmean' (sum / shape[0], the divergence itself) or 'sum'.
        log_target: whether target holds logarithms: exp(target) * (target - input).
        dtype: of the result; otherwise the promoted dtype of input and target.
        out: array to write the result into.

    Returns:
        A scalar, or for 'none' an array of the broadcast shape, in input's library.

    Raises:
        ValueError: shapes, reduction. TypeError: array types, and dtypes that are not real numbers.

    Source: torch.nn.functional.kl_div; Kullback and Leibler, On information and sufficiency (1951).

    >>> import numpy as np, fastloss
    >>> q, p = np.log([[0.5, 0.5]]), np.array([[1.0, 0.0]])
    >>> round(float(fastloss.kl_div(q, p, reduction="batchmean")), 6)
    0.693147
    """
    reduction = checks.reduction_of(size_average, reduce, reduction, (*REDUCTIONS, "batchmean"))
    loss = KL_DIV_LOG_TARGET if log_target else KL_DIV
    return PointwiseCall(loss, input, target, reduction, dtype=dtype, out=out)


@Loss
def cross_entropy(
    input: Array,
    target: Array,
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
    out: Array = None,
    check: bool | None = None,
) -> Call:
    """Softmax cross-entropy, weight[t] * (log(sum_c exp(input[c])) - input[t]) for the class t = target.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dK) for C classes, read where they lie.
        target: class indices of any integer dtype and shape (), (N) or (N, d1, ..., dK); or class probabilities q of
            the shape of input: sum_c q[c] weight[c] (log(sum exp(input)) - input[c]); a class of probability 0 costs 0.
        weight: (C) class weights.
        size_average, reduce: deprecated, as in torch.
        ignore_index: samples of this class index cost nothing and count for nothing.
        reduction: 'none'; 'mean', which divides by the sum of weight[t] over the samples not ignored (class
            probabilities: by the number of samples) and is NaN where there are none; or 'sum'.
        label_smoothing: e in 0 to 1: probabilities (1 - e) * q + e / C replace q.
        lse_square_scale: z-loss, adds lse_square_scale * log(sum_c exp(input[c]))**2 to each sample that is not
            ignored, not weighted; under 'mean' its sum is divided by the number of those samples.
        softcap: softcap * tanh(input / softcap) replaces input; greater than 0.
        dtype: of the result; otherwise the dtype of input.
        out: array to write the result into.
        check: for arrays on a GPU: wait, and raise IndexError for a class index out of range before anything is
            written; FASTLOSS_CHECK=1 in the environment is the same. Otherwise nothing waits: such a sample's own
            loss is NaN, and nothing else is harmed. Arrays in the CPU's memory are always checked.

    Returns:
        A scalar, or for 'none' an array of the shape of the samples, in input's library.

    Raises:
        ValueError: shapes, options. IndexError: a class index outside 0 to C - 1 that is not ignore_index (naming
        its position). TypeError: array types and dtypes.

    Source: torch.nn.functional.cross_entropy; lse_square_scale and softcap as in Liger-Kernel.

    >>> import numpy as np, fastloss
    >>> round(float(fastloss.cross_entropy(np.array([[0.8, 0.1, 0.2]]), np.array([0]))), 4)
    0.7156
    """
    reduction = checks.reduction_of(size_average, reduce, reduction, REDUCTIONS)
    return SoftmaxCall(
        input,
        target,
        reduction,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=checks.option("label_smoothing", label_smoothing, 0, 1),
        lse_square_scale=checks.option("lse_square_scale", lse_square_scale, 0),
        softcap=None if softcap is None else checks.option("softcap", softcap, 0, open_low=True),
        dtype=dtype,
        out=out,
        check=check,
    )


@Loss
def nll_loss(
    input: Array,
    target: Array,
    weight: Array = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    dtype: Any = None,
    out: Array = None,
    check: bool | None = None,
) -> Call:
    """Negative log-likelihood, -weight[t] * input[t] for the class t = target.

    Args:
        input: log-probabilities of shape (C), (N, C) or (N, C, d1, ..., dK) for C classes.
        target: class indices of any integer dtype and shape (), (N) or (N, d1, ..., dK).
        weight: (C) class weights.
        size_average, reduce: deprecated, as in torch.
        ignore_index: samples of this class index cost nothing and count for nothing.
        reduction: 'none'; 'mean', which divides by the sum of weight[t] over the samples not ignored and is NaN where
            there are none; or 'sum'.
        dtype: of the result; otherwise the dtype of input.
        out: array to write the result into.
        check: for arrays on a GPU: wait, and raise IndexError for a class index out of range before anything is
            written; FASTLOSS_CHECK=1 in the environment is the same. Otherwise nothing waits: such a sample's own
            loss is NaN, and nothing else is harmed. Arrays in the CPU's memory are always checked.

    Returns:
        A scalar, or for 'none' an array of the shape of the samples, in input's library.

    Raises:
        ValueError: shapes, options. IndexError: a class index outside 0 to C - 1 that is not ignore_index (naming
        its position). TypeError: array types and dtypes.

    Source: torch.nn.functional.nll_loss.

    >>> import numpy as np, fastloss
    >>> round(float(fastloss.nll_loss(np.log([[0.7, 0.2, 0.1]]), [0])), 6)
    0.356675
    """
    reduction = checks.reduction_of(size_average, reduce, reduction, REDUCTIONS)
    return NLLCall(
        input, target, reduction, weight=weight, ignore_index=ignore_index, dtype=dtype, out=out, check=check
    )
