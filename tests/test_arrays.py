"""What can be handed in: NumPy, torch, lists, DLPack, registered types; all else is refused by name."""

import importlib.metadata
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
import torch

import fastloss
from table import (
    BY_ID,
    DTYPES,
    ROWS,
    Rng,
    Row,
    Sample,
    assert_within,
    check_gradient,
    check_value,
    name_of,
    value_bound,
)

CE = BY_ID["cross_entropy"]


# ---- NumPy


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_memory_mapped(mode: Any, tmp_path: Path, rng: Rng) -> None:
    for row in ROWS:
        sample = row.draw(rng, (500, 9))
        paths = tmp_path / f"{row.id}-x.npy", tmp_path / f"{row.id}-y.npy"
        for path, a in zip(paths, (sample.input, sample.target), strict=True):
            np.save(path, a)
        x, y = (np.load(path, mmap_mode=mode) for path in paths)
        for reduction in ("none", "mean"):
            got = check_value(row, Sample(x, y, {}), reduction)
            assert type(got) is (np.ndarray if reduction == "none" else np.float32)
        check_gradient(row, Sample(x, y, {}), "mean")


def test_results_are_plain_numpy(rng: Rng) -> None:
    """Reduced: a scalar of the input's dtype. 'none': an array, whatever subclass came in."""
    for row in ROWS:
        for dtype in DTYPES.values():
            sample = row.draw(rng, (6, 4), dtype)
            value, grad = row.gradient(sample)
            assert isinstance(value, np.generic)
            assert value.dtype == dtype
            assert type(grad) is np.ndarray
            assert type(row.call(sample, reduction="none")) is np.ndarray
    x = np.ones(2).view(np.rec.recarray)
    assert type(x) is not np.ndarray
    assert type(fastloss.mse_loss(x, np.zeros(2), reduction="none")) is np.ndarray


def test_numpy_scalars_and_zero_dimensions() -> None:
    assert fastloss.mse_loss(np.float32(3), np.float32(1)) == 4
    assert fastloss.mse_loss(np.array(3.0), np.array(1.0), reduction="none") == 4
    value, grad = fastloss.value_and_grad(fastloss.mse_loss)(np.float32(3), np.float32(1))
    assert (value, grad) == (4, 4)
    assert fastloss.cross_entropy(np.zeros(4, np.float32), np.uint8(3)) == pytest.approx(np.log(4), rel=2e-7)
    assert fastloss.cross_entropy(np.zeros(4, np.float32), 3, reduction="none") == pytest.approx(np.log(4), rel=2e-7)


def test_bfloat16_of_ml_dtypes(rng: Rng) -> None:
    """Strided, reversed and read-only; as weights; as out and grad_out."""
    for row in ROWS:
        drawn = row.draw(
            rng,
            (24, 10),
            ml_dtypes.bfloat16,
            {"weight": row.options["weight"][0]} if "weight" in row.options else {},
        )
        x = np.repeat(drawn.input, 2, 1)[::-1, ::2]
        x.flags.writeable = False
        sample = Sample(x, drawn.target, drawn.options)
        check_value(
            row,
            sample,
            "none",
            out=np.empty(np.shape(row.call(sample, reduction="none")), ml_dtypes.bfloat16),
        )
        check_gradient(row, sample, "mean", grad_out=np.empty((24, 10), ml_dtypes.bfloat16, order="F"))


def test_other_numpy_dtypes_are_refused() -> None:
    y = np.zeros(3, np.float32)
    for dtype in (
        "complex64",
        "longdouble",
        "S3",
        "datetime64[s]",
        object,
        ml_dtypes.float8_e4m3fn,
        [("a", "f4")],
    ):
        with pytest.raises(TypeError, match=r"input has dtype .*float16, .*float32"):
            fastloss.mse_loss(np.zeros(3, dtype), y)


def test_masked_arrays_do_not_lose_their_mask() -> None:
    """A mask cannot be honoured, so it is not dropped in silence."""
    with pytest.raises(TypeError, match=r"MaskedArray|masked"):
        fastloss.mse_loss(np.ma.masked_array([1.0, 2.0], [True, False]), np.zeros(2))


# ---- torch


def tensor_of(got: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as an array of the same dtype."""
    if got.dtype is torch.bfloat16:
        return got.view(torch.uint16).numpy().view(DTYPES["bfloat16"])
    return got.numpy()


@pytest.mark.parametrize("row", ROWS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(row: Row, dtype: str, rng: Rng) -> None:
    """Tensors give tensors, the same bits as NumPy gives, whatever their strides; but where classes lie apart: kernels
    that take one reference for many samples round as those that take each sample's maximum do, and not to the same."""
    sample = row.draw(rng, (24, 10), DTYPES[dtype])

    def tensor(a: np.ndarray[Any, Any]) -> torch.Tensor:
        if a.dtype == DTYPES["bfloat16"]:
            return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(a)

    x, y = tensor(sample.input), tensor(sample.target)
    for reduction in ("none", "mean"):
        plain = np.asarray(row.call(sample, reduction=reduction)).astype(np.float64)
        for input in (x, x.repeat_interleave(2, 1)[:, ::2], x.t().contiguous().t()):
            got = row.function(input, y, reduction=reduction)
            assert isinstance(got, torch.Tensor)
            assert got.dtype == getattr(torch, dtype)
            if row.classes and input.stride(1) != 1 and input.stride(0) == 1:
                bound = value_bound(row, sample, reduction, DTYPES[dtype])
                truth = row.truth(sample, reduction).value
                assert_within(tensor_of(got), truth, bound, DTYPES[dtype])
            else:
                np.testing.assert_array_equal(got.double().numpy(), plain)
    value, grad = fastloss.value_and_grad(row.function)(x, y)
    assert isinstance(value, torch.Tensor)
    assert value.shape == ()
    assert grad.dtype == x.dtype
    np.testing.assert_array_equal(grad.double().numpy(), row.gradient(sample)[1].astype(np.float64))


def test_torch_memory_is_not_copied() -> None:
    """Results are written where they are asked for: into the tensors' own memory, bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x, y = torch.full((8, 5), 3.0, dtype=dtype), torch.ones(8, 5, dtype=dtype)
        out, pointer = torch.zeros(8, 5, dtype=dtype), x.data_ptr()
        got = fastloss.mse_loss(x, y, reduction="none", out=out)
        assert got is out
        assert (out == 4).all()
        _, grad = fastloss.value_and_grad(fastloss.mse_loss)(x, y, reduction="sum", grad_out=x)
        assert grad is x
        assert x.data_ptr() == pointer
        assert (x == 4).all()


def test_torch_adapter_shares_memory() -> None:
    """Peak memory of a call is far below a copy of its operands."""
    import tracemalloc

    x = torch.zeros(4_000_000, dtype=torch.bfloat16)
    fastloss.mse_loss(x, x)
    tracemalloc.start()
    fastloss.mse_loss(x, x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 10


def test_torch_tensors_that_require_grad() -> None:
    """Never a silent detach: the error points to value_and_grad, which takes them."""
    x, y = torch.ones(3, requires_grad=True), torch.zeros(3)
    for operands in ((x, y), (y, x)):
        with pytest.raises(TypeError, match="value_and_grad"):
            fastloss.mse_loss(*operands)
    with pytest.raises(TypeError, match="value_and_grad"):
        fastloss.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(3, requires_grad=True))
    with pytest.raises(TypeError, match="value_and_grad"):
        fastloss.Meter("mse_loss").update(x, y)
    assert fastloss.mse_loss(x.detach(), y) == 1
    with torch.no_grad():
        assert fastloss.mse_loss(x, y) == 1
    value, grad = fastloss.value_and_grad(fastloss.mse_loss)(x, y)
    assert value == 1
    assert not grad.requires_grad
    torch.testing.assert_close(grad, torch.full((3,), 2 / 3))


def test_torch_tensors_that_cannot_be_read() -> None:
    y = torch.zeros(3, 3)
    for x, words in (
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.zeros(3, 3, device="meta"), "meta"),
        (torch.zeros(3, 3, dtype=torch.complex64), "complex64"),
        (torch.zeros(3, 3, dtype=torch.float8_e4m3fn), "[Ff]loat8"),
    ):
        with pytest.raises(TypeError, match=words):
            fastloss.mse_loss(x, y)


def test_torch_subclasses_and_views() -> None:
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    assert fastloss.mse_loss(parameter, torch.zeros(3)) == 1
    assert fastloss.mse_loss(torch.ones(2, 3).expand(4, 2, 3), torch.zeros(4, 2, 3)) == 1
    negative = torch.tensor([1j, 2j]).conj().imag  # a view whose sign is pending
    assert negative.is_neg()
    assert fastloss.l1_loss(negative, torch.zeros(2), reduction="none").tolist() == [1, 2]


def test_mixed_libraries() -> None:
    """The result belongs to the library of the input."""
    x = np.array([1.0, 2.0])
    assert isinstance(fastloss.mse_loss(torch.from_numpy(x), x), torch.Tensor)
    assert isinstance(fastloss.mse_loss(x, torch.from_numpy(x)), np.float64)
    assert isinstance(fastloss.mse_loss(torch.from_numpy(x), [0.0, 0.0]), torch.Tensor)
    got = fastloss.cross_entropy(torch.zeros(2, 3), np.array([0, 1]), weight=[1, 2, 3])
    assert isinstance(got, torch.Tensor)


# ---- lists, numbers, DLPack


def test_lists_and_numbers() -> None:
    """Read as NumPy would; beside an array they take its dtype."""
    assert fastloss.mse_loss([1.0, 2.0], [0.0, 0.0]) == 2.5
    assert fastloss.mse_loss(3.0, 1.0) == 4
    assert fastloss.mse_loss(((1.0, 2.0), (3.0, 4.0)), [[1, 2], [3, 5]], reduction="none").tolist() == [
        [0, 0],
        [0, 1],
    ]
    assert fastloss.cross_entropy([[0.0, 0.0]], [1]) == pytest.approx(np.log(2), rel=2e-7)
    x = np.array([1, 2], np.float32)
    assert fastloss.mse_loss(x, [0.0, 0.0]).dtype == np.float32
    assert fastloss.mse_loss([0.0, 0.0], x).dtype == np.float32
    half = x.astype(np.float16)
    assert fastloss.huber_loss(half, [0.0, 0.0], weight=[1.0, 2.0]).dtype == np.float16
    with pytest.raises((TypeError, ValueError)):
        fastloss.mse_loss([[1.0], [1.0, 2.0]], [[1.0], [1.0, 2.0]])
    with pytest.raises(TypeError, match="list"):
        fastloss.mse_loss(["a", "b"], [1.0, 2.0])


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_dlpack(row: Row, rng: Rng) -> None:
    """array_api_strict arrays, which NumPy does not convert: read through DLPack, answered in kind."""
    sample = row.draw(rng, (24, 10))
    x, y = (array_api_strict.asarray(a) for a in (sample.input, sample.target))
    for reduction in ("none", "mean"):
        got = row.function(x, y, reduction=reduction)
        assert isinstance(got, type(x))
        np.testing.assert_array_equal(np.from_dlpack(got), row.call(sample, reduction=reduction))
    value, grad = fastloss.value_and_grad(row.function)(x, y)
    assert isinstance(value, type(x))
    assert isinstance(grad, type(x))
    np.testing.assert_array_equal(np.from_dlpack(grad), row.gradient(sample)[1])


class Exporter:
    """Nothing but DLPack: __dlpack__ and __dlpack_device__ of a NumPy array."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class Elsewhere:
    """An array on a GPU, which its library does not hand out to the CPU."""

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("cannot export to the CPU")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


def test_bare_dlpack() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    for view in (x, x.T, x[::2, ::-1]):
        got = fastloss.mse_loss(Exporter(view), Exporter(np.zeros_like(view)))
        assert float(got) == pytest.approx(float((view**2).mean()), rel=3e-7)
    with pytest.raises(TypeError, match=r"Elsewhere.*CPU"):
        fastloss.mse_loss(Elsewhere(), x)


# ---- refused


class Unknown:
    """Not an array."""


def name_of_type(thing: Any) -> str:
    return type(thing).__name__


@pytest.mark.parametrize(
    "thing",
    [Unknown(), None, "text", {1.0}, {"a": 1.0}, b"ab", iter([1.0]), object, 1j, range(3)],
    ids=name_of_type,
)
def test_other_types_are_refused_by_name(thing: Any) -> None:
    y = np.zeros(3)
    for operands, name in (((thing, y), "input"), ((y, thing), "target")):
        with pytest.raises(TypeError, match=rf"{name}.*{type(thing).__name__}") as caught:
            fastloss.mse_loss(*operands)
        if isinstance(thing, Unknown):
            for accepted in ("NumPy", "torch", "list", "__dlpack__"):
                assert accepted in str(caught.value)


# ---- others' array types


ADAPTER = '''
import numpy as np
from fastloss.arrays import View

def view(array, differentiable=False):
    return View(array.memory, array.memory.dtype.name)

def wrap(data, dtype, like):
    return type(like)(data)
'''  # fmt: skip


def third_party(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """An array type in a module of its own, and beside it the module of its adapter."""
    package, adapter = types.ModuleType(name), types.ModuleType(f"{name}_adapter")

    class Lake:
        def __init__(self, memory: Any) -> None:
            self.memory = np.asarray(memory)

    Lake.__module__ = f"{name}.core"
    package.Lake = Lake  # type: ignore[attr-defined]
    exec(ADAPTER, adapter.__dict__)
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, adapter.__name__, adapter)
    return Lake


def test_an_entry_point_adds_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group fastloss.arrays: the root module's name, and the adapter to import at the first such array."""
    lake = third_party(monkeypatch, "lakes_by_entry_point")
    with pytest.raises(TypeError, match="Lake"):
        fastloss.mse_loss(lake([1.0]), lake([3.0]))
    point = importlib.metadata.EntryPoint("lakes_by_entry_point", "lakes_by_entry_point_adapter", "fastloss.arrays")
    original = importlib.metadata.entry_points

    def entry_points(**options: Any) -> Any:
        found = list(original(**options))
        return importlib.metadata.EntryPoints([*found, point] if options.get("group") == "fastloss.arrays" else found)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr("fastloss.dispatch.entry_points", entry_points)
    got = fastloss.mse_loss(lake([1.0, 2.0]), lake([3.0, 2.0]), reduction="none")
    assert isinstance(got, lake)
    assert got.memory.tolist() == [4, 0]
    derived = type("Pond", (lake,), {"__module__": "elsewhere"})
    assert isinstance(fastloss.mse_loss(derived([1.0]), lake([3.0])), lake)


def test_register_adds_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastloss.dispatch.ADAPTERS", dict(fastloss.dispatch.ADAPTERS))
    lake = third_party(monkeypatch, "lakes_by_register")
    fastloss.register("lakes_by_register", "lakes_by_register_adapter")
    value, grad = fastloss.value_and_grad(fastloss.mse_loss)(lake([1.0, 2.0]), lake([3.0, 2.0]))
    assert float(value.memory) == 2
    assert grad.memory.tolist() == [-2, 0]


# ---- what an import loads


def loaded(code: str) -> set[str]:
    """Root modules that a fresh interpreter has loaded after running code."""
    script = textwrap.dedent(code) + "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"numba", "llvmlite", "torch", "jax", "cupy", "dask", "ml_dtypes", "matplotlib", "pyarrow", "sklearn"}


def test_import_loads_no_array_library_but_numpy() -> None:
    assert not loaded("import fastloss; fastloss.__version__; dir(fastloss)") & HEAVY


def test_a_call_loads_only_what_it_is_given() -> None:
    code = "import fastloss, numpy; fastloss.mse_loss(numpy.ones(3), numpy.zeros(3))"
    assert not loaded(code) & (HEAVY - {"numba", "llvmlite"})
    assert "ml_dtypes" not in loaded(code.replace("numpy.ones(3)", "[1.0, 2, 3]"))
