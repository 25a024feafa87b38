"""Cross-entropy of many classes, relative to what the first say: logits far from these, masks, special values."""

from __future__ import annotations

import numpy as np
import pytest

from table import BY_ID, DTYPES, Rng, Sample, check_gradient, check_value

ROW = BY_ID["cross_entropy"]
SHAPES = [(20, 65), (11, 129), (9, 1000), (4, 4097)]
NAN, INF = np.nan, np.inf


def changed(rng: Rng, x: np.ndarray, kind: str) -> np.ndarray:
    """Some rows of x with what `kind` says."""
    n, classes = x.shape
    x = x.copy()
    rows = rng.uniform(size=n) < 0.7
    some = rng.uniform(size=x.shape) < 0.3
    largest = float(np.finfo(np.float16).max) if x.dtype == np.float16 else 3e38
    if kind == "masked here and there":
        x[rows[:, None] & some] = rng.choice([-INF, -largest, -1e4])
    elif kind == "masked to the end":
        for i in np.flatnonzero(rows):
            x[i, rng.integers(1, classes) :] = -INF
    elif kind == "the first masked":
        x[rows, : rng.integers(1, classes)] = -INF
    elif kind == "a late maximum":
        x[rows, rng.integers(0, classes, rows.sum())] += 300
    elif kind == "far from 0":
        x[rows] += rng.choice([-200, -70, -50, 50, 70, 200], (rows.sum(), 1)).astype(x.dtype)
    elif kind == "spread":
        x[rows] *= 60
    else:
        x[rows, rng.integers(0, classes, rows.sum())] = rng.choice([NAN, -NAN, INF], rows.sum())
    return x


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        "masked here and there",
        "masked to the end",
        "the first masked",
        "a late maximum",
        "far from 0",
        "spread",
        "NaN and infinity",
    ],
)
def test_logits_far_from_the_first(kind: str, shape: tuple[int, ...], dtype: str, rng: Rng) -> None:
    x = changed(rng, rng.standard_normal(shape).astype(DTYPES[dtype]), kind)
    sample = Sample(x, rng.integers(0, shape[1], shape[0]), {})
    check_value(ROW, sample, "none")
    check_value(ROW, sample, "mean")
    check_gradient(ROW, sample, "none", grad_output=rng.uniform(-1, 1, shape[0]))
    check_gradient(ROW, sample, "mean")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_row_does_not_depend_on_those_before_it(dtype: str, rng: Rng) -> None:
    """Whose reference it may share, to the last bit; nor does what is too far from the first classes."""
    x = rng.standard_normal((200, 300)) + rng.choice([0.0, 0.3, 3.0, 7.9, 12.0, -5.0, -40.0, 88.0, 500.0], (200, 1))
    x[rng.uniform(size=200) < 0.1, :40] = rng.choice([-INF, NAN])
    x[:, 250] += rng.choice([0.0, 25.0, 35.0, 40.0, 45.0, 50.0, 60.0], 200)
    x = x.astype(DTYPES[dtype])
    sample = Sample(x, rng.integers(0, 300, 200), {})

    def found(sample: Sample) -> np.ndarray:
        losses, grad = ROW.call(sample, reduction="none"), ROW.gradient(sample, "input", reduction="sum")[1]
        return np.column_stack([losses, grad]).astype(np.float64)

    of_all = found(sample)
    for i in range(200):
        alone = Sample(x[i : i + 1], sample.target[i : i + 1], {})
        np.testing.assert_array_equal(found(alone), of_all[i : i + 1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_masked_classes_have_no_gradient(dtype: str, rng: Rng) -> None:
    x = rng.standard_normal((9, 1000)).astype(DTYPES[dtype])
    masked = rng.uniform(size=x.shape) < 0.5
    masked[np.arange(9), np.arange(9)] = False
    x[masked] = -INF
    _, grad = ROW.gradient(Sample(x, np.arange(9), {}), "input", reduction="sum", grad_output=-1.0)
    assert (grad[masked] == 0).all()
    assert (grad[~masked] != 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("above", [10, 20, 30, 39])
def test_a_late_class_that_takes_almost_all(above: float, dtype: str, rng: Rng) -> None:
    """Its loss is small beside the logarithm of the sum, which cancels: what is left is not the rounding of that."""
    x = rng.standard_normal((50, 1000))
    x[:, 500] += above
    x = x.astype(dtype)
    losses = ROW.call(Sample(x, np.full(50, 500), {}), reduction="none")
    others = np.delete(x.astype(np.longdouble), 500, 1)
    expected = np.log1p(np.exp(others - x[:, 500:501].astype(np.longdouble)).sum(1))
    np.testing.assert_allclose(losses, expected.astype(np.float64), rtol=0, atol=8 * np.finfo(dtype).eps)
