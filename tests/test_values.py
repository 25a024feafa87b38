"""Values of every loss against the oracle: options, reductions, class counts, sizes and ugly inputs."""

import os
from typing import Any

import numpy as np
import pytest

import fastloss
import table
from table import BY_ID, CLASS_ROWS, POINTWISE, ROWS, Options, Rng, Row, Sample, check_value, name_of

INF, NAN = np.inf, np.nan

# Every tail of a 16-lane vector, and both sides of each place where the kernels change their way.
CLASS_COUNTS = (*range(1, 21), 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 1000, 1024, 4097)
# Around powers of two, around blocks, and past the size at which work is shared between threads.
SIZES = (
    *range(20),
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    1000,
    1023,
    1024,
    1025,
    4095,
    4097,
    16385,
    65536,
    70001,
)


@pytest.mark.parametrize(("row", "choice"), [(row, choice) for row in ROWS for choice in row.choices()], ids=name_of)
@pytest.mark.parametrize("shape", [(37, 10), (6, 5, 3, 7), (7,)], ids=str)
def test_each_option_and_reduction(row: Row, choice: Options, shape: tuple[int, ...], rng: Rng) -> None:
    for dtype in row.dtypes(choice):
        sample = row.draw(rng, shape, dtype, choice)
        for reduction in row.reductions:
            check_value(row, sample, reduction)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_large_enough_for_threads(row: Row, rng: Rng) -> None:
    for shape in ((20_011, 10), (3, 5, 90, 91)):
        sample = row.draw(rng, shape, choice=row.everything())
        for reduction in ("none", "mean"):
            check_value(row, sample, reduction)


@pytest.mark.parametrize("n_classes", CLASS_COUNTS)
@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_class_counts(row: Row, n_classes: int, rng: Rng) -> None:
    """Rows of every length, some with a maximum 500 above whatever the row began with."""
    for n in (1, 3, int(rng.integers(30, 80))):
        sample = row.draw(rng, (n, n_classes))
        late = sample.input.copy()
        some = rng.uniform(size=n) < 0.5
        late[some, -1 - rng.integers(0, min(n_classes, 3))] += np.float32(500)
        for x in (sample.input, late):
            for reduction in ("none", "mean"):
                check_value(row, Sample(x, sample.target, {}), reduction)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 127, 255, 1025])
@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_row_counts(row: Row, n: int, rng: Rng) -> None:
    """Numbers of rows that are no multiple of a block, in both layouts."""
    for shape in ((n, 2), (n, 7), (n, 40), (1, 3, n), (3, 20, n)):
        check_value(row, row.draw(rng, shape), "none")


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_sizes(row: Row, n: int, rng: Rng) -> None:
    sample = row.draw(rng, (n,))
    for reduction in ("none", "mean", "sum") if n else ("none", "sum"):
        check_value(row, sample, reduction)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("row", [row for row in CLASS_ROWS if row.name == "cross_entropy"], ids=name_of)
def test_logits_of_1e4(row: Row, dtype: str, rng: Rng) -> None:
    """Shared offsets and spread maxima of +-1e4 cost no digits; smoothing sums what is far apart."""
    for n_classes in (3, 10, 100, 1000):
        for choice in ({}, {"label_smoothing": 0.1}):
            sample = row.draw(rng, (20, n_classes), dtype, choice)
            for offset in (1e4, -1e4):
                near = (sample.input + offset).astype(dtype)
                check_value(row, Sample(near, sample.target, sample.options), "none")
            far = (rng.choice([-1e4, 0, 1e4], sample.input.shape) + sample.input).astype(dtype)
            check_value(row, Sample(far, sample.target, sample.options), "none")


@pytest.mark.parametrize("special", [NAN, INF, -INF], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize(
    ("row", "choice"),
    # Not all of it smoothed: 0 * inf at an impossible target has no agreed value.
    [(row, choice) for row in CLASS_ROWS for choice in row.choices() if choice.get("label_smoothing") != 1],
    ids=name_of,
)
def test_special_logits(row: Row, choice: Options, special: float, rng: Rng) -> None:
    """One special value anywhere, at the target, and whole rows of it; the other rows stay as they are."""
    for n_classes in (2, 5, 40, 200):
        sample = row.draw(rng, (9, n_classes), choice=choice)
        x = sample.input
        for i in range(1, 6):
            x[i, rng.integers(0, n_classes)] = special
        if row.indices:
            sample.target[6] = 0
        x[6, 0] = special
        x[7] = special
        for reduction in ("none", "sum"):
            check_value(row, sample, reduction)


def specials(row: Row, rng: Rng) -> Sample:
    """Every pair of special and ordinary values that the loss admits."""
    if row.name == "binary_cross_entropy":
        x = y = np.array([0, 1, 0.5, 1e-45, 1e-38, 1e-30, 1 - 2**-24, 2**-126, 0.25], np.float32)
    elif row.name == "binary_cross_entropy_with_logits":
        x = np.array([0, -0.0, INF, -INF, NAN, 1e4, -1e4, -37, 88, -104, 3e38, 1e-40], np.float32)
        y = np.array([0, 1, 0.5, 0.25], np.float32)
    elif row.name == "kl_div":
        x = np.array([0, -1, -1e4, NAN, 1e-40], np.float32)
        y = np.array([0, 1, 1e-45, 1e-30, 0.5, 1e4, -1], np.float32)
    else:
        x = y = np.array([0, -0.0, INF, -INF, NAN, 1e4, -1e4, 1, 1e-45, 1e-20, 1e30, -3e38], np.float32)
    pairs = np.stack(np.meshgrid(x, y, indexing="ij")).reshape(2, -1)
    # Repeated past one vector, so that both the loop and its tail meet every pair.
    return Sample(np.tile(pairs[0], 2), np.tile(pairs[1], 2), {})


@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_special_values(row: Row, rng: Rng) -> None:
    sample = specials(row, rng)
    if row.name == "kl_div":
        keep = ~((sample.target == 0) & np.isnan(sample.input))  # 0 * nan: no agreed value
        sample = Sample(sample.input[keep], sample.target[keep], {})
    for dtype in ("float32", "float64"):
        wider = Sample(sample.input.astype(dtype), sample.target.astype(dtype), {})
        check_value(row, wider, "none")


def test_bce_with_logits_at_infinity() -> None:
    """The limit, where torch gives nan: 0 for the target that agrees, inf for the opposite one."""
    row = BY_ID["binary_cross_entropy_with_logits"]
    x = np.array([INF, INF, -INF, -INF, INF, -INF], np.float32)
    y = np.array([1, 0, 0, 1, 0.5, 0.5], np.float32)
    for pos_weight in ({}, {"pos_weight": np.float32([2, 2, 2, 2, 2, 2])}):
        got = row.function(x, y, reduction="none", **pos_weight)
        np.testing.assert_array_equal(got, [0, INF, 0, INF, INF, INF])


@pytest.mark.parametrize("place", [0, 700, 2003])
def test_bce_sums_where_their_short_formulas_do_not_hold(place: int, rng: Rng) -> None:
    """An infinite logit with the target that agrees adds nothing, -0.0 is a probability: the sum is done again."""
    n = 2004
    y = rng.random(n).astype(np.float32)
    x = rng.standard_normal(n).astype(np.float32)
    probability = rng.random(n).astype(np.float32)
    x[place], probability[place], y[place] = -INF, -0.0, 0
    for name, values in (("binary_cross_entropy_with_logits", x), ("binary_cross_entropy", probability)):
        row = BY_ID[name]
        others = row.function(np.delete(values, place), np.delete(y, place), reduction="sum")
        np.testing.assert_allclose(row.function(values, y, reduction="sum"), others, rtol=3e-7)
    y[place] = 1
    assert BY_ID["binary_cross_entropy_with_logits"].function(x, y) == INF


def test_bce_with_logits_keeps_the_small_tail() -> None:
    """log1p(exp(-37)) in float64 is 8.5e-17; 1 + exp(-37) would be 1."""
    got = BY_ID["binary_cross_entropy_with_logits"].function(np.array([-37.0]), np.array([0.0]), reduction="none")
    np.testing.assert_allclose(got, np.exp(-37.0), rtol=1e-15)


@pytest.mark.parametrize(("p", "y", "expected"), [(0, 1, 100), (1, 0, 100), (0, 0, 0), (1, 1, 0), (0, 0.5, 50)])
@pytest.mark.parametrize("dtype", table.DTYPES)
def test_bce_clamps_each_logarithm(dtype: str, p: float, y: float, expected: float) -> None:
    x, t = (np.array([v, 0.5], table.DTYPES[dtype]) for v in (p, y))
    got = BY_ID["binary_cross_entropy"].function(x, t, reduction="none")
    assert got[0] == expected


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_empty(row: Row, reduction: str, rng: Rng) -> None:
    """No samples: none has none, the mean is nan, the sum 0; likewise with a dimension of length 0."""
    for shape in ((0, 3), (0, 3, 4), (2, 3, 0), *(() if row.classes else ((0,), (3, 0)))):
        sample = row.draw(rng, shape)
        got = np.asarray(row.call(sample, reduction=reduction))
        assert got.dtype == np.float32
        if reduction == "none":
            assert got.shape == (table.samples(shape) if row.classes else shape)
        else:
            assert got.shape == ()
            assert np.isnan(got) if reduction == "mean" else got == 0


@pytest.mark.parametrize("choice", [{}, {"label_smoothing": 0.1}, {"weight": table.CLASSES}], ids=name_of)
@pytest.mark.parametrize("ignored", [-100, 2, 255, 10**6])
def test_everything_ignored(choice: Options, ignored: int, rng: Rng) -> None:
    row = BY_ID["cross_entropy"]
    drawn = row.draw(rng, (50, 7), choice=choice)
    for target in (np.full(50, ignored), np.full((50, 3), ignored)):
        x = drawn.input if target.ndim == 1 else np.stack([drawn.input] * 3, -1)
        sample = Sample(x, target, drawn.options | {"ignore_index": ignored})
        assert np.isnan(row.call(sample))
        assert row.call(sample, reduction="sum") == 0
        assert not row.call(sample, reduction="none").any()


@pytest.mark.parametrize("choice", list(BY_ID["cross_entropy"].choices()), ids=name_of)
def test_ignored_rows_leak_nothing(choice: Options, rng: Rng) -> None:
    """NaN and infinity in ignored rows change nothing, in no layout; a softmax neighbour is no neighbour."""
    row = BY_ID["cross_entropy"]
    for shape in ((60, 5), (60, 40), (60, 300), (2, 5, 50), (2, 40, 50)):
        sample = row.draw(rng, shape, choice=choice)
        sample.target.flat[:2] = 1, sample.options.get("ignore_index", -100)
        ignored = sample.target == sample.options.get("ignore_index", -100)
        x = np.moveaxis(sample.input, 1, -1)
        x[ignored] = rng.choice([NAN, INF, -INF, 1e38], (int(ignored.sum()), x.shape[-1]))
        for reduction in ("none", "mean", "sum"):
            assert np.isfinite(check_value(row, sample, reduction)).all()


@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_weights_zero_and_negative(row: Row, rng: Rng) -> None:
    """All zero: the mean of class indices is 0 / 0; negative weights are weights like any other."""
    sample = row.draw(rng, (30, 6))
    zero = Sample(sample.input, sample.target, {"weight": np.zeros(6, np.float32)})
    assert np.isnan(row.call(zero)) if row.indices else row.call(zero) == 0
    assert row.call(zero, reduction="sum") == 0
    negative = Sample(sample.input, sample.target, {"weight": np.float32([-3, 1, 2, -0.5, 0, 1])})
    for reduction in ("none", "sum"):
        check_value(row, negative, reduction)


def test_one_hot_against_its_own_logits() -> None:
    """H(P, Q) of equal one-hot distributions is 0, with the other classes impossible or merely 1e4 away."""
    for away in (-INF, -1e4):
        x = np.array([0, away, away], np.float32)
        assert BY_ID["cross_entropy-probabilities"].function(x, np.float32([1, 0, 0])) == 0
        assert BY_ID["cross_entropy"].function(x, np.array(0)) == 0


@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in ("cross_entropy", "nll_loss")], ids=name_of)
def test_broadcasting(row: Row, rng: Rng) -> None:
    """Where torch broadcasts and warns, so do we, in a category of its own; elsewhere it is an error."""
    for left, right in (((4, 1, 3), (5, 3)), ((3,), (2, 3)), ((2, 3), ()), ((), (4,))):
        sample = Sample(row.draw(rng, left).input, row.draw(rng, right).target, {})
        if row.name.startswith("binary"):
            with pytest.raises(ValueError, match="shape"):
                row.call(sample)
            continue
        with pytest.warns(fastloss.BroadcastWarning):
            check_value(row, sample, "none")
        with pytest.warns(fastloss.BroadcastWarning):
            check_value(row, sample, "mean")


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_out_is_used_and_returned(row: Row, rng: Rng) -> None:
    """`out` of the result's shape and dtype receives the result, whatever its layout."""
    shape = (40, 6)
    sample = row.draw(rng, shape)
    for reduction in row.reductions:
        plain = np.asarray(row.call(sample, reduction=reduction))
        room = np.full((*plain.shape[:-1], 2 * plain.shape[-1]) if plain.ndim else (), 77, plain.dtype)
        out = room[..., ::2] if plain.ndim else room
        got = row.call(sample, reduction=reduction, out=out)
        assert got is out
        np.testing.assert_array_equal(out, plain)
        if plain.ndim:
            assert (room[..., 1::2] == 77).all()


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_input_and_target_are_left_alone(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (40, 6), choice=row.everything())
    before = [np.array(a) for a in (sample.input, sample.target, *sample.options.values())]
    for reduction in row.reductions:
        row.call(sample, reduction=reduction)
        row.gradient(sample, reduction=reduction)
    for a, b in zip(before, (sample.input, sample.target, *sample.options.values()), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_same_bits_again(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (5_003, 10), choice=row.everything())
    for reduction in row.reductions:
        first, second = (np.asarray(row.call(sample, reduction=reduction)) for _ in range(2))
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("row", [row for row in ROWS if row.name != "huber_loss"], ids=name_of)
def test_legacy_arguments(row: Row, rng: Rng) -> None:
    """size_average and reduce override the reduction, with a warning, as in torch.nn."""
    sample = row.draw(rng, (12, 5))
    for legacy, reduction in (
        ({"size_average": False}, "sum"),
        ({"size_average": True}, "mean"),
        ({"reduce": False}, "none"),
        ({"reduce": True}, "mean"),
        ({"size_average": False, "reduce": True}, "sum"),
        ({"size_average": True, "reduce": False}, "none"),
    ):
        other: Any = "none" if reduction != "none" else "sum"
        with pytest.warns(DeprecationWarning, match=reduction):
            got = row.call(sample, **legacy, reduction=other)
        np.testing.assert_array_equal(got, row.call(sample, reduction=reduction))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """Offsets past 2**31: a float16 row vector seen as (N, C) with N * C > 2**31, needing 4.3 GB."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 12 << 30:
        pytest.skip(f"needs 12 GB of free memory, {free >> 30} are free")
    n, c = (1 << 25) + 3, 64
    x = np.zeros((n, c), np.float16)
    x[-1, -1], x[-2, 0] = 5, 7
    target = np.zeros(n, np.uint8)
    target[-1] = c - 1
    got = fastloss.cross_entropy(x, target, reduction="none")
    expected = np.full(n, np.log(c), np.float16)
    tail = np.zeros((2, c))
    tail[1, -1], tail[0, 0] = 5, 7
    expected[-2:] = [np.log(np.exp(r).sum()) - r[t] for r, t in zip(tail, (0, c - 1), strict=True)]
    np.testing.assert_array_equal(got, expected)
    del got, expected
    flat = x.reshape(-1)
    total = fastloss.l1_loss(flat, flat[::-1], reduction="sum", dtype="float64")
    assert total == 2 * (5 + 7)
    target[-1] = c
    with pytest.raises(IndexError, match=rf"target {c} at position \({n - 1},\) is out of range for {c} classes"):
        fastloss.cross_entropy(x, target)
