"""Repeated calls: only addresses and the stream are new."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import cuda

import fastloss
from fastloss import dispatch
from fastloss.backends.cuda.plan import GPUPlan

CROSS_ENTROPY = fastloss.cross_entropy


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each run of a plan went through."""
    ran: list[bool] = []
    original = GPUPlan.run

    def run(self: GPUPlan, *arguments: Any) -> Any:
        result = original(self, *arguments)
        ran.append(result is not None)
        return result

    monkeypatch.setattr(GPUPlan, "run", run)
    return ran


def batch(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    classes = shape[-1]
    return rng.normal(size=shape).astype(np.float32), rng.integers(0, classes, shape[:-1])


@pytest.mark.parametrize("shape", [(32, 10), (3, 70), (1, 1100), (10,)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_other_arrays_of_one_kind(
    rng: np.random.Generator, repeats: list[bool], shape: tuple[int, ...], reduction: str
) -> None:
    """Few and many classes, a row cut into slices, no samples' dimension: each repeats with other numbers."""
    fused = fastloss.value_and_grad(CROSS_ENTROPY)
    for _ in range(3):
        x, t = batch(rng, shape)
        got = CROSS_ENTROPY(cuda.to_device(x), cuda.to_device(t), reduction=reduction)
        value, grad = fused(cuda.to_device(x), cuda.to_device(t), reduction=reduction)
        expected, expected_grad = fastloss.value_and_grad(CROSS_ENTROPY)(x, t, reduction=reduction)
        np.testing.assert_allclose(got.copy_to_host(), expected, rtol=1e-5)
        np.testing.assert_allclose(value.copy_to_host(), expected, rtol=1e-5)
        np.testing.assert_allclose(grad.copy_to_host(), expected_grad, rtol=1e-4, atol=1e-7)
    assert repeats.count(True) >= 3  # a process learns an array type by its first call, which keeps no plan


def test_results_do_not_share_memory(rng: np.random.Generator, repeats: list[bool]) -> None:
    fused = fastloss.value_and_grad(fastloss.mse_loss)
    x, y = (cuda.to_device(rng.normal(size=50).astype(np.float32)) for _ in range(2))
    (first, first_grad), (second, second_grad) = fused(x, y), fused(y, x)
    assert repeats == [True]
    np.testing.assert_array_equal(first.copy_to_host(), second.copy_to_host())
    np.testing.assert_array_equal(first_grad.copy_to_host(), -second_grad.copy_to_host())


def unaligned(x: np.ndarray) -> Any:
    """The same numbers, 4 bytes past an aligned address."""
    return cuda.to_device(np.concatenate([x[:1], x]))[1:]


def test_another_alignment_goes_the_long_way(rng: np.random.Generator, repeats: list[bool]) -> None:
    x, y = (rng.normal(size=50).astype(np.float32) for _ in range(2))
    for place in (cuda.to_device, unaligned):
        value = fastloss.value_and_grad(fastloss.l1_loss)(place(x), place(y))[0]
        np.testing.assert_allclose(value.copy_to_host(), abs(x - y).mean(), rtol=1e-6)
    fused = fastloss.value_and_grad(fastloss.l1_loss)
    aligned, other = cuda.to_device(x), unaligned(x)
    if dispatch.view(aligned, "x").data.address % 16 != dispatch.view(other, "x").data.address % 16:
        fused(aligned, cuda.to_device(y))
        del repeats[:]
        fused(other, unaligned(y))
        assert True not in repeats


@pytest.mark.parametrize(
    "call",
    [
        lambda x, t: CROSS_ENTROPY(x, t, check=True),
        lambda x, t: CROSS_ENTROPY(x, t, cuda.to_device(np.ones(10, np.float32))),
        lambda x, t: CROSS_ENTROPY(x, t, out=cuda.device_array((), np.float32)),
        lambda x, t: fastloss.value_and_grad(CROSS_ENTROPY)(x, t, grad_output=2.0),
    ],
    ids=["check", "weight", "out", "grad_output"],
)
def test_what_is_not_repeated(rng: np.random.Generator, repeats: list[bool], call: Callable[..., Any]) -> None:
    x, t = batch(rng, (32, 10))
    for _ in range(2):
        call(cuda.to_device(x), cuda.to_device(t))
    assert repeats == []


def test_a_check_asked_for_later(
    rng: np.random.Generator, repeats: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FASTLOSS_CHECK holds for calls that were planned without it."""
    x, t = batch(rng, (31, 11))
    bad = t.copy()
    bad[3] = 11
    for _ in range(2):
        CROSS_ENTROPY(cuda.to_device(x), cuda.to_device(t))
    assert repeats == [True]
    assert np.isnan(CROSS_ENTROPY(cuda.to_device(x), cuda.to_device(bad)).copy_to_host())
    monkeypatch.setenv("FASTLOSS_CHECK", "1")
    with pytest.raises(IndexError, match="target 11 at position"):
        CROSS_ENTROPY(cuda.to_device(x), cuda.to_device(bad))


def test_the_widest_arrays_vectors_count(rng: np.random.Generator, repeats: list[bool]) -> None:
    """A vector of 8 halves beside float64 takes 64 bytes of the logits: 16 bytes say too little of where they lie."""
    logits, mass = rng.normal(size=(4, 40)), rng.uniform(size=(4, 40)).astype(np.float16)
    memory, halves = cuda.to_device(np.zeros(200 + 160)), cuda.to_device(mass)
    fused, placed = fastloss.value_and_grad(CROSS_ENTROPY), []
    for shift in range(0, 16, 2):
        x = memory[shift : shift + 160].reshape(4, 40)
        x.copy_to_device(logits)
        fused(x, halves)
        placed.append(dispatch.view(x, "x").data.address % 64)
    # only what lies as an earlier call's did may repeat it, and a new result may lie otherwise
    assert sum(repeats) <= len(placed) - len(set(placed))
