"""Hypothesis looks for shapes, strides and values that break a loss."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import fastloss
from table import (
    BY_ID,
    POINTWISE,
    ROWS,
    Row,
    Sample,
    check_gradient,
    check_value,
    name_of,
    samples,
)

# Magnitudes at which no loss overflows float32 when squared; -0.0, subnormals and the ends are among them.
FINITE = st.floats(-1e4, 1e4, width=32)
UNIT = st.floats(0, 1, width=32)
# Dimensions that pass one vector, one block of rows and the class counts at which kernels change.
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=40).filter(lambda s: np.prod(s) <= 4000)
SLICES = st.sampled_from([slice(None), slice(None, None, -1), slice(None, None, 2), slice(1, None), slice(None, -1)])


def arrays(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> st.SearchStrategy[NDArray[Any]]:
    return hnp.arrays(np.float32, shape, elements=elements, fill=st.nothing() if np.prod(shape) < 50 else elements)


@st.composite
def pointwise(draw: st.DrawFn, row: Row) -> Sample:
    """Input and target of one shape, cut out of larger arrays by the same slices of either sign."""
    unit = row.name == "binary_cross_entropy"
    x_of, y_of = (UNIT, UNIT) if unit else (FINITE, UNIT if row.name == "kl_div" else FINITE)
    shape = draw(SHAPES)
    cut = tuple(draw(SLICES) for _ in shape)
    order = draw(st.sampled_from("CF"))
    return Sample(np.array(draw(arrays(shape, x_of)), order=order)[cut], draw(arrays(shape, y_of))[cut], {})


@st.composite
def classes(draw: st.DrawFn, row: Row) -> Sample:
    """Logits of 1 to 40 classes in any layout, with targets of any integer dtype or probabilities."""
    shape = draw(SHAPES)
    x = np.array(draw(arrays(shape, FINITE)), order=draw(st.sampled_from("CF")))
    x = x[tuple(draw(SLICES) for _ in shape)]
    axis = min(1, x.ndim - 1)
    assume(x.shape[axis] > 0)
    if not row.indices:
        return Sample(x, draw(arrays(x.shape, UNIT)), {})
    kind = draw(st.sampled_from([np.int64, np.int32, np.int16, np.int8, np.uint8, np.uint64]))
    allowed = st.integers(0, x.shape[axis] - 1)
    if np.dtype(kind).kind == "i":
        allowed |= st.just(-100)
    return Sample(x, draw(hnp.arrays(kind, samples(x.shape), elements=allowed)), {})


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_any_shape_and_values(row: Row) -> None:
    """Values of every reduction and the gradient, against the oracle."""

    @given(sample=(classes if row.classes else pointwise)(row))
    def check(sample: Sample) -> None:
        for reduction in ("none", "mean") if sample.input.size else ("none",):
            check_value(row, sample, reduction)
        check_gradient(row, sample, "sum" if row.reductions else "none")

    check()


@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_any_bits(row: Row) -> None:
    """Any of the 2**32 float32: NaN and infinity where the definition has them, the bound elsewhere."""
    bits = UNIT if row.name == "binary_cross_entropy" else st.floats(width=32, allow_nan=True)

    @given(
        x=arrays((40,), bits),
        y=arrays((40,), bits if row.name not in ("kl_div", "binary_cross_entropy_with_logits") else UNIT),
    )
    def check(x: NDArray[Any], y: NDArray[Any]) -> None:
        if row.name == "kl_div":
            assume(not ((y == 0) & ~np.isfinite(x)).any())  # 0 * inf has no agreed value
        check_value(row, Sample(x, y, {}), "none")

    check()


@pytest.mark.parametrize("row", [row for row in ROWS if row.name == "cross_entropy"], ids=name_of)
def test_adding_a_constant_changes_nothing(row: Row) -> None:
    """Softmax sees differences alone: a whole number added to whole-number logits loses nothing."""

    @given(
        x=hnp.arrays(np.int64, (6, 12), elements=st.integers(-30, 30)),
        shift=st.integers(-10_000, 10_000),
        y=hnp.arrays(np.int64, 6, elements=st.integers(0, 11)),
    )
    def check(x: NDArray[Any], shift: int, y: NDArray[Any]) -> None:
        target = y if row.indices else np.eye(12, dtype=np.float32)[y]
        here, there = ((x + k).astype(np.float32) for k in (0, shift))
        a, b = (row.function(z, target, reduction="none") for z in (here, there))
        # 2e-6: the bound of 1e-6 on either side.
        np.testing.assert_allclose(a, b, rtol=4e-7, atol=2e-6)

    check()


@given(
    splits=st.lists(st.integers(0, 300), max_size=6),
    seed=st.integers(0, 2**32 - 1),
    choice=st.sampled_from(list(BY_ID["cross_entropy"].choices())),
)
def test_meter_of_any_batches(splits: list[int], seed: int, choice: dict[str, Any]) -> None:
    """Any cutting into batches gives the value of one call, to 1 ulp of float64."""
    row = BY_ID["cross_entropy"]
    sample = row.draw(np.random.default_rng(seed), (300, 5), "float64", choice)
    meter = fastloss.Meter("cross_entropy", **sample.options)
    cuts = [0, *sorted(splits), 300]
    for start, stop in itertools.pairwise(cuts):
        meter.update(sample.input[start:stop], sample.target[start:stop])
    whole = row.call(sample)
    assert abs(meter.compute() - whole) <= np.spacing(abs(whole))
    assert meter.samples == 300
