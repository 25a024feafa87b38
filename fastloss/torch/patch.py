"""patched(): existing modules on fastloss's losses, unchanged."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import functional
from .spec import SPECS

_lock = threading.Lock()
_depth = 0  # how many contexts are open
_originals = {spec.name: getattr(F, spec.name) for spec in SPECS}
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Within it torch.nn.functional's losses, and so torch.nn's modules, are fastloss's; also a decorator.

    What fastloss does not read goes to torch as before: tensors that are neither on the CPU nor on an NVIDIA GPU,
    sparse or quantized ones, and integer or complex numbers. Code that has bound a function to a name of its own
    (`from torch.nn.functional import cross_entropy`) keeps torch's. The replacement is the process's, not the
    thread's; contexts may be nested, and the last to leave restores torch.

    >>> import torch, fastloss.torch
    >>> loss = torch.nn.CrossEntropyLoss()
    >>> with fastloss.torch.patched():
    ...     loss(torch.tensor([[0.8, 0.1, 0.2]]), torch.tensor([0], dtype=torch.int16))
    tensor(0.7156)
    """
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            for name in _originals:
                setattr(F, name, _replacements[name])
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for name, original in _originals.items():
                    setattr(F, name, original)


def _replacement(name: str) -> Callable[..., Tensor]:
    ours, original = getattr(functional, name), _originals[name]

    @wraps(original)
    def loss(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        function = ours if _ours(input) and (_ours(target) or not _numbers(target)) else original
        result: Tensor = function(input, target, *args, **kwargs)
        return result

    return loss


def _ours(tensor: Tensor) -> bool:
    """Whether fastloss reads this tensor."""
    kind = tensor.device.type
    there = kind in ("cpu", "meta") or (kind == "cuda" and not torch.version.hip)
    return there and tensor.layout is torch.strided and tensor.dtype in _FLOATS


def _numbers(tensor: Tensor) -> bool:
    """Whether a target is no tensor of class indices that fastloss reads."""
    integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
    return not (integer and tensor.layout is torch.strided)


_replacements = {name: _replacement(name) for name in _originals}
