"""Gradients on a GPU against the oracle: every operand, upstream gradients, and where results may lie."""

import numpy as np
import pytest
from on_device import (
    LAYOUTS,
    Room,
    check_gradient,
    check_value,
    compare,
    gradient_bound,
    has_gradient,
    host,
    on_device,
    overlapping,
    upload,
    upstream,
    value_bound,
)

import fastloss
from table import ARGNUM, CLASS_ROWS, CLASSES, DTYPES, ROWS, Options, Rng, Row, Sample, assert_within, name_of

CHOICES = [(row, choice) for row in ROWS for choice in row.choices()]


@pytest.mark.parametrize(("row", "choice"), CHOICES, ids=name_of)
def test_each_option_and_reduction(row: Row, choice: Options, rng: Rng) -> None:
    """Upstream gradients of each kind: an array for 'none'; nothing, a number or an array on the device otherwise."""
    shape = [(2, 21), (2, 3, 8)][rng.integers(2)] if row.classes else (3, 11)
    sample, other = (row.draw(rng, of, choice=choice) for of in (shape, (5, 6)))
    for operand in row.gradients:
        if has_gradient(sample, operand):
            check_gradient(row, sample, "none", operand, upstream(row, sample, rng))
            reduction = str(rng.choice(row.reductions[1:]))
            kinds = [None, float(rng.uniform(-2, 2)), upstream(row, other, rng, reduction)]
            check_gradient(row, other, reduction, operand, kinds[rng.integers(3)])


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_upstream_gradients(row: Row, rng: Rng) -> None:
    """None is 1, and an array means its numbers, whatever their dtype and layout."""
    for shape in ((5, 6), (1, 17)) if row.classes else ((3, 5),):
        sample = row.draw(rng, shape, choice=row.everything())
        device = upload(sample)
        reduction, up = str(rng.choice(row.reductions[1:])), upstream(row, sample, rng, "mean")
        grads = [check_gradient(row, sample, reduction, "input", one, device) for one in (None, 1.0)]
        np.testing.assert_array_equal(*grads)
        check_gradient(row, sample, reduction, "input", up.astype(np.float64), device)
        up = upstream(row, sample, rng)
        for name in ("backwards", "every-second"):
            check_gradient(row, sample, "none", "input", LAYOUTS[name](up), device)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_dtypes(row: Row, dtype: str, rng: Rng) -> None:
    for shape in ((5, 6), (2, 27), (2, 3, 16)) if row.classes else ((67,), (3, 5)):
        sample = row.draw(rng, shape, DTYPES[dtype], row.everything())
        operand = str(rng.choice([operand for operand in row.gradients if has_gradient(sample, operand)]))
        reduction = str(rng.choice(row.reductions))
        check_gradient(row, sample, reduction, operand, upstream(row, sample, rng, reduction))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_finite_differences(row: Row, rng: Rng) -> None:
    """Of the device's own values, in float64: the step's square and the rounding over the step are about 1e-9."""
    x = rng.uniform(0.2, 0.8, (2, 3))
    y = rng.integers(0, 3, 2) if row.indices else rng.uniform(0.85, 0.95, (2, 3))
    step = 1e-5
    _, grad = row.gradient(Sample(*map(on_device, (x, y)), {}))
    for at in ((0, 0), (1, 2)):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            ends.append(float(host(row.function(on_device(moved), on_device(y)))))
        assert host(grad)[at] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_input_becomes_its_gradient(row: Row, rng: Rng) -> None:
    """grad_out may be the input itself, on every path: the bits are those of an array of its own."""
    for shape in ((40, 6), (2, 21), (1, 131), (1, 300), (1, 1031), (2, 3, 8), (7,)) if row.classes else ((3, 50),):
        choice = row.any_choice(rng) if len(shape) > 2 or shape[-1] < 100 else {}
        sample = row.draw(rng, shape, choice=choice)
        reduction = str(rng.choice(row.reductions))
        up = upstream(row, sample, rng, reduction)
        plain = check_gradient(row, sample, reduction, "input", up)
        device = upload(sample)
        value, grad = row.gradient(device, reduction=reduction, grad_output=on_device(up), grad_out=device.input)
        assert grad is device.input
        np.testing.assert_array_equal(host(grad), plain)
        compare(row, sample, reduction, "input", up, host(value), plain)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_results_in_any_layout(row: Row, rng: Rng) -> None:
    """`out` and `grad_out` are filled and handed back, whatever their strides; nothing beside them is touched."""
    for shape in ((5, 6), (2, 21), (2, 3, 8)) if row.classes else ((3, 11),):
        sample = row.draw(rng, shape)
        device = upload(sample)
        truth = row.truth(sample, "none", 1.0)
        for name in rng.choice(list(LAYOUTS), 2):
            losses, grads = (
                Room(LAYOUTS[name](np.zeros(of.shape, np.float32)), shift=int(rng.integers(4)))
                for of in (truth.value, truth.input)
            )
            value, grad = row.gradient(
                device,
                reduction="none",
                grad_output=on_device(np.ones(truth.value.shape, np.float32)),
                out=losses.array,
                grad_out=grads.array,
            )
            assert value is losses.array
            assert grad is grads.array
            losses.check()
            grads.check()
            bound = gradient_bound(row, truth, "input", np.float32)
            assert_within(grads.read(), truth.input, bound, np.float32, f"{row.id} {name}")
            bound = value_bound(row, sample, "none")
            assert_within(losses.read(), truth.value, bound, np.float32, f"{row.id} {name}")


@pytest.mark.parametrize("row", [row for row in ROWS if len(row.gradients) > 1], ids=name_of)
def test_several_operands(row: Row, rng: Rng) -> None:
    """A tuple of argnums gives a tuple of gradients; each may lie where its argument does, or the other one's."""
    argnums = tuple(ARGNUM[operand] for operand in row.gradients)
    fused = fastloss.value_and_grad(row.function, argnums=argnums)
    for shape in ((5, 6), (2, 21)) if row.classes else ((3, 11),):
        sample = row.draw(rng, shape, choice={"weight": CLASSES} if row.classes else {})
        device = upload(sample)
        swapped = (device.target, device.input, *device.options.values())[: len(argnums)]
        for grad_out in (None, swapped):
            value, grads = fused(device.input, device.target, **device.options, reduction="sum", grad_out=grad_out)
            assert isinstance(grads, tuple)
            for operand, grad in zip(row.gradients, grads, strict=True):
                compare(row, sample, "sum", operand, None, host(value), host(grad))
        assert all(grad is given for grad, given in zip(grads, swapped, strict=True))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_gradients_that_lie_across_the_input(row: Row, rng: Rng) -> None:
    """Whatever is still to be read is not written over."""
    for shape, by in (((40, 6), 1), ((2, 30), -1), ((2, 3, 8), 5)) if row.classes else (((3, 50), 1), ((3, 50), -4)):
        sample = row.draw(rng, shape)
        x, grad_out = overlapping(sample.input, shape, by)
        check_gradient(row, sample, "sum", device=Sample(x, on_device(sample.target), {}), grad_out=grad_out)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_results_that_lie_across_the_upstream_gradient(row: Row, rng: Rng) -> None:
    """The memory of grad_output may become that of a result."""
    classes = (((34, 3), 0), ((34, 3), 1), ((2, 20), 0), ((2, 20), -1), ((2, 3, 8), 0))
    for shape, by in classes if row.classes else (((3, 50), 0), ((3, 50), 1), ((3, 50), -1)):
        sample = row.draw(rng, shape)
        up = upstream(row, sample, rng)
        for name, result in (("out", up.shape), ("grad_out", shape)):
            grad_output, memory = overlapping(up, result, by)
            found = row.gradient(upload(sample), reduction="none", grad_output=grad_output, **{name: memory})
            compare(row, sample, "none", "input", up, *map(host, found))


@pytest.mark.parametrize("row", [row for row in CLASS_ROWS if row.indices], ids=name_of)
def test_losses_that_lie_across_the_weights(row: Row, rng: Rng) -> None:
    """As many samples as classes: their losses may take the place of the class weights, and no weight is lost."""
    for n, by in ((5, 0), (5, 1), (16, 0)):
        sample = row.draw(rng, (n, n), choice={"weight": CLASSES})
        weight, out = overlapping(sample.options["weight"], (n,), by)
        device = Sample(on_device(sample.input), on_device(sample.target), {"weight": weight})
        check_value(row, sample, "none", device, out=out)
        weight, out = overlapping(sample.options["weight"], (n,), by)
        device = Sample(device.input, device.target, {"weight": weight})
        check_gradient(row, sample, "none", "input", np.ones(n, np.float32), device, out=out)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.classes], ids=name_of)
def test_losses_that_lie_across_the_input(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (3, 50))
    for by in (0, 1, -1):
        x, out = overlapping(sample.input, (3, 50), by)
        check_value(row, sample, "none", Sample(x, on_device(sample.target), {}), out=out)
