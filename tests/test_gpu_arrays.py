"""How arrays on GPUs are read: Numba's in its CUDA simulator, the other libraries' by stand-ins, for there is no GPU
here. A stand-in has what the adapter asks the library's own arrays for."""

import ctypes
import importlib
import math
import os
import subprocess
import sys
import textwrap
import types
import weakref
from collections.abc import Iterator
from typing import Any

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
import torch
from numba import config, cuda, typed

import fastloss
from fastloss import dispatch, runtime
from fastloss.arrays import DeviceMemory, View, cuda_interface, dlpack, gpu, numba_cuda
from fastloss.arrays import torch as torch_adapter
from table import DTYPES, ROWS, Rng, Row, name_of

NAMES = [*DTYPES, "int8", "uint16", "int32", "int64", "bool"]


def numpy_dtype(name: str) -> Any:
    return DTYPES.get(name) or np.dtype(name)


def layouts(dtype: Any) -> list[np.ndarray[Any, Any]]:
    """C and Fortran order, steps, backwards, an offset, broadcast, no dimension, no element."""
    x = np.arange(24).reshape(4, 6).astype(dtype)
    return [x, x.T, x[::2, 1::2], x[::-1, ::-1], x[2:], np.broadcast_to(x[1], (3, 6)), x[1, 2].reshape(()), x[:0]]


def at(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def check_memory(view: View, host: np.ndarray[Any, Any], name: str, device: int) -> DeviceMemory:
    """A view describes the same elements as the NumPy array that the stand-in was made of."""
    memory = view.data
    assert isinstance(memory, DeviceMemory)
    assert (view.dtype, view.device, view.weak) == (name, device, False)
    assert (memory.address, memory.itemsize) == (at(host), host.itemsize)
    assert type(memory.shape) is type(memory.strides) is tuple
    assert memory.shape == view.shape == host.shape
    if host.size:
        assert memory.strides == host.strides
    return memory


# ---- Numba, in its simulator


@pytest.mark.parametrize("name", NAMES)
def test_numba_arrays(name: str) -> None:
    assert config.ENABLE_CUDASIM, "this file needs NUMBA_ENABLE_CUDASIM=1"
    whole = cuda.to_device(np.arange(24).reshape(4, 6).astype(numpy_dtype(name)))
    pieces = [whole, whole.T, whole[::2, 1::2], whole[::-1, ::-1], whole[2:], whole[1], whole[:0]]
    for array in pieces:
        view = dispatch.view(array, "input")
        memory = check_memory(view, array._ary, name, 0)
        assert memory.owner is array
        assert memory.writable
        assert memory.stream is None
        assert dispatch.adapter_of(array).address(array) == memory.address
    scalar = cuda.device_array((), numpy_dtype(name))
    check_memory(dispatch.view(scalar, "input"), scalar._ary, name, 0)


def test_numba_arrays_that_cannot_be_written() -> None:
    array = cuda.to_device(np.ones(3))
    array._ary.flags.writeable = False
    assert not dispatch.view(array, "input").writable


def test_numba_arrays_that_cannot_be_read() -> None:
    with pytest.raises(TypeError, match=r"input: .*byte order >f4.*<f4"):
        dispatch.view(cuda.to_device(np.ones(3, ">f4")), "input")
    with pytest.raises(TypeError, match=r"target: a List is not an array"):
        dispatch.view(typed.List([1.0, 2.0]), "target")
    assert dispatch.view(cuda.to_device(np.zeros(2, [("a", "f4")])), "input").dtype == "void32"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5, 4)])
def test_new_numba_arrays(name: str, shape: tuple[int, ...]) -> None:
    like = cuda.to_device(np.ones(3))
    made = dispatch.adapter_of(like).empty(shape, name, like)
    assert type(made) is type(like)
    view = dispatch.view(made, "out")
    assert (view.dtype, view.shape, view.device) == (name, shape, 0)
    if math.prod(shape):
        assert view.data.strides == gpu.packed(shape, view.data.itemsize)


def test_keys_of_numba_arrays() -> None:
    """Equal for arrays that are read alike, wherever they lie."""
    x = np.ones((4, 4), np.float32)
    key = numba_cuda.key
    assert key(cuda.to_device(x)) == key(cuda.to_device(x + 1))
    other = [x[:2], x.astype(np.int32), x.reshape(2, 8)]
    keys = [key(cuda.to_device(array)) for array in (x, *other)] + [key(cuda.to_device(x)[:, ::2])]
    assert len({*keys}) == len(keys)
    assert key(typed.List([1.0])) is None


def test_the_simulator_has_one_stream() -> None:
    array = cuda.device_array(3, np.float32, stream=cuda.stream())
    assert numba_cuda.stream(array) == 0
    assert dispatch.view(array, "input").data.stream is None
    assert numba_cuda.empty((2,), "float32", array).stream is array.stream


REAL = """
    import numpy as np
    from types import SimpleNamespace
    from numba.cuda.cudadrv import driver
    from numba.cuda.cudadrv.devicearray import DeviceNDArray, ManagedNDArray
    from fastloss import dispatch

    context = SimpleNamespace(device=SimpleNamespace(id=3))  # a driver is needed to make one
    pointer = driver.MemoryPointer(context, driver.binding.CUdeviceptr(4096), 24)
    array = DeviceNDArray((2, 3), (12, 4), np.float32, gpu_data=pointer)
    adapter = dispatch.adapter_of(array)
    view = dispatch.view(array, "input")
    assert (view.dtype, view.device, view.writable) == ("float32", 3, True)
    assert (view.data.address, view.data.shape, view.data.strides) == (4096, (2, 3), (12, 4))
    assert view.data.stream is None and adapter.stream(array) == 0
    assert adapter.address(array) == 4096 and adapter.key(array)[-1] == 3

    back = array._do_getitem((slice(None, None, -1), slice(1, None)))  # array[...] asks the driver first
    memory = dispatch.view(back, "input").data
    assert (memory.address, memory.strides, memory.device) == (4096 + 12 + 4, (-12, 4), 3)

    for handle in (1, 7):
        bound = array.bind(driver.Stream(driver.binding.CUstream(handle)))
        assert adapter.stream(bound) == dispatch.view(bound, "input").data.stream == handle
        assert adapter.key(bound) is None
    assert adapter.stream(array.bind(driver.Stream(driver.binding.CUstream(0)))) == 0

    nothing = array.bind()
    nothing.gpu_data = driver.MemoryPointer(context, driver.binding.CUdeviceptr(0), 0)
    assert dispatch.view(nothing, "input").data.address == 0

    managed = np.zeros(6, np.float32).view(ManagedNDArray)
    managed.device_setup(pointer)
    assert dispatch.view(managed, "input").device == 3
    managed.flags.writeable = False
    assert not dispatch.view(managed, "input").writable
    assert adapter.key(managed[1:]) is None
    try:
        dispatch.view(managed[1:], "input")
    except TypeError as error:
        assert "numpy.asarray" in str(error)
        assert dispatch.view(np.asarray(managed[1:]), "input").device is None
    else:
        raise AssertionError
"""


def run(code: str) -> str:
    """What a fresh interpreter without the simulator prints."""
    clean = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_numbas_own_device_arrays() -> None:
    """The classes that a GPU's memory has in Numba, over an address that nobody reads."""
    run(REAL)


# ---- torch


class CudaTensor(torch.Tensor):
    """A CPU tensor that says of itself what a tensor on cuda:1 says."""

    device = torch.device("cuda:1")
    is_cuda, is_cpu = True, False

    def get_device(self) -> int:
        return 1


def on_cuda(tensor: torch.Tensor) -> Any:
    return tensor.as_subclass(CudaTensor)


@pytest.mark.parametrize("name", NAMES)
def test_cuda_tensors(name: str) -> None:
    x = torch.arange(24).reshape(4, 6).to(getattr(torch, name))
    for tensor in (x, x.t(), x[::2, 1::2], x[2:], x[1].expand(3, 6), x[1, 2], x[:0]):
        array = on_cuda(tensor)
        view = torch_adapter.view(array)
        memory = view.data
        assert (view.dtype, view.shape, view.device) == (name, tuple(tensor.shape), 1)
        assert type(memory.shape) is tuple
        assert memory.address == tensor.data_ptr() == torch_adapter.address(array)
        assert memory.strides == tuple(step * tensor.element_size() for step in tensor.stride())
        assert (memory.itemsize, memory.writable, memory.stream) == (tensor.element_size(), True, None)


def test_rules_of_cpu_tensors_hold_for_cuda_tensors() -> None:
    x = on_cuda(torch.ones(3)).requires_grad_()
    with pytest.raises(TypeError, match="value_and_grad"):
        torch_adapter.view(x)
    assert torch_adapter.view(x, differentiable=True).device == 1
    assert torch_adapter.view(x.detach()).device == 1
    with torch.no_grad():
        assert torch_adapter.view(x).device == 1
    sparse = types.SimpleNamespace(device=x.device, layout=torch.sparse_coo)
    with pytest.raises(TypeError, match=r"sparse_coo.*to_dense"):
        torch_adapter.view(sparse)


@pytest.mark.parametrize("move", [torch.Tensor.cpu, on_cuda], ids=["cpu", "cuda"])
def test_pending_signs(move: Any) -> None:
    """Resolved into a copy, into which nothing may be written."""
    negative = torch.tensor([1j, 2j]).conj().imag
    view = torch_adapter.view(move(negative))
    memory = view.data
    values = memory.tolist() if isinstance(memory, np.ndarray) else memory.owner.tolist()
    assert values == [-1, -2]
    assert not view.writable
    with pytest.raises(ValueError, match="out is read-only"):
        fastloss.mse_loss(torch.ones(2), torch.zeros(2), reduction="none", out=negative)


@pytest.mark.parametrize("device", ["meta", "mps:0", "xpu:1"])
def test_tensors_elsewhere(device: str) -> None:
    kind = type("Elsewhere", (torch.Tensor,), {"device": torch.device(device)})
    with pytest.raises(TypeError, match=rf"target: .*{device}.*CPU.*NVIDIA GPUs.*\.cpu\(\)"):
        dispatch.view(torch.ones(3).as_subclass(kind), "target")


def test_tensors_on_amd_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls them cuda."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(TypeError, match="AMD"):
        torch_adapter.view(on_cuda(torch.ones(3)))
    assert torch_adapter.view(torch.ones(3)).device is None


def test_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `like` is; on the stream that is current there."""
    for name in NAMES:
        made = torch_adapter.empty((2, 3), name, torch.ones(1))
        assert (made.dtype, made.shape, made.device.type) == (getattr(torch, name), (2, 3), "cpu")
    like = on_cuda(torch.ones(3))
    asked: list[Any] = []
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: asked.append(options["device"]))
    torch_adapter.empty((2,), "bfloat16", like)
    streams = {like.device: types.SimpleNamespace(cuda_stream=99)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    assert torch_adapter.stream(like) == 99
    assert asked == [like.device]


def test_keys_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's and a GPU's are told apart, as are two GPUs."""
    x = torch.ones(4, 4)
    cpu = torch_adapter.key(x)
    assert torch_adapter.key(torch.ones(3, device="meta")) is None
    monkeypatch.setattr(torch_adapter.torch, "Tensor", CudaTensor)  # only the class itself is known to hold no surprise
    first = torch_adapter.key(on_cuda(x))
    assert first == torch_adapter.key(on_cuda(x + 1))
    monkeypatch.setattr(CudaTensor, "get_device", lambda self: 2)
    keys = [cpu, first, torch_adapter.key(on_cuda(x)), torch_adapter.key(on_cuda(x.t()[::2]))]
    assert None not in keys
    assert len({*keys}) == 4
    assert torch_adapter.key(on_cuda(x).requires_grad_()) is None


# ---- CuPy


class CupyArray:
    """What a cupy.ndarray has, over NumPy's memory."""

    def __init__(self, host: np.ndarray[Any, Any]) -> None:
        self.data = types.SimpleNamespace(ptr=at(host))
        self.device = types.SimpleNamespace(id=1)
        self.dtype, self.shape, self.strides, self.itemsize = host.dtype, host.shape, host.strides, host.itemsize


CupyArray.__module__, CupyArray.__name__ = "cupy", "ndarray"


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for the module, and the adapter that imported it."""
    chosen: list[int] = []

    class Device:
        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> None:
            chosen.append(self.number)

        def __exit__(self, *exception: object) -> None:
            chosen.append(-1)

    module: Any = types.ModuleType("cupy")
    module.ndarray, module.chosen = CupyArray, chosen
    module.cuda = types.SimpleNamespace(
        Device=Device,
        runtime=types.SimpleNamespace(is_hip=False),
        get_current_stream=lambda number: types.SimpleNamespace(ptr=70 + number),
    )
    module.empty = lambda shape, dtype: (tuple(chosen), shape, dtype)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.delitem(sys.modules, "fastloss.arrays.cupy", raising=False)
    yield module
    sys.modules.pop("fastloss.arrays.cupy", None)
    dispatch._by_type.pop(CupyArray, None)


@pytest.mark.parametrize("name", NAMES)
def test_cupy_arrays(name: str, cupy: Any) -> None:
    for host in layouts(numpy_dtype(name)):
        array = CupyArray(host)
        adapter = dispatch.adapter_of(array)
        assert adapter.__name__ == "fastloss.arrays.cupy"
        memory = check_memory(dispatch.view(array, "input"), host, name, 1)
        assert (memory.owner, memory.writable, memory.stream) == (array, True, None)
        assert adapter.address(array) == at(host)
        assert adapter.stream(array) == 71
        assert adapter.key(array)[1:] == (host.dtype, host.shape, host.strides, 1)
    assert adapter.empty((2, 3), name, array) == ((1,), (2, 3), numpy_dtype(name))
    assert cupy.chosen == [1, -1]


def test_cupy_arrays_that_cannot_be_read(cupy: Any) -> None:
    with pytest.raises(TypeError, match=r"byte order >f8"):
        dispatch.view(CupyArray(np.ones(3, ">f8")), "input")
    other = type("csr_matrix", (), {"__module__": "cupy.sparse"})
    with pytest.raises(TypeError, match=r"weight: .*csr_matrix"):
        dispatch.view(other(), "weight")
    derived = type("derived", (CupyArray,), {})
    assert dispatch.adapter_of(derived(np.ones(3))).key(derived(np.ones(3))) is None
    cupy.cuda.runtime.is_hip = True
    with pytest.raises(TypeError, match="AMD"):
        dispatch.view(CupyArray(np.ones(3)), "input")


def test_cupys_own_arrays() -> None:
    """Where CuPy is installed: its class, over memory that it takes to be on GPU 1."""
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    for name in NAMES:
        host = np.arange(24).astype(numpy_dtype(name))
        memory = cupy.cuda.UnownedMemory(at(host), host.nbytes, host, 1)
        whole = cupy.ndarray((4, 6), host.dtype, cupy.cuda.MemoryPointer(memory, 0))
        for array, same in ((whole, host.reshape(4, 6)), (whole[::-1, 1::2], host.reshape(4, 6)[::-1, 1::2])):
            check_memory(dispatch.view(array, "input"), same, name, 1)
            assert dispatch.adapter_of(array).key(array)[-1] == 1


# ---- __cuda_array_interface__


class Interface:
    """A NumPy array that is described as one on a GPU; keywords replace the description's entries."""

    def __init__(self, host: np.ndarray[Any, Any], **entries: Any) -> None:
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": host.shape,
            "strides": None if host.flags.c_contiguous else host.strides,
            "typestr": host.dtype.str,
            "data": (at(host), False),
            "version": 3,
            "stream": None,
        } | entries


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bfloat16"])
def test_cuda_array_interface(name: str) -> None:
    for host in layouts(np.dtype(name)):
        array = Interface(host)
        assert dispatch.adapter_of(array) is cuda_interface
        memory = check_memory(dispatch.view(array, "input"), host, name, 0)
        assert (memory.owner, memory.writable, memory.stream) == (array, True, None)
        assert cuda_interface.stream(array) == gpu.LEGACY_STREAM
        made = cuda_interface.empty((2, 3), name, array)
        assert type(made) is type(cuda.device_array(1))
        assert (made.shape, made.dtype) == ((2, 3), host.dtype)


def test_entries_of_the_interface() -> None:
    host = np.ones(3, np.float32)
    for stream in (1, 2, 4711):
        array = Interface(host, stream=stream)
        assert dispatch.view(array, "input").data.stream == cuda_interface.stream(array) == stream
    second = Interface(host, version=2)
    del second.__cuda_array_interface__["stream"], second.__cuda_array_interface__["strides"]
    memory = check_memory(dispatch.view(second, "input"), host, "float32", 0)
    assert memory.stream is None
    assert not dispatch.view(Interface(host, data=(at(host), True)), "input").writable
    assert dispatch.view(Interface(host[:0], data=(0, False)), "input").data.address == 0
    for array, words in (
        (Interface(host, mask=Interface(host)), "weight: .*mask"),
        (Interface(host.astype(">f4")), r"weight: .*byte order >f4"),
        (Interface(host, typestr="<V2"), r"weight: .*'<V2'.*bfloat16.*DLPack"),
    ):
        with pytest.raises(TypeError, match=words):
            dispatch.view(array, "weight")


def test_the_gpu_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the driver, of which there is none here."""
    driver = pytest.importorskip("cuda.bindings.driver")
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    success, failure = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_INVALID_VALUE
    monkeypatch.setattr(numba_cuda, "SIMULATED", False)
    monkeypatch.setattr(
        driver, "cuPointerGetAttribute", lambda *asked: (success, 3) if asked[0] == attribute else (failure, None)
    )
    assert dispatch.view(Interface(np.ones(3)), "input").device == 3
    monkeypatch.setattr(driver, "cuPointerGetAttribute", lambda *asked: (failure, None))
    with pytest.raises(TypeError, match=r"input: .*0x10\b.*INVALID_VALUE"):
        dispatch.view(Interface(np.ones(3), data=(16, False)), "input")


# ---- DLPack

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class Exported:
    """A CPU tensor whose DLPack capsules say that it is on another device."""

    def __init__(self, tensor: torch.Tensor, kind: int = 2, number: int = 1, offset: int = 0) -> None:
        self.tensor, self.device_, self.offset = tensor, (kind, number), offset
        self.asked: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.asked.append(stream)
        capsule = self.tensor.__dlpack__()
        start = _pointer(capsule, b"dltensor")  # data, device type, number, ndim, dtype, shape, strides, byte_offset
        ctypes.c_int32.from_address(start + 8).value, ctypes.c_int32.from_address(start + 12).value = self.device_
        ctypes.c_uint64.from_address(start + 40).value += self.offset
        return capsule


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [2, 13], ids=["cuda", "managed"])
def test_dlpack_on_a_gpu(name: str, kind: int) -> None:
    x = torch.arange(24).reshape(4, 6).to(getattr(torch, name))
    for tensor in (x, x.t(), x[::2, 1::2], x[2:], x[1].expand(3, 6), x[1, 2]):
        array = Exported(tensor, kind)
        view = dispatch.view(array, "input")
        memory, size = view.data, tensor.element_size()
        assert (view.dtype, view.shape, view.device) == (name, tuple(tensor.shape), 1)
        assert (memory.address, memory.itemsize, memory.writable) == (tensor.data_ptr(), size, True)
        assert array.asked == [gpu.LEGACY_STREAM] == [memory.stream] == [dlpack.stream(array)]
        steps = zip(tensor.shape, tensor.stride(), memory.strides, strict=True)
        assert all(step * size == stride for extent, step, stride in steps if extent > 1)


def test_dlpacks_byte_offset() -> None:
    tensor = torch.arange(6.0)
    assert dispatch.view(Exported(tensor[:4], offset=8), "input").data.address == tensor.data_ptr() + 8


def test_a_view_keeps_the_memory() -> None:
    array = Exported(torch.ones(3))
    alive = weakref.ref(array)
    view = dispatch.view(array, "input")
    del array
    assert alive() is not None
    del view
    assert alive() is None


@pytest.mark.parametrize(("kind", "words"), [(10, "AMD GPU"), (7, "Vulkan"), (8, "Metal"), (99, "type 99")])
def test_dlpack_elsewhere(kind: int, words: str) -> None:
    with pytest.raises(TypeError, match=rf"input: Exported is on .*{words}.*NVIDIA GPUs"):
        dispatch.view(Exported(torch.ones(3), kind), "input")


def test_dlpack_that_is_refused() -> None:
    with pytest.raises(TypeError, match=r"input: Exported cannot be read through DLPack: .*dtype"):
        dispatch.view(Exported(torch.ones(3).to(torch.float8_e4m3fn)), "input")
    assert dispatch.view(Exported(torch.ones(3, dtype=torch.complex64)), "input").dtype == "complex64"


def test_new_arrays_of_dlpack_libraries() -> None:
    """In the array's own library where it follows the array API, else Numba's."""
    x = array_api_strict.ones(3)
    made = dlpack.empty((2, 3), "float32", x)
    assert type(made) is type(x)
    assert (made.shape, made.dtype) == ((2, 3), array_api_strict.float32)
    with pytest.raises(TypeError, match=r"array_api_strict has no bfloat16.*another dtype"):
        dlpack.empty((2,), "bfloat16", x)
    plain = dlpack.empty((2,), "bfloat16", Exported(torch.ones(3), number=0))
    assert type(plain) is type(cuda.device_array(1))
    assert plain.dtype == ml_dtypes.bfloat16


class Both(Interface, Exported):
    """Speaks both protocols."""

    def __init__(self, tensor: torch.Tensor, typestr: str) -> None:
        Exported.__init__(self, tensor)
        Interface.__init__(self, np.zeros(tensor.shape), typestr=typestr)


def test_two_protocols() -> None:
    """The CUDA array interface comes first, but for bfloat16, and for arrays on the CPU of the same library."""
    both = Both(torch.ones(3, dtype=torch.float64), "<f8")
    assert dispatch.view(both, "input").data.address == at(both.host)
    half = Both(torch.ones(3, dtype=torch.bfloat16), "<V2")
    view = dispatch.view(half, "input")
    assert (view.dtype, view.data.address) == ("bfloat16", half.tensor.data_ptr())
    cpu = Both(torch.ones(3), "<f4")
    cpu.device_ = (1, 0)
    del cpu.__cuda_array_interface__
    view = dispatch.view(cpu, "input")
    assert (view.device, view.data.tolist()) == (None, [1, 1, 1])
    assert fastloss.mse_loss(cpu, cpu) == 0


# ---- JAX


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax")


@pytest.mark.parametrize("row", ROWS, ids=name_of)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_jax_arrays_on_the_cpu(row: Row, dtype: str, jax: Any, rng: Rng) -> None:
    """NumPy's values, as JAX arrays."""
    sample = row.draw(rng, (24, 10), DTYPES[dtype])
    x, y = jax.numpy.asarray(sample.input), jax.numpy.asarray(sample.target)
    target = np.asarray(y)  # int32 where it was int64
    for reduction in ("none", "mean"):
        got = row.function(x, y, reduction=reduction)
        assert isinstance(got, jax.Array)
        assert got.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(np.asarray(got), row.function(sample.input, target, reduction=reduction))
    value, grad = fastloss.value_and_grad(row.function)(x, y)
    expected = fastloss.value_and_grad(row.function)(sample.input, target)
    assert isinstance(value, jax.Array)
    assert isinstance(grad, jax.Array)
    np.testing.assert_array_equal(np.asarray(grad), expected[1])


def test_jax_arrays_are_not_copied_nor_written(jax: Any) -> None:
    x = jax.numpy.arange(12, dtype=jax.numpy.bfloat16).reshape(3, 4)
    view = dispatch.view(x, "input")
    assert (view.dtype, at(view.data)) == ("bfloat16", x.unsafe_buffer_pointer())
    with pytest.raises(ValueError, match="out is read-only"):
        fastloss.mse_loss(x, x, reduction="none", out=x)


def test_jax_results_of_64_bits(jax: Any) -> None:
    """As asked for, though JAX by itself would make float32 of them."""
    x = jax.numpy.ones(3)
    assert fastloss.mse_loss(x, x, dtype="float64").dtype == np.float64
    assert dispatch.adapter_of(x).empty((2,), "int64", x).dtype == np.int64


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_jax_tracers(transform: str, jax: Any) -> None:
    """What is no loss cannot read them."""
    with pytest.raises(TypeError, match=r"traced by JAX.*outside jax.jit"):
        getattr(jax, transform)(lambda a: fastloss.Meter("mse_loss").update(a, a))(jax.numpy.ones(3))


class JaxArray(Exported):
    """What an array of JAX's on other devices shows of itself."""

    def __init__(self, *platforms: str, kind: int = 2) -> None:
        super().__init__(torch.ones(3), kind)
        self.platforms = platforms

    def devices(self) -> set[Any]:
        return {type("Device", (), {"platform": name})() for name in self.platforms}


def test_jax_arrays_on_gpus(jax: Any) -> None:
    from fastloss.arrays import jax as adapter

    array = JaxArray("gpu")
    view = adapter.view(array)
    memory = view.data
    assert (view.device, memory.address, memory.writable) == (1, array.tensor.data_ptr(), False)
    assert array.asked == [1] == [memory.stream] == [adapter.stream(array)]
    assert adapter.SYNCHRONISES
    for other, words in (
        (JaxArray("gpu", kind=10), "AMD"),
        (JaxArray("tpu"), "on a tpu"),
        (JaxArray("gpu", "gpu"), "2 devices.*addressable_shards"),
        (jax.ShapeDtypeStruct((2,), np.float32), "ShapeDtypeStruct is not an array"),
    ):
        with pytest.raises(TypeError, match=words):
            adapter.view(other)


def test_new_jax_arrays(jax: Any) -> None:
    like = jax.numpy.ones(3)
    adapter = dispatch.adapter_of(like)
    for name in NAMES:
        made = adapter.empty((2, 3), name, like)
        assert (made.dtype, made.shape, made.devices()) == (numpy_dtype(name), (2, 3), like.devices())
    first, second = (adapter.empty((), "float32", like).unsafe_buffer_pointer() for _ in range(2))
    assert first != second


# ---- which adapter, which device


def test_adapters_by_type() -> None:
    """The root of the module that a type is defined in, along its bases."""
    modules = {"cupy": "cupy", "jax._src.core": "jax", "jaxlib._jax": "jax", "numba.cuda.cudadrv": "numba_cuda"}
    for module, adapter in modules.items():
        kind = type("Array", (), {"__module__": module})
        derived = type("Derived", (kind,), {"__module__": "elsewhere", "__dlpack__": None})
        for one in (kind, derived):
            assert dispatch._search(one()) == f"fastloss.arrays.{adapter}"


def test_what_is_said_of_other_types() -> None:
    with pytest.raises(TypeError, match=r"target: builtins.object") as caught:
        dispatch.view(object(), "target")
    for accepted in ("NumPy", "CuPy", "JAX", "Numba", "torch", "list", "__cuda_array_interface__", "__dlpack__"):
        assert accepted in str(caught.value)


def on(device: int | None) -> View:
    if device is None:
        return View(np.ones(3), "float64")
    return View(DeviceMemory(16, (3,), (8,), 8, device, None), "float64")


def test_one_device() -> None:
    assert dispatch.one_device({}) is None
    assert dispatch.one_device({"input": on(None), "target": on(None)}) is None
    assert dispatch.one_device({"input": on(0), "target": on(0), "weight": on(0)}) == 0
    assert dispatch.one_device({"input": on(1)}) == 1
    with pytest.raises(TypeError, match=r"input on GPU 0, target on the CPU, weight on GPU 1; move them to one"):
        dispatch.one_device({"input": on(0), "target": on(None), "weight": on(1)})
    number = dispatch.view(3.0, "target")
    assert number.weak
    with pytest.raises(TypeError, match=r"input on GPU 0, target on the CPU"):
        dispatch.one_device({"input": on(0), "target": number})


@pytest.mark.parametrize("array", ["numpy.ones(3)", "torch.ones(3)", "[1.0, 2.0]"])
def test_work_on_the_cpu_imports_nothing_for_gpus(array: str) -> None:
    code = f"""
        import sys, fastloss, numpy
        if {array!r}.startswith("torch"):
            import torch
        before = set(sys.modules)
        fastloss.mse_loss({array}, {array})
        print(*(set(sys.modules) - before))
    """
    loaded = set(run(code).split())
    assert "fastloss.kernels.drivers" in loaded
    assert not {name for name in loaded if name.partition(".")[0] in {"cuda", "cupy", "jax", "numba_cuda"}}
    assert not {name for name in loaded if name.startswith("numba.cuda")}


def test_kernels_for_gpus_need_numba_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.require_cuda()
    runtime.require_cuda.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        for call in (runtime.require_cuda, lambda: dispatch.view(Exported(torch.ones(3)), "input")):
            with pytest.raises(ImportError, match=r'numba-cuda.*pip install "fastloss\[cuda12\]".*fastloss\[cuda13\]'):
                call()
    runtime.require_cuda()
    assert run("import sys, fastloss.runtime as r; r.require_cuda(); print('numba_cuda' in sys.modules)") == "False\n"
