"""Dtypes: half precision is summed wide and rounded once, `dtype=` is the result's, promotion is torch's."""

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastloss
import table
from table import (
    BY_ID,
    CLASS_ROWS,
    DTYPES,
    ROWS,
    Rng,
    Row,
    Sample,
    check_gradient,
    check_value,
    name_of,
)

HALVES = ["float16", "bfloat16"]
SUMMED = ("cross_entropy", "l1_loss", "mse_loss", "binary_cross_entropy")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_half_values_and_gradients(row: Row, dtype: str, rng: Rng) -> None:
    for shape in ((37, 10), (6, 5, 3, 7)):
        sample = row.draw(rng, shape, DTYPES[dtype], row.everything())
        for reduction in row.reductions:
            check_value(row, sample, reduction)
        grad_output = rng.uniform(-2, 2, row.truth(sample, "none").value.shape).astype(DTYPES[dtype])
        check_gradient(row, sample, "none", "input", grad_output)
        for operand in row.gradients:
            if operand != "weight" or "weight" in sample.options:
                check_gradient(row, sample, "mean", operand)
    check_value(row, row.draw(rng, (5_003, 20), DTYPES[dtype], row.everything()), "mean")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_half_class_counts(row: Row, dtype: str, rng: Rng) -> None:
    for n_classes in (1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129, 1000, 4097):
        sample = row.draw(rng, (9, n_classes), DTYPES[dtype])
        check_value(row, sample, "none")
        check_gradient(row, sample, "none")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("row", [row for row in ROWS if row.name in SUMMED], ids=name_of)
def test_half_means_are_right_to_half_an_ulp(row: Row, dtype: str, rng: Rng) -> None:
    """65,536 x 64: torch's sums in the input's dtype are 1% off (bfloat16) or nan (float16)."""
    shape = (65_536, 64)
    target = rng.integers(0, 64, shape[0]) if row.indices else row.draw(rng, shape).target
    x = row.draw_input(rng, shape, {}).astype(DTYPES[dtype])
    sample = Sample(x, target if row.indices else target.astype(DTYPES[dtype]), {})
    true_total = row.truth(sample, "none").value.sum()
    samples = shape[0] if row.classes else shape[0] * shape[1]
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    for reduction, truth in (("mean", true_total / samples), ("sum", true_total)):
        got = float(row.call(sample, reduction=reduction))
        if abs(truth) > 1.001 * largest:
            assert got == np.sign(truth) * np.inf
        else:
            # Half an ulp of the half type, and float32's 3e-7 beside it where the truth lies next to a tie.
            assert abs(got - truth) <= 0.5 * table.ulp(truth, DTYPES[dtype]) + 3e-7 * abs(truth)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_float64_sums(row: Row, rng: Rng) -> None:
    """1e-15 log2(N) relative: what pairwise summation would reach."""
    sample = row.draw(rng, (8_192, 8), "float64")
    for reduction in row.reductions:
        check_value(row, sample, reduction)


def test_ill_conditioned_sum(rng: Rng) -> None:
    """A million losses of 1 beside one of 1e16, whose ulp is 2: right to 1e-15 log2(N) of the whole."""
    x = np.ones(1_000_001)
    x[rng.integers(0, x.size)] = 1e16
    got = fastloss.l1_loss(x, np.zeros_like(x), reduction="sum")
    assert abs(got - (1e16 + 1_000_000)) <= 1e-15 * 20 * 1e16


def some_pairs(row: Row, rng: Rng, count: int) -> list[tuple[str, str]]:
    """Pairs of dtypes, each a kernel: all for one loss, a few at random for the others."""
    pairs = list(itertools.product(DTYPES, DTYPES))
    if row.name == "l1_loss":
        return pairs
    return [pairs[i] for i in rng.choice(len(pairs), count, replace=False)]


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_dtype_of_the_result(row: Row, rng: Rng) -> None:
    """`dtype=` is the result's: a wider one shows what rounding hides, a narrower one rounds once more."""
    for source, wanted in some_pairs(row, rng, 3):
        sample = row.draw(rng, (33, 7), DTYPES[source])
        for reduction in ("none", "mean"):
            truth = row.truth(sample, reduction).value
            bound = table.value_bound(row, sample, reduction, DTYPES[source])
            if wanted == "float32":
                bound = bound + 0.505 * table.ulp(truth, np.float32)
            got = row.call(sample, reduction=reduction, dtype=wanted)
            table.assert_within(got, truth, bound, DTYPES[wanted], f"{row.id} {source} to {wanted}")


def test_spellings_of_dtype(rng: Rng) -> None:
    """Names, scalar types, NumPy's and torch's dtypes."""
    for name, dtype in DTYPES.items():
        for spelling in (name, dtype, dtype.type, getattr(torch, name)):
            assert fastloss.mse_loss(np.ones(3), np.zeros(3), dtype=spelling).dtype == dtype


@pytest.mark.parametrize("row", [row for row in ROWS if not row.indices], ids=name_of)
def test_promotion_is_torchs(row: Row, rng: Rng) -> None:
    """Floating dtypes of input and target give torch.promote_types; gradients have their operand's dtype."""
    for left, right in some_pairs(row, rng, 3):
        expected = torch.promote_types(getattr(torch, left), getattr(torch, right))
        result = DTYPES[str(expected).removeprefix("torch.")]
        a, b = row.draw(rng, (12, 5), DTYPES[left]), row.draw(rng, (12, 5), DTYPES[right])
        sample = Sample(a.input, b.target, {})
        truth = row.truth(sample, "none").value
        bound = table.value_bound(row, sample, "none", result)
        table.assert_within(row.call(sample, reduction="none"), truth, bound, result, f"{left}, {right}")
        for operand, own in zip(row.gradients[:2], (left, right), strict=False):
            assert row.gradient(sample, operand)[1].dtype == DTYPES[own]


@pytest.mark.parametrize("row", [row for row in ROWS if not row.classes], ids=name_of)
def test_integer_operands(row: Row, rng: Rng) -> None:
    """Beside a float an integer takes its dtype; two of them are an error that says what to cast to."""
    x = np.array([0, 1, 1, 0], np.float32)
    for kind in (np.int64, np.uint8, np.bool_, np.int32):
        y = np.array([1, 1, 0, 0], kind)
        sample = Sample(x, y, {})
        got = row.call(sample, reduction="none")
        table.assert_within(got, row.truth(sample, "none").value, 1e-6, np.float32)
        with pytest.raises(TypeError, match="float32"):
            row.call(Sample(y, y, {}))


@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.bool_, np.complex64, np.longdouble])
def test_logits_must_be_floating(row: Row, kind: Any, rng: Rng) -> None:
    sample = row.draw(rng, (4, 3))
    with pytest.raises(TypeError, match="float32"):
        row.call(Sample(np.ones((4, 3), kind), sample.target, {}))


@pytest.mark.parametrize("row", [BY_ID["cross_entropy"], BY_ID["nll_loss"]], ids=name_of)
@pytest.mark.parametrize("kind", [*"bBhHiIlLqQ"])
def test_every_integer_dtype_is_an_index(row: Row, kind: str, rng: Rng) -> None:
    """Native and byte-swapped, contiguous and strided, in rows and in trailing dimensions."""
    for shape in ((41, 10), (2, 7, 33), (9, 120)):
        sample = row.draw(rng, shape)
        plain = np.where(sample.target < 0, 3, sample.target).astype(kind)
        for target in (
            plain,
            np.repeat(plain, 2, -1)[..., ::2],
            plain.astype(plain.dtype.newbyteorder()),
            plain[..., ::-1].copy()[..., ::-1],
        ):
            for ignore in (-100, 3):
                one = Sample(sample.input, target, {"ignore_index": ignore})
                check_value(row, one, "none")
                check_value(row, one, "mean")
        check_gradient(row, Sample(sample.input, plain, {}), "mean")
