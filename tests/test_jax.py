"""JAX: every loss, reduction and option under jit, grad, jvp and vmap, against the oracle."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastloss
import reference
from table import (
    ARGNUM,
    BY_ID,
    DTYPES,
    ROWS,
    Options,
    Rng,
    Row,
    Sample,
    assert_within,
    gradient_bound,
    name_of,
    value_bound,
)

# JAX's threads stay in one worker.
pytestmark = pytest.mark.xdist_group("jax")
jax = pytest.importorskip("jax")
jnp = jax.numpy

import fastloss.jax  # noqa: E402
from fastloss.jax import composite, sites  # noqa: E402

SHAPE = (24, 10)
CASES = [(row, choice) for row in ROWS for choice in ({}, row.everything())]


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def arguments(row: Row, sample: Sample) -> tuple[tuple[Any, Any], Options, Options]:
    """Input and target, options that are arrays, and others."""
    arrays = {name: jnp.asarray(value) for name, value in sample.options.items() if isinstance(value, np.ndarray)}
    others = {name: value for name, value in sample.options.items() if name not in arrays}
    return (jnp.asarray(sample.input), jnp.asarray(sample.target)), arrays, others


def check(
    row: Row, sample: Sample, reduction: str, value: Any, operand: str = "", grad: Any = None, scale: Any = 1.0
) -> None:
    """Compare a value, and the gradient to an operand, with the oracle."""
    __tracebackhide__ = True
    truth = row.truth(sample, reduction, scale if operand else None)
    dtype = sample.input.dtype
    assert_within(value, truth.value, value_bound(row, sample, reduction, dtype), dtype, f"{row.id} {reduction}")
    if operand:
        bound = gradient_bound(truth, operand, dtype)
        assert_within(grad, getattr(truth, operand), bound, dtype, f"{row.id} {reduction} {operand}")


# ---- values and gradients


@pytest.mark.parametrize(("row", "choice"), CASES, ids=name_of)
def test_jit(row: Row, choice: Options, rng: Rng) -> None:
    """Value, and value with gradients, of the first call and of the next one, which takes another way."""
    names = [name for name in row.gradients if name != "weight"]
    for reduction in row.reductions if choice else ("mean",):
        first = row.draw(rng, SHAPE, choice=choice)
        _, _, others = arguments(row, first)
        loss = jax.jit(lambda x, y, more, r=reduction, o=others: row.function(x, y, reduction=r, **more, **o))
        both = jax.jit(jax.value_and_grad(lambda *a, f=loss: f(*a).sum(), argnums=tuple(ARGNUM[n] for n in names)))
        for sample in (first, row.draw(rng, SHAPE, choice=choice)):
            operands, arrays, _ = arguments(row, sample)
            check(row, sample, reduction, loss(*operands, arrays))
            _, grads = both(*operands, arrays)
            for name, grad in zip(names, grads, strict=True):
                check(row, sample, reduction, loss(*operands, arrays), name, grad)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_float64_and_other_shapes(row: Row, rng: Rng, x64: None) -> None:
    """All options at once."""
    for shape in ((7, 5, 3), (6,)):
        sample = row.draw(rng, shape, np.float64, row.everything())
        operands, arrays, others = arguments(row, sample)
        loss = jax.jit(jax.value_and_grad(lambda x, y, more, o=others: row.function(x, y, **more, **o)))
        value, grad = loss(*operands, arrays)
        check(row, sample, "mean", value, "input", grad)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("row", [BY_ID["cross_entropy"], BY_ID["mse_loss"]], ids=name_of)
def test_halves(row: Row, dtype: str, rng: Rng) -> None:
    loss = jax.jit(jax.value_and_grad(row.function))
    for _ in range(2):
        sample = row.draw(rng, SHAPE, DTYPES[dtype])
        value, grad = loss(*arguments(row, sample)[0])
        check(row, sample, "mean", value, "input", grad)
    assert row.function(jnp.ones(SHAPE, dtype), jnp.zeros(SHAPE if row.id == "mse_loss" else 24, int)).dtype == dtype
    wide = jax.jit(lambda x, y: row.function(x, y, dtype="float32"))(*arguments(row, sample)[0])
    assert_within(wide, row.truth(sample).value, value_bound(row, sample, "mean", np.float32), np.float32)


def test_eager(rng: Rng) -> None:
    """Concrete arrays, differentiated without jit, by both spellings; and a cotangent that is not 1."""
    row = BY_ID["cross_entropy"]
    sample = row.draw(rng, SHAPE)
    (x, y), _, _ = arguments(row, sample)
    for function in (fastloss.cross_entropy, fastloss.jax.cross_entropy):
        assert isinstance(function(x, y), jax.Array)
        check(row, sample, "mean", *jax.value_and_grad(function)(x, y)[:1])
        check(row, sample, "mean", function(x, y), "input", jax.grad(function)(x, y))
    scale = rng.standard_normal(24)
    value, pull = jax.vjp(lambda a: fastloss.cross_entropy(a, y, reduction="none"), x)
    (grad,) = pull(jnp.asarray(scale, np.float32))
    check(row, sample, "none", value, "input", grad, scale.astype(np.float32))


def test_numpy_arrays_become_jax_arrays(rng: Rng) -> None:
    x, y = rng.standard_normal((4, 5)).astype(np.float32), [1, 2, 3, 4]
    expected = fastloss.cross_entropy(x, y)
    for got in (fastloss.jax.cross_entropy(x, y), jax.jit(lambda a: fastloss.jax.cross_entropy(a, y))(x)):
        assert isinstance(got, jax.Array)
        assert float(got) == pytest.approx(float(expected), rel=1e-6)
    assert jax.grad(lambda a: fastloss.mse_loss(a, 0.0, reduction="sum"))(jnp.array(3.0)) == 6


def test_value_and_grad_modules_and_own_losses(rng: Rng) -> None:
    from fastloss.kernels.pointwise import Pointwise

    x, y = (jnp.asarray(rng.standard_normal(9), np.float32) for _ in range(2))
    value, grad = jax.jit(fastloss.value_and_grad(fastloss.HuberLoss(delta=0.5)))(x, y)
    truth = reference.huber_loss(np.asarray(x), np.asarray(y), delta=0.5, grad_output=1.0)
    np.testing.assert_allclose(value, truth.value, rtol=3e-7)
    np.testing.assert_allclose(grad, truth.input, rtol=1e-6)
    weight = jnp.arange(9.0)
    fused = fastloss.value_and_grad(fastloss.mse_loss, argnums=(1, 0))
    _, (to_y, to_x) = jax.jit(lambda a, b: fused(a, b, reduction="none", grad_output=weight))(x, y)
    np.testing.assert_allclose(to_x, 2 * (x - y) * weight, rtol=1e-6)
    np.testing.assert_array_equal(to_y, -to_x)
    square = fastloss.pointwise_loss(Pointwise("square", lambda x, y: (x - y) * (x - y), lambda x, y: 2 * (x - y)))
    assert jax.jit(jax.grad(square))(x, y) == pytest.approx(np.asarray(2 * (x - y) / 9), rel=1e-6)
    # by the target, of which these formulas say nothing, the composition is asked
    assert jax.grad(square, argnums=1)(x, y) == pytest.approx(np.asarray(2 * (y - x) / 9), rel=1e-6)


# ---- other derivatives


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_second_derivatives(row: Row, rng: Rng, x64: None) -> None:
    """Hessian-vector products, forward over reverse and reverse over reverse, beside differences of the oracle's
    gradients."""
    sample = row.draw(rng, SHAPE, np.float64, {n: v for n, v in row.everything().items() if n != "ignore_index"})
    if row.id == "binary_cross_entropy":
        sample = Sample(sample.input * 0.8 + 0.1, sample.target, sample.options)
    operands, arrays, others = arguments(row, sample)
    direction = rng.standard_normal(SHAPE)
    h = 1e-5

    def loss(x: Any) -> Any:
        return row.function(x, operands[1], **arrays, **others)

    def oracle(step: float) -> Any:
        moved = Sample(sample.input + step * direction, sample.target, sample.options)
        return np.asarray(row.truth(moved, "mean", 1.0).input, np.float64)

    truth = (oracle(h) - oracle(-h)) / (2 * h)
    x, along = operands[0], jnp.asarray(direction)
    forward = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (along,))[1])(x)
    backward = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), along)))(x)
    kinks = row.id in ("l1_loss", "smooth_l1_loss", "huber_loss")  # a difference across one is no derivative
    for got in (forward, backward):
        close = np.isclose(got, truth, rtol=1e-5, atol=1e-8)
        assert close.mean() > 0.98 if kinks else close.all()


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_forward_mode(row: Row, rng: Rng) -> None:
    """The directional derivative is the oracle's gradient times the direction, of each sample."""
    sample = row.draw(rng, SHAPE, choice=row.everything())
    operands, arrays, others = arguments(row, sample)
    direction = rng.standard_normal(SHAPE).astype(np.float32)
    for reduction in ("none", "mean"):
        function = jax.jit(lambda x, r=reduction: row.function(x, operands[1], reduction=r, **arrays, **others))
        value, got = jax.jvp(function, operands[:1], (jnp.asarray(direction),))
        check(row, sample, reduction, value)
        slope = row.truth(sample, reduction, 1.0).input * direction
        truth = slope.sum() if reduction == "mean" else slope.sum(1) if row.classes else slope
        np.testing.assert_allclose(got, np.asarray(truth, float), rtol=1e-4, atol=1e-5 * abs(np.asarray(slope)).max())


def test_weights_that_learn(rng: Rng, x64: None) -> None:
    """Gradients by weights, which the kernels have not, beside differences of the oracle."""
    for row in ROWS:
        for name in ("weight", "pos_weight"):
            if name not in row.options:
                continue
            sample = row.draw(rng, (6, 4), np.float64, row.everything())
            operands, arrays, others = arguments(row, sample)
            direction = rng.standard_normal(arrays[name].shape)

            def oracle(step: float) -> float:
                options = sample.options | {name: sample.options[name] + step * direction}  # noqa: B023
                return float(row.truth(Sample(sample.input, sample.target, options)).value)  # noqa: B023

            function = jax.jit(jax.grad(lambda w: row.function(*operands, **arrays | {name: w}, **others)))  # noqa: B023
            grad = function(arrays[name])
            truth = (oracle(1e-5) - oracle(-1e-5)) / 2e-5
            assert float((grad * direction).sum()) == pytest.approx(truth, rel=1e-6, abs=1e-8), row.id


# ---- batches


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_vmap(row: Row, rng: Rng) -> None:
    """Value and gradient of every call of a batch, its axis anywhere, some operands shared, of samples and of one."""
    everything = row.everything()
    for shape, reduction, choice in (
        ((5, 4), "none", everything),
        ((5, 4), row.reductions[-1], everything),
        ((5, 4), "mean", everything),
        ((4,), "mean", {}),
    ):
        batch = [row.draw(rng, shape, choice=choice) for _ in range(3)]
        _, arrays, others = arguments(row, batch[0])
        one = [Sample(s.input, s.target, batch[0].options) for s in batch]  # which share the options
        x, y = (jnp.stack([jnp.asarray(getattr(s, n)) for s in one], axis=-1) for n in ("input", "target"))

        def loss(a: Any, b: Any, arrays: Any = arrays, others: Any = others, r: str = reduction) -> Any:
            return row.function(a, b, reduction=r, **arrays, **others)

        def with_grad(a: Any, b: Any, loss: Any = loss) -> Any:
            value, pull = jax.vjp(partial(loss, b=b), a)
            return value, *pull(jnp.ones_like(value))

        values, grads = jax.jit(jax.vmap(with_grad, in_axes=(-1, -1)))(x, y)
        for k, sample in enumerate(one):
            check(row, sample, reduction, values[k], "input", grads[k])
        if reduction == "mean":
            continue
        shared = jax.jit(jax.vmap(loss, in_axes=(-1, None)))(x, jnp.asarray(one[0].target))
        for k, sample in enumerate(one):
            check(row, Sample(sample.input, one[0].target, sample.options), reduction, shared[k])


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_nested_vmap_over_everything(reduction: str, rng: Rng) -> None:
    """Two batches, weights of their own, and operands that are in either, both or neither."""
    x = jnp.asarray(rng.standard_normal((2, 3, 5, 4)), np.float32)
    y = jnp.asarray(rng.integers(0, 4, (2, 5)))
    w = jnp.asarray(rng.uniform(1, 2, (3, 4)), np.float32)

    def loss(x: Any, y: Any, w: Any) -> Any:
        return fastloss.cross_entropy(x, y, w, reduction=reduction, label_smoothing=0.1)

    nested = jax.vmap(jax.vmap(loss, (0, None, 0)), (0, 0, None))
    got = jax.jit(nested)(x, y, w)
    grads = jax.grad(lambda a: nested(a, y, w).sum())(x)
    for i, j in itertools.product(range(2), range(3)):
        operands = (np.asarray(x[i, j]), np.asarray(y[i]))
        options = {"weight": np.asarray(w[j]), "label_smoothing": 0.1, "reduction": reduction}
        truth = reference.cross_entropy(*operands, **options, grad_output=1.0)
        np.testing.assert_allclose(got[i, j], truth.value, rtol=1e-6)
        np.testing.assert_allclose(grads[i, j], truth.input, rtol=1e-5, atol=1e-7)


def test_a_batch_of_single_samples_keeps_what_is_ignored(rng: Rng) -> None:
    """The mean over nothing is NaN, with gradient 0."""
    x = jnp.asarray(rng.standard_normal((4, 3)), np.float32)
    y = jnp.array([0, -100, 2, -100])
    values, grads = jax.vmap(jax.value_and_grad(fastloss.cross_entropy))(x, y)
    assert np.isnan(values).tolist() == [False, True, False, True]
    assert (np.asarray(grads)[1::2] == 0).all()


# ---- compositions


@pytest.mark.parametrize(("row", "choice"), CASES, ids=name_of)
def test_compositions_equal_the_oracle(row: Row, choice: Options, rng: Rng) -> None:
    """What runs where the kernels do not, in float32: a few ulp of the largest term."""
    for reduction in row.reductions[1:] if choice else ("none",):
        sample = row.draw(rng, SHAPE, choice=choice)
        operands, arrays, others = arguments(row, sample)
        given = {"input": operands[0], "target": operands[1], **arrays, **others, "reduction": reduction}
        site, made = sites.site_of(row.function, given)
        site = sites.replace(site, grads=site.fused)
        value, *grads = jax.jit(composite.evaluate, static_argnums=0)(site, *made)
        truth = row.truth(sample, reduction, 1.0)
        np.testing.assert_allclose(value, np.asarray(truth.value, float), rtol=2e-5, atol=1e-5)
        for name, grad in zip(site.fused, grads, strict=True):
            expected = np.asarray(getattr(truth, name), float)
            np.testing.assert_allclose(grad, expected, rtol=2e-4, atol=1e-5 * abs(expected).max())


def test_other_platforms_get_the_composition() -> None:
    """A program for GPUs holds no call of ours; one for the CPU holds nothing else."""
    traced = jax.jit(jax.value_and_grad(fastloss.cross_entropy)).trace(jnp.ones((4, 3)), jnp.zeros(4, int))
    texts = [traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")]
    assert ["@fastloss" in text for text in texts] == [True, False]
    assert ["exponential" in text for text in texts] == [False, True]


def test_invalid_numbers_of_compositions() -> None:
    """A sample of its own is NaN, nothing else is harmed."""
    evaluate = jax.jit(composite.evaluate, static_argnums=0)
    given = {"input": jnp.ones((3, 4)), "target": jnp.array([0, 9, -1]), "reduction": "none"}
    site, arrays = sites.site_of(fastloss.cross_entropy, given)
    assert np.isnan(evaluate(site, *arrays)[0]).tolist() == [False, True, True]
    given = {"input": jnp.array([0.5, 1.5]), "target": jnp.array([1.0, 1.0]), "reduction": "none"}
    site, arrays = sites.site_of(fastloss.binary_cross_entropy, given)
    assert np.isnan(evaluate(site, *arrays)[0]).tolist() == [False, True]
