"""Arrays of any library that follows the array API standard, or speaks DLPack and nothing else: every loss reads them,
and answers in kind. array_api_strict is the standard and no more; it converts to nothing by itself."""

import sys
import types
from collections.abc import Iterator
from typing import Any

import array_api_strict
import numpy as np
import pytest
from array_api_strict import ArrayAPIStrictFlags, Device
from numba import cuda

import fastloss
from fastloss import dispatch
from fastloss.arrays import numba_cuda
from table import ARGNUM, BY_ID, ROWS, Rng, Row, Sample, name_of

STRICT = type(array_api_strict.asarray(1.0))


def strict(value: Any, device: Any = None) -> Any:
    """A NumPy array as array_api_strict's; options that are no arrays as they are."""
    return array_api_strict.asarray(value, device=device) if isinstance(value, np.ndarray) else value


def strictly(sample: Sample, device: Any = None) -> Sample:
    options = {name: strict(value, device) for name, value in sample.options.items()}
    return Sample(strict(sample.input, device), strict(sample.target, device), options)


def check_same(got: Any, expected: Any) -> None:
    """An array of the standard's, with the numbers, the shape and the dtype of NumPy's."""
    __tracebackhide__ = True
    assert type(got) is STRICT
    host = np.from_dlpack(got)
    assert (host.dtype, host.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(host, expected)


# ---- every loss


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_every_argument(row: Row, dtype: str, rng: Rng) -> None:
    """input, target and weights of the standard's type; value, and every gradient that the loss has, in kind."""
    sample = row.draw(rng, (6, 4), dtype, row.everything())
    own = strictly(sample)
    for reduction in row.reductions:
        check_same(row.call(own, reduction=reduction), np.asarray(row.call(sample, reduction=reduction)))
    for operand in row.gradients:
        value, grad = row.gradient(own, operand)
        expected, expected_grad = row.gradient(sample, operand)
        check_same(value, np.asarray(expected))
        check_same(grad, expected_grad)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_results_in_given_arrays(row: Row, rng: Rng) -> None:
    """out, grad_out, grad_output: written and read where they lie."""
    sample = row.draw(rng, (6, 4))
    own = strictly(sample)
    losses = np.asarray(row.call(sample, reduction="none"))
    out, grad_out = (array_api_strict.zeros(a.shape, dtype=array_api_strict.float32) for a in (losses, sample.input))
    assert row.call(own, reduction="none", out=out) is out
    check_same(out, losses)
    upstream = rng.standard_normal(losses.shape).astype(np.float32)
    _, grad = row.gradient(own, reduction="none", grad_output=strict(upstream), grad_out=grad_out)
    assert grad is grad_out
    check_same(grad, row.gradient(sample, reduction="none", grad_output=upstream)[1])


def test_other_shapes(rng: Rng) -> None:
    """No dimension, no element, several dimensions."""
    row = BY_ID["cross_entropy"]
    for shape in ((5,), (0, 5), (2, 5, 3, 2)):
        sample = row.draw(rng, shape)
        for reduction in ("none", "mean"):
            expected = np.asarray(row.call(sample, reduction=reduction))
            check_same(row.call(strictly(sample), reduction=reduction), expected)


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_class_indices_of_every_dtype(name: str, rng: Rng) -> None:
    x, t = rng.standard_normal((7, 4)).astype(np.float32), rng.integers(0, 4, 7).astype(name)
    for loss in (fastloss.cross_entropy, fastloss.nll_loss):
        check_same(loss(strict(x), strict(t)), loss(x, t))


def test_labels_that_are_bool(rng: Rng) -> None:
    x, y = rng.uniform(size=9).astype(np.float32), rng.uniform(size=9) < 0.5
    for loss in (fastloss.binary_cross_entropy, fastloss.binary_cross_entropy_with_logits):
        check_same(loss(strict(x), strict(y)), loss(x, y))


def test_meter_and_modules(rng: Rng) -> None:
    sample = BY_ID["cross_entropy"].draw(rng, (9, 5))
    own = strictly(sample)
    meter = fastloss.Meter("cross_entropy")
    meter.update(own.input[:4, :], own.target[:4])
    meter.update(own.input[4:, :], own.target[4:])
    expected = fastloss.cross_entropy(sample.input, sample.target, dtype="float64")
    assert meter.compute() == pytest.approx(float(expected), rel=1e-15)
    check_same(fastloss.CrossEntropyLoss()(own.input, own.target), fastloss.cross_entropy(sample.input, sample.target))


@pytest.mark.parametrize("version", ["2023.12", "2024.12"])
def test_versions_of_the_standard(version: str, rng: Rng) -> None:
    """Nothing is asked of the library but DLPack: no optional extension, no shape that depends on numbers."""
    sample = BY_ID["cross_entropy"].draw(rng, (9, 5))
    own = strictly(sample)
    expected = fastloss.value_and_grad(fastloss.cross_entropy)(sample.input, sample.target)
    least = {"boolean_indexing": False, "data_dependent_shapes": False, "enabled_extensions": ()}
    with ArrayAPIStrictFlags(api_version=version, **least):
        got = fastloss.value_and_grad(fastloss.cross_entropy)(own.input, own.target)
    for a, b in zip(got, expected, strict=True):
        check_same(a, np.asarray(b))


# ---- flags


def test_read_only_arrays(rng: Rng) -> None:
    """They are read; nothing is written to them."""
    row = BY_ID["mse_loss"]
    sample = row.draw(rng, (6, 4))
    frozen = sample.input.copy()
    frozen.flags.writeable = False
    own = array_api_strict.asarray(frozen, copy=False)
    before = frozen.copy()
    check_same(row.call(Sample(own, strict(sample.target), {})), np.asarray(row.call(sample)))
    with pytest.raises(ValueError, match="out is read-only"):
        fastloss.mse_loss(strict(sample.input), strict(sample.target), reduction="none", out=own)
    with pytest.raises(ValueError, match="grad_out is read-only"):
        fastloss.value_and_grad(fastloss.mse_loss)(own, strict(sample.target), grad_out=own)
    np.testing.assert_array_equal(frozen, before)


def test_results_are_on_the_inputs_device(rng: Rng) -> None:
    """A library may have several devices in the CPU's memory: array_api_strict has, to find out who forgets them."""
    sample = BY_ID["huber_loss"].draw(rng, (6, 4))
    for device in (Device("CPU_DEVICE"), Device("device1"), Device("device2")):
        own = strictly(sample, device)
        value, grads = fastloss.value_and_grad(fastloss.huber_loss, (0, 1))(own.input, own.target)
        losses = fastloss.huber_loss(own.input, own.target, reduction="none")
        assert all(array.device == device for array in (value, losses, *grads))


def test_dtypes_that_the_library_lacks(rng: Rng) -> None:
    x = strict(rng.standard_normal((3, 4)))
    for name in ("float16", "bfloat16"):
        with pytest.raises(TypeError, match=rf"array_api_strict has no {name}.*another dtype"):
            fastloss.mse_loss(x, x, dtype=name)
    with pytest.raises(TypeError, match="input has dtype complex128"):
        fastloss.mse_loss(array_api_strict.astype(x, array_api_strict.complex128), x)


# ---- DLPack alone


class Parcel:
    """An array that can hand itself over by DLPack, and nothing else."""

    def __init__(self, array: Any) -> None:
        self._array = np.from_dlpack(array)

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


@pytest.fixture
def parcels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its library, whose only function takes DLPack."""
    library: Any = types.ModuleType("parcels")
    library.float32, library.from_dlpack = object(), Parcel
    monkeypatch.setattr(Parcel, "__module__", "parcels.core")
    monkeypatch.setitem(sys.modules, "parcels", library)
    return library


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_dlpack_both_ways(row: Row, parcels: Any, rng: Rng) -> None:
    """Results go back by the from_dlpack of the library that the input came from."""
    sample = row.draw(rng, (6, 4))
    own = Sample(Parcel(sample.input), Parcel(sample.target), {})
    got = [*row.gradient(own), row.call(own, reduction="none")]
    expected = [*row.gradient(sample), row.call(sample, reduction="none")]
    for a, b in zip(got, expected, strict=True):
        assert type(a) is Parcel
        np.testing.assert_array_equal(a._array, b)
    with pytest.raises(TypeError, match="parcels has no float64"):
        row.call(own, dtype="float64")


class OldParcel(Parcel):
    """Of a library that follows the standard's first versions: `stream` is all that it can be asked for."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self._array.__dlpack__()


def test_the_first_versions_of_dlpack(rng: Rng) -> None:
    sample = BY_ID["mse_loss"].draw(rng, (6, 4))
    got = fastloss.mse_loss(OldParcel(sample.input), OldParcel(sample.target))
    assert got == fastloss.mse_loss(sample.input, sample.target)


def test_without_from_dlpack_numpy_answers(rng: Rng) -> None:
    sample = BY_ID["l1_loss"].draw(rng, (6, 4))
    got = fastloss.l1_loss(Parcel(sample.input), Parcel(sample.target))
    assert type(got) is np.float32
    assert got == fastloss.l1_loss(sample.input, sample.target)


# ---- on a GPU, or in Numba's simulator of one


class CupyArray:
    """What fastloss.arrays.cupy asks of a CuPy array, in Numba's device memory."""

    def __init__(self, host: Any) -> None:
        self.memory = cuda.to_device(np.asarray(host))
        self.data = types.SimpleNamespace(ptr=numba_cuda.address(self.memory))
        self.device = types.SimpleNamespace(id=0)
        self.dtype, self.shape, self.strides = self.memory.dtype, self.memory.shape, self.memory.strides
        self.itemsize = self.dtype.itemsize


class Interface:
    """Nothing but the CUDA array interface."""

    def __init__(self, host: Any) -> None:
        self.memory = cuda.to_device(np.asarray(host))
        self.__cuda_array_interface__ = {
            "shape": self.memory.shape,
            "typestr": self.memory.dtype.str,
            "data": (numba_cuda.address(self.memory), False),
            "strides": None,
            "version": 3,
        }


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """A stand-in for the module; gives its array type."""

    class Current:
        ptr = 0

    class Chosen:
        def __init__(self, number: int) -> None:
            assert number == 0

        def __enter__(self) -> None: ...

        def __exit__(self, *exception: object) -> None: ...

    module: Any = types.ModuleType("cupy")
    monkeypatch.setattr(CupyArray, "__module__", "cupy")
    module.ndarray = CupyArray
    module.empty = lambda shape, dtype: CupyArray(np.empty(shape, dtype))
    module.cuda = types.SimpleNamespace(
        Device=Chosen,
        runtime=types.SimpleNamespace(is_hip=False),
        get_current_stream=lambda number: Current,
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.delitem(sys.modules, "fastloss.arrays.cupy", raising=False)
    yield CupyArray
    sys.modules.pop("fastloss.arrays.cupy", None)
    for known in (dispatch._by_type, dispatch.keys, dispatch._engines):
        known.pop(CupyArray, None)  # type: ignore[attr-defined]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The losses whose kernels ran on the GPU."""
    from fastloss.backends.cuda.run import Run

    names: list[str] = []
    start = Run.start

    def noted(self: Any, outputs: Any) -> None:
        names.append(type(self).__name__)
        start(self, outputs)

    monkeypatch.setattr(Run, "start", noted)
    return names


def host(array: Any) -> Any:
    return getattr(array, "memory", array).copy_to_host()


@pytest.mark.parametrize("id", ["cross_entropy", "mse_loss", "binary_cross_entropy_with_logits"])
@pytest.mark.parametrize("library", ["cupy", "interface", "numba"])
def test_gpu_arrays_take_the_cuda_kernels(library: str, id: str, cupy: type, launched: list[str], rng: Rng) -> None:
    """Value and gradient of a whole call; CuPy is answered by CuPy, the others by Numba."""
    numba_array = type(cuda.to_device(np.zeros(1)))
    make = {"cupy": cupy, "interface": Interface, "numba": cuda.to_device}[library]
    answer = cupy if library == "cupy" else numba_array
    row = BY_ID[id]
    sample = row.draw(rng, (4, 5))
    value, grad = fastloss.value_and_grad(row.function, ARGNUM["input"])(make(sample.input), make(sample.target))
    assert type(value) is type(grad) is answer
    assert launched
    expected, expected_grad = row.gradient(sample)
    # the same formulas in float32, added up in another order
    np.testing.assert_allclose(host(value), expected, rtol=1e-6)
    np.testing.assert_allclose(host(grad), expected_grad, rtol=1e-5, atol=1e-7)
    launched.clear()
    row.call(sample)
    assert not launched
