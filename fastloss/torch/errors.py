"""Errors that are torch's classes as well as fastloss's: code that catches what torch raises goes on working."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .. import checks


class LossValueError(ValueError, RuntimeError):
    """A shape or an option that a loss cannot take: RuntimeError in torch mostly, ValueError sometimes."""


class LossDomainError(checks.DomainError, RuntimeError):
    """A number outside the domain of a loss."""


class LossTypeError(TypeError, RuntimeError):
    """A dtype, or a tensor, that a loss cannot read."""


_TORCH = {checks.DomainError: LossDomainError, ValueError: LossValueError, TypeError: LossTypeError}


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise fastloss's errors as torch's too. An index that is no class is an IndexError in both."""
    try:
        yield
    except tuple(_TORCH) as error:
        kind = next((kind for base, kind in _TORCH.items() if type(error) is base), None)
        if kind is None:
            raise
        own = kind(*error.args)
        vars(own).update(vars(error))
        raise own from error.__cause__
