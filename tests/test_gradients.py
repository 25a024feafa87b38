"""Gradients of every loss: against the oracle's formula and its central finite differences."""

from typing import Any

import numpy as np
import pytest

import fastloss
import table
from table import (
    BY_ID,
    CLASS_ROWS,
    POINTWISE,
    ROWS,
    Options,
    Rng,
    Row,
    Sample,
    assert_within,
    check_gradient,
    gradient_bound,
    name_of,
)

INF, NAN = np.inf, np.nan


def upstream(row: Row, sample: Sample, reduction: str, rng: Rng) -> Any:
    """A random gradient of the loss's value, in the input's dtype and the value's shape."""
    shape = row.truth(sample, reduction).value.shape
    return rng.uniform(-2, 2, shape).astype(sample.input.dtype)


def has_gradient(sample: Sample, operand: str) -> bool:
    return operand != "weight" or "weight" in sample.options


@pytest.mark.parametrize(("row", "choice"), [(row, choice) for row in ROWS for choice in row.choices()], ids=name_of)
@pytest.mark.parametrize("shape", [(37, 10), (3, 5, 2, 7), (7,)], ids=str)
def test_each_option_and_reduction(row: Row, choice: Options, shape: tuple[int, ...], rng: Rng) -> None:
    """With upstream gradients; without them for what is reduced."""
    for dtype in row.dtypes(choice):
        sample = row.draw(rng, shape, dtype, choice)
        for reduction in row.reductions:
            for operand in row.gradients:
                if has_gradient(sample, operand):
                    check_gradient(row, sample, reduction, operand, upstream(row, sample, reduction, rng))
                    if reduction != "none":
                        check_gradient(row, sample, reduction, operand)


def differences(row: Row, sample: Sample, reduction: str, grad_output: Any, operand: str) -> np.ndarray[Any, Any]:
    """Central differences of the oracle's value in longdouble: the error is about h**2, 1e-8."""
    h = 1e-4
    x = np.array({"input": sample.input, "target": sample.target, **sample.options}[operand])
    grad = np.empty(x.shape)
    for at in np.ndindex(x.shape):
        ends = []
        for step in (h, -h):
            moved = x.copy()
            moved[at] += step
            operands = {"input": sample.input, "target": sample.target, "options": sample.options}
            if operand == "weight":
                operands["options"] = sample.options | {"weight": moved}
            else:
                operands[operand] = moved
            ends.append((row.truth(Sample(**operands), reduction).value * grad_output).sum())  # type: ignore[arg-type]
        grad[at] = (ends[0] - ends[1]) / (2 * h)
    return grad


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_finite_differences(row: Row, rng: Rng) -> None:
    for choice in (*row.choices(), row.any_choice(rng)):
        sample = row.draw(rng, (4, 3), "float64", choice)
        while np.isnan(row.truth(sample, "mean").value):  # every sample ignored: the mean of none has no slope
            sample = row.draw(rng, (4, 3), "float64", choice)
        if row.name == "binary_cross_entropy":
            # Away from 0 and 1, where the third derivative outgrows the step.
            sample = Sample(0.1 + 0.8 * sample.input, sample.target, sample.options)
        if row.name in ("l1_loss", "smooth_l1_loss", "huber_loss"):
            # Differences away from 0, beta and delta, where the derivative jumps.
            apart = rng.choice([-1, 1], (4, 3)) * (rng.integers(0, 5, (4, 3)) + rng.uniform(0.1, 0.9, (4, 3)))
            sample = Sample(sample.target + apart, sample.target, sample.options)
        if row.name == "kl_div" and not choice.get("log_target"):
            sample = Sample(sample.input, sample.target + 0.1, sample.options)
        reduction = str(rng.choice(row.reductions))
        grad_output = upstream(row, sample, reduction, rng)
        for operand in row.gradients:
            if has_gradient(sample, operand):
                _, grad = row.gradient(sample, operand, reduction=reduction, grad_output=grad_output)
                expected = differences(row, sample, reduction, grad_output, operand)
                # h**2 / 6 times the third derivative, at most a few thousand here (1 / 0.1**3).
                np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_classes", [*range(1, 20), 31, 33, 63, 64, 65, 100, 127, 129, 1000, 1024, 4097])
@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_class_counts(row: Row, n_classes: int, rng: Rng) -> None:
    for n in (1, int(rng.integers(5, 70))):
        sample = row.draw(rng, (n, n_classes))
        late = sample.input.copy()
        late[rng.uniform(size=n) < 0.5, -1] += np.float32(500)
        for x in (sample.input, late):
            check_gradient(row, Sample(x, sample.target, {}), "mean")
            one = Sample(x, sample.target, {})
            check_gradient(row, one, "none", "input", upstream(row, one, "none", rng))


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 31, 33, 64, 1000, 1023, 1025, 4097, 70_001])
@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_sizes(row: Row, n: int, rng: Rng) -> None:
    sample = row.draw(rng, (n,))
    for reduction in ("none", "mean", "sum") if n else ("none", "sum"):
        check_gradient(row, sample, reduction, "input", upstream(row, sample, reduction, rng))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_large_enough_for_threads(row: Row, rng: Rng) -> None:
    for shape in ((20_011, 10), (3, 5, 90, 91)):
        sample = row.draw(rng, shape, choice=row.everything())
        for reduction in ("none", "mean"):
            check_gradient(row, sample, reduction, "input", upstream(row, sample, reduction, rng))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_input_becomes_its_gradient(row: Row, rng: Rng) -> None:
    """grad_out receives the gradient and is what is returned; it may be the input itself."""
    for shape in ((37, 10), (5, 3, 11), (300, 70)):
        sample = row.draw(rng, shape, choice=row.everything())
        for reduction in row.reductions:
            grad_output = upstream(row, sample, reduction, rng)
            _, plain = row.gradient(sample, reduction=reduction, grad_output=grad_output)
            room = np.empty((*shape[:-1], 2 * shape[-1]), np.float32)[..., ::2]
            for grad_out in (np.empty(shape, np.float32), np.empty(shape, np.float32, order="F"), room):
                got = check_gradient(row, sample, reduction, "input", grad_output, grad_out=grad_out)
                assert got is grad_out
                np.testing.assert_array_equal(got, plain)
            overwritten = Sample(sample.input.copy(), sample.target, sample.options)
            got = check_gradient(row, overwritten, reduction, grad_output=grad_output, grad_out=overwritten.input)
            assert got is overwritten.input
            np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
@pytest.mark.parametrize("shape", [(300,), (37, 10)], ids=str)
def test_a_gradient_over_what_it_is_made_from(row: Row, shape: tuple[int, ...], rng: Rng) -> None:
    """grad_out may begin in any operand's memory, beside or at its first element: everything is read before."""
    for choice in row.choices():
        sample = row.draw(rng, shape, "float64", choice)
        operands = {"input": sample.input, "target": sample.target, **sample.options}
        operands["grad_output"] = np.asarray(upstream(row, sample, "none", rng))
        _, plain = fastloss.value_and_grad(row.function)(**operands, reduction="none")
        for name, operand in operands.items():
            if not isinstance(operand, np.ndarray) or operand.dtype != np.float64:
                continue
            for shift in (-1, 0, 1):
                room = np.empty(sample.input.size + operand.size + 1)
                moved = room[1 : 1 + operand.size].reshape(operand.shape)
                moved[...] = operand
                grad_out = room[1 + shift : 1 + shift + plain.size].reshape(plain.shape)
                fused = fastloss.value_and_grad(row.function)
                _, grad = fused(**operands | {name: moved}, reduction="none", grad_out=grad_out)
                assert grad is grad_out
                np.testing.assert_array_equal(grad, plain, err_msg=f"over {name}, {shift} elements on")


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_out_and_grad_out_together(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (37, 10))
    value, grad = row.gradient(sample, reduction="none")
    out, grad_out = np.empty_like(value), np.empty_like(grad)
    got = row.gradient(sample, reduction="none", out=out, grad_out=grad_out)
    assert got[0] is out
    assert got[1] is grad_out
    np.testing.assert_array_equal(out, value)
    np.testing.assert_array_equal(grad_out, grad)


@pytest.mark.parametrize("row", [row for row in ROWS if len(row.gradients) > 1], ids=name_of)
def test_several_operands(row: Row, rng: Rng) -> None:
    """A tuple of argnums gives a tuple of gradients, the same bits as one at a time."""
    sample = row.draw(rng, (37, 10), choice={"weight": table.CLASSES} if row.classes else {})
    argnums = tuple(table.ARGNUM[operand] for operand in row.gradients)
    fused = fastloss.value_and_grad(row.function, argnums=argnums)
    value, grads = fused(sample.input, sample.target, **sample.options)
    assert isinstance(grads, tuple)
    for operand, grad in zip(row.gradients, grads, strict=True):
        alone_value, alone = row.gradient(sample, operand)
        np.testing.assert_array_equal(grad, alone)
        assert value == alone_value
    _, (single,) = fastloss.value_and_grad(row.function, argnums=(0,))(sample.input, sample.target, **sample.options)
    np.testing.assert_array_equal(single, grads[0])


def test_weight_by_position(rng: Rng) -> None:
    row = BY_ID["cross_entropy-probabilities"]
    sample = row.draw(rng, (9, 4), "float64", {"weight": table.CLASSES})
    fused = fastloss.value_and_grad(fastloss.cross_entropy, argnums=2)
    _, grad = fused(sample.input, sample.target, sample.options["weight"])
    truth = row.truth(sample, grad_output=1.0)
    assert_within(grad, truth.weight, gradient_bound(truth, "weight", "float64"), "float64")


@pytest.mark.parametrize("choice", [{}, {"label_smoothing": 0.1}, {"weight": table.CLASSES}], ids=name_of)
@pytest.mark.parametrize("shape", [(12, 3), (12, 30), (12, 300), (3, 5, 4)], ids=str)
def test_everything_ignored_has_no_gradient(choice: Options, shape: tuple[int, ...], rng: Rng) -> None:
    row = BY_ID["cross_entropy"]
    drawn = row.draw(rng, shape, choice=choice)
    sample = Sample(np.full(shape, NAN, np.float32), np.full_like(drawn.target, -100), drawn.options)
    for reduction in row.reductions:
        value, grad = row.gradient(sample, reduction=reduction)
        assert np.isnan(value) if reduction == "mean" else not np.any(value)
        assert not grad.any()


@pytest.mark.parametrize("choice", list(BY_ID["cross_entropy"].choices()), ids=name_of)
def test_ignored_rows_leak_nothing(choice: Options, rng: Rng) -> None:
    """A row of NaN or infinity that is ignored has gradient 0, where torch's is nan."""
    row = BY_ID["cross_entropy"]
    for shape in ((60, 5), (60, 40), (60, 300), (2, 5, 50)):
        sample = row.draw(rng, shape, choice=choice)
        sample.target.flat[:2] = 1, sample.options.get("ignore_index", -100)
        ignored = sample.target == sample.options.get("ignore_index", -100)
        np.moveaxis(sample.input, 1, -1)[ignored] = rng.choice([NAN, INF, -INF, 1e38])
        for reduction in row.reductions:
            grad = check_gradient(row, sample, reduction)
            assert not np.moveaxis(grad, 1, -1)[ignored].any()
            assert np.isfinite(grad).all()


@pytest.mark.parametrize("special", [NAN, INF, -INF], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_special_logits(row: Row, special: float, rng: Rng) -> None:
    for n_classes in (2, 5, 40, 200):
        sample = row.draw(rng, (9, n_classes))
        if row.indices:
            sample.target[:] = rng.integers(1, n_classes, 9)
        sample.input[np.arange(5), rng.integers(0, n_classes, 5)] = special
        check_gradient(row, sample, "none")


def test_minus_infinity_at_the_target(rng: Rng) -> None:
    """The loss is inf, its gradient finite: the softmax, -1 at the target."""
    for n_classes in (2, 3, 20, 100, 1000):
        x = np.zeros((3, n_classes), np.float32)
        x[:, 0] = -INF
        loss, grad = fastloss.value_and_grad(fastloss.cross_entropy)(x, np.zeros(3, int), reduction="none")
        assert np.isposinf(loss).all()
        expected = np.full(n_classes, 1 / (n_classes - 1))
        expected[0] = -1
        np.testing.assert_allclose(grad, [expected] * 3, rtol=3e-7)


@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_special_values(row: Row, rng: Rng) -> None:
    """Infinities of either sign and NaN against ordinary targets: NaN stays NaN."""
    if row.name == "binary_cross_entropy":
        x = np.array([0, 1, 1e-45, 1e-38, 1e-7, 1 - 2**-24, 0.5], np.float32)
        y = np.array([0, 1, 0.5], np.float32)
    else:
        x = np.array([0, NAN, INF, -INF, 1e4, -1e4, 88, -88, 1e-40], np.float32)
        y = np.array([0.25, 1, 0], np.float32)
    x, y = np.stack(np.meshgrid(x, y)).reshape(2, -1)
    x, y = np.tile(x, 3), np.tile(y, 3)
    check_gradient(row, Sample(x, y, {}), "none")


def test_l1_gradient_at_equality_and_nan() -> None:
    x = np.array([1, 2, 3, NAN, 5], np.float32)
    y = np.array([1, 3, 2, 1, NAN], np.float32)
    _, grad = fastloss.value_and_grad(fastloss.l1_loss)(x, y, reduction="sum")
    np.testing.assert_array_equal(grad, [0, -1, 1, NAN, NAN])


@pytest.mark.parametrize("n", [2, 3, 1000])
def test_infinite_gradients_stay_infinite(n: int) -> None:
    """1 / n may be a float32 or not, and lie on either side of the nearest one."""
    x, y = np.ones(n, np.float32), np.zeros(n, np.float32)
    y[:2] = INF, -INF
    _, grad = fastloss.value_and_grad(fastloss.binary_cross_entropy_with_logits)(x, y)
    np.testing.assert_array_equal(grad[:2], [-INF, INF])
    assert np.isfinite(grad[2:]).all()


def test_bce_gradient_is_finite_at_the_ends() -> None:
    """(x - y) / max((1 - x) x, 1e-12): 1e12 at the worst."""
    x, y = np.array([0, 1, 0, 1], np.float64), np.array([1, 0, 0, 1], np.float64)
    _, grad = fastloss.value_and_grad(fastloss.binary_cross_entropy)(x, y, reduction="sum")
    np.testing.assert_allclose(grad, [-1e12, 1e12, 0, 0], rtol=1e-15)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.name.startswith(("cross", "nll", "bin"))], ids=name_of)
def test_broadcasting_sums_over_the_stretched_axes(row: Row, rng: Rng) -> None:
    sample = Sample(row.draw(rng, (4, 1, 3)).input, row.draw(rng, (5, 3)).target, {})
    for operand in row.gradients:
        for reduction in ("none", "mean"):
            with pytest.warns(fastloss.BroadcastWarning):
                check_gradient(row, sample, reduction, operand)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_empty(row: Row, rng: Rng) -> None:
    for shape in ((0, 3), (2, 3, 0)):
        for reduction in ("none", "mean", "sum"):
            _, grad = row.gradient(row.draw(rng, shape), reduction=reduction)
            assert grad.shape == shape


def test_class_instances(rng: Rng) -> None:
    """value_and_grad takes a class instance as well as a function."""
    sample = BY_ID["cross_entropy"].draw(rng, (9, 4), choice={"weight": table.CLASSES})
    loss = fastloss.CrossEntropyLoss(weight=sample.options["weight"], label_smoothing=0.1)
    value, grad = fastloss.value_and_grad(loss)(sample.input, sample.target)
    expected = fastloss.value_and_grad(fastloss.cross_entropy)(
        sample.input, sample.target, **sample.options, label_smoothing=0.1
    )
    assert value == expected[0]
    np.testing.assert_array_equal(grad, expected[1])
