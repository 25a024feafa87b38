"""linear_cross_entropy: the oracle's value and gradients whatever the chunks, on NumPy and on torch, in a tenth of the
logits' memory."""

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
import torch

import fastloss
import fastloss.torch.linear_ops
import reference
from table import Rng, assert_within

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "linear_cross_entropy.py"
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "lse_square_scale": 1e-2, "softcap": 5.0}
GRADIENTS = ("input", "linear_weight", "linear_bias")
fused = fastloss.value_and_grad(fastloss.linear_cross_entropy, argnums=(0, 1, 3))


@dataclass(frozen=True)
class Drawn:
    """One drawn call: hidden states (..., D), a weight (C, D), a bias (C) and targets."""

    input: Any
    linear_weight: Any
    target: Any
    linear_bias: Any
    options: dict[str, Any]

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self.input, self.linear_weight, self.target, self.linear_bias

    def torch(self, requires_grad: bool = False) -> "Drawn":
        def tensor(array: Any) -> Any:
            if array.dtype == ml_dtypes.bfloat16:
                return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
            return torch.from_numpy(np.asarray(array))

        x, matrix, bias = (
            tensor(a).clone().requires_grad_(requires_grad) for a in (self.input, self.linear_weight, self.linear_bias)
        )
        options = {k: tensor(v) if isinstance(v, np.ndarray) else v for k, v in self.options.items()}
        return Drawn(x, matrix, tensor(self.target), bias, options)


def draw(
    rng: Rng, samples: tuple[int, ...], features: int, classes: int, dtype: Any = np.float64, **options: Any
) -> Drawn:
    """One in four targets is ignored, and its hidden state is NaN. `weight=True`: class weights."""
    x = rng.standard_normal((*samples, features)).astype(dtype)
    matrix, bias = (rng.standard_normal(shape).astype(dtype) for shape in ((classes, features), (classes,)))
    target = np.asarray(rng.integers(0, classes, samples))
    if samples:
        ignored = rng.uniform(size=samples) < 0.25
        target[ignored] = options.get("ignore_index", -100)
        x[ignored] = np.nan
    if options.get("weight"):
        options["weight"] = rng.uniform(0.1, 2, classes).astype(dtype)
    return Drawn(x, matrix, target, bias, options)


@np.errstate(invalid="ignore")
def truth(drawn: Drawn, reduction: str, grad_output: Any = 1.0) -> tuple[Any, dict[str, Any]]:
    """Value and gradients, by way of all logits."""
    classes, features = drawn.linear_weight.shape
    arrays = drawn.input, drawn.linear_weight, drawn.linear_bias
    x, matrix, bias = (np.asarray(a).astype(np.longdouble) for a in arrays)
    x = x.reshape(-1, features)
    by_probability = drawn.target.dtype.kind == "f"
    target = drawn.target.reshape(-1, classes) if by_probability else drawn.target.reshape(-1)
    if not by_probability:
        x = np.where((target != drawn.options.get("ignore_index", -100))[:, None], x, 0)
    up = np.reshape(grad_output, -1) if reduction == "none" else grad_output
    found = reference.cross_entropy(x @ matrix.T + bias, target, **drawn.options, reduction=reduction, grad_output=up)
    d = found.input
    grads = {"input": (d @ matrix).reshape(drawn.input.shape), "linear_weight": d.T @ x, "linear_bias": d.sum(0)}
    return found.value.reshape(drawn.input.shape[:-1] if reduction == "none" else ()), grads


def bounds(drawn: Drawn, reduction: str, grad_output: Any, eps: float) -> tuple[float, dict[str, float]]:
    """The most that arithmetic of precision eps may miss value and gradients by.

    A logit is a sum of D products. A loss moves at most twice as far as the logits, times the weight and what the
    z-loss adds; so do the entries of its gradient. Those are multiplied and summed again.
    """
    x = np.nan_to_num(np.abs(np.asarray(drawn.input, np.float64)).reshape(-1, drawn.input.shape[-1]))
    matrix, bias = (np.abs(np.asarray(a, np.float64)) for a in (drawn.linear_weight, drawn.linear_bias))
    logit = (x @ matrix.T + bias).max(initial=0)
    one = eps * logit * (drawn.linear_weight.shape[1] + 2)
    weight = np.max(drawn.options.get("weight", 1.0), initial=1)
    steep = 2 * weight + 2 * drawn.options.get("lse_square_scale", 0) * (logit + 1)
    rows, classes = max(1, len(x)), len(bias)
    value = steep * (one + 16 * eps) * (rows if reduction == "sum" else 1) * 2
    count = 1 if reduction == "mean" else rows
    each = steep * (2 * one + 32 * eps) * np.max(np.abs(grad_output), initial=0)
    each = each / max(1, rows // 8) if reduction == "mean" else each  # by the weights of those that count
    total = each * rows
    return value, {
        "input": each * matrix.sum(0).max(initial=0) + classes * eps * each * matrix.max(initial=0),
        "linear_weight": total * x.max(initial=0) * 2,
        "linear_bias": total * 2 * max(1, count / rows),
    }


def check(
    drawn: Drawn, value: Any, grads: Any, reduction: str, grad_output: Any = 1.0, eps: float | None = None
) -> None:
    """Value and gradients (of all or of some) are the oracle's."""
    __tracebackhide__ = True
    dtype = drawn.input.dtype
    eps = eps or float(ml_dtypes.finfo(dtype).eps)
    expected, expected_grads = truth(drawn, reduction, grad_output)
    of_value, of_grads = bounds(drawn, reduction, grad_output, eps)
    assert_within(host(value), expected, of_value, host(value).dtype, "value")
    for name, grad in grads.items():
        own = getattr(drawn, name).dtype
        assert_within(host(grad), expected_grads[name], of_grads[name], own, f"gradient to {name}")


def host(array: Any) -> Any:
    if isinstance(array, torch.Tensor):
        array = array.detach()
        if array.dtype is torch.bfloat16:
            return array.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()
    return np.asarray(array)


CASES = [
    pytest.param((23,), 5, 7, {}, id="defaults"),
    pytest.param((4, 6), 3, 11, {"weight": True}, id="two-dimensions-weights"),
    pytest.param((), 4, 6, {"label_smoothing": 0.1}, id="one-sample"),
    pytest.param((30,), 6, 9, {"weight": True, "ignore_index": 2, **OPTIONS}, id="everything"),
    pytest.param((12,), 3, 1, OPTIONS, id="one-class"),
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("samples", "features", "classes", "options"), CASES)
def test_numpy(samples: Any, features: int, classes: int, options: Any, reduction: str, rng: Rng) -> None:
    """float64: every option, whatever the chunks, and any gradient of what comes after."""
    drawn = draw(rng, samples, features, classes, **options)
    grad_output = rng.standard_normal(samples if reduction == "none" else ())
    for chunk_size in (None, 1, int(rng.integers(2, 9)), 10**6):
        more = {**drawn.options, "reduction": reduction, "chunk_size": chunk_size}
        value, grads = fused(*drawn.arrays, **more, grad_output=grad_output)
        check(drawn, value, dict(zip(GRADIENTS, grads, strict=True)), reduction, grad_output)
        np.testing.assert_array_equal(fastloss.linear_cross_entropy(*drawn.arrays, **more), value)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("samples", "features", "classes", "options"), CASES)
def test_torch(samples: Any, features: int, classes: int, options: Any, reduction: str, rng: Rng) -> None:
    """The same through autograd, and by value_and_grad, whose gradients are no part of a graph."""
    drawn = draw(rng, samples, features, classes, **options)
    grad_output = rng.standard_normal(samples if reduction == "none" else ())
    for chunk_size in (None, 1, int(rng.integers(2, 9))):
        tensors = drawn.torch(requires_grad=True)
        more = {**tensors.options, "reduction": reduction, "chunk_size": chunk_size}
        value = fastloss.linear_cross_entropy(*tensors.arrays, **more)
        value.backward(torch.from_numpy(np.asarray(grad_output)))
        grads = {name: getattr(tensors, name).grad for name in GRADIENTS}
        check(drawn, value, grads, reduction, grad_output)
        value, direct = fused(*tensors.arrays, **more, grad_output=torch.from_numpy(np.asarray(grad_output)))
        check(drawn, value, dict(zip(GRADIENTS, direct, strict=True)), reduction, grad_output)
        assert not any(tensor.requires_grad for tensor in (value, *direct))
        with torch.no_grad():
            np.testing.assert_array_equal(fastloss.linear_cross_entropy(*tensors.arrays, **more), value)


@pytest.mark.parametrize("options", [{}, {"weight": True, **OPTIONS}], ids=["defaults", "everything"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_dtypes(dtype: Any, options: Any, rng: Rng) -> None:
    """NumPy computes halves in float32; torch's logits are halves, as in the composition."""
    drawn = draw(rng, (40,), 16, 30, dtype, **options)
    for reduction in ("none", "mean"):
        value, grads = fused(*drawn.arrays, **drawn.options, reduction=reduction, chunk_size=7)
        check(drawn, value, dict(zip(GRADIENTS, grads, strict=True)), reduction, eps=float(np.finfo(np.float32).eps))
        tensors = drawn.torch(requires_grad=True)
        value = fastloss.linear_cross_entropy(*tensors.arrays, **tensors.options, reduction=reduction, chunk_size=7)
        value.backward(torch.ones_like(value))
        check(drawn, value, {name: getattr(tensors, name).grad for name in GRADIENTS}, reduction)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_class_probabilities(dtype: Any, rng: Rng) -> None:
    drawn = draw(rng, (3, 5), 4, 6, dtype, weight=True, **OPTIONS)
    probabilities = rng.dirichlet(np.ones(6), (3, 5)).astype(dtype)
    drawn = Drawn(np.nan_to_num(drawn.input), drawn.linear_weight, probabilities, drawn.linear_bias, drawn.options)
    for reduction in ("none", "mean", "sum"):
        value, grads = fused(*drawn.arrays, **drawn.options, reduction=reduction, chunk_size=4)
        check(drawn, value, dict(zip(GRADIENTS, grads, strict=True)), reduction)
        tensors = drawn.torch(requires_grad=True)
        value = fastloss.linear_cross_entropy(*tensors.arrays, **tensors.options, reduction=reduction, chunk_size=4)
        value.backward(torch.ones_like(value))
        check(drawn, value, {name: getattr(tensors, name).grad for name in GRADIENTS}, reduction)


def test_finite_differences(rng: Rng) -> None:
    """d loss / d argument along a random direction, for each argument."""
    drawn = draw(rng, (20,), 5, 8, weight=True, **OPTIONS)
    arrays = [np.nan_to_num(a) if a.dtype.kind == "f" else a for a in drawn.arrays]
    for argnum in (0, 1, 3):
        value_and_grad = fastloss.value_and_grad(fastloss.linear_cross_entropy, argnums=argnum)
        _, grad = value_and_grad(*arrays, **drawn.options, chunk_size=3)
        step = 1e-5 * rng.standard_normal(arrays[argnum].shape)
        ends = []
        for sign in (1, -1):
            moved = list(arrays)
            moved[argnum] = arrays[argnum] + sign * step
            ends.append(float(fastloss.linear_cross_entropy(*moved, **drawn.options)))
        # central differences: an error of step**2, and of eps over the step's length
        assert (ends[0] - ends[1]) / 2 == pytest.approx(float((grad * step).sum()), rel=1e-6, abs=1e-12)


# ---- rows that are ignored


def numpy_gradients(x: Any, matrix: Any, target: Any, bias: Any, **options: Any) -> Any:
    value, grads = fused(x, matrix, target, bias, **options)
    return value, *grads


def torch_gradients(x: Any, matrix: Any, target: Any, bias: Any, **options: Any) -> Any:
    x, matrix, bias = (torch.from_numpy(a).requires_grad_() for a in (x, matrix, bias))
    value = fastloss.linear_cross_entropy(x, matrix, torch.from_numpy(target), bias, **options)
    value.backward(torch.ones_like(value))
    return tuple(a.detach().numpy() for a in (value, x.grad, matrix.grad, bias.grad))


LIBRARIES = pytest.mark.parametrize("gradients", [numpy_gradients, torch_gradients], ids=["numpy", "torch"])


@LIBRARIES
def test_ignored_rows_leak_nothing(gradients: Callable[..., Any], rng: Rng) -> None:
    """Whatever they hold, the result is that of the other rows alone; their own gradients are exactly 0."""
    drawn = draw(rng, (50,), 4, 6, np.float32)
    x, matrix, target, bias = drawn.arrays
    ignored = target == -100
    x[ignored] = rng.choice([np.nan, np.inf, -np.inf, 3e38], (ignored.sum(), 4))
    value, to_x, to_matrix, to_bias = gradients(x, matrix, target, bias, chunk_size=9)
    kept = gradients(x[~ignored], matrix, target[~ignored], bias, chunk_size=9)
    for got, expected in zip((value, to_x[~ignored], to_matrix, to_bias), kept, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert not to_x[ignored].any()


@LIBRARIES
def test_nothing_counts(gradients: Callable[..., Any], rng: Rng) -> None:
    """No rows, or none that counts: the mean is NaN, the gradients are 0."""
    matrix, bias = rng.standard_normal((6, 4)), rng.standard_normal(6)
    for x, target in ((np.zeros((0, 4)), np.zeros(0, int)), (np.full((5, 4), np.nan), np.full(5, -100))):
        for reduction, expected in (("mean", np.nan), ("sum", 0.0), ("none", np.zeros(len(x)))):
            value, *grads = gradients(x, matrix, target, bias, reduction=reduction)
            np.testing.assert_array_equal(value, expected)
            for grad, of in zip(grads, (x, matrix, bias), strict=True):
                assert grad.shape == of.shape
                assert not grad.any()


@LIBRARIES
def test_rows_that_count_are_not_hidden(gradients: Callable[..., Any], rng: Rng) -> None:
    """NaN in a row that counts is in the loss, in its own gradient and in the weight's."""
    x, matrix, bias = (rng.standard_normal(shape) for shape in ((5, 4), (6, 4), (6,)))
    x[2] = np.nan
    value, to_x, to_matrix, _ = gradients(x, matrix, np.arange(5), bias, chunk_size=2)
    assert np.isnan(value)
    assert np.isnan(to_x[2]).all()
    assert np.isfinite(np.delete(to_x, 2, 0)).all()
    assert np.isnan(to_matrix).all()


@LIBRARIES
def test_the_mean_is_never_a_mean_of_means(gradients: Callable[..., Any], rng: Rng) -> None:
    """Weights, and rows that are ignored, lie unevenly over the chunks."""
    x, matrix, bias = rng.standard_normal((8, 3)), rng.standard_normal((4, 3)), rng.standard_normal(4)
    target, weight = np.array([0, 0, 0, 0, 3, -100, -100, -100]), np.array([1.0, 1, 1, 10])
    drawn = Drawn(x, matrix, target, bias, {"weight": weight, "lse_square_scale": 0.5})
    expected, _ = truth(drawn, "mean")
    if gradients is torch_gradients:
        weight = torch.from_numpy(weight)
    value, *_ = gradients(x, matrix, target, bias, weight=weight, lse_square_scale=0.5, chunk_size=4)
    assert value == pytest.approx(float(expected), rel=1e-14)


def test_integer_targets_of_every_width(rng: Rng) -> None:
    drawn = draw(rng, (9,), 3, 5)
    target = np.arange(9) % 5
    expected = fastloss.linear_cross_entropy(drawn.input * 0 + 1, drawn.linear_weight, target)
    for dtype in (np.int8, np.uint8, np.int32, np.uint64, ">i8"):
        x = drawn.input * 0 + 1
        got = fastloss.linear_cross_entropy(x, drawn.linear_weight, target.astype(dtype))
        np.testing.assert_array_equal(got, expected)
        if dtype != ">i8":
            own = torch.from_numpy(target.astype(dtype))
            got = fastloss.linear_cross_entropy(torch.from_numpy(x), torch.from_numpy(drawn.linear_weight), own)
            np.testing.assert_array_equal(got, expected)


# ---- NumPy's arrays as they come


def test_layouts(rng: Rng, tmp_path: Path) -> None:
    """Strided, reversed, in Fortran order, byte-swapped, read-only, memory-mapped: the same numbers."""
    drawn = draw(rng, (30,), 6, 9, weight=True, **OPTIONS)
    x, matrix, target, bias = drawn.arrays
    expected = fused(x, matrix, target, bias, **drawn.options, chunk_size=7)

    def mapped(array: Any) -> Any:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
        np.save(path, array)
        return np.load(path, mmap_mode="r")

    def frozen(array: Any) -> Any:
        array = array.copy()
        array.flags.writeable = False
        return array

    layouts: dict[str, Callable[[Any], Any]] = {
        "strided": lambda a: np.repeat(a, 3, -1)[..., ::3],
        "reversed": lambda a: a[::-1].copy()[::-1],
        "fortran": np.asfortranarray,
        "swapped": lambda a: a.astype(a.dtype.newbyteorder(">")),
        "frozen": frozen,
        "mapped": mapped,
        "misaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
    }
    for name, layout in layouts.items():
        value, grads = fused(*(layout(a) for a in (x, matrix, target, bias)), **drawn.options, chunk_size=7)
        np.testing.assert_allclose(value, expected[0], rtol=1e-14, err_msg=name)
        for grad, plain in zip(grads, expected[1], strict=True):
            np.testing.assert_allclose(grad, plain, rtol=1e-12, atol=1e-14, err_msg=name)


def test_results_belong_to_the_inputs_library(rng: Rng) -> None:
    drawn = draw(rng, (8,), 3, 5, np.float32)
    x, matrix, target, bias = drawn.arrays
    value, grads = fused(x, matrix, target, bias)
    assert type(value) is np.float32
    assert all(type(grad) is np.ndarray and grad.dtype == np.float32 for grad in grads)
    strict = [array_api_strict.asarray(a) for a in drawn.arrays]
    got, got_grads = fused(*strict)
    assert all(isinstance(a, type(strict[0])) for a in (got, *got_grads))
    for a, b in zip((got, *got_grads), (value, *grads), strict=True):
        np.testing.assert_array_equal(np.from_dlpack(a), b)
    mixed = fastloss.linear_cross_entropy(torch.from_numpy(x), matrix, target.tolist(), bias)
    assert isinstance(mixed, torch.Tensor)
    assert isinstance(fastloss.linear_cross_entropy(x, torch.from_numpy(matrix), target, bias), np.float32)
    lists = fastloss.linear_cross_entropy([[1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]], [1])
    assert lists == pytest.approx(np.log1p(np.exp(-1.0)), rel=1e-7)


def test_memory_for_gradients(rng: Rng) -> None:
    """Written where the caller says, also over the argument itself."""
    drawn = draw(rng, (12,), 4, 7)
    _, expected = fused(*drawn.arrays, chunk_size=5)
    for arrays in (drawn.arrays, drawn.torch().arrays):
        library = torch if isinstance(arrays[0], torch.Tensor) else np
        outs = tuple(library.empty_like(arrays[k]) for k in (0, 1, 3))
        _, got = fused(*arrays, chunk_size=5, grad_out=outs)
        assert all(a is b for a, b in zip(got, outs, strict=True))
        over = arrays[0], arrays[1], arrays[3]
        _, got_over = fused(*arrays, chunk_size=5, grad_out=over)
        assert all(a is b for a, b in zip(got_over, over, strict=True))
        for a, b, plain in zip(got, got_over, expected, strict=True):
            np.testing.assert_allclose(a, plain, rtol=1e-13, atol=1e-15)
            np.testing.assert_array_equal(a, b)


def test_a_failed_call_changes_nothing(rng: Rng) -> None:
    x, matrix = rng.standard_normal((6, 3)), rng.standard_normal((4, 3))
    memory = np.full((4, 3), 7.0)
    with pytest.raises(IndexError):
        fastloss.value_and_grad(fastloss.linear_cross_entropy, 1)(
            x, matrix, np.array([0, 1, 2, 3, 4, 0]), chunk_size=1, grad_out=memory
        )
    assert (memory == 7).all()
    memory.flags.writeable = False
    with pytest.raises(ValueError, match="grad_out is read-only"):
        fastloss.value_and_grad(fastloss.linear_cross_entropy, 1)(x, matrix, np.zeros(6, int), grad_out=memory)


# ---- torch


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(reduction: str, rng: Rng) -> None:
    """torch's own checkers: first derivatives by the kernel, second ones by the composition."""
    tensors = draw(rng, (4,), 2, 3, weight=True, **OPTIONS).torch()
    given = tensors.input, tensors.linear_weight, tensors.linear_bias
    x, matrix, bias = (a.nan_to_num().requires_grad_() for a in given)

    def loss(x: Any, matrix: Any, bias: Any) -> Any:
        return fastloss.linear_cross_entropy(
            x, matrix, tensors.target, bias, reduction=reduction, chunk_size=3, **tensors.options
        )

    assert torch.autograd.gradcheck(loss, (x, matrix, bias))
    assert torch.autograd.gradgradcheck(loss, (x, matrix, bias))


def test_second_derivatives_of_ignored_rows_and_of_mixed_dtypes(rng: Rng) -> None:
    """create_graph takes the composition: it leaks nothing either, and multiplies in autocast's dtype."""
    tensors = draw(rng, (40,), 3, 5, np.float32).torch(requires_grad=True)
    assert tensors.input.isnan().any()
    x = tensors.input.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastloss.linear_cross_entropy(x, *tensors.arrays[1:])
    (grad,) = torch.autograd.grad(loss, tensors.linear_weight, create_graph=True)
    assert grad.isfinite().all()
    grad.square().sum().backward()
    ignored = tensors.target == -100
    assert not x.grad[ignored].any()
    assert x.grad[~ignored].isfinite().all()
    assert tensors.linear_weight.grad.isfinite().all()
    assert tensors.linear_weight.grad.any()


def test_only_what_requires_grad_has_a_gradient(rng: Rng) -> None:
    tensors = draw(rng, (9,), 3, 5).torch()
    expected = dict(zip(GRADIENTS, fused(*tensors.arrays)[1], strict=True))
    for wanted in GRADIENTS:
        own = {name: getattr(tensors, name).clone().requires_grad_(name == wanted) for name in GRADIENTS}
        loss = fastloss.linear_cross_entropy(
            own["input"], own["linear_weight"], tensors.target, linear_bias=own["linear_bias"]
        )
        loss.backward()
        for name in GRADIENTS:
            if name == wanted:
                np.testing.assert_array_equal(own[name].grad, expected[name])
            else:
                assert own[name].grad is None
    with torch.no_grad():
        assert not fastloss.linear_cross_entropy(own["input"], own["linear_weight"], tensors.target).requires_grad


def test_backward_again(rng: Rng) -> None:
    """With retain_graph the gradients add up; without, torch's own error."""
    tensors = draw(rng, (9,), 3, 5).torch(requires_grad=True)
    loss = fastloss.linear_cross_entropy(*tensors.arrays, chunk_size=4)
    (3 * loss).backward(retain_graph=True)
    first = tensors.linear_weight.grad.clone()
    loss.backward()
    np.testing.assert_allclose(tensors.linear_weight.grad, first * 4 / 3, rtol=1e-13)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_tensor_given_twice(rng: Rng) -> None:
    """Tied weights: the hidden states are the weight; its gradient is the sum of both."""
    x = torch.from_numpy(rng.standard_normal((5, 5)))
    target = torch.arange(5)
    tied = x.clone().requires_grad_()
    fastloss.linear_cross_entropy(tied, tied, target, chunk_size=2).backward()
    _, (to_input, to_matrix) = fastloss.value_and_grad(fastloss.linear_cross_entropy, (0, 1))(x, x, target)
    np.testing.assert_allclose(tied.grad, to_input + to_matrix, rtol=1e-13, atol=1e-15)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_functional_transforms(rng: Rng) -> None:
    """torch.func differentiates the composition: gradient, Jacobian-vector product, per-sample gradients."""
    tensors = draw(rng, (6,), 3, 4).torch()
    x, matrix = tensors.input.nan_to_num(), tensors.linear_weight
    target = torch.arange(6) % 4

    def loss(matrix: Any, x: Any = x, target: Any = target) -> Any:
        return fastloss.linear_cross_entropy(x, matrix, target)

    _, expected = fastloss.value_and_grad(fastloss.linear_cross_entropy, 1)(x, matrix, target)
    torch.testing.assert_close(torch.func.grad(loss)(matrix), expected)
    direction = torch.ones_like(matrix)
    torch.testing.assert_close(torch.func.jvp(loss, (matrix,), (direction,))[1], expected.sum())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(matrix, x[:, None], target[:, None])
    torch.testing.assert_close(each.mean(0), expected)


@pytest.mark.parametrize(("reduction", "autocast"), [("none", False), ("mean", False), ("mean", True)])
def test_torch_compile(reduction: str, autocast: bool, rng: Rng) -> None:
    """One graph, also of other sizes, with the eager call's value and gradients."""
    matrix, bias = torch.from_numpy(rng.standard_normal((9, 6))), torch.from_numpy(rng.standard_normal(9))

    def loss(x: Any, matrix: Any, bias: Any, target: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            own = fastloss.linear_cross_entropy(
                2 * x, matrix, target, bias, reduction=reduction, chunk_size=7, softcap=5.0
            )
        return own * own

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (20, 13):
        x, target = torch.from_numpy(rng.standard_normal((rows, 6))), torch.from_numpy(rng.integers(0, 9, rows))
        arrays = [a.to(torch.float32) for a in (x, matrix, bias)]
        found = []
        for function in (loss, compiled):
            own = [a.clone().requires_grad_() for a in arrays]
            value = function(*own, target)
            value.sum().backward()
            found.append([value.detach(), *(a.grad for a in own)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arrays, target), found[0][0])


def test_opcheck(rng: Rng) -> None:
    """torch's own checker of an operator's schema, fake tensors and registrations."""
    tensors = draw(rng, (7,), 3, 5, np.float32).torch(requires_grad=True)
    for reduction in ("none", "mean"):
        for wanted in ([True] * 3, [False, True, False], [False] * 3):
            arguments = (tensors.input.detach().nan_to_num().requires_grad_(), tensors.linear_weight,
                         tensors.linear_bias, tensors.target, None, reduction, -100, 0.1, 0.0, None, torch.float32,
                         4, None, torch.float32, wanted)  # fmt: skip
            torch.library.opcheck(torch.ops.fastloss.linear_cross_entropy.default, arguments)


def test_autocast_multiplies_halves(rng: Rng) -> None:
    """bfloat16 products of float32 and mixed arguments; value, and gradients of float32 arguments, are float32."""
    drawn = draw(rng, (40,), 16, 30, np.float32, **OPTIONS)
    tensors = drawn.torch(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = fastloss.linear_cross_entropy(*tensors.arrays, **tensors.options, chunk_size=9)
    value.backward()
    grads = {name: getattr(tensors, name).grad for name in GRADIENTS}
    check(drawn, value, grads, "mean", eps=2.0**-8)
    exact = truth(drawn, "mean")[1]["linear_weight"]
    assert abs(host(grads["linear_weight"]) - exact).max() > 1e-5 * abs(exact).max()  # float32's would be nearer
    half = tensors.input.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fastloss.linear_cross_entropy(half, *tensors.arrays[1:], **tensors.options, chunk_size=9)
    mixed.backward()
    assert mixed.dtype is torch.float32
    assert half.grad.dtype is torch.bfloat16
    assert mixed.item() == value.item()
    with pytest.raises(TypeError, match=r"input has dtype torch.bfloat16, linear_weight .*torch.float32.*autocast"):
        fastloss.linear_cross_entropy(half, *tensors.arrays[1:])


def test_the_weights_gradient_is_summed_wide() -> None:
    """In bfloat16 a sum of ones would stand still at 256 of them."""
    x, matrix = torch.ones(1000, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    target = torch.zeros(1000, dtype=torch.int64)
    fastloss.linear_cross_entropy(x, matrix, target, reduction="sum", chunk_size=2).backward()
    np.testing.assert_allclose(matrix.grad.double()[:, 0], [-500, 500], rtol=2.0**-8)


def test_float16_gradients_wait_for_the_loss_scale() -> None:
    """Gradients too small for float16 before the loss is scaled are there afterwards."""
    rows = 4096
    x, matrix = torch.full((rows, 1), 1e-3).half(), torch.zeros(2, 1).half().requires_grad_()
    x.requires_grad_()
    loss = fastloss.linear_cross_entropy(x, matrix, torch.zeros(rows, dtype=torch.int64), dtype=torch.float32)
    (loss * 2.0**15).backward()
    np.testing.assert_allclose(matrix.grad.float()[:, 0], np.array([-0.5, 0.5]) * 1e-3 * 2**15, rtol=2e-3)


# ---- memory


def test_peak_memory_of_numpy(rng: Rng) -> None:
    """Under 15% of the logits, also where the weight cannot be multiplied as it lies."""
    n, d, c = 3000, 16, 6000
    x, matrix = (rng.standard_normal((k, d)).astype(np.float32) for k in (n, c))
    wide = np.repeat(matrix, 2, 1)[:, ::2]
    target = rng.integers(0, c, n)
    value_and_grad = fastloss.value_and_grad(fastloss.linear_cross_entropy, (0, 1))
    for weight in (matrix, wide, matrix.astype(np.float16)):
        value_and_grad(x[:10], weight, target[:10])
        tracemalloc.start()
        _, grads = value_and_grad(x, weight, target)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak - sum(grad.nbytes for grad in grads) < 0.15 * 4 * n * c
        assert peak > 0.05 * 4 * n * c  # it was measured


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_torch() -> None:
    """The benchmark's own measurement, in a process of its own, on a smaller problem."""
    n, d, c = 8192, 32, 16000
    words = ["--shape", str(n), str(d), str(c), "--contender", "fastloss.linear_cross_entropy, torch"]
    command = [sys.executable, str(BENCHMARK), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    extra = json.loads(done.stdout)["bytes"]
    assert 0.05 * 4 * n * c < extra < 0.15 * 4 * n * c


def test_chunks_are_a_tenth_of_large_logits() -> None:
    """What is chosen: not over a tenth, 64 MiB of logits or 256 rows, and all of a small problem at once."""
    def rows(n: int, c: int) -> int:
        call = fastloss.linear_cross_entropy.call(
            np.broadcast_to(np.float32(0), (n, 1)), np.broadcast_to(np.float32(0), (c, 1)), np.broadcast_to(0, n)
        )
        call.prepare(differentiable=True)
        return call.chunk_rows(4)

    assert rows(32, 10) == 32
    assert rows(4096, 32000) == 373  # in eleven chunks
    assert rows(100_000, 32000) == 524
    assert rows(100_000, 256_000) == 256
    assert rows(1000, 256_000) == 100
    assert rows(0, 10) == 0


# ---- errors


X, W, T = np.ones((4, 3)), np.ones((5, 3)), np.zeros(4, int)
SHAPES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    (r"input has shape \(4, 2\), expected \(..., 3\) to match linear_weight of shape \(5, 3\)", (X[:, 1:], W, T), {}),
    (r"input has shape \(\), expected \(..., 3\)", (np.float64(1), W, T), {}),
    (r"linear_weight has shape \(5,\), expected \(C, D\)", (X, np.ones(5), T), {}),
    (r"linear_bias has shape \(4,\), expected \(5,\)", (X, W, T, np.ones(4)), {}),
    (r"weight has shape \(3,\), expected \(5,\)", (X, W, T), {"weight": np.ones(3)}),
    (r"target has shape \(3,\), expected \(4,\) to match input of shape \(4, 3\)", (X, W, T[:3]), {}),
    (r"float64 and shape \(4, 4\), expected .*indices.* \(4,\), or .* of shape \(4, 5\)", (X, W, np.ones((4, 4))), {}),
    (r"there are samples, but no classes", (X, W[:0], T), {}),
]
VALUES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    (r"ignore_index is 1, but target holds class", (X, W, np.ones((4, 5))), {"ignore_index": 1}),
    (r"reduction is 'average'", (X, W, T), {"reduction": "average"}),
    (r"label_smoothing is 2", (X, W, T), {"label_smoothing": 2}),
    (r"softcap is 0", (X, W, T), {"softcap": 0}),
    (r"chunk_size is 0, expected at least 1 row", (X, W, T), {"chunk_size": 0}),
]
TYPES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    (r"target has dtype bool", (X, W, T.astype(bool)), {}),
    (r"input has dtype int64.*cast it", (X.astype(int), W, T), {}),
    (r"linear_weight has dtype int64", (X, W.astype(int), T), {}),
    (r"linear_weight: .*str", (X, "no array", T), {}),
    (r"dtype is 'int8'", (X, W, T), {"dtype": "int8"}),
]
INDICES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    (r"target 5 at position \(2,\) is out of range for 5 classes", (X, W, np.array([0, 1, 5, 7])), {"chunk_size": 1}),
    (r"target -1 at position \(1, 0\)", (np.ones((2, 2, 3)), W, np.array([[0, 1], [-1, 7]])), {"chunk_size": 1}),
]
ERRORS = [
    pytest.param(kind, *row, id=row[0][:40])
    for kind, rows in ((ValueError, SHAPES + VALUES), (TypeError, TYPES), (IndexError, INDICES))
    for row in rows
]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(("kind", "message", "arrays", "options"), ERRORS)
def test_errors(kind: type[Exception], message: str, arrays: Any, options: Any, library: str) -> None:
    if library == "torch":
        arrays = [torch.from_numpy(np.array(a)) if isinstance(a, np.ndarray) else a for a in arrays]
        arrays[0] = torch.as_tensor(arrays[0])
    with pytest.raises(kind, match=message):
        fastloss.linear_cross_entropy(*arrays, **options)


def test_gradients_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="argnums has 2, expected positions of input, linear_weight, linear_bias"):
        fastloss.value_and_grad(fastloss.linear_cross_entropy, argnums=2)
    for arrays in ((X, W, T), tuple(map(torch.from_numpy, (X, W, T)))):
        with pytest.raises(ValueError, match="gradient of linear_bias was asked for, but there is no linear_bias"):
            fused(*arrays)
        with pytest.raises(ValueError, match=r"grad_output has shape \(3,\), expected \(4,\)"):
            fastloss.value_and_grad(fastloss.linear_cross_entropy)(*arrays, reduction="none", grad_output=arrays[0][0])
    weight = torch.ones(5, requires_grad=True)
    with pytest.raises(TypeError, match="weight requires grad, but linear_cross_entropy has no gradient for it"):
        fastloss.linear_cross_entropy(*map(torch.from_numpy, (X, W, T)), weight=weight)
    with pytest.raises(TypeError, match="linear_weight: the tensor requires grad"):
        fastloss.linear_cross_entropy(X, torch.from_numpy(W).requires_grad_(), T)


def test_the_functions_name_and_pickle() -> None:
    assert repr(fastloss.linear_cross_entropy) == "<loss fastloss.linear_cross_entropy>"
    assert pickle.loads(pickle.dumps(fastloss.linear_cross_entropy)) is fastloss.linear_cross_entropy


def test_torchs_own(rng: Rng) -> None:
    """The arguments of torch.nn.functional.linear_cross_entropy mean here what they mean there."""
    tensors = draw(rng, (15,), 4, 6, weight=True).torch()
    x = tensors.input.nan_to_num()
    arguments = {"linear_bias": tensors.linear_bias, "weight": tensors.options["weight"], "label_smoothing": 0.2}
    for reduction in ("none", "mean", "sum"):
        more = {**arguments, "reduction": reduction}
        expected = torch.nn.functional.linear_cross_entropy(x, tensors.linear_weight, tensors.target, **more)
        got = fastloss.linear_cross_entropy(x, tensors.linear_weight, tensors.target, **more)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)
