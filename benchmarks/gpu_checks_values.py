"""Checks of results: bad indices, the same bits, every array library, the CPU's results.

Those that are marked so also run in Numba's simulator, at its sizes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpu_arrays import SIMULATED, near, number, operands, tensors, to_gpu, to_numpy
from gpu_cases import Work, kinds
from gpu_checklist import Found, NotRunError, bits, both, check, expect_value, imported, value_of
from gpu_contenders import ours
from gpu_timing import sleep

import fastloss

# ---- class indices out of range

BAD = (-1, 0, 1, 2**31, -(2**31), 2**40, 2**62, -(2**62))  # added to the number of classes where not negative
GUARDS = (64, 37)  # elements: the second leaves arrays without 16-byte alignment


def guarded(values: np.ndarray, guard: int) -> tuple[Any, Any]:
    """An allocation with `values` in its middle, and that middle; the guards' bits say when they are written to."""
    whole = np.full(values.size + 2 * guard, 77, values.dtype)
    whole[guard : guard + values.size] = values.ravel()
    memory = to_gpu(whole)
    return memory, memory[guard : guard + values.size].reshape(values.shape)


def guards_of(memory: Any, guard: int) -> bytes:
    host = to_numpy(memory)
    return host[:guard].tobytes() + host[-guard:].tobytes()


@check("class indices out of range: their own losses are NaN, nothing else is touched", simulated=True)
def out_of_range() -> Found:
    rng = np.random.default_rng()
    shapes = ((9, 10), (9, 40)) if SIMULATED else ((33, 10), (19, 1_000), (11, 20_011), (9, 300_007))
    for shape in shapes:
        for guard in GUARDS:
            _out_of_range(rng, shape, guard)
    return None


def _out_of_range(rng: np.random.Generator, shape: tuple[int, int], guard: int) -> None:
    n, classes = shape
    good = rng.integers(0, classes, n)
    target, bad = good.copy(), np.zeros(n, bool)
    for place, index in zip(rng.permutation(n), BAD, strict=False):
        target[place], bad[place] = index + classes if index >= 0 else index, True
    logits = rng.standard_normal(shape).astype(np.float32)
    memory = [guarded(array, guard) for array in (logits, target, np.zeros(n, np.float32), np.zeros_like(logits))]
    before = [guards_of(whole, guard) for whole, _ in memory]
    x, t, out, grad_out = (inner for _, inner in memory)
    fine = to_gpu(good)
    fused = fastloss.value_and_grad(fastloss.cross_entropy)

    # Into the same memory both times: its alignment decides which instructions run, and so the last bit.
    want, losses = (
        to_numpy(fastloss.cross_entropy(x, indices, reduction="none", out=out)).copy() for indices in (fine, t)
    )
    assert (np.isnan(losses) == bad).all(), f"{shape}: NaN at {np.flatnonzero(np.isnan(losses))}, expected {bad}"
    assert (losses[~bad] == want[~bad]).all(), f"{shape}: losses of other samples changed"
    want, grad = (to_numpy(fused(x, indices, reduction="none", grad_out=grad_out)[1]).copy() for indices in (fine, t))
    assert (grad[~bad] == want[~bad]).all(), f"{shape}: gradients of other samples changed"
    assert np.isnan(number(fastloss.cross_entropy(x, t))), f"{shape}: the mean over a bad index is not NaN"
    after = [guards_of(whole, guard) for whole, _ in memory]
    assert after == before, f"{shape}: memory beside an array was written"
    assert to_numpy(x).tobytes() == logits.tobytes(), f"{shape}: the input was written"
    assert np.isfinite(number(fastloss.cross_entropy(x, fine))), f"{shape}: the next call is not right"


@check("check=True and FASTLOSS_CHECK=1 raise, and the next call is right", simulated=True)
def checked() -> Found:
    x, t = to_gpu(np.log(np.full((3, 4), 0.25, np.float32))), to_gpu(np.array([1, 4, 2]))
    fine = to_gpu(np.array([1, 3, 2]))
    for loss in (fastloss.cross_entropy, fastloss.nll_loss):
        _raises(IndexError, functools.partial(loss, x, t, check=True))
        assert near(number(loss(x, fine, check=True)), float(np.log(4)), 1e-6), "the call after an error is not right"
        os.environ["FASTLOSS_CHECK"] = "1"
        try:
            _raises(IndexError, functools.partial(loss, x, t))
        finally:
            del os.environ["FASTLOSS_CHECK"]
    p = to_gpu(np.array([0.5, 1.5, 0.5], np.float32))
    _raises(ValueError, lambda: fastloss.binary_cross_entropy(p, to_gpu(np.ones(3, np.float32)), check=True))
    return None


def _raises(kind: type[Exception], call: Callable[[], Any]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")


# ---- the same bits


@check("ten runs of every reduction, and of the gradient: the same bits", simulated=True)
def samebits() -> Found:
    for work in kinds(SIMULATED):
        (x, y), _ = operands(work)
        loss, fused = ours(work), ours(replace(work, gradient=True))
        calls = {reduction: functools.partial(loss, reduction=reduction) for reduction in ("none", "mean", "sum")}
        for what, call in (calls | {"gradient": fused}).items():
            seen = {bits(_disturbed(call, x, y, k)) for k in range(10)}
            assert len(seen) == 1, f"{work.name}, {what}: {len(seen)} different results of ten runs"
    return None


def _disturbed(call: Callable[..., Any], x: Any, y: Any, k: int) -> Any:
    """The call, every other time beside work on another stream, which changes the order of its blocks."""
    if SIMULATED or k % 2 == 0:
        return call(x, y)
    with torch.cuda.stream(torch.cuda.Stream()):
        load = torch.randn(2_048, 2_048, device="cuda")
        for _ in range(20):
            load = load @ load / 2_048
    return call(x, y)


# ---- arrays of other libraries


def _expect_library(work: Work, arrays: tuple[Any, Any], pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    kind = type(arrays[0])
    for what, call in both(work):
        result = call(*arrays)
        expect_value(what, value_of(result), work, *pair)
        for part in result if isinstance(result, tuple) else (result,):
            assert isinstance(part, kind), f"{what}: {type(part)} came back for {kind}"


@check("CuPy arrays, on CuPy's current stream")
def cupy_arrays() -> Found:
    cupy = imported("cupy")
    for work in kinds(SIMULATED):
        if work.dtype == "bfloat16":
            continue
        pair = tensors(work)
        x, y = (cupy.from_dlpack(part) for part in pair)
        late = cupy.full_like(x, float("nan"))
        torch.cuda.synchronize()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
                sleep(50)
            late[...] = x  # who reads it on any other stream reads NaN
            _expect_library(work, (late, y), pair)
            stream.synchronize()
    return None


@check("JAX arrays")
def jax_arrays() -> Found:
    jax = imported("jax")
    if jax.default_backend() == "cpu":
        raise NotRunError("JAX is here without a GPU")
    for work in kinds(SIMULATED):
        x, y = pair = tensors(work)
        if work.dtype == "float64":
            continue  # none in JAX as it starts
        arrays = (jax.dlpack.from_dlpack(x), jax.dlpack.from_dlpack(y.int() if work.indices else y))
        _expect_library(work, arrays, pair)
    return None


@check("Numba device arrays", simulated=True)
def numba_arrays() -> Found:
    from numba import cuda

    for work in kinds(SIMULATED):
        if work.dtype == "bfloat16":
            continue  # no dtype of NumPy's
        pair = tensors(work)
        _expect_library(work, tuple(cuda.to_device(to_numpy(part)) for part in pair), pair)
    return None


# ---- beside the CPU's results


@check("equal to the CPU's results, every loss, all options at once", simulated=True)
def like_the_cpu() -> Found:
    from table import ROWS, assert_within, ulp, value_bound

    rng = np.random.default_rng()
    worst = 0.0
    for row in ROWS:
        shape = ((3, 7) if row.classes else (4, 5)) if SIMULATED else ((300, 37) if row.classes else (1_000, 7))
        for choice in [row.everything()] if SIMULATED else [{}, row.everything()]:
            sample = row.draw(rng, shape, np.float32, choice)
            options = {k: to_gpu(v) if isinstance(v, np.ndarray) else v for k, v in sample.options.items()}
            there = replace(sample, input=to_gpu(sample.input), target=to_gpu(sample.target), options=options)
            for reduction in ("none", "mean"):
                want = np.asarray(row.call(sample, reduction=reduction)).astype(np.float64)
                got = to_numpy(row.call(there, reduction=reduction))
                # once for the CPU, whose differences are float64, twice for the GPU's float32 ones
                bound = 3 * value_bound(row, sample, reduction, np.float32)
                assert_within(got, want, bound, np.float32, f"{row.id} {choice} {reduction}")
                with np.errstate(invalid="ignore"):
                    apart = abs(got.astype(np.float64) - want) / ulp(want, np.float32)
                worst = max(worst, float(np.nanmax(apart, initial=0)))
    return f"at most {worst:.1f} ulp of float32 apart"
