"""Compiled loss kernels: torch.nn's losses over any array, exact, at the speed of the memory they read.

Importing this package imports neither Numba nor any array library but NumPy; a kernel is compiled (or read from the
disk cache) when it is first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checks import BroadcastWarning
    from .dispatch import register
    from .linear import linear_cross_entropy
    from .losses import (
        binary_cross_entropy,
        binary_cross_entropy_with_logits,
        cross_entropy,
        huber_loss,
        kl_div,
        l1_loss,
        mse_loss,
        nll_loss,
        pointwise_loss,
        smooth_l1_loss,
    )
    from .meter import Meter
    from .modules import (
        BCELoss,
        BCEWithLogitsLoss,
        CrossEntropyLoss,
        HuberLoss,
        KLDivLoss,
        L1Loss,
        MSELoss,
        NLLLoss,
        SmoothL1Loss,
    )
    from .partials import Partials, cross_entropy_partials, cross_entropy_partials_grad
    from .runtime import get_num_threads, set_num_threads, show_versions
    from .transforms import value_and_grad

_HOME = {
    "checks": ("BroadcastWarning",),
    "dispatch": ("register",),
    "linear": ("linear_cross_entropy",),
    "losses": (
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "huber_loss",
        "kl_div",
        "l1_loss",
        "mse_loss",
        "nll_loss",
        "pointwise_loss",
        "smooth_l1_loss",
    ),
    "meter": ("Meter",),
    "partials": ("Partials", "cross_entropy_partials", "cross_entropy_partials_grad"),
    "modules": (
        "BCELoss",
        "BCEWithLogitsLoss",
        "CrossEntropyLoss",
        "HuberLoss",
        "KLDivLoss",
        "L1Loss",
        "MSELoss",
        "NLLLoss",
        "SmoothL1Loss",
    ),
    "runtime": ("get_num_threads", "set_num_threads", "show_versions"),
    "transforms": ("value_and_grad",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "BroadcastWarning",
    "CrossEntropyLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "Meter",
    "NLLLoss",
    "Partials",
    "SmoothL1Loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "cross_entropy_partials",
    "cross_entropy_partials_grad",
    "get_num_threads",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",
    "mse_loss",
    "nll_loss",
    "pointwise_loss",
    "register",
    "set_num_threads",
    "show_versions",
    "smooth_l1_loss",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
