"""What the tests of fastloss.torch share: a row of the table drawn as tensors, smooth where it is differentiated."""

from typing import Any

import numpy as np
import torch

import fastloss.torch
from table import ROWS, Options, Row

Rng = np.random.Generator
ROUTES = [(row, choice) for row in ROWS for choice in ({}, row.everything()) if choice or not row.options]
ROUTES += [(row, {}) for row in ROWS if row.options]


def drop_in(row: Row) -> Any:
    """The function of fastloss.torch."""
    return getattr(fastloss.torch, row.name)


def tensors(
    row: Row, rng: Rng, shape: tuple[int, ...], choice: Options, dtype: Any = np.float64
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Input, target and options, away from where a loss has a kink or a pole."""
    sample = row.draw(rng, shape, np.float64, choice)
    x, y = sample.input, sample.target
    if row.name == "binary_cross_entropy":
        x, y = 0.1 + 0.8 * x, 0.1 + 0.8 * y
    if row.name == "kl_div" and not choice.get("log_target"):
        y = y + 0.1
    if row.indices:
        y.flat[0] = 0  # never ignored: the mean of no samples is NaN, which torch's own checks take for unequal
    options = {
        name: torch.from_numpy(value.astype(dtype)) if isinstance(value, np.ndarray) else value
        for name, value in sample.options.items()
    }
    target = torch.from_numpy(y if row.indices else y.astype(dtype))
    return torch.from_numpy(x.astype(dtype)), target, options


def learning(row: Row, x: torch.Tensor, y: torch.Tensor, options: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that the kernel has gradients for, as leaves of autograd; the others are left as they are."""
    named = {"input": x, "target": y, "weight": options.get("weight")}
    return [named[name].requires_grad_() for name in row.gradients if named[name] is not None]


def composed(row: Row, x: torch.Tensor, y: torch.Tensor, options: dict[str, Any], **more: Any) -> torch.Tensor:
    """The same loss by torch's own operations."""
    from fastloss.torch.spec import SPECS

    spec = next(spec for spec in SPECS if spec.name == row.name)
    known = {name: default for name, (_, default) in spec.options.items()} | more
    rest = [options.get(name) for name in spec.tensors[2:]]
    known |= {name: value for name, value in options.items() if name in known}
    return spec.composite(x, y, *rest, **known)
