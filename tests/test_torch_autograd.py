"""fastloss.torch under autograd: values, first and second gradients, and which way each call takes."""

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastloss
import fastloss.torch as ft
from fastloss.torch import autograd, functional, gradients
from table import BY_ID, ROWS, Options, Row, assert_within, gradient_bound, name_of, value_bound
from torch_losses import ROUTES, Rng, composed, drop_in, learning, tensors

SHAPE = (3, 4)
CHOICES = [(row, choice) for row in ROWS for choice in row.choices()]


@pytest.mark.parametrize(("row", "choice"), CHOICES, ids=name_of)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(row: Row, choice: Options, reduction: str, rng: Rng) -> None:
    """torch's own check: analytic gradients against finite differences, of every argument at once."""
    x, y, options = tensors(row, rng, SHAPE, choice)
    leaves = learning(row, x, y, options)
    assert torch.autograd.gradcheck(lambda *_: drop_in(row)(x, y, reduction=reduction, **options), leaves)


@pytest.mark.parametrize(("row", "choice"), CHOICES, ids=name_of)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradgradcheck(row: Row, choice: Options, reduction: str, rng: Rng) -> None:
    x, y, options = tensors(row, rng, SHAPE, choice)
    leaves = learning(row, x, y, options)
    assert torch.autograd.gradgradcheck(lambda *_: drop_in(row)(x, y, reduction=reduction, **options), leaves)


@pytest.mark.parametrize("reduction", ["batchmean"])
def test_batchmean(reduction: str, rng: Rng) -> None:
    row = BY_ID["kl_div"]
    x, y, options = tensors(row, rng, SHAPE, {})
    leaves = learning(row, x, y, options)
    assert torch.autograd.gradcheck(lambda *_: ft.kl_div(x, y, reduction=reduction), leaves)
    assert torch.autograd.gradgradcheck(lambda *_: ft.kl_div(x, y, reduction=reduction), leaves)


@pytest.mark.parametrize(("row", "choice"), ROUTES, ids=name_of)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_float32_is_the_oracles(row: Row, choice: Options, reduction: str, rng: Rng) -> None:
    """Value and gradient through autograd keep the kernels' bounds."""
    sample = row.draw(rng, (5, 7), np.float32, choice)
    options = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in sample.options.items()}
    x = torch.from_numpy(sample.input).requires_grad_()
    loss = drop_in(row)(x, torch.from_numpy(sample.target), reduction=reduction, **options)
    upstream = rng.standard_normal(loss.shape).astype(np.float32)
    loss.backward(torch.from_numpy(np.asarray(upstream)))
    assert_within(
        loss.detach(), row.truth(sample, reduction).value, value_bound(row, sample, reduction, np.float32), np.float32
    )
    truth = row.truth(sample, reduction, upstream)
    bound = gradient_bound(truth, "input", np.float32)
    if reduction == "mean":  # the kernel's gradient, rounded, times what comes after, rounded
        bound = bound + 2 * np.abs(truth.input) * np.finfo(np.float32).eps
        at_one = row.truth(sample, reduction, 1.0)
        bound = bound + gradient_bound(at_one, "input", np.float32) * abs(upstream)
    assert x.grad is not None
    assert_within(x.grad, truth.input, bound, np.float32)


@pytest.mark.parametrize(("row", "choice"), CHOICES, ids=name_of)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_composition_is_the_kernel(row: Row, choice: Options, reduction: str, rng: Rng) -> None:
    """What second derivatives are taken of has the kernel's value and gradients."""
    x, y, options = tensors(row, rng, SHAPE, choice)
    leaves = learning(row, x, y, options)
    ours = drop_in(row)(x, y, reduction=reduction, **options)
    theirs = composed(row, x, y, options, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.from_numpy(np.asarray(rng.standard_normal(ours.shape)))
    for mine, its in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, its)


# ---- ways


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the ways that calls took, in order."""
    taken: list[str] = []

    def spy(owner: Any, name: str, way: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            taken.append(way)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    spy(autograd.Fused, "apply", "autograd")
    spy(functional.ops, "call", "operator")
    spy(gradients, "by_kernel", "kernel in backward")
    spy(gradients, "by_composite", "composition in backward")
    return taken


def batch(rng: Rng, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(rng.standard_normal((6, 5))).to(dtype), torch.from_numpy(rng.integers(0, 5, 6))


def test_without_gradient_nothing_is_recorded(rng: Rng, ways: list[str]) -> None:
    x, t = batch(rng)
    for _ in range(3):  # the first makes the plan, the others follow it
        assert ft.cross_entropy(x, t).grad_fn is None
    with torch.no_grad():
        assert ft.cross_entropy(x.clone().requires_grad_(), t).grad_fn is None
    with torch.inference_mode():
        torch.testing.assert_close(ft.cross_entropy(x, t), F.cross_entropy(x, t))
    assert ways == []


def test_plans_are_found_however_options_are_spelled(rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = batch(rng)
    calls = ({}, {"reduction": "mean"}, {"reduction": "sum", "ignore_index": -100}, {"weight": None})
    expected = [ft.cross_entropy(x, t, **options) for options in calls]
    monkeypatch.setattr(functional, "_evaluate", lambda *_: pytest.fail("the long way was taken"))
    for options, value in zip(calls, expected, strict=True):
        assert torch.equal(ft.cross_entropy(x, t, **options), value)


def test_a_reduced_gradient_is_written_in_forward(rng: Rng, ways: list[str]) -> None:
    x, t = batch(rng)
    x.requires_grad_()
    ft.cross_entropy(x, t).backward()
    (3 * ft.cross_entropy(x, t)).backward()
    assert ways == ["autograd", "autograd"]
    own = x.detach().requires_grad_()
    (4 * F.cross_entropy(own, t)).backward()
    torch.testing.assert_close(x.grad, own.grad)


def test_losses_of_samples_run_the_kernel_in_backward(rng: Rng, ways: list[str]) -> None:
    x, t = batch(rng)
    ft.cross_entropy(x.requires_grad_(), t, reduction="none").mean().backward()
    assert ways == ["autograd", "kernel in backward"]


def test_float16_keeps_what_a_loss_scale_lifts(rng: Rng, ways: list[str]) -> None:
    """A gradient of 1e-9 is 0 in float16; scaled by 2**15 it is a number."""
    x = torch.zeros(1, 3, dtype=torch.float16)
    x[0, 1] = -20
    x.requires_grad_()
    (ft.cross_entropy(x, torch.tensor([0])) * 2.0**15).backward()
    assert ways == ["autograd", "kernel in backward"]
    expected = torch.softmax(x.detach().double(), 1)[0, 1] * 2.0**15
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 1].double(), expected, rtol=2e-3, atol=0)


def test_second_gradients_take_the_composition(rng: Rng, ways: list[str]) -> None:
    x, t = batch(rng, torch.float64)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ft.cross_entropy(x, t), x, create_graph=True)
    (second,) = torch.autograd.grad((grad**2).sum(), x)
    assert ways == ["autograd", "composition in backward"]
    (grad,) = torch.autograd.grad(F.cross_entropy(x, t), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad((grad**2).sum(), x)[0])


def test_what_no_kernel_differentiates_is_composed(rng: Rng, ways: list[str]) -> None:
    """A weight that learns."""
    x, y, w = (torch.from_numpy(rng.uniform(0.1, 0.9, (4, 3))).requires_grad_() for _ in range(3))
    for ours, theirs in ((ft.mse_loss, F.mse_loss), (ft.l1_loss, F.l1_loss), (ft.huber_loss, F.huber_loss)):
        mine = torch.autograd.grad(ours(x, y, weight=w), (x, y, w))
        its = torch.autograd.grad(theirs(x, y, weight=w), (x, y, w))
        for got, expected in zip(mine, its, strict=True):
            torch.testing.assert_close(got, expected)
    assert ways == []


# ---- autograd's rules


def test_a_graph_that_is_kept_gives_the_same_again(rng: Rng) -> None:
    x, t = batch(rng)
    x.requires_grad_()
    loss = ft.cross_entropy(x, t)
    (first,) = torch.autograd.grad(5 * loss, x, retain_graph=True)
    first.mul_(0)  # what was handed out is the caller's
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = second.clone()
    (third,) = torch.autograd.grad(2 * loss, x)
    torch.testing.assert_close(second, kept)
    torch.testing.assert_close(third, 2 * kept)
    torch.testing.assert_close(kept, torch.autograd.grad(F.cross_entropy(x, t), x)[0])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_that_are_kept_are_not_handed_out(rng: Rng) -> None:
    """With retain_graph .grad must not be the memory that the next backward pass hands over again."""
    x, t = batch(rng)
    x.requires_grad_()
    loss = ft.cross_entropy(x, t)
    loss.backward(retain_graph=True)
    assert x.grad is not None
    expected = x.grad.clone()
    x.grad.zero_()
    loss.backward()
    torch.testing.assert_close(x.grad, expected)


def test_logits_may_change_after_the_forward_pass(rng: Rng) -> None:
    """As torch's cross_entropy allows; the gradient is that of the forward pass."""
    leaf, t = batch(rng)
    leaf.requires_grad_()
    x = leaf * 1
    loss = ft.cross_entropy(x, t)
    with torch.no_grad():
        x.zero_()
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(leaf, t), leaf)[0])
    x = leaf * 1
    loss = ft.cross_entropy(x, t, reduction="none").sum()  # reads the logits in backward, and notices
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_one_tensor_given_twice(rng: Rng) -> None:
    x, _ = batch(rng, torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ft.mse_loss(x, x * x), (x,))
    (grad,) = torch.autograd.grad(ft.mse_loss(x, x), x, create_graph=True)
    assert not grad.any()


def test_broadcast_arguments_have_gradients_of_their_shapes(rng: Rng) -> None:
    x, y = (torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in ((4, 3), (3,)))
    with pytest.warns(fastloss.BroadcastWarning):
        mine = torch.autograd.grad(ft.mse_loss(x, y), (x, y))
    its = torch.autograd.grad(((x - y) ** 2).mean(), (x, y))
    for got, expected in zip(mine, its, strict=True):
        torch.testing.assert_close(got, expected)


def test_checkpointing(rng: Rng) -> None:
    from torch.utils.checkpoint import checkpoint

    x, t = batch(rng)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(checkpoint(ft.cross_entropy, x, t, use_reentrant=False), x)
    torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(x, t), x)[0])


def test_autocast_gives_float32_without_a_copy(rng: Rng, ways: list[str]) -> None:
    x, t = batch(rng, torch.bfloat16)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ft.cross_entropy(x, t)
        double = ft.mse_loss(x.detach().double(), x.detach().double() + 1)
        expected = F.cross_entropy(x, t)
    assert loss.dtype is torch.float32
    assert double.dtype is torch.float64
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.bfloat16
    assert ways == ["autograd"]


def test_the_gradient_is_all_the_memory_it_takes(rng: Rng) -> None:
    """Forward and backward hold at most one gradient beside the logits."""
    x = torch.from_numpy(rng.standard_normal((256, 4000)).astype(np.float32)).requires_grad_()
    t = torch.from_numpy(rng.integers(0, 4000, 256))
    ft.cross_entropy(x, t).backward()  # kernels are compiled
    x.grad = None
    tracemalloc.start()  # NumPy's memory, in which the kernel writes
    (2 * ft.cross_entropy(x, t)).backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = x.nelement() * x.element_size()
    assert size <= peak <= 1.02 * size
