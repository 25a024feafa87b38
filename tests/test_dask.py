"""Losses of Dask arrays: the values and gradients of one call on the whole arrays, lazily, whatever the chunks."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from numba import cuda
from numpy.typing import NDArray

import fastloss
from fastloss import runtime
from fastloss.backends import dask_blocks
from fastloss.kernels.pointwise import Pointwise
from table import (
    ARGNUM,
    BY_ID,
    POINTWISE,
    ROWS,
    Rng,
    Row,
    Sample,
    assert_within,
    gradient_bound,
    name_of,
    value_bound,
)

Chunks = tuple[tuple[int, ...], ...]
CE = BY_ID["cross_entropy"]


def cut(rng: Rng, extent: int, step: int = 1) -> tuple[int, ...]:
    """Up to three chunks of any sizes, or of multiples of `step`."""
    inner = step * rng.integers(1, extent // step, 2) if extent > step else []
    return tuple(np.diff(np.unique([0, extent, *inner])).tolist()) or (0,)


def cuts(rng: Rng, shape: tuple[int, ...], whole: int | None = None) -> Chunks:
    """Random chunks; the axis `whole` has one."""
    return tuple((n,) if axis == whole else cut(rng, n) for axis, n in enumerate(shape))


def lazy(rng: Rng, array: NDArray[Any], whole: int | None = None) -> Any:
    return da.from_array(array, chunks=cuts(rng, array.shape, whole))


def lazily(rng: Rng, row: Row, sample: Sample, classes_cut: bool) -> Sample:
    """The same sample in Dask arrays, each cut in its own way; half of the options stay NumPy arrays."""
    axis = min(1, sample.input.ndim - 1)
    input = lazy(rng, sample.input, axis if row.classes else None)
    if classes_cut:  # always alike: every number of classes up to 32 has kernels of its own
        input = input.rechunk({axis: (3, input.shape[axis] - 3)})
    options = {
        name: lazy(rng, value) if isinstance(value, np.ndarray) and rng.integers(2) else value
        for name, value in sample.options.items()
    }
    target = lazy(rng, sample.target, axis if row.classes and not row.indices else None)
    return Sample(input, target, options)


CASES = [(row, classes_cut) for row in ROWS for classes_cut in ([False, True] if row.classes else [False])]


@pytest.mark.parametrize("everything", [False, True], ids=["defaults", "everything"])
@pytest.mark.parametrize(("row", "classes_cut"), CASES, ids=lambda value: "cut" if value is True else name_of(value))
def test_loss(row: Row, classes_cut: bool, everything: bool, rng: Rng) -> None:
    """Values and gradients of every reduction, against the oracle, with the bounds of a call on the whole arrays."""
    sample = row.draw(rng, (37, 7, 5), np.float32, row.everything() if everything else {})
    parts = lazily(rng, row, sample, classes_cut)
    names = [name for name in row.gradients if name != "weight" or everything]
    own = {"input": (sample.input, parts.input), "target": (sample.target, parts.target)}
    own["weight"] = sample.options.get("weight"), parts.options.get("weight")
    for reduction in row.reductions:
        truth = row.truth(sample, reduction)
        bound = value_bound(row, sample, reduction, np.float32)
        value = row.call(parts, reduction=reduction)
        assert isinstance(value, da.Array)
        assert value.dtype == np.float32
        if reduction == "none":
            axis = (0, 2) if row.classes else (0, 1, 2)
            assert value.chunks == tuple(parts.input.chunks[k] for k in axis)
        grad_output = rng.uniform(0.5, 2, truth.value.shape) if reduction == "none" else float(rng.uniform(0.5, 2))
        given = lazy(rng, grad_output) if reduction == "none" else da.from_array(np.asarray(grad_output))
        fused = fastloss.value_and_grad(row.function, argnums=[ARGNUM[name] for name in names])
        again, grads = fused(parts.input, parts.target, reduction=reduction, grad_output=given, **parts.options)
        got, got_again, *got_grads = dask.compute(value, again, *grads)
        what = f"{row.id} {reduction}"
        assert_within(np.asarray(got), truth.value, bound, np.float32, what)
        np.testing.assert_array_equal(got, got_again)
        scaled = row.truth(sample, reduction, grad_output)
        for name, grad, found in zip(names, grads, got_grads, strict=True):
            array, part = own[name]
            assert (grad.shape, grad.dtype) == (array.shape, array.dtype)
            if isinstance(part, da.Array):
                assert grad.chunks == part.chunks
            limit = gradient_bound(scaled, name, np.float32)
            assert_within(found, getattr(scaled, name), limit, array.dtype, f"{what}, gradient to {name}")


@pytest.mark.parametrize("classes_cut", [False, True], ids=["whole", "cut"])
def test_fifty_chunkings(classes_cut: bool, rng: Rng) -> None:
    """float64, any chunking of (N, C, d): the value of one call to 1 ulp."""
    shape = 211, 24, 6
    x, target = 3 * rng.standard_normal(shape), rng.integers(0, 24, (211, 6))
    weight = rng.uniform(0.5, 2, 24)
    options = {"weight": weight, "label_smoothing": 0.1}
    for number in range(50):
        given = options if number % 2 else {}
        expected = fastloss.cross_entropy(x, target, **given)
        # multiples of 6, since every number of classes up to 32 has kernels of its own
        chunks = cut(rng, 211), cut(rng, 24, 6) if classes_cut else 24, cut(rng, 6)
        dx = da.from_array(x, chunks=chunks)
        found = fastloss.cross_entropy(dx, lazy(rng, target), **given).compute(scheduler="sync")
        assert abs(found - expected) <= np.spacing(expected)


def test_float32_in_float64(rng: Rng) -> None:
    """float32 logits, dtype float64: the samples' losses are float32's, to 2**-24 of what cancels in each.

    Without cut classes the blocks are the samples of the whole call, so that the sums agree to 1 ulp of float64; a row
    that is cut has roundings of its own.
    """
    x, target = 3 * rng.standard_normal((211, 24), np.float32), rng.integers(0, 24, 211)
    expected = fastloss.cross_entropy(x, target, dtype="float64")
    scale = np.abs(x).max()
    for number in range(10):
        dx = da.from_array(x, chunks=(cut(rng, 211), cut(rng, 24, 6) if number % 2 else 24))
        found = fastloss.cross_entropy(dx, lazy(rng, target), dtype="float64").compute()
        assert found.dtype == np.float64
        bound = np.spacing(expected) if dx.numblocks[1] == 1 else 2.0**-22 * scale
        assert abs(found - expected) <= bound


def test_same_bits_on_every_scheduler(rng: Rng) -> None:
    """Threads, processes and none: the same graph, the same bits. Tasks travel, formulas of one's own among them."""
    x, target = rng.standard_normal((90, 6), np.float32), rng.integers(0, 6, 90)
    dx, dt = da.from_array(x, chunks=(20, 3)), da.from_array(target, chunks=31)
    own = fastloss.pointwise_loss(Pointwise("square_of_mine", lambda x, y: (x - y) * (x - y), lambda x, y: 2 * (x - y)))
    value, grad = fastloss.value_and_grad(fastloss.cross_entropy)(dx, dt, label_smoothing=0.1)
    results = (value, grad, fastloss.nll_loss(dx, dt), own(dx, np.zeros_like(x)))
    first = dask.compute(*results, scheduler="sync")
    for name in ("threads", "processes"):
        for a, b in zip(first, dask.compute(*results, scheduler=name, num_workers=2), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(first[3], np.mean(x.astype(float) ** 2), 1e-6)


def test_tasks_keep_to_their_thread(rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba's threads are one within a task, and what they were after it."""
    seen = []
    accumulate = fastloss.losses.PointwiseCall.accumulate

    def watched(self: Any, per_sample: Any) -> Any:
        seen.append(runtime.get_num_threads())
        return accumulate(self, per_sample)

    monkeypatch.setattr(fastloss.losses.PointwiseCall, "accumulate", watched)
    before = runtime.get_num_threads()
    x = da.from_array(rng.standard_normal((40, 3)), chunks=(10, 3))
    fastloss.mse_loss(x, np.zeros((40, 3))).compute(scheduler="sync")
    fastloss.mse_loss(x, np.zeros((40, 3))).compute(scheduler="threads")
    assert seen == [1] * 8
    assert runtime.get_num_threads() == before


# ---- graphs


def tasks_of(array: Any) -> dict[Any, Any]:
    return dict(array.__dask_graph__())


def test_lazy_and_never_rechunked(rng: Rng) -> None:
    """Nothing is read while a graph is made, and of the input no block is cut, joined or read twice."""
    reads: list[tuple[int, ...]] = []

    def block(block_info: Any = None) -> NDArray[Any]:
        where = block_info[None]["array-location"]
        reads.append(tuple(start for start, _ in where))
        return np.random.default_rng(1).standard_normal([stop - start for start, stop in where])

    chunks = ((20, 30), (5, 4, 2), (3, 3))
    x = da.map_blocks(block, chunks=chunks, dtype=np.float64, meta=np.empty((0, 0, 0)))
    target = da.from_array(rng.integers(0, 11, (50, 6)), chunks=(7, 6))
    value = fastloss.cross_entropy(x, target)
    both = fastloss.value_and_grad(fastloss.cross_entropy)(x, target)
    assert not reads
    value.compute()
    assert len(reads) == len(set(reads)) == 12
    reads.clear()
    _, grad = dask.compute(*both)
    assert len(reads) == len(set(reads)) == 12
    assert grad.shape == x.shape
    assert not any("rechunk" in str(key) and x.name in str(task) for key, task in tasks_of(value).items())


def test_operands_are_cut_not_joined(rng: Rng) -> None:
    """Two arrays of one size and different chunks meet in pieces of both, each no larger than a chunk of either."""
    x, y = rng.standard_normal((2, 24, 10))
    dx, dy = da.from_array(x, chunks=((9, 15), (4, 6))), da.from_array(y, chunks=((12, 12), (10,)))
    sizes = []
    call = dask_blocks.SumsOf.call

    def watched(self: Any, where: Any, arrays: Any, **options: Any) -> Any:
        sizes.append(arrays[0].shape)
        return call(self, where, arrays, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dask_blocks.SumsOf, "call", watched)
        fastloss.mse_loss(dx, dy).compute(scheduler="sync")
    assert sorted(sizes) == sorted((n, c) for n in (9, 3, 12) for c in (4, 6))
    losses = fastloss.mse_loss(dx, dy, reduction="none")
    assert losses.chunks == dx.chunks
    np.testing.assert_array_equal(losses, fastloss.mse_loss(x, y, reduction="none"))


def test_tasks_are_small(rng: Rng) -> None:
    """A NumPy argument is cut like the Dask array beside it: no task carries more than a chunk."""
    x = da.zeros((4000, 50), chunks=(500, 50), dtype=np.float32)
    target = np.zeros((4000, 50), np.float32)
    graph = tasks_of(fastloss.l1_loss(x, target))
    assert max(len(cloudpickle.dumps(task)) for task in graph.values()) < 500 * 50 * 4 + 5000


def test_same_call_same_keys(rng: Rng) -> None:
    x, target = rng.standard_normal((20, 4)), rng.integers(0, 4, 20)

    def name() -> Any:
        return fastloss.cross_entropy(da.from_array(x, chunks=(5, 2)), target, label_smoothing=0.1).name

    assert name() == name()
    assert name() != fastloss.cross_entropy(da.from_array(x, chunks=(5, 2)), target).name


def test_dask_is_not_imported() -> None:
    code = "import sys, fastloss; fastloss.mse_loss([1.0], [2.0]); sys.exit('dask' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- arguments


def test_classes_of_losses(rng: Rng) -> None:
    x, target = rng.standard_normal((30, 6)), rng.integers(0, 6, 30)
    loss = fastloss.CrossEntropyLoss(weight=rng.uniform(0.5, 1, 6), reduction="sum")
    dx, dt = da.from_array(x, chunks=(cut(rng, 30), 3)), lazy(rng, target)
    np.testing.assert_allclose(loss(dx, dt), loss(x, target), 1e-15)
    value, grad = fastloss.value_and_grad(loss)(dx, dt)
    expected, expected_grad = fastloss.value_and_grad(loss)(x, target)
    np.testing.assert_allclose(value, expected, 1e-15)
    np.testing.assert_allclose(grad, expected_grad, 1e-12, 1e-15)


@pytest.mark.parametrize("dask_is", ["input", "target"])
def test_beside_other_arrays(dask_is: str, rng: Rng) -> None:
    x, target = rng.standard_normal((30, 5), np.float32), rng.integers(0, 5, 30)
    given = {"input": x, "target": target}
    given[dask_is] = lazy(rng, given[dask_is], 1)
    value = fastloss.cross_entropy(**given)
    assert isinstance(value, da.Array)
    np.testing.assert_allclose(value, fastloss.cross_entropy(x, target), 1e-6)


def test_numbers_and_lists(rng: Rng) -> None:
    x = rng.standard_normal((6, 3), np.float32)
    dx = lazy(rng, x)
    with pytest.warns(fastloss.BroadcastWarning) as caught:
        value = fastloss.l1_loss(dx, 0.5)
    assert [warning.filename for warning in caught] == [__file__]
    assert value.dtype == np.float32
    value.compute()  # without a warning, which would be an error
    np.testing.assert_allclose(value, np.abs(x - 0.5).mean(), 1e-6)
    np.testing.assert_allclose(fastloss.mse_loss(dx, x.tolist()), 0, atol=1e-15)


def test_broadcasting_with_gradients(rng: Rng) -> None:
    """The gradient of what was broadcast is the sum over all blocks that used it."""
    x, y = rng.standard_normal((40, 6), np.float32), rng.standard_normal((6,), np.float32)
    fused = fastloss.value_and_grad(fastloss.huber_loss, argnums=(0, 1))
    with pytest.warns(fastloss.BroadcastWarning):
        value, grads = fused(lazy(rng, x), lazy(rng, y))
    with pytest.warns(fastloss.BroadcastWarning):
        expected, expected_grads = fused(x, y)
    np.testing.assert_allclose(value, expected, 1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == wanted.dtype
        np.testing.assert_allclose(grad, wanted, 1e-5, 1e-7)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_halves(dtype: Any, rng: Rng) -> None:
    """Summed wide, rounded once; the samples of a row that is cut are float32's."""
    x, target = rng.standard_normal((70, 6)).astype(dtype), rng.integers(0, 6, 70)
    for classes in (6, 3):
        dx = da.from_array(x, chunks=(cut(rng, 70), classes))
        value, grad = fastloss.value_and_grad(fastloss.cross_entropy)(dx, target)
        expected, expected_grad = fastloss.value_and_grad(fastloss.cross_entropy)(x, target)
        assert value.dtype == grad.dtype == dtype
        assert value.compute() == expected
        eps = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(grad.compute().astype(float), expected_grad.astype(float), eps, 1e-6)
        wide = fastloss.cross_entropy(dx, target, dtype="float64")
        np.testing.assert_allclose(wide, fastloss.cross_entropy(x, target, dtype="float64"), 1e-6)


def test_weights_that_add_up_to_less_than_nothing(rng: Rng) -> None:
    """The mean's divisor is negative while that of the z-loss, the count, is not."""
    x, target = rng.standard_normal((20, 6)), rng.integers(0, 6, 20)
    options = {"weight": -rng.uniform(0.5, 2, 6), "lse_square_scale": 0.1}
    expected = fastloss.value_and_grad(fastloss.cross_entropy)(x, target, **options)
    for classes in (6, 3):
        dx = da.from_array(x, chunks=(cut(rng, 20), classes))
        found = fastloss.value_and_grad(fastloss.cross_entropy)(dx, target, **options)
        np.testing.assert_allclose(found[0], expected[0], 1e-13)
        np.testing.assert_allclose(found[1], expected[1], 1e-11, 1e-15)


def test_nothing_to_average(rng: Rng) -> None:
    """Everything ignored, no samples at all: what a call on the whole arrays gives."""
    x = rng.standard_normal((8, 6))
    ignored = np.full(8, -100)
    for classes in (6, 3):
        dx = da.from_array(x, chunks=(cut(rng, 8), classes))
        value, grad = fastloss.value_and_grad(fastloss.cross_entropy)(dx, lazy(rng, ignored))
        assert math.isnan(value.compute())
        assert not grad.compute().any()
        assert fastloss.cross_entropy(dx, ignored, reduction="sum").compute() == 0
    empty = da.zeros((0, 6), chunks=(1, 3))
    target = np.zeros(0, int)
    assert math.isnan(fastloss.cross_entropy(empty, target).compute())
    assert fastloss.cross_entropy(empty, target, reduction="none").compute().shape == (0,)
    assert fastloss.mse_loss(da.zeros((0, 4)), np.zeros((0, 4)), reduction="sum").compute() == 0


def test_ugly_logits(rng: Rng) -> None:
    """Infinities and NaN in one chunk or across two: the whole call's answer for that sample, and no other's."""
    x = 1e4 * rng.standard_normal((7, 6))
    x[0, :3], x[1], x[2, 4], x[3, 1], x[4, 0] = -np.inf, -np.inf, np.nan, np.inf, -np.inf
    target = np.array([4, 0, 1, 2, 0, 5, 5])
    expected = fastloss.cross_entropy(x, target, reduction="none")
    found = fastloss.cross_entropy(da.from_array(x, chunks=(4, 3)), target, reduction="none")
    np.testing.assert_allclose(found, expected, 1e-14)


@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_no_dimensions(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (), np.float64)
    value = row.function(da.from_array(np.asarray(sample.input)), sample.target)
    np.testing.assert_allclose(value, row.call(sample), 1e-15)


# ---- errors


def raises_now(kind: type[Exception], message: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """While the graph is made, not when it is computed."""
    with pytest.raises(kind, match=message):
        call(*args, **kwargs)


def test_errors_of_graphs(rng: Rng) -> None:
    x, target = da.zeros((6, 4), chunks=2), da.zeros(6, chunks=3, dtype=int)
    loss = fastloss.cross_entropy
    fused = fastloss.value_and_grad(loss)
    raises_now(ValueError, r"target has shape \(5,\)", loss, x, target[:5])
    raises_now(ValueError, "label_smoothing is 2", loss, x, target, label_smoothing=2)
    raises_now(ValueError, "reduction is 'median'", loss, x, target, reduction="median")
    raises_now(TypeError, "input has dtype int64", loss, x.astype(int), target)
    raises_now(ValueError, "out is given", loss, x, target, out=np.zeros(()))
    raises_now(ValueError, "grad_out is given", fused, x, target, grad_out=np.zeros((6, 4)))
    raises_now(ValueError, "no gradient for weight", fastloss.value_and_grad(loss, 2), x, target, np.ones(4))
    raises_now(ValueError, "input has chunks of unknown size", loss, x[x[:, 0] > 1], target)
    raises_now(ValueError, r"grad_output has shape \(5,\)", fused, x, target, reduction="none", grad_output=np.ones(5))
    raises_now(TypeError, "ignore_index is a Dask array", loss, x, target, ignore_index=da.ones((), dtype=int))
    raises_now(TypeError, "input: a Array of Dask holds no numbers", fastloss.Meter("mse").update, x, x)


@pytest.mark.parametrize("classes_cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_class_index_error(name: str, classes_cut: bool) -> None:
    """The position is one of the whole array."""
    x = da.zeros((9, 6, 4), chunks=(4, 3 if classes_cut else 6, 3))
    target = np.zeros((9, 4), int)
    target[7, 3] = 6
    loss = getattr(fastloss, name)
    message = r"target 6 at position \(7, 3\) is out of range for 6 classes"
    with pytest.raises(IndexError, match=message):
        loss(x, target).compute()
    with pytest.raises(IndexError, match=message):
        fastloss.value_and_grad(loss)(x, target)[1].compute()


def test_domain_error() -> None:
    x = np.full((9, 4), 0.5)
    x[6, 2] = 1.5
    value = fastloss.binary_cross_entropy(da.from_array(x, chunks=(4, 2)), np.zeros((9, 4)))
    with pytest.raises(ValueError, match=r"input 1.5 at position \(6, 2\) is outside \[0, 1\]"):
        value.compute()


# ---- chunks on a GPU


def test_chunks_on_a_gpu(rng: Rng) -> None:
    """Chunks are device arrays (in the simulator where there is no GPU): they go to the kernels for GPUs."""
    x, target = rng.standard_normal((24, 5), np.float32), rng.integers(0, 5, 24)

    def on_gpu(array: NDArray[Any], rows: int) -> Any:
        parts = [
            da.from_delayed(dask.delayed(cuda.to_device)(part), part.shape, meta=part[:0])
            for part in np.split(array, len(array) // rows)
        ]
        return da.concatenate(parts)

    dx, dt = on_gpu(x, 8), on_gpu(target, 8)
    expected, expected_grad = CE.gradient(Sample(x, target, {}))
    ran = []
    with pytest.MonkeyPatch.context() as patch, dask.config.set(scheduler="sync"):
        gpu_run = fastloss.losses.SoftmaxCall.gpu_run
        patch.setattr(fastloss.losses.SoftmaxCall, "gpu_run", lambda call: ran.append(gpu_run(call)) or ran[-1])
        value, grad = fastloss.value_and_grad(fastloss.cross_entropy)(dx, dt)
        np.testing.assert_allclose(fastloss.cross_entropy(dx, dt), expected, 1e-6)
        blocks = dask.compute(value, *grad.to_delayed().reshape(-1))
    assert ran
    assert None not in ran
    np.testing.assert_allclose(blocks[0], expected, 1e-6)
    np.testing.assert_allclose(np.concatenate([part.copy_to_host() for part in blocks[1:]]), expected_grad, 1e-5, 1e-8)
