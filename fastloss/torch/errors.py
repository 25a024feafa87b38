"""Errors that are torch's classes as well as fastloss's: code that catches what torch raises goes on working."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from .. import checks

P = ParamSpec("P")
T = TypeVar("T")


class LossValueError(ValueError, RuntimeError):
    """A shape or an option that a loss cannot take: RuntimeError in torch mostly, ValueError sometimes."""


class LossDomainError(checks.DomainError, RuntimeError):
    """A number outside the domain of a loss."""


class LossTypeError(TypeError, RuntimeError):
    """A dtype, or a tensor, that a loss cannot read."""


_TORCH = {checks.DomainError: LossDomainError, ValueError: LossValueError, TypeError: LossTypeError}


def translated(function: Callable[P, T]) -> Callable[P, T]:
    """Raises fastloss's errors as torch's too. An index that is no class is an IndexError in both."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except tuple(_TORCH) as error:
            kind = next((kind for base, kind in _TORCH.items() if type(error) is base), None)
            if kind is None:
                raise
            own = kind(*error.args)
            vars(own).update(vars(error))
            raise own from error.__cause__

    return call
