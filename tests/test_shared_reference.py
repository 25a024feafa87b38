"""Cross-entropy whose blocks of samples have one reference: samples that it does not suit; where gradients end up."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastloss
from fastloss.backends.cpu import STREAM_BYTES
from fastloss.kernels.storage import itemsize
from table import BY_ID, Rng, Sample, assert_within, check_gradient, check_value, gradient_bound

ROW = BY_ID["cross_entropy"]
# rows of few classes, of every number of vectors, images; sixteen samples and a few more, blocks and a few more
ROWS = [(16, 6), (220, 7), (300, 10), (70, 16), (16, 17), (70, 17), (53, 31), (131, 33), (40, 100), (19, 256)]
SHAPES = [*ROWS, (1, 21, 16), (2, 21, 13, 19), (1, 3, 5000), (3, 256, 120)]
DTYPES = ["float32", "float16", "bfloat16"]
NAN, INF = np.nan, np.inf


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def drawn(rng: Rng, shape: tuple[int, ...], dtype: str) -> Sample:
    """Logits and targets, one in ten ignored."""
    x = rng.standard_normal(shape).astype(dtype_of(dtype))
    t = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    t[rng.uniform(size=t.shape) < 0.1] = -100
    return Sample(x, t, {})


def changed(rng: Rng, sample: Sample, share: float) -> Sample:
    """So large a share of the samples far from the others, or with special values."""
    x, t = np.moveaxis(sample.input, 1, -1).copy(), sample.target
    largest = 6e4 if sample.input.dtype == np.float16 else 1e30
    for place in zip(*np.nonzero(rng.uniform(size=t.shape) < share), strict=True):
        row = x[place].astype(np.float64)
        kind, c = rng.integers(0, 9), rng.integers(0, len(row))
        if kind < 4:
            row += (60.0, -60.0, 1e4, -1e4)[kind]
        elif kind == 4:
            row[c] = largest
        else:
            row[c if kind < 8 else slice(None)] = (NAN, INF, -INF, -INF)[kind - 5]
        x[place] = row.astype(x.dtype)
    return Sample(np.ascontiguousarray(np.moveaxis(x, -1, 1)), t, {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_samples_that_the_reference_does_not_suit(shape: tuple[int, ...], dtype: str, share: float, rng: Rng) -> None:
    sample = changed(rng, drawn(rng, shape, dtype), share)
    for reduction in ("none", "sum"):
        check_value(ROW, sample, reduction)
    upstream = rng.standard_normal(sample.target.shape)
    check_gradient(ROW, sample, "none", grad_output=upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ROWS, (1, 21, 400), (1, 3, 5000)], ids=str)
def test_a_sample_does_not_depend_on_others(shape: tuple[int, ...], dtype: str, rng: Rng) -> None:
    """Not a bit of its loss and of its gradient, whatever reference the block that it is in has."""
    sample = changed(rng, drawn(rng, shape, dtype), 0.1)
    fused = fastloss.value_and_grad(fastloss.cross_entropy)
    losses, grads = fused(sample.input, sample.target, reduction="none", grad_output=np.ones(sample.target.shape))
    axis = 0 if len(shape) == 2 else 2
    n = shape[axis]
    least = 1 if axis == 0 else 2  # one position of an image is a row, whose classes adjoin
    for _ in range(5):
        start = int(rng.integers(0, n - least + 1))
        part = range(start, int(rng.integers(start + least, n + 1)))
        x, grad = (np.ascontiguousarray(np.take(array, part, axis)) for array in (sample.input, grads))
        t, loss = (np.take(array, part, axis - (axis == 2)) for array in (sample.target, losses))
        got = fused(x, t, reduction="none", grad_output=np.ones(t.shape))
        for found, wanted in zip(got, (loss, grad), strict=True):
            np.testing.assert_array_equal(found.astype(np.float64), wanted.astype(np.float64))


@pytest.mark.parametrize("first", [NAN, INF, -INF, 3e4, -3e4])
@pytest.mark.parametrize("shape", [(70, 17), (40, 100), (2, 21, 13, 19)], ids=str)
def test_the_reference_itself_is_special(shape: tuple[int, ...], first: float, rng: Rng) -> None:
    """The logits that it is made of."""
    sample = drawn(rng, shape, "float32")
    sample.input.reshape(-1)[:16] = first
    check_value(ROW, sample, "none")
    check_gradient(ROW, sample, "mean")


@pytest.mark.parametrize("shape", [(53, 31), (40, 100), (2, 21, 13, 19)], ids=str)
def test_ignored_samples_leak_nothing(shape: tuple[int, ...], rng: Rng) -> None:
    """Not even NaN: loss and gradient are 0."""
    sample = drawn(rng, shape, "float32")
    ignored = sample.target == -100
    np.moveaxis(sample.input, 1, -1)[ignored] = NAN
    value, grad = fastloss.value_and_grad(fastloss.cross_entropy)(sample.input, sample.target)
    assert np.isfinite(value)
    assert (np.moveaxis(grad, 1, -1)[ignored] == 0).all()
    check_gradient(ROW, sample, "mean")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(220_001, 10), (60_001, 40), (3, 21, 260, 261)], ids=str)
@pytest.mark.parametrize("offset", [0, 5])
def test_large_gradients_end_where_they_belong(shape: tuple[int, ...], dtype: str, offset: int, rng: Rng) -> None:
    """Past the caches or not, aligned or not, with nothing written beside them."""
    if dtype != "float32":
        shape = (shape[0] * 2, *shape[1:])
    sample = drawn(rng, shape, dtype)
    size = sample.input.size
    room = np.full(size + 128, 7, sample.input.dtype)
    start = -(room.__array_interface__["data"][0] // itemsize(dtype)) % 64 + offset
    out = room[start : start + size].reshape(shape)
    assert out.nbytes >= STREAM_BYTES
    fused = fastloss.value_and_grad(fastloss.cross_entropy)
    value, grad = fused(sample.input, sample.target, reduction="sum", grad_out=out)
    assert grad is out
    assert (room[:start] == 7).all()
    assert (room[start + size :] == 7).all()
    some = np.unique([0, shape[0] - 1, *rng.integers(0, shape[0], 300)])
    part = Sample(sample.input[some], sample.target[some], {})
    truth = ROW.truth(part, "sum", 1.0)
    bound = gradient_bound(truth, "input", sample.input.dtype)
    assert_within(grad[some], truth.input, bound, sample.input.dtype)
    assert value == fastloss.cross_entropy(sample.input, sample.target, reduction="sum")
