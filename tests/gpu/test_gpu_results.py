"""What calls on a GPU hand back: the same bits every time, arrays of the device, errors that say what is where."""

import copy
import importlib.util
import inspect
import itertools
from typing import Any

import numpy as np
import pytest
from on_device import DEVICE_ARRAY, Room, check_gradient, check_value, host, on_device, upload, upstream, value_bound

import fastloss
import table
from fastloss import modules, runtime
from table import BY_ID, DTYPES, ROWS, Rng, Row, Sample, assert_within, name_of

CE = BY_ID["cross_entropy"]


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_ten_runs_give_the_same_bits(row: Row, rng: Rng) -> None:
    """Each from memory of its own, in several blocks whose sums are added up."""
    sample = row.draw(rng, (34, 2) if row.classes else (36,))
    for reduction in row.reductions:
        found = {host(row.call(upload(sample), reduction=reduction)).tobytes() for _ in range(10)}
        assert len(found) == 1


@pytest.mark.parametrize("shape", [(2, 30), (1, 140), (1, 300), (1, 1100), (2, 3, 8)], ids=str)
def test_ten_runs_of_each_path_give_the_same_bits(shape: tuple[int, ...], rng: Rng) -> None:
    """Values and gradients."""
    sample = CE.draw(rng, shape)
    device = upload(sample)
    assert len({b"".join(host(x).tobytes() for x in CE.gradient(device)) for _ in range(10)}) == 1


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_results_are_arrays_of_the_device(row: Row, rng: Rng) -> None:
    """dtype and shape as on the CPU; `out` is what is returned, and a failed call leaves it alone."""
    for shape in ((5, 3), (4,)):
        sample = row.draw(rng, shape)
        device = upload(sample)
        for reduction in row.reductions:
            dtype = str(rng.choice(list(DTYPES)))
            got = row.call(device, reduction=reduction, dtype=dtype)
            truth = row.truth(sample, reduction).value
            assert type(got) is DEVICE_ARRAY
            assert tuple(got.shape) == truth.shape
            bound = value_bound(row, sample, reduction) + (table.ulp(truth, np.float32) if dtype == "float64" else 0)
            assert_within(host(got), truth, bound, DTYPES[dtype], f"{row.id} as {dtype}")
            room = Room(np.zeros(truth.shape, DTYPES[dtype]))
            assert row.call(device, reduction=reduction, dtype=dtype, out=room.array) is room.array
            # as float64, since NaN of ml_dtypes' bfloat16 is not equal to itself there: the mean of ignored samples
            np.testing.assert_array_equal(room.read().astype(np.float64), host(got).astype(np.float64))
            room.check()
            for out, error, match in (
                (np.zeros((*truth.shape, 2), DTYPES[dtype]), ValueError, "out has shape"),
                (np.zeros(truth.shape, np.int32), TypeError, "out has dtype int32"),
            ):
                wrong = Room(out)
                with pytest.raises(error, match=match):
                    row.call(device, reduction=reduction, dtype=dtype, out=wrong.array)
                wrong.check(written=False)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_arguments_are_left_alone(row: Row, rng: Rng) -> None:
    for shape in ((5, 6), (1, 21)) if row.classes else ((3, 11),):
        sample = row.draw(rng, shape, choice=row.everything())
        rooms = {"input": Room(sample.input), "target": Room(sample.target)}
        rooms |= {name: Room(value) for name, value in sample.options.items() if isinstance(value, np.ndarray)}
        arrays = {name: room.array for name, room in rooms.items()}
        device = Sample(arrays["input"], arrays["target"], sample.options | dict(list(arrays.items())[2:]))
        check_value(row, sample, str(rng.choice(row.reductions)), device)
        check_gradient(row, sample, "none", row.gradients[-1], upstream(row, sample, rng), device)
        for room in rooms.values():
            room.check(written=False)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_arguments_on_different_devices(row: Row, rng: Rng) -> None:
    """Nothing is moved: an error names the arguments and where they are."""
    sample = row.draw(rng, (4, 3), choice={"weight": row.options["weight"][0]} if "weight" in row.options else {})
    device = upload(sample)
    both = "input on GPU 0, target on the CPU"
    with pytest.raises(TypeError, match=both):
        row.call(Sample(device.input, sample.target, {}))
    with pytest.raises(TypeError, match="input on the CPU, target on GPU 0"):
        row.call(Sample(sample.input, device.target, {}))
    if "weight" in sample.options:
        with pytest.raises(TypeError, match=r"input on GPU 0, target on GPU 0, .*weight on the CPU"):
            row.call(Sample(device.input, device.target, sample.options))
    for near, far, places in ((sample, device, ("the CPU", "GPU 0")), (device, sample, ("GPU 0", "the CPU"))):
        value = row.truth(sample, "none").value.astype(np.float32)
        other = value if far is sample else on_device(value)
        match = r"input on {}, {} on {}"
        for name in ("out", "grad_output"):
            with pytest.raises(TypeError, match=match.format(places[0], name, places[1])):
                row.gradient(near, reduction="none", **{"grad_output": near_like(near, value), name: other})
        with pytest.raises(TypeError, match=match.format(places[0], "grad_out", places[1])):
            row.gradient(near, grad_out=far.input)


def near_like(sample: Sample, value: np.ndarray[Any, Any]) -> Any:
    return value if isinstance(sample.input, np.ndarray) else on_device(value)


def test_a_pos_weight_and_numbers_elsewhere(rng: Rng) -> None:
    row = BY_ID["binary_cross_entropy_with_logits"]
    device = upload(row.draw(rng, (4, 3)))
    with pytest.raises(TypeError, match="pos_weight on the CPU"):
        row.call(device, pos_weight=np.ones(3, np.float32))
    with pytest.raises(TypeError, match="input on GPU 0, target on the CPU"), pytest.warns(fastloss.BroadcastWarning):
        fastloss.mse_loss(device.input, 0.5)


def test_without_numba_cuda(monkeypatch: pytest.MonkeyPatch, rng: Rng) -> None:
    """The message says what to install; the array is fastloss's to read, so only the kernels are missing."""
    device = upload(CE.draw(rng, (4, 3)))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba_cuda" else found(name))
    runtime.require_cuda.cache_clear()
    try:
        for call in (CE.function, fastloss.value_and_grad(CE.function), fastloss.Meter("cross_entropy").update):
            with pytest.raises(ImportError, match=r"numba-cuda.*pip install .*fastloss\[cuda1[23]\]"):
                call(device.input, device.target)
    finally:
        runtime.require_cuda.cache_clear()


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_meter(row: Row, rng: Rng) -> None:
    """Batches of any size give the value of one call on everything; the samples' losses stay on the device."""
    sample = row.draw(rng, (12, 3))
    bounds = [0, 1, 1, 5, 12]
    for reduction in row.reductions[1:]:
        meter = fastloss.Meter(row.name, reduction=reduction)
        parts = []
        for start, stop in itertools.pairwise(bounds):
            batch = Sample(sample.input[start:stop], sample.target[start:stop], {})
            device = upload(batch)
            shape = row.truth(batch, "none").value.shape
            kept = Room(np.zeros(shape, rng.choice(["float32", "float64"])))
            meter.update(device.input, device.target, per_sample=kept.array)
            kept.check()
            parts.append(kept.read().astype(np.float32))
        truth = row.truth(sample, reduction).value
        assert_within(np.float32(meter.compute()), truth, value_bound(row, sample, reduction), np.float32, row.id)
        losses = row.truth(sample, "none").value
        assert_within(np.concatenate(parts), losses, value_bound(row, sample, "none"), np.float32, row.id)
        assert meter.samples == losses.size
        assert meter.ignored == (int((sample.target == -100).sum()) if row.indices else 0)


def test_meter_with_weights(rng: Rng) -> None:
    weight = rng.uniform(0.1, 2, 5).astype(np.float32)
    sample = CE.draw(rng, (40, 5))
    sample = Sample(sample.input, sample.target, {"weight": weight, "label_smoothing": 0.1})
    device = upload(sample)
    meter = fastloss.Meter("cross_entropy", weight=device.options["weight"], label_smoothing=0.1)
    for start, stop in ((0, 7), (7, 40)):
        meter.update(on_device(sample.input[start:stop]), on_device(sample.target[start:stop]))
    bound = value_bound(CE, sample, "mean")
    assert_within(np.float32(meter.compute()), CE.truth(sample).value, bound, np.float32, "meter")
    assert meter.weight_sum == pytest.approx(weight[sample.target[sample.target >= 0]].sum(dtype=float), rel=1e-7)
    together = copy.deepcopy(meter)
    together.merge(meter)
    assert together.compute() == pytest.approx(meter.compute(), rel=1e-12)
    on_the_cpu = fastloss.Meter("cross_entropy", weight=weight, label_smoothing=0.1)
    on_the_cpu.update(sample.input, sample.target)
    assert on_the_cpu.compute() == pytest.approx(meter.compute(), rel=1e-6)
    with pytest.raises(TypeError, match="per_sample on the CPU"):
        meter.update(device.input, device.target, per_sample=np.zeros(40, np.float32))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_classes_are_their_functions(row: Row, rng: Rng) -> None:
    kind = next(kind for kind in vars(modules).values() if getattr(kind, "function", None) is row.function)
    taken = inspect.signature(kind).parameters
    sample = row.draw(rng, (12, 5), choice={name: v for name, v in row.everything().items() if name in taken})
    device = upload(sample)
    for reduction in ("none", "mean"):
        loss = kind(**device.options, reduction=reduction)
        expected = row.call(device, reduction=reduction)
        np.testing.assert_array_equal(host(loss(device.input, device.target)), host(expected))
    value, grad = fastloss.value_and_grad(loss)(device.input, device.target)
    expected_value, expected_grad = row.gradient(device)
    np.testing.assert_array_equal(host(value), host(expected_value))
    np.testing.assert_array_equal(host(grad), host(expected_grad))


def test_a_loss_of_ones_own(rng: Rng) -> None:
    """Formulas from outside run on a GPU as they do on the CPU."""
    from fastloss.kernels.pointwise import Pointwise

    cube = fastloss.pointwise_loss(
        Pointwise("cube", lambda x, y, k: k * (x - y) * (x - y) * (x - y), lambda x, y, k: 3.0 * k * (x - y) * (x - y),
                  parameters=("k",))
    )  # fmt: skip
    x, y = rng.normal(size=(2, 140))
    value, grad = fastloss.value_and_grad(cube)(on_device(x), on_device(y), reduction="sum", k=2.0)
    assert host(value) == pytest.approx((2 * (x - y) ** 3).sum(), rel=1e-12)
    np.testing.assert_allclose(host(grad), 6 * (x - y) ** 2, rtol=1e-14)
