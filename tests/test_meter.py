"""Meter: batches of any size give what one call on everything gives, and a failed update changes nothing."""

import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest

import fastloss
import table
from table import BY_ID, ROWS, Options, Rng, Row, Sample, name_of


def per_batch(row: Row, options: Options) -> set[str]:
    """Options that belong to a batch: of the input's shape, element by element."""
    shaped = ("weight", "pos_weight")
    return {name for name in shaped if not row.classes and np.ndim(options.get(name, 0)) > 1}


def split(row: Row, sample: Sample, bounds: list[int]) -> list[tuple[Any, Any, Options]]:
    """Consecutive rows of a sample, with what belongs to them."""
    names = per_batch(row, sample.options)
    return [
        (sample.input[a:b], sample.target[a:b], {name: sample.options[name][a:b] for name in names})
        for a, b in itertools.pairwise(bounds)
    ]


def meter_for(row: Row, sample: Sample, **more: Any) -> fastloss.Meter:
    names = per_batch(row, sample.options)
    options = {name: value for name, value in sample.options.items() if name not in names}
    return fastloss.Meter(row.name, **options, **more)


def within_one_ulp(got: float, whole: Any) -> bool:
    return bool(abs(got - whole) <= np.spacing(abs(np.float64(whole))))


@pytest.mark.parametrize(("row", "choice"), [(row, choice) for row in ROWS for choice in row.choices()], ids=name_of)
def test_batches_equal_one_call(row: Row, choice: Options, rng: Rng) -> None:
    """To 1 ulp of float64, for batches of one row, of none, and of many; merging in any order too."""
    for dtype in row.dtypes(choice):
        sample = row.draw(rng, (257, 5), dtype, choice)
        bounds = [0, 1, 1, 3, 64, 200, 257]
        for reduction in row.reductions[1:]:
            whole = row.call(sample, reduction=reduction, dtype="float64")
            meter = meter_for(row, sample, reduction=reduction)
            parts = []
            for x, y, own in split(row, sample, bounds):
                meter.update(x, y, **own)
                parts.append(meter_for(row, sample, reduction=reduction))
                parts[-1].update(x, y, **own)
            assert isinstance(meter.compute(), float)
            assert within_one_ulp(meter.compute(), whole)
            merged = meter_for(row, sample, reduction=reduction)
            for i in rng.permutation(len(parts)):
                assert merged.merge(pickle.loads(pickle.dumps(parts[i]))) is None
            assert within_one_ulp(merged.compute(), whole)
            assert merged.samples == meter.samples


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_counts_and_sums(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (57, 5), "float64", {"weight": row.options["weight"][0]} if "weight" in row.options else {})
    meter = meter_for(row, sample)
    for x, y, own in split(row, sample, [0, 20, 57]):
        meter.update(x, y, **own)
    ignored = int((sample.target == -100).sum()) if row.indices else 0
    assert isinstance(meter.samples, int)
    assert meter.samples == (57 if row.classes else 57 * 5)
    assert meter.ignored == ignored
    assert within_one_ulp(meter.loss_sum, row.call(sample, reduction="sum"))
    if row.name in ("l1_loss", "mse_loss"):
        expected = float(sample.options["weight"].sum())
    elif row.indices:
        kept = sample.target[sample.target != -100]
        expected = float(sample.options["weight"][kept].sum())
    else:
        return
    assert meter.weight_sum == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_per_sample_losses_in_the_same_pass(row: Row, dtype: str, rng: Rng) -> None:
    sample = row.draw(rng, (57, 5), "float32")
    meter = meter_for(row, sample)
    losses = np.full(np.shape(row.call(sample, reduction="none")), 7, dtype)
    for (x, y, own), start, stop in zip(split(row, sample, [0, 20, 57]), (0, 20), (20, 57), strict=True):
        meter.update(x, y, **own, per_sample=losses[start:stop])
    np.testing.assert_array_equal(losses, row.call(sample, reduction="none", dtype=dtype))
    plain = meter_for(row, sample)
    plain.update(sample.input, sample.target)
    assert within_one_ulp(meter.compute(), plain.compute())


BAD_BATCHES = {
    "index": ("cross_entropy", lambda s: (s.input, np.where(np.arange(57) == 30, 99, s.target)), IndexError),
    "probability": ("binary_cross_entropy", lambda s: (s.input + (np.arange(5) == 3), s.target), ValueError),
    "shape": ("mse_loss", lambda s: (s.input, s.target[:, :3]), ValueError),
    "type": ("l1_loss", lambda s: ("text", s.target), TypeError),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_BATCHES)
def test_a_failed_update_changes_nothing(kind: str, rng: Rng) -> None:
    name, spoil, error = BAD_BATCHES[kind]
    row = BY_ID[name]
    sample = row.draw(rng, (57, 5))
    meter = fastloss.Meter(name)
    meter.update(sample.input, sample.target)
    state = pickle.dumps(meter)
    losses = np.full((57,) if row.classes else (57, 5), 7, np.float32)
    for per_sample in (None, losses):
        with pytest.raises(error):
            meter.update(*spoil(sample), per_sample=per_sample)
    assert pickle.dumps(meter) == state
    assert (losses == 7).all()


def test_per_sample_must_fit(rng: Rng) -> None:
    sample = BY_ID["cross_entropy"].draw(rng, (57, 5))
    meter = fastloss.Meter("cross_entropy")
    for losses, error in ((np.zeros(56, np.float32), ValueError), (np.zeros(57, np.int32), TypeError)):
        with pytest.raises(error, match="per_sample"):
            meter.update(sample.input, sample.target, per_sample=losses)
    assert meter.samples == 0


def test_nothing_seen() -> None:
    for reduction, expected in (("mean", np.nan), ("sum", 0)):
        meter = fastloss.Meter("cross_entropy", reduction=reduction)
        np.testing.assert_equal(meter.compute(), expected)
        meter.update(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
        np.testing.assert_equal(meter.compute(), expected)
        meter.update(np.zeros((2, 3), np.float32), np.array([-100, -100]))
        np.testing.assert_equal(meter.compute(), expected)
        assert (meter.samples, meter.ignored, meter.weight_sum, meter.loss_sum) == (2, 2, 0, 0)


def test_reset_and_pickle(rng: Rng) -> None:
    weight = rng.uniform(0.1, 2, 5).astype(np.float32)
    sample = BY_ID["cross_entropy"].draw(rng, (57, 5))
    meter = fastloss.Meter("cross_entropy", weight=weight, label_smoothing=0.1)
    meter.update(sample.input, sample.target)
    again = pickle.loads(pickle.dumps(meter))
    assert again.compute() == meter.compute()
    for one in (meter, again):
        one.update(sample.input[:9], sample.target[:9])
    assert again.compute() == meter.compute()
    meter.reset()
    assert meter.samples == 0
    assert np.isnan(meter.compute())
    meter.update(sample.input, sample.target)
    expected = fastloss.cross_entropy(sample.input, sample.target, weight, label_smoothing=0.1, dtype="float64")
    assert within_one_ulp(meter.compute(), expected)


def test_names_and_options() -> None:
    x, y = np.zeros((4, 3), np.float32), np.zeros(4, np.int64)
    for name in ("cross_entropy", "cross-entropy"):
        meter = fastloss.Meter(name)
        meter.update(x, y)
        assert meter.compute() == pytest.approx(np.log(3), rel=3e-7)
    for name, options, error in (
        ("cross_entropie", {}, ValueError),
        ("cross_entropy", {"reduction": "none"}, ValueError),
        ("cross_entropy", {"reduction": "average"}, ValueError),
        ("mse_loss", {"reduction": "batchmean"}, ValueError),
        ("cross_entropy", {"label_smoothing": 2.0}, ValueError),
        ("huber_loss", {"delta": -1.0}, ValueError),
        ("mse_loss", {"label_smoothing": 0.1}, TypeError),
        ("mse_loss", {"out": np.zeros(())}, (TypeError, ValueError)),
    ):
        with pytest.raises(error):
            fastloss.Meter(name, **options)


def test_meters_that_do_not_belong_together() -> None:
    """Only the same loss with the same options can be merged, and a refusal changes nothing."""
    weight = np.array([1, 2, 4], np.float32)
    meters = [
        fastloss.Meter("cross_entropy"),
        fastloss.Meter("cross_entropy", label_smoothing=0.1),
        fastloss.Meter("cross_entropy", weight=weight),
        fastloss.Meter("cross_entropy", weight=weight + 1),
        fastloss.Meter("nll_loss"),
    ]
    for meter in meters:
        meter.update(np.zeros((4, 3), np.float32), np.zeros(4, np.int64))
    for i, a in enumerate(meters):
        for j, b in enumerate(meters):
            if i != j:
                before = a.compute()
                with pytest.raises((ValueError, TypeError)):
                    a.merge(b)
                assert a.compute() == before
    same = fastloss.Meter("cross_entropy", weight=weight.copy())
    same.update(np.zeros((4, 3), np.float32), np.zeros(4, np.int64))
    meters[2].merge(same)
    assert meters[2].samples == 8


def test_merging_with_itself_counts_twice() -> None:
    meter = fastloss.Meter("mse_loss", reduction="sum")
    meter.update(np.array([2.0]), np.array([0.0]))
    meter.merge(meter)
    assert meter.compute() == 8
    assert meter.samples == 2


def test_many_batches_keep_their_digits(rng: Rng) -> None:
    """2,000 batches: the rounding of a plain float64 sum would show; ours is within 1 ulp of exact."""
    x = rng.uniform(0.1, 1, 2_000)
    meter = fastloss.Meter("l1_loss", reduction="sum")
    for value in x:
        meter.update(np.array([value]), np.array([0.0]))
    assert within_one_ulp(meter.compute(), math.fsum(x))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_trailing_dimensions(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (8, 4, 3, 5), choice={"weight": table.CLASSES} if row.classes else {})
    meter = meter_for(row, sample)
    for x, y, own in split(row, sample, [0, 1, 8]):
        meter.update(x, y, **own)
    assert meter.samples == sample.target.size if row.indices or not row.classes else 8 * 3 * 5
    assert within_one_ulp(meter.compute(), row.call(sample, dtype="float64"))
