"""Class indices and probabilities that are none: nothing but their own sample is harmed, and checks raise in time."""

import re
from typing import Any

import numpy as np
import pytest
from on_device import Room, gradient_bound, on_device, upload, value_bound

import fastloss
from table import BY_ID, CLASSES, DTYPES, Rng, Row, Sample, assert_within, name_of

CE, NLL, BCE = (BY_ID[name] for name in ("cross_entropy", "nll_loss", "binary_cross_entropy"))
# One for each way that a sample's classes are read: tiled, by a warp, by a block, piece by piece, in slices, apart.
SHAPES = ((40, 5), (4, 21), (3, 131), (2, 261), (2, 1030), (2, 5, 6), (2, 5, 8))
KINDS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def bad_indices(kind: str, n_classes: int) -> list[int]:
    """The least and the greatest of the dtype, those that look like a class once bits are lost, and neighbours."""
    info = np.iinfo(kind)
    candidates = (-1, -2, n_classes, n_classes + 1, 2**32, 2**32 + 1, 2**40, -(2**40), int(info.min), int(info.max))
    return [n for n in candidates if info.min <= n <= info.max and not 0 <= n < n_classes]


def compare_without(
    row: Row, sample: Sample, bad: np.ndarray[Any, Any], grad_output: np.ndarray[Any, Any], losses: Any, grad: Any
) -> None:
    """Samples that are not `bad` are what the oracle says of them alone; those that are, NaN."""
    harmless = Sample(sample.input, np.where(bad, 0, sample.target).astype(np.int64), sample.options)
    truth = row.truth(harmless, "none", grad_output)
    assert np.isnan(losses[bad]).all()
    expected, bound = np.where(bad, np.nan, truth.value), value_bound(row, harmless, "none")
    assert_within(losses, expected, bound, losses.dtype, f"{row.id} beside {sample.target[bad]}")
    classes_last = np.moveaxis(grad, 1, -1) if grad.ndim > 1 else grad
    assert np.isnan(classes_last[bad]).all()
    mask = np.expand_dims(bad, min(1, grad.ndim - 1)) if grad.ndim > 1 else bad
    expected, bound = np.where(mask, np.nan, truth.input), gradient_bound(row, truth, "input", np.float32)
    assert_within(grad, expected, bound, grad.dtype, f"gradient of {row.id} beside {sample.target[bad]}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [CE, NLL], ids=name_of)
def test_indices_out_of_range(row: Row, kind: str, rng: Rng) -> None:
    """Beside guard values on both sides of every array: they stay as they are, and are not read in the simulator."""
    first = 2 * KINDS.index(kind) % len(SHAPES)  # two shapes for each dtype: all have two turns
    for shape in (SHAPES * 2)[first : first + 2]:
        sample = row.draw(rng, shape, choice={"weight": CLASSES} if rng.integers(2) else {})
        wrong = bad_indices(kind, shape[1])
        if not wrong:
            continue
        target = (abs(sample.target) % min(shape[1], np.iinfo(kind).max)).astype(kind)
        bad = np.zeros(target.shape, bool)
        bad.flat[rng.choice(target.size, max(1, target.size // 3), replace=False)] = True
        target[bad] = rng.choice(np.array(wrong, object), int(bad.sum())).astype(kind)
        sample = Sample(sample.input, target, sample.options)
        inputs = [Room(sample.input), Room(target), *map(Room, sample.options.values())]
        weights = {name: room.array for name, room in zip(sample.options, inputs[2:], strict=True)}
        device = Sample(inputs[0].array, inputs[1].array, weights)
        up = rng.uniform(-2, 2, target.shape).astype(np.float32)
        losses, grad = Room(np.zeros(target.shape, np.float32)), Room(np.zeros(shape, np.float32))
        row.gradient(device, reduction="none", grad_output=on_device(up), out=losses.array, grad_out=grad.array)
        compare_without(row, sample, bad, up, losses.read(), grad.read())
        total, slopes = Room(np.zeros((), np.float32)), Room(np.zeros(shape, np.float32))
        row.gradient(device, reduction=str(rng.choice(["mean", "sum"])), out=total.array, grad_out=slopes.array)
        assert np.isnan(total.read())
        rows = np.moveaxis(slopes.read(), 1, -1)
        assert np.isnan(rows[bad]).all()
        assert np.isfinite(rows[~bad]).all()
        for room in inputs:
            room.check(written=False)
        for room in (losses, grad, total, slopes):
            room.check()


@pytest.mark.parametrize("choice", list(CE.choices()), ids=name_of)
def test_indices_out_of_range_with_options(choice: dict[str, Any], rng: Rng) -> None:
    for shape in ((9, 5), (3, 21), (2, 5, 6)):
        sample = CE.draw(rng, shape, choice=choice)
        bad = np.zeros(sample.target.shape, bool)
        bad.flat[rng.integers(bad.size)] = True
        sample.target[bad] = rng.choice([-1, shape[1], 2**40])
        up = rng.uniform(-2, 2, bad.shape).astype(np.float32)
        rooms = Room(np.zeros(bad.shape, np.float32)), Room(np.zeros(shape, np.float32))
        CE.gradient(
            upload(sample), reduction="none", grad_output=on_device(up), out=rooms[0].array, grad_out=rooms[1].array
        )
        harmless = Sample(sample.input, np.where(bad, 0, sample.target), sample.options)
        if choice.get("ignore_index") == 1:
            harmless.target[bad] = 0
        compare_without(CE, sample, bad, up, *(room.read() for room in rooms))


def test_the_index_that_is_ignored_alone(rng: Rng) -> None:
    """-1 is ignored where it is ignore_index, and then no other number that has the same bits in 64."""
    logits = on_device(rng.normal(size=(3, 4)).astype(np.float32))
    for row in (CE, NLL):
        got = row.function(logits, on_device(np.array([0, -1, 2])), ignore_index=-1, reduction="none").copy_to_host()
        assert got[1] == 0
        target = on_device(np.array([0, 2**64 - 1, 2], np.uint64))
        got = row.function(logits, target, ignore_index=-1, reduction="none").copy_to_host()
        assert np.isnan(got[1])


@pytest.mark.parametrize("asked", ["argument", "environment"])
@pytest.mark.parametrize("row", [CE, NLL], ids=name_of)
def test_checks_of_indices(row: Row, asked: str, rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """IndexError with the value and its position, before anything is written."""
    if asked == "environment":
        monkeypatch.setenv("FASTLOSS_CHECK", "1")
    check = {"check": True} if asked == "argument" else {}
    for shape in ((40, 5), (2, 21), (1, 1030), (2, 5, 6), (5,)):
        sample = row.draw(rng, shape)
        target = np.atleast_1d(sample.target).copy() if len(shape) > 1 else np.asarray(sample.target)
        at = tuple(int(rng.integers(n)) for n in target.shape)
        target[at] = value = int(rng.choice([-1, 2**40, shape[min(1, len(shape) - 1)]]))
        device = Sample(on_device(sample.input), on_device(target), {})
        n_classes = shape[min(1, len(shape) - 1)]
        message = re.escape(f"target {value} at position {at} is out of range for {n_classes} classes")
        for reduction in row.reductions:
            out = Room(np.zeros(target.shape if reduction == "none" else (), np.float32))
            grad = Room(np.zeros(shape, np.float32))
            with pytest.raises(IndexError, match=f"^{message}$"):
                row.call(device, reduction=reduction, out=out.array, **check)
            with pytest.raises(IndexError, match=message):
                row.gradient(device, reduction=reduction, out=out.array, grad_out=grad.array, **check)
            out.check(written=False)
            grad.check(written=False)
        with pytest.raises(IndexError, match=message):
            row.gradient(device, grad_out=device.input, **check)
        np.testing.assert_array_equal(device.input.copy_to_host(), sample.input)
        good = upload(Sample(sample.input, np.where(target < 0, 0, target) % n_classes, {}))
        assert np.isfinite(row.call(good, **check).copy_to_host())
    if asked == "environment":
        row.call(device, check=False)
        monkeypatch.setenv("FASTLOSS_CHECK", "0")
        row.call(device)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_probabilities_out_of_range(dtype: str, rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN for the element alone; ValueError with the value and its position where checks are asked for."""
    for n in (20, 530 if dtype == "float32" else 67):
        for operand in ("input", "target"):
            sample = BCE.draw(rng, (n,), DTYPES[dtype])
            bad = np.zeros(n, bool)
            first = int(rng.integers(n - 3))
            bad[first] = bad[-2] = True
            getattr(sample, operand)[bad] = rng.choice([1.5, -0.25, np.nan, np.inf])
            value = getattr(sample, operand)[first]
            device = upload(sample)
            losses, grad = (Room(np.zeros(n, DTYPES[dtype])) for _ in range(2))
            up = on_device(np.ones(n, np.float32))
            BCE.gradient(device, reduction="none", grad_output=up, out=losses.array, grad_out=grad.array)
            for room in (losses, grad):
                np.testing.assert_array_equal(np.isnan(room.read()), bad)
                room.check()
            assert np.isnan(BCE.call(device).copy_to_host())
            message = re.escape(f"{operand} {value!s} at position ({first},) is outside [0, 1]")
            losses = Room(np.zeros(n, DTYPES[dtype]))
            for reduction, out in (("none", losses.array), ("mean", None)):
                with pytest.raises(ValueError, match=message):
                    BCE.call(device, check=True, reduction=reduction, out=out)
                with pytest.raises(ValueError, match=message):
                    BCE.gradient(device, check=True, reduction=reduction, out=out)
            losses.check(written=False)
            monkeypatch.setenv("FASTLOSS_CHECK", "1")
            with pytest.raises(ValueError, match=message):
                BCE.call(device)
            monkeypatch.delenv("FASTLOSS_CHECK")


def test_a_failed_update_of_a_meter_changes_nothing(rng: Rng) -> None:
    for row, spoil in ((CE, 99), (NLL, -1), (BCE, 1.5)):
        sample = row.draw(rng, (20, 5))
        meter = fastloss.Meter(row.name)
        good = upload(sample)
        meter.update(good.input, good.target)
        before = (meter.compute(), meter.samples, meter.weight_sum)
        target = sample.target.copy()
        target.flat[7] = spoil
        kept = Room(np.zeros(20 if row.classes else (20, 5), np.float32))
        for per_sample in (None, kept.array):
            with pytest.raises((IndexError, ValueError), match="at position"):
                meter.update(good.input, on_device(target), per_sample=per_sample)
        kept.check(written=False)
        assert (meter.compute(), meter.samples, meter.weight_sum) == before
