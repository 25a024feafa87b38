"""value_and_grad: a loss and its gradients from one fused kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from . import dispatch
from .call import Call
from .plans import Plans

_NAMES = ("input", "target", "weight")


def value_and_grad(fn: Callable[..., Any], argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """A function that returns a loss and its gradient, d loss / d argument, in one pass over the arrays.

    Args:
        fn: a function of fastloss (`fastloss.cross_entropy`) or one of its classes' instances.
        argnums: position of the argument to differentiate by: 0 is input, 1 target; for cross_entropy with class
            probabilities also the position of weight, 2; for linear_cross_entropy 0, 1 and 3 are input, linear_weight
            and linear_bias. A sequence of positions gives a tuple of gradients.

    Returns:
        A function with the signature of `fn` and two more keyword arguments. `grad_output` is the gradient of what
        comes after: for reduction 'none' an array of the losses' shape (default: ones), otherwise a number (default
        1). `grad_out` is an array (or, for several argnums, a tuple of arrays) to write the gradient into; it may be
        the differentiated argument itself. The function returns (value, gradient); a gradient has its argument's
        shape and dtype.

    Raises:
        ValueError: where the loss has no gradient for an argument. TypeError: where fn is no loss of fastloss.

    >>> import numpy as np, fastloss
    >>> value, grad = fastloss.value_and_grad(fastloss.mse_loss)(np.array([1.0, 2.0]), np.array([0.0, 2.0]))
    >>> float(value), grad.tolist()
    (0.5, [1.0, 0.0])
    """
    call: Callable[..., Call] | None = getattr(fn, "call", None)
    if call is None:
        raise TypeError(
            f"{fn!r} is not a loss of fastloss: value_and_grad takes its functions and its classes' instances"
        )
    several = not isinstance(argnums, int)
    positions = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    parameters = list(inspect.signature(call).parameters)
    differentiable = getattr(fn, "differentiable", _NAMES)
    names = [_name(parameters, position, differentiable) for position in positions]
    engine_of = getattr(fn, "engine", dispatch.engine)

    plans = Plans()

    def differentiated(*args: Any, grad_output: Any = None, grad_out: Any = None, **kwargs: Any) -> Any:
        brought = () if grad_out is None else (grad_out,)
        key = plans.key(args, kwargs, *brought) if grad_output is None else None
        if key is not None and brought:
            key = key, grad_out is args[0]  # the input becomes its gradient
        plan = plans.find(key)
        if plan is not None and (found := plan(*args, *brought)) is not None:
            value, *grads = found
            return value, tuple(grads) if several else grads[0]
        outs = grad_out if several and grad_out is not None else [grad_out] * len(names)
        if len(outs) != len(names):
            raise ValueError(f"grad_out has {len(outs)} arrays, expected one for each of argnums {positions}")
        if (engine := engine_of((*args, *kwargs.values()))) is not None:
            loss: Any = getattr(fn, "function", fn)  # of one of the classes' instances
            arguments = fn.arguments(*args, **kwargs)  # type: ignore[attr-defined]  # losses and instances have it
            value, grads = engine.value_and_grad(loss, arguments, names, grad_output, outs)
            return value, tuple(grads) if several else grads[0]
        made = call(*args, **kwargs)
        value, grads = made.value_and_grad(names, grad_output, outs)
        if key is not None:
            plans.keep(key, made.plan())
        return value, tuple(grads) if several else grads[0]

    return differentiated


def _name(parameters: list[str], position: int, names: Sequence[str]) -> str:
    if position not in range(-len(parameters), len(parameters)) or parameters[position] not in names:
        raise ValueError(
            f"argnums has {position}, expected positions of {', '.join(p for p in parameters if p in names)}"
        )
    return parameters[position]
