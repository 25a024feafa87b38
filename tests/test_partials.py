"""Cross-entropy over sharded classes: states, merging, gradients, held to the bounds of the unsharded loss."""

import itertools
import pickle
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastloss
from fastloss import Partials, dispatch
from table import (
    BY_ID,
    DTYPES,
    Options,
    Rng,
    Row,
    Sample,
    Shape,
    check_gradient,
    check_value,
    n_classes,
    name_of,
    samples,
)

INF, NAN = np.inf, np.nan
MERGED = ("reduction", "lse_square_scale", "dtype")  # options that the merged state takes; the others go to shards


@dataclass(frozen=True)
class Sharded(Row):
    """Cross-entropy whose classes are cut at these fractions of their number; `table` draws and checks it."""

    cuts: tuple[float, ...] = (0.5,)

    def shards(self, sample: Sample) -> list[tuple[Any, Any, Options]]:
        """The arguments of each shard."""
        x, target, options = sample.input, sample.target, dict(sample.options)
        axis, count = int(x.ndim > 1), n_classes(x.shape)
        weight = options.pop("weight", None)
        options.pop("lse_square_scale", None)
        edges = [0, *sorted(round(cut * count) for cut in self.cuts), count]
        found = []
        for start, stop in itertools.pairwise(edges):
            part = (slice(None),) * axis + (slice(start, stop),)
            own = None if weight is None else weight[start:stop]
            options = options | {"offset": start, "num_classes": count, "weight": own}
            found.append((x[part], target if self.indices else target[part], options))
        return found

    def merged(self, sample: Sample) -> Partials:
        """The state of all shards, merged in pairs."""
        states = [fastloss.cross_entropy_partials(x, target, **options) for x, target, options in self.shards(sample)]
        while len(states) > 1:
            states = [a.merge(*b) if b else a for a, *b in (states[k : k + 2] for k in range(0, len(states), 2))]
        return states[0]

    def call(self, sample: Sample, **more: Any) -> Any:
        return self.merged(sample).finish(**_merged_options(sample), **more)

    def gradient(self, sample: Sample, operand: str = "input", **more: Any) -> tuple[Any, Any]:
        merged = self.merged(sample)
        how = _merged_options(sample)
        grads = [
            fastloss.cross_entropy_partials_grad(x, target, merged, **options, **how, **more)
            for x, target, options in self.shards(sample)
        ]
        value = merged.finish(more["reduction"], **how)
        return value, np.concatenate(grads, int(sample.input.ndim > 1))


def _merged_options(sample: Sample) -> Options:
    return {name: value for name, value in sample.options.items() if name in MERGED}


def sharded(row: str, *cuts: float) -> Sharded:
    return Sharded(**vars(BY_ID[row]), cuts=cuts)


ROWS = [sharded("cross_entropy", 0.5), sharded("cross_entropy-probabilities", 0.5)]
INDICES, PROBABILITIES = ROWS
# Halves of these go to each kernel: long rows, few classes compiled in, short rows, classes that lie apart.
LONG, OTHERS = (5, 160), ((37, 10), (10,), (19, 80), (2, 40, 21), (3, 140, 5, 7))


def check(row: Row, sample: Sample, reduction: str, rng: Rng) -> None:
    """The value, and the gradient for an upstream one."""
    check_value(row, sample, reduction)
    upstream = rng.uniform(-2, 2, row.truth(sample, reduction).value.shape).astype(sample.input.dtype)
    check_gradient(row, sample, reduction, grad_output=upstream)


@pytest.mark.parametrize(("row", "choice"), [(row, choice) for row in ROWS for choice in row.choices()], ids=name_of)
def test_each_option(row: Row, choice: Options, rng: Rng) -> None:
    sample = row.draw(rng, LONG, choice=choice)
    check(row, sample, "none", rng)
    if len(choice) != 1:
        for reduction in ("mean", "sum"):
            check(row, sample, reduction, rng)


@pytest.mark.parametrize("shape", OTHERS, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_each_kernel(row: Row, shape: Shape, rng: Rng) -> None:
    for choice in ({}, row.everything()):
        sample = row.draw(rng, shape, choice=choice)
        check(row, sample, "none", rng)
        check_value(row, sample, "mean")
        check_value(row, sample, "sum")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str, rng: Rng) -> None:
    for shape in ((9, 160), (20, 10)):
        sample = INDICES.draw(rng, shape, DTYPES[dtype])
        check(INDICES, sample, "mean", rng)
        assert INDICES.call(sample, dtype="float64").dtype == np.float64


def test_many_shards_in_any_order(rng: Rng) -> None:
    """Empty ones among them; also so many samples that threads share them."""
    for shape in ((33, 640), (700, 640)):
        row = sharded("cross_entropy", *rng.integers(0, 9, 3) / 8, 0, 0.25, 0.25, 1)
        sample = row.draw(rng, shape)
        check(row, sample, "mean", rng)
        states = [fastloss.cross_entropy_partials(x, target, **options) for x, target, options in row.shards(sample)]
        expected = row.call(sample, dtype="float64")
        for _ in range(3):
            rng.shuffle(states)  # type: ignore[arg-type]
            merged = states[0]
            for state in states[1:]:
                merged = state.merge(merged)
            np.testing.assert_allclose(merged.finish(dtype="float64"), expected, rtol=1e-14)


@pytest.mark.parametrize("special", [NAN, INF, -INF], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_special_logits(row: Row, special: float, rng: Rng) -> None:
    """Anywhere, at the target, all over a shard, and all over a row."""
    for shape in ((9, 160), (9, 10), (1, 80, 9)):
        for choice in ({}, row.everything()):
            sample = row.draw(rng, shape, choice={k: v for k, v in choice.items() if k != "softcap"})
            x = np.moveaxis(sample.input, 1, -1).reshape(9, -1)  # a view
            half = x.shape[1] // 2
            for i in range(3):
                x[i, rng.integers(0, 2 * half)] = special
            if row.indices:
                sample.target.reshape(-1)[3:6] = 0, 0, 2 * half - 1
            x[3, 0] = x[4, :half] = x[5, :half] = x[6, half:] = x[7] = special
            for reduction in ("none", "sum"):
                check_value(row, sample, reduction)
            check_gradient(row, sample, "none")


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_of_1e4(offset: float, rng: Rng) -> None:
    """The shards' maxima 2e4 apart, or all of them far from 0."""
    for shape in ((20, 160), (20, 10)):
        sample = INDICES.draw(rng, shape, choice={"label_smoothing": 0.1})
        sample.input[:10, : shape[1] // 2] += np.float32(offset)
        sample.input[10:] += np.float32(offset)
        check(INDICES, sample, "none", rng)


def test_shards_far_below_the_maximum_have_no_gradient(rng: Rng) -> None:
    """Their exponentials leave float32's range, and float64's: 0, not NaN."""
    for low in (-80.0, -400.0, -3000.0, -INF):
        for shape in ((6, 160), (6, 10)):
            sample = INDICES.draw(rng, shape)
            sample.input[:, : shape[1] // 2] += np.float32(low)
            check(INDICES, sample, "sum", rng)


def test_layouts(rng: Rng) -> None:
    """Strided, transposed, reversed, byte-swapped and read-only, as NumPy can lay arrays out."""
    for shape in ((6, 160), (6, 10), (3, 12, 5)):
        sample = INDICES.draw(rng, shape)
        x = sample.input
        wide = np.zeros((*shape[:-1], 2 * shape[-1]), x.dtype)
        wide[..., ::2] = x
        fixed = x.copy()
        fixed.flags.writeable = False
        swapped = x.astype(x.dtype.newbyteorder())
        for laid in (wide[..., ::2], np.asfortranarray(x), x[::-1][::-1], x[:, ::-1][:, ::-1], fixed, swapped):
            target = np.asfortranarray(np.repeat(sample.target, 2, 0))[::2]
            assert not np.shares_memory(target, sample.target)
            np.testing.assert_array_equal(laid, x)
            check(INDICES, Sample(laid, target, {}), "none", rng)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_index_dtypes(dtype: str, rng: Rng) -> None:
    """Narrower than the offset, unsigned, and ignored by what the dtype does not hold."""
    count = 120
    x = rng.standard_normal((30, count)).astype(np.float32)
    target = rng.integers(0, count, 30).astype(dtype)
    target[:3] = 7
    for ignore_index in (7, -100, 2**63 - 1):
        sample = Sample(x, target, {"ignore_index": ignore_index})
        check(INDICES, sample, "mean", rng)
    far = fastloss.cross_entropy_partials(x, target, offset=10**12)
    assert not far.found.any()
    if dtype == "uint64":
        target[4] = 2**64 - 100  # -100 in another dtype
        with pytest.raises(IndexError, match=r"target 18446744073709551516 at position \(4,\)"):
            fastloss.cross_entropy_partials(x, target)


def test_everything_ignored(rng: Rng) -> None:
    sample = INDICES.draw(rng, (8, 10))
    sample.target[:] = -100
    sample.input[3] = NAN
    assert np.isnan(INDICES.call(sample))
    assert INDICES.call(sample, reduction="sum") == 0
    assert not INDICES.call(sample, reduction="none", lse_square_scale=0.1).any()
    for reduction in ("mean", "sum", "none"):
        assert not INDICES.gradient(sample, reduction=reduction)[1].any()


def test_no_samples_and_no_classes() -> None:
    for shape in ((0, 10), (2, 10, 0)):
        sample = Sample(np.zeros(shape, np.float32), np.zeros(samples(shape), np.int64), {})
        assert np.isnan(INDICES.call(sample))
        assert INDICES.call(sample, reduction="sum") == 0
        assert INDICES.gradient(sample, reduction="none")[1].shape == shape
    nothing = fastloss.cross_entropy_partials(np.zeros((3, 0)), np.array([0, -100, 5]))
    assert nothing.lse.tolist() == [-INF, 0, -INF]
    assert nothing.found.tolist() == [0, -1, 0]


def test_the_state_itself(rng: Rng) -> None:
    """lse, mass and loss over the shard's classes, as the definitions say."""
    x = rng.standard_normal((6, 10))
    target, weight = np.array([0, 9, 12, 5, -100, 19]), rng.uniform(0.5, 2, 10)
    p = fastloss.cross_entropy_partials(x, target, offset=10, num_classes=40, weight=weight, label_smoothing=0.2)
    own = (target >= 10) & (target < 20)
    mass = np.full((6, 10), 0.2 / 40) * weight
    mass[own, target[own] - 10] += 0.8 * weight[target[own] - 10]
    live = target != -100
    lse = np.log(np.exp(x).sum(1))
    np.testing.assert_allclose(p.lse, np.where(live, lse, 0), rtol=1e-14)
    np.testing.assert_allclose(p.mass, np.where(live, mass.sum(1), 0), rtol=1e-14)
    np.testing.assert_allclose(p.loss, np.where(live, (mass * (lse[:, None] - x)).sum(1), 0), rtol=1e-13)
    np.testing.assert_array_equal(p.weight, np.where(own, weight[(target - 10) * own], 0))
    assert p.found.tolist() == [0, 0, 1, 0, -1, 1]


def test_sums_add_up_across_batches(rng: Rng) -> None:
    sample = INDICES.draw(rng, (50, 10), choice=INDICES.everything())
    scale = sample.options["lse_square_scale"]
    total = None
    for rows in (slice(0, 7), slice(7, 50)):
        batch = INDICES.merged(Sample(sample.input[rows], sample.target[rows], sample.options)).sums(scale)
        total = batch if total is None else total
        if total is not batch:
            total += batch
    assert total is not None
    assert total.samples == total.rows == 50
    assert total.value("mean", weighted_mean=True) == pytest.approx(INDICES.call(sample, dtype="float64"), rel=1e-15)


def test_states_pickle(rng: Rng) -> None:
    sample = INDICES.draw(rng, (8, 10))
    states = [fastloss.cross_entropy_partials(x, target, **options) for x, target, options in INDICES.shards(sample)]
    a, b = pickle.loads(pickle.dumps(states))
    assert a.merge(b).finish() == INDICES.call(sample)
    assert all(array.dtype == np.float64 for array in (a.lse, a.mass, a.loss, a.weight))


def test_gradient_in_place(rng: Rng) -> None:
    for shape in ((40, 160), (40, 10), (2, 12, 30)):
        sample = INDICES.draw(rng, shape)
        expected = INDICES.gradient(sample, reduction="mean")[1]
        merged = INDICES.merged(sample)
        for x, target, options in INDICES.shards(sample):
            assert fastloss.cross_entropy_partials_grad(x, target, merged, **options, grad_out=x) is x
        np.testing.assert_array_equal(sample.input, expected)


def test_torch_tensors(rng: Rng) -> None:
    """States are NumPy's, losses and gradients torch's."""
    for dtype in ("float32", "bfloat16", "float16"):
        sample = INDICES.draw(rng, (12, 10), DTYPES[dtype])
        x = torch.from_numpy(sample.input.astype(np.float32)).to(getattr(torch, dtype))
        target = torch.from_numpy(sample.target)
        parts = [fastloss.cross_entropy_partials(x[:, k : k + 5], target, offset=k) for k in (0, 5)]
        merged = parts[0].merge(parts[1])
        assert type(merged.lse) is np.ndarray
        value = merged.finish()
        assert (type(value), value.dtype) == (torch.Tensor, x.dtype)
        assert value.double().item() == float(INDICES.call(sample))
        grads = [
            fastloss.cross_entropy_partials_grad(x[:, k : k + 5], target, merged, offset=k, grad_output=torch.ones(()))
            for k in (0, 5)
        ]
        grad = torch.cat(grads, 1)
        assert grad.dtype == x.dtype
        np.testing.assert_array_equal(grad.double(), INDICES.gradient(sample, reduction="mean")[1].astype(float))


def test_shards_of_several_dtypes(rng: Rng) -> None:
    x = rng.standard_normal((5, 10))
    target = rng.integers(0, 10, 5)
    halves = [x[:, :5].astype(np.float16), x[:, 5:].astype(ml_dtypes.bfloat16)]
    a, b = (fastloss.cross_entropy_partials(half, target, offset=5 * k) for k, half in enumerate(halves))
    whole = np.concatenate([half.astype(np.float32) for half in halves], 1)
    value = a.merge(b).finish()
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, fastloss.cross_entropy(whole, target), rtol=1e-6)
    assert a.merge(fastloss.cross_entropy_partials(x[:, 5:], target, offset=5)).finish().dtype == np.float64


# ---- errors


X, T = np.zeros((3, 10), np.float32), np.array([1, 25, -100])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 20}, IndexError, r"target 25 at position \(1,\) is out of range for 20 classes"),
        ({"target": np.array([1, -1, 0])}, IndexError, r"target -1 at position \(1,\) is out of range"),
        ({"offset": -1}, ValueError, "offset is -1"),
        ({"offset": 0.5}, TypeError, "float"),
        ({"offset": 15, "num_classes": 20}, ValueError, "num_classes is 20, but the shard has classes 15 to 24"),
        ({"label_smoothing": 0.1}, ValueError, "label_smoothing needs num_classes"),
        ({"label_smoothing": 1.5, "num_classes": 30}, ValueError, "label_smoothing is 1.5"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"weight": np.ones(30)}, ValueError, r"weight has shape \(30,\), expected \(10,\)"),
        ({"target": np.zeros((3, 30))}, TypeError, "target has dtype float64"),
        ({"target": np.zeros((3, 10)), "ignore_index": 1}, ValueError, "ignore_index is 1"),
    ],
)
def test_errors_of_a_shard(options: Options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastloss.cross_entropy_partials(X, options.pop("target", T), **options)


def test_errors_of_a_merged_state() -> None:
    a, b = (fastloss.cross_entropy_partials(X, T, offset=offset) for offset in (0, 10))
    with pytest.raises(IndexError, match=r"none of the shards .* at position \(1,\)"):
        a.merge(b).finish()
    with pytest.raises(IndexError, match="none of the shards"):
        fastloss.cross_entropy_partials_grad(X, T, a.merge(b))
    whole = a.merge(b).merge(fastloss.cross_entropy_partials(X, T, offset=20))
    with pytest.raises(ValueError, match=r"several of the shards .* at position \(0,\)"):
        whole.merge(a).finish()
    with pytest.raises(ValueError, match="reduction is 'average'"):
        whole.finish("average")
    with pytest.raises(ValueError, match="lse_square_scale is -1"):
        whole.finish(lse_square_scale=-1)
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(2,\)"):
        a.merge(fastloss.cross_entropy_partials(X[:2], T[:2]))
    with pytest.raises(ValueError, match="different targets"):
        a.merge(fastloss.cross_entropy_partials(X, np.where(T < 0, 1, T)))
    with pytest.raises(ValueError, match="different targets"):
        a.merge(fastloss.cross_entropy_partials(X, X))
    with pytest.raises(ValueError, match=r"merged is the state of losses of shape \(3,\), expected \(2,\)"):
        fastloss.cross_entropy_partials_grad(X[:2], T[:2], whole)
    with pytest.raises(ValueError, match=r"grad_output has shape \(4,\)"):
        fastloss.cross_entropy_partials_grad(X, T, whole, reduction="none", grad_output=np.ones(4))
    with pytest.raises(ValueError, match=r"grad_out has shape \(2, 10\)"):
        fastloss.cross_entropy_partials_grad(X, T, whole, grad_out=np.empty((2, 10), np.float32))


def test_a_gradient_is_asked_for_by_name() -> None:
    with pytest.raises(TypeError, match="requires grad"):
        fastloss.cross_entropy_partials(torch.zeros(3, 10, requires_grad=True), torch.zeros(3, dtype=torch.int64))


def test_arrays_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import posing_as_gpu

    monkeypatch.setitem(dispatch.ADAPTERS, "posing_as_gpu", "posing_as_gpu")
    logits, target = posing_as_gpu.arrays((4, 10))
    with pytest.raises(TypeError, match="run on the CPU only so far"):
        fastloss.cross_entropy_partials(logits, target)
    with pytest.raises(TypeError, match="different devices"):
        fastloss.cross_entropy_partials(logits, np.zeros(4, np.int64))
