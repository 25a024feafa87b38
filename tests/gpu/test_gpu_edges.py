"""Ugly inputs on a GPU: NaN, infinities, nothing, everything ignored, numbers at the ends of their formats."""

from typing import Any

import numpy as np
import pytest
from on_device import check_gradient, check_value, host, on_device, upload, upstream

import fastloss
import table
from table import BY_ID, CLASS_ROWS, DTYPES, POINTWISE, ROWS, Options, Rng, Row, Sample, name_of
from test_values import specials

INF, NAN = np.inf, np.nan
CE, NLL, SOFT = (BY_ID[name] for name in ("cross_entropy", "nll_loss", "cross_entropy-probabilities"))
# One for each way that a sample's classes are read: tiled, by a warp, by a block, piece by piece, in slices, apart.
SHAPES = ((9, 5), (3, 21), (2, 131), (2, 261), (1, 1030), (2, 5, 4))


def rows_of(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(N, C, ...) as a view in which classes come last."""
    return np.moveaxis(x, 1, -1)


@pytest.mark.parametrize("special", [NAN, INF, -INF], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_special_logits(row: Row, special: float, rng: Rng) -> None:
    """One special value anywhere, at the target, and a whole row of it; the other rows stay as they are."""
    choices = [choice for choice in row.choices() if choice.get("label_smoothing") != 1]  # 0 * inf has no agreed value
    for shape in SHAPES:
        sample = row.draw(rng, shape, choice=choices[rng.integers(len(choices))])
        rows = rows_of(sample.input)
        samples = list(np.ndindex(rows.shape[:-1]))
        kinds = [*rng.permutation(["anywhere", "target", "all"]), *["none"] * len(samples)]
        for at, kind in zip(samples, kinds[rng.integers(2) :], strict=False):
            target = sample.target[at] if row.indices and sample.target[at] >= 0 else 0
            if kind != "none":
                place = {"all": slice(None), "target": target, "anywhere": rng.integers(shape[1])}[kind]
                rows[at][place] = special
        check_value(row, sample, str(rng.choice(["none", "sum"])))


@pytest.mark.parametrize("special", [NAN, INF, -INF], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_gradients_at_special_logits(row: Row, special: float, rng: Rng) -> None:
    for shape in SHAPES[rng.integers(2) :: 2]:  # half of them
        sample = row.draw(rng, shape)
        rows = rows_of(sample.input)
        for at in list(np.ndindex(rows.shape[:-1]))[::2]:
            rows[at][rng.integers(shape[1])] = special
        check_gradient(row, sample, "none", "input", upstream(row, sample, rng))


@pytest.mark.parametrize("n_classes", [3, 20, 150, 300, 1031])
def test_minus_infinity_at_the_target(n_classes: int) -> None:
    """The loss is inf, its gradient finite: the softmax, -1 at the target."""
    x = np.zeros((2, n_classes), np.float32)
    x[:, 0] = -INF
    device = Sample(on_device(x), on_device(np.zeros(2, int)), {})
    loss, grad = CE.gradient(device, reduction="sum")
    assert host(loss) == INF
    np.testing.assert_allclose(host(grad), [[-1.0] + [1 / (n_classes - 1)] * (n_classes - 1)] * 2, rtol=5e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_special_values(row: Row, dtype: str, rng: Rng) -> None:
    """Every pair of special and ordinary values that the loss admits, subnormal numbers among them."""
    sample = specials(row, rng)
    if row.name == "kl_div":
        keep = ~((sample.target == 0) & np.isnan(sample.input))  # 0 * nan: no agreed value
        sample = Sample(sample.input[keep], sample.target[keep], {})
    check_value(row, Sample(sample.input.astype(dtype), sample.target.astype(dtype), {}), "none")


@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_gradients_at_special_values(row: Row, rng: Rng) -> None:
    if row.name == "binary_cross_entropy":
        x, y = np.float32([0, 1, 1e-45, 1e-38, 1e-7, 1 - 2**-24, 0.5]), np.float32([0, 1, 0.5])
    else:
        x, y = np.float32([0, NAN, INF, -INF, 1e4, -1e4, 88, -88, 1e-40]), np.float32([0.25, 1, 0])
    x, y = np.stack(np.meshgrid(x, y)).reshape(2, -1)
    check_gradient(row, Sample(x, y, {}), "none", "input", np.ones(x.shape, np.float32))


@pytest.mark.parametrize(("p", "y", "expected"), [(0, 1, 100), (1, 0, 100), (0, 0, 0), (1, 1, 0), (0, 0.5, 50)])
def test_bce_at_the_ends(p: float, y: float, expected: float) -> None:
    """Each logarithm is at least -100, and gradients are divided by at least 1e-12."""
    for dtype in DTYPES.values():
        x, t = (on_device(np.array([v, 0.5], dtype)) for v in (p, y))
        assert host(fastloss.binary_cross_entropy(x, t, reduction="none"))[0] == expected
    x, t = (on_device(np.array([float(v)])) for v in (p, y))
    _, grad = fastloss.value_and_grad(fastloss.binary_cross_entropy)(x, t)
    assert host(grad)[0] == pytest.approx((p - y) * 1e12, rel=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("row", [CE, SOFT], ids=name_of)
def test_logits_of_1e4(row: Row, dtype: str, rng: Rng) -> None:
    """Shared offsets and spread maxima of +-1e4 cost no digits; smoothing sums what is far apart."""
    for shape, smoothing in zip(SHAPES, (0.0, 0.1) * 3, strict=True):
        sample = row.draw(rng, shape, dtype, {"label_smoothing": smoothing})
        offset = rng.choice([1e4, -1e4]) if rng.integers(2) else rng.choice([-1e4, 0, 1e4], shape)
        moved = Sample((sample.input + offset).astype(dtype), sample.target, sample.options)
        check_gradient(row, moved, "mean")


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_empty(row: Row, rng: Rng) -> None:
    """No samples: none has none, the mean is nan, the sum 0, and gradients have no elements."""
    for shape in ((0, 3), (0, 33), (0, 3, 4), (2, 3, 0), *(((0, 0),) if row.classes else ((0,), (3, 0)))):
        sample = row.draw(rng, shape)
        for reduction in row.reductions:
            value, grad = (host(x) for x in row.gradient(upload(sample), reduction=reduction))
            expected = {"none": table.samples(shape) if row.classes else shape}.get(reduction, ())
            assert value.shape == expected
            assert grad.shape == shape
            if reduction == "sum":
                assert value == 0
            elif reduction == "mean":
                assert np.isnan(value)


def test_samples_without_classes() -> None:
    for target in (np.zeros(4, int), np.zeros((4, 0), np.float32)):
        with pytest.raises(ValueError, match="class"):
            fastloss.cross_entropy(on_device(np.zeros((4, 0), np.float32)), on_device(target))


@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_one_class_and_no_batch(row: Row, rng: Rng) -> None:
    for shape in ((5, 1), (2, 1, 5), (1,), (4,), (35,), (300,), (1031,)):
        sample = row.draw(rng, shape)
        if row.indices:
            sample = Sample(sample.input, abs(np.asarray(sample.target)) % table.n_classes(shape), {})
        check_value(row, sample, "none")
        check_gradient(row, sample, "mean")


@pytest.mark.parametrize("choice", [{}, {"label_smoothing": 0.1}, {"weight": table.CLASSES}], ids=name_of)
def test_everything_ignored(choice: Options, rng: Rng) -> None:
    """The mean is nan and its gradient 0, the sum is 0, 'none' all 0, whatever stands in the logits."""
    for row in (CE, NLL):
        if choice.keys() <= row.options.keys():
            for shape in SHAPES if row is CE else SHAPES[::5]:
                drawn = row.draw(rng, shape, choice=choice)
                ignored = int(rng.choice([-100, 1, 10**6]))
                options = drawn.options | {"ignore_index": ignored}
                device = upload(Sample(np.full(shape, NAN, np.float32), np.full_like(drawn.target, ignored), options))
                for reduction in {"mean", str(rng.choice(row.reductions))}:
                    value, grad = (host(x) for x in row.gradient(device, reduction=reduction))
                    assert np.isnan(value) if reduction == "mean" else not value.any()
                    assert not grad.any()


@pytest.mark.parametrize("row", [CE, NLL], ids=name_of)
def test_ignored_rows_leak_nothing(row: Row, rng: Rng) -> None:
    """NaN and infinity in ignored rows change nothing and have gradient 0, in no layout."""
    for shape in SHAPES:
        sample = row.draw(rng, shape, choice=row.any_choice(rng))
        ignore = sample.options.get("ignore_index", -100)
        sample.target.flat[:2] = (0, ignore)[: sample.target.size]
        ignored = sample.target == ignore
        rows_of(sample.input)[ignored] = rng.choice([NAN, INF, -INF, 1e38], (int(ignored.sum()), shape[1]))
        grad = check_gradient(row, sample, str(rng.choice(row.reductions)))
        assert not rows_of(grad)[ignored].any()
        assert np.isfinite(grad).all()
        assert np.isfinite(check_value(row, sample, str(rng.choice(row.reductions)))).all()


@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_weights_zero_and_negative(row: Row, rng: Rng) -> None:
    """All zero: the mean of class indices is 0 / 0; negative weights are weights like any other."""
    for shape in ((9, 6), (3, 40), (2, 6, 4)):
        sample = row.draw(rng, shape)
        zero = upload(Sample(sample.input, sample.target, {"weight": np.zeros(shape[1], np.float32)}))
        assert np.isnan(host(row.call(zero))) if row.indices else host(row.call(zero)) == 0
        assert host(row.call(zero, reduction="sum")) == 0
        weight = rng.uniform(-3, 3, shape[1]).astype(np.float32)
        weight[1] = 0
        negative = Sample(sample.input, sample.target, {"weight": weight})
        check_value(row, negative, "none")
        check_gradient(row, negative, "sum")


@pytest.mark.parametrize("row", [BY_ID["l1_loss"], BY_ID["mse_loss"]], ids=name_of)
def test_element_weights_of_zero(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (3, 7))
    device = upload(Sample(sample.input, sample.target, {"weight": np.zeros((3, 7), np.float32)}))
    assert np.isnan(host(row.call(device)))
    assert host(row.call(device, reduction="sum")) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [3, 70, 600])
def test_sums_beyond_the_largest_number(n: int, dtype: str) -> None:
    """Sums are pairs of float32: past 3.4e38 they are infinite, and so is their mean, finite on the CPU (docs/cuda.md).
    What is not added up is right, and so are float16, whose sums float32 holds, and float64."""
    large = np.full(n, 3e38).astype(DTYPES[dtype])
    x, y = on_device(large), on_device(np.zeros_like(large))
    np.testing.assert_array_equal(host(fastloss.l1_loss(x, y, reduction="none")), large)
    for reduction in ("sum", "mean"):
        assert host(fastloss.l1_loss(x, y, reduction=reduction)) == INF
    half = np.full(n, 65504, np.float16)
    assert host(fastloss.l1_loss(on_device(half), on_device(np.zeros_like(half)))) == half[0]
    wide = large.astype(np.float64)
    assert host(fastloss.l1_loss(on_device(wide), on_device(np.zeros_like(wide)))) == wide[0]


def test_subnormal_numbers(rng: Rng) -> None:
    """As exact as others, in sums too."""
    for row in (BY_ID["l1_loss"], BY_ID["smooth_l1_loss"]):
        x, y = ((rng.uniform(-1, 1, 70) * 1e-40).astype(np.float32) for _ in range(2))
        options: Options = {"beta": 0.0} if row.name == "smooth_l1_loss" else {}
        for reduction in ("none", "sum"):
            check_value(row, Sample(x, y, options), reduction)
