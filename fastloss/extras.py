"""What is said where a library is missing that one of fastloss's extras brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(library: str, by: str, extra: str, error: type[Exception] = ModuleNotFoundError) -> Iterator[None]:
    """Imports within raise `error`, with the extra to install, where `library` is missing; `by` says who needs it.

    >>> with needed("numpyro", by="this example", extra="bayes"):
    ...     import numpyro
    Traceback (most recent call last):
    ModuleNotFoundError: this example needs numpyro, which is not installed: pip install "fastloss[bayes]"
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != library:
            raise
        message = f'{by} needs {library}, which is not installed: pip install "fastloss[{extra}]"'
        raise error(message) from None
