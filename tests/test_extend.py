"""A loss of one's own: docs/adding-a-loss.md is run as it stands, and what it adds is a loss like any other."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastloss

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-loss.md"
SHAPES = ((0,), (1,), (37,), (6, 5, 3), (70_001,))


@pytest.fixture(scope="module")
def log_cosh_loss() -> Any:
    """The loss that the page's first block defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks[0].strip().splitlines()) <= 27  # about 20 lines of code; the rest is blank
    names: dict[str, Any] = {"__name__": "log_cosh"}
    exec(blocks[0], names)
    names |= {"prediction": np.array([1.0, 2.0]), "target": np.array([0.0, 2.0])}
    exec(blocks[1], names)  # what the page says that a user writes
    np.testing.assert_allclose(names["gradient"], np.tanh([1.0, 0.0]) / 2, rtol=1e-14)
    return names["log_cosh_loss"]


def truth(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """log cosh in float64 and, for small differences, as a series: the logarithm of nearly 1 loses digits."""
    d = np.abs(x.astype(np.float64) - y)
    return np.asarray(np.where(d < 1e-2, d**2 / 2 - d**4 / 12 + d**6 / 45, np.logaddexp(d, -d) - np.log(2)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_it_is_a_loss_like_any_other(log_cosh_loss: Any, shape: tuple[int, ...], dtype: str, rng: Any) -> None:
    """Reductions, gradients by both operands, strides, dtypes, threads."""
    x, y = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    expected = truth(x, y)
    # The formula subtracts log 2 from its sum: a few eps absolute; then half an ulp of the dtype.
    eps = max(float(np.finfo(dtype).eps), 2.0**-52)
    for a, b in ((x, y), (x[..., ::-1].copy()[..., ::-1], y)):
        np.testing.assert_allclose(log_cosh_loss(a, b, reduction="none"), expected, rtol=2 * eps, atol=8 * eps)
    if not x.size:
        assert np.isnan(log_cosh_loss(x, y))
        return
    mean = log_cosh_loss(x, y)
    assert mean.dtype == dtype
    assert mean == pytest.approx(expected.mean(), rel=4 * eps, abs=8 * eps)
    slope = np.tanh(x.astype(np.float64) - y) / x.size
    for argnum, sign in ((0, 1), (1, -1)):
        value, grad = fastloss.value_and_grad(log_cosh_loss, argnums=argnum)(x, y)
        assert value == mean
        np.testing.assert_allclose(grad, sign * slope, rtol=8 * eps, atol=8 * eps)


def test_it_takes_weights_and_refuses_what_others_refuse(log_cosh_loss: Any, rng: Any) -> None:
    x, y, weight = (rng.uniform(0, 2, (5, 3)) for _ in range(3))
    expected = weight * truth(x, y)
    np.testing.assert_allclose(log_cosh_loss(x, y, weight=weight, reduction="sum"), expected.sum(), rtol=1e-13)
    with pytest.raises(ValueError, match="reduction"):
        log_cosh_loss(x, y, reduction="average")
    with pytest.raises(ValueError, match="target has shape"):
        log_cosh_loss(x, y[:, :2])
