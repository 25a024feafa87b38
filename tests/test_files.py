"""The readers of `fastloss evaluate`: every format gives the rows that were written, or one line why not."""

import gc
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
import safetensors.numpy
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastloss.files import InputError, open_reader

Array = NDArray[Any]
FLOATS = ("float16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def read(spec: str | Path, step: int | None = None) -> Array:
    """The whole array, in chunks of `step` rows; copied, for a chunk is good until the next read."""
    reader = open_reader(str(spec))
    try:
        step = step or max(reader.rows, 1)
        starts = range(0, max(reader.rows, 1), step)
        chunks = [reader.read(min(step, reader.rows - start)).copy() for start in starts]
        array = np.concatenate(chunks).reshape(reader.shape)
        assert array.dtype == reader.dtype.newbyteorder("=")  # which concatenate makes of it
        return array
    finally:
        reader.close()


def equal(got: Array, expected: Array) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.tobytes() == expected.tobytes()


# ---- what is written is read


def arrow_column(array: Array, fixed: bool = True) -> pa.Array:
    if array.ndim == 1:
        return pa.array(array)
    rows, width = array.shape
    values = pa.array(array.ravel())
    if fixed:
        return pa.FixedSizeListArray.from_arrays(values, width)
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype="int32") * width), values)


def write_npy(path: Path, array: Array) -> str:
    np.save(path / "a.npy", array)
    return f"{path}/a.npy"


def write_npy_version_2(path: Path, array: Array) -> str:
    with open(path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    return f"{path}/a.npy"


def write_npz(path: Path, array: Array) -> str:
    np.savez(path / "a.npz", other=np.zeros(3), rows=array)
    return f"{path}/a.npz:rows"


def write_npz_deflated(path: Path, array: Array) -> str:
    np.savez_compressed(path / "a.npz", array)
    return f"{path}/a.npz"


def write_safetensors(path: Path, array: Array) -> str:
    # an odd number of bytes in front puts the rows off any alignment
    arrays = {"a": np.zeros(3, "u1"), "rows": array.copy(order="C")}
    safetensors.numpy.save_file(arrays, path / "a.safetensors")
    return f"{path}/a.safetensors:rows"


def write_parquet(path: Path, array: Array) -> str:
    table = pa.table({"rows": arrow_column(array), "other": np.zeros(len(array))})
    pyarrow.parquet.write_table(table, path / "a.parquet", row_group_size=7)
    return f"{path}/a.parquet:rows"


def write_parquet_lists(path: Path, array: Array) -> str:
    table = pa.table({"rows": arrow_column(array, fixed=False)})
    pyarrow.parquet.write_table(table, path / "a.parquet", compression="zstd")
    return f"{path}/a.parquet"


def write_arrow(path: Path, array: Array) -> str:
    table = pa.table({"other": np.zeros(len(array)), "rows": arrow_column(array)})
    with pyarrow.ipc.new_file(path / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=5)
    return f"{path}/a.arrow:rows"


def write_feather(path: Path, array: Array) -> str:
    pyarrow.feather.write_feather(pa.table({"rows": arrow_column(array, fixed=False)}), path / "a.feather")
    return f"{path}/a.feather"


def write_zarr(path: Path, array: Array) -> str:
    zarr.create_array(path / "a.zarr", data=array, chunks=(min(4, max(1, len(array))), *array.shape[1:]))
    return f"{path}/a.zarr"


def write_zarr_group(path: Path, array: Array) -> str:
    zarr.open_group(path / "a.zarr", mode="w").create_array("rows", data=array)
    return f"{path}/a.zarr:rows"


Writer = Callable[[Path, Array], str]
ARROW = (write_parquet, write_parquet_lists, write_arrow, write_feather)
ZARR = (write_zarr, write_zarr_group)
NUMPY = (write_npy, write_npy_version_2, write_npz, write_npz_deflated)
ONE_OF_EACH = (write_npy, write_npz, write_safetensors, write_parquet, write_arrow, write_zarr)
ALL = (*NUMPY, write_safetensors, *ARROW, *ZARR)


@pytest.mark.parametrize("step", [1, 3, None])
@pytest.mark.parametrize("shape", [(11,), (11, 3)])
@pytest.mark.parametrize("write", ALL)
def test_round_trip(
    write: Writer, shape: tuple[int, ...], step: int | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    array = rng.standard_normal(shape).astype("float32")
    equal(read(write(tmp_path, array), step), array)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, "bool"])
@pytest.mark.parametrize("write", ONE_OF_EACH)
def test_dtypes(write: Writer, dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 2 if dtype == "bool" else 100, (9, 4)).astype(dtype)
    equal(read(write(tmp_path, array), 2), array)


@pytest.mark.parametrize("write", [write_npy, write_npz, write_npz_deflated, write_safetensors])
def test_bfloat16(write: Writer, tmp_path: Path, rng: np.random.Generator) -> None:
    """A .npy says 2 raw bytes where it holds bfloat16."""
    array = rng.standard_normal((9, 4)).astype(ml_dtypes.bfloat16)
    equal(read(write(tmp_path, array), 2), array)


@pytest.mark.parametrize("step", [1, 4, None])
@pytest.mark.parametrize("shape", [(9, 5), (9, 5, 2, 3)])
@pytest.mark.parametrize("write", NUMPY)
def test_fortran_order(
    write: Writer, shape: tuple[int, ...], step: int | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    array = np.asfortranarray(rng.standard_normal(shape))
    equal(read(write(tmp_path, array), step), array)


@pytest.mark.parametrize("write", [write_npy, write_npz, write_npz_deflated])
def test_big_endian(write: Writer, tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.standard_normal((9, 4))
    got = read(write(tmp_path, array.astype(">f8")), 2)
    assert got.tolist() == array.tolist()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("write", ALL)
def test_empty(write: Writer, shape: tuple[int, ...], tmp_path: Path) -> None:
    if write in ARROW and shape == (3, 0):
        shape = (0,)  # pyarrow writes no lists of length 0
    got = read(write(tmp_path, np.zeros(shape, "float32")))
    if write in (write_parquet_lists, write_feather) and len(shape) == 2:
        shape = (0, 0)  # an empty column of lists of any length does not say which
    assert got.shape == shape


@pytest.mark.parametrize("write", [*NUMPY, write_safetensors])
def test_single_number(write: Writer, tmp_path: Path) -> None:
    equal(read(write(tmp_path, np.array(2.5))), np.array(2.5))


def test_blocks_longer_than_a_chunk(tmp_path: Path, rng: np.random.Generator) -> None:
    """More than one block of 8 MB, cut at other places than the chunks."""
    array = rng.integers(0, 9, (1_200_000, 9), dtype="uint8")
    for write in (write_npz_deflated, write_parquet_lists):
        equal(read(write(tmp_path, array), 70_001), array)


def test_a_file_may_have_a_colon_in_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz:b.npz", np.arange(3.0))
    assert read(tmp_path / "a.npz:b.npz").tolist() == [0, 1, 2]


# ---- what cannot be read is one line


def npy(path: Path, array: Array) -> bytes:
    return Path(write_npy(path, array)).read_bytes()


def save(path: Path, name: str, content: bytes) -> str:
    (path / name).write_bytes(content)
    return f"{path}/{name}"


def pickled(path: Path) -> str:
    np.save(path / "a.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    return f"{path}/a.npy"


def pickled_in_npz(path: Path) -> str:
    np.savez(path / "a.npz", np.array([{}, None], dtype=object), allow_pickle=True)
    return f"{path}/a.npz"


def npz_flipped(path: Path, write: Writer, at: int) -> str:
    spec = write(path, np.arange(4000, dtype="int64").reshape(-1, 4))
    content = bytearray((path / "a.npz").read_bytes())
    content[at] ^= 0xFF
    save(path, "a.npz", bytes(content))
    return spec


def npz_of_other_things(path: Path) -> str:
    with zipfile.ZipFile(path / "a.npz", "w") as archive:
        archive.writestr("notes.txt", "no arrays")
    return f"{path}/a.npz"


def npz_short_member(path: Path) -> str:
    with zipfile.ZipFile(path / "a.npz", "w") as archive:
        archive.writestr("rows.npy", npy(path, np.zeros((10, 4)))[:-40])
    return f"{path}/a.npz:rows"


def tensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return save(path, "a.safetensors", (length or len(text)).to_bytes(8, "little") + text + data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def parquet(path: Path, **columns: Any) -> str:
    pyarrow.parquet.write_table(pa.table(columns), path / "a.parquet", row_group_size=4)
    return f"{path}/a.parquet"


def cut(spec: str, share: float) -> str:
    path = Path(spec.partition(":")[0] if ":" in spec else spec)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return spec


def zarr_flipped(path: Path) -> str:
    spec = write_zarr(path, np.arange(64.0).reshape(16, 4))
    save(path / "a.zarr" / "c" / "2", "0", b"no chunk of anything")
    return spec


BROKEN: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda p: f"{p}/none.npy", "No such file"),
    "directory": (lambda p: str(p), "unknown kind of file"),
    "directory.npy": (lambda p: (p / "a.npy").mkdir() or f"{p}/a.npy", "is a directory"),
    "device": (lambda p: (p / "a.npy").symlink_to("/dev/null") or f"{p}/a.npy", "not a regular file"),
    "other suffix": (lambda p: save(p, "a.txt", b"1 2 3"), r"unknown kind of file.*\.npy, \.npz"),
    "zero bytes": (lambda p: save(p, "a.npy", b""), r"is empty \(0 bytes\), expected a \.npy"),
    "zero bytes npz": (lambda p: save(p, "a.npz", b""), "is empty"),
    "text": (lambda p: save(p, "a.npy", b"1.0,2.0\n3.0,4.0\n"), "not a .npy array"),
    "header cut": (lambda p: save(p, "a.npy", npy(p, np.zeros(9))[:40]), "not a .npy array"),
    "data cut": (
        lambda p: save(p, "a.npy", npy(p, np.zeros((9, 4), "f4"))[:-10]),
        r"truncated: 134 bytes of data, expected 144 for shape \(9, 4\) of float32",
    ),
    "objects": (pickled, "holds Python objects, expected numbers; what is pickled is never read"),
    "objects in npz": (pickled_in_npz, "holds Python objects"),
    "pickle": (lambda p: save(p, "a.npy", pickle.dumps([1, 2])), "not a .npy array"),
    "complex": (lambda p: write_npy(p, np.zeros(3, complex)), "has dtype complex128, expected float16"),
    "text items": (lambda p: write_npy(p, np.array(["a", "b"])), "has dtype <U1, expected"),
    "records": (lambda p: write_npy(p, np.zeros(3, "f4,f4")), "has dtype .*, expected"),
    "dates": (lambda p: write_npy(p, np.zeros(3, "M8[s]")), "has dtype datetime64"),
    "huge shape": (
        lambda p: save(p, "a.npy", npy(p, np.zeros((9, 4))).replace(b"(9, 4)", b"(9, 1" + b"0" * 30 + b")")),
        "larger than an array can be|not a .npy array",
    ),
    "negative shape": (
        lambda p: save(p, "a.npy", npy(p, np.zeros((9, 4))).replace(b"(9,", b"(-9,")),
        "not a .npy",
    ),
    "npz cut": (lambda p: cut(write_npz(p, np.zeros((99, 4))), 0.5), "not a readable .npz archive"),
    "npz stored, flipped": (
        lambda p: npz_flipped(p, write_npz, 20_000),
        r"a.npz:rows: corrupt after row .*CRC",
    ),
    "npz deflated, flipped": (
        lambda p: npz_flipped(p, write_npz_deflated, 2_000),
        r"a.npz:arr_0: corrupt after row",
    ),
    "npz member short": (npz_short_member, "truncated in row 8, expected 10 rows of 32 bytes"),
    "npz no arrays": (npz_of_other_things, "has 0 members"),
    "npz which": (
        lambda p: write_npz(p, np.zeros(3)).removesuffix(":rows"),
        r"has 2 members \(other, rows\)",
    ),
    "npz none such": (
        lambda p: write_npz(p, np.zeros(3)) + "x",
        "has no member called 'rowsx', expected one of: oth",
    ),
    "safetensors text": (
        lambda p: save(p, "a.safetensors", b"{'a': 'b', 'c': 'd'}"),
        "not a .safetensors file",
    ),
    "safetensors short": (lambda p: save(p, "a.safetensors", b"1234"), "not a .safetensors file"),
    "safetensors list": (lambda p: tensors(p, [1, 2]), "its header is not a JSON object"),
    "safetensors no json": (lambda p: tensors(p, b"{]"), "its header is not a JSON object"),
    "safetensors long": (
        lambda p: tensors(p, entry(), b"\0" * 8, length=10**9),
        "a header of 1000000000 bytes",
    ),
    "safetensors entry": (lambda p: tensors(p, {"x": 3}), "is not {dtype, shape, data_offsets}"),
    "safetensors shape": (lambda p: tensors(p, entry(shape=[-2]), b"\0" * 8), "is not {dtype, shape"),
    "safetensors offsets": (
        lambda p: tensors(p, entry(offsets=[0, 9]), b"\0" * 9),
        "9 bytes of data, expected 8",
    ),
    "safetensors cut": (lambda p: tensors(p, entry(), b"\0" * 7), "truncated: 7 bytes of data, expected 8"),
    "safetensors fp8": (
        lambda p: tensors(p, entry("F8_E4M3"), b"\0" * 8),
        "has dtype F8_E4M3, expected one of F16",
    ),
    "safetensors which": (lambda p: tensors(p, {**entry(), "y": {}}), r"has 2 names \(x, y\)"),
    "parquet text": (lambda p: save(p, "a.parquet", b"a,b\n1,2\n" * 9), "not a readable Parquet file"),
    "parquet cut": (
        lambda p: cut(write_parquet_lists(p, np.zeros((99, 4))), 0.6),
        "not a readable Parquet file",
    ),
    "parquet strings": (lambda p: parquet(p, x=["a", "b"]), "is a column of string, expected numbers"),
    "parquet dates": (
        lambda p: parquet(p, x=pa.array([1, 2], pa.timestamp("s"))),
        "is a column of timestamp",
    ),
    "parquet which": (lambda p: parquet(p, x=[1], y=[2]), r"has 2 columns \(x, y\)"),
    "parquet none such": (lambda p: parquet(p, x=[1]) + ":z", "has no column called 'z', expected one of: x"),
    "parquet null": (
        lambda p: parquet(p, x=[1.0] * 6 + [None]),
        "null at row 6, expected a number in every row",
    ),
    "parquet null list": (lambda p: parquet(p, x=[[1.0]] * 5 + [None]), "null at row 5"),
    "parquet null first": (lambda p: parquet(p, x=pa.array([None, [1.0]])), "null at row 0"),
    "parquet null in list": (
        lambda p: parquet(p, x=[[1.0, 2.0]] * 5 + [[3.0, None]]),
        "null at row 5, element 1",
    ),
    "parquet uneven": (
        lambda p: parquet(p, x=[[1.0, 2.0]] * 5 + [[3.0]]),
        "list of 1 at row 5, expected 2 as in row 0",
    ),
    "arrow text": (lambda p: save(p, "a.arrow", b"a,b\n1,2\n" * 9), "not a readable Arrow file"),
    "arrow cut": (lambda p: cut(write_arrow(p, np.zeros((99, 4))), 0.5), "not a readable Arrow file"),
    "feather text": (lambda p: save(p, "a.feather", b"FEA1 and something"), "not a readable Arrow file"),
    "zarr text": (lambda p: save(p, "a.zarr", b"no store"), "not a readable Zarr array"),
    "zarr empty": (lambda p: (p / "a.zarr").mkdir() or f"{p}/a.zarr", "not a readable Zarr array"),
    "zarr chunk": (zarr_flipped, "corrupt after row 8"),
    "zarr which": (lambda p: write_zarr_group(p, np.zeros(3)) + "x", "has no array called 'rowsx', expected"),
    "zarr no group": (lambda p: write_zarr(p, np.zeros(3)) + ":x", "is an array without members"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case: str, tmp_path: Path) -> None:
    make, message = BROKEN[case]
    spec = make(tmp_path)
    with pytest.raises((InputError, OSError), match=message) as raised:
        read(spec, 4)
    error = raised.value
    assert "a." in str(error) or "none.npy" in str(error) or case == "directory"
    assert str(error).startswith(str(tmp_path)) or isinstance(error, OSError)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    reader = open_reader(write_npy(tmp_path, np.zeros((100, 4))))
    reader.read(10)
    with open(tmp_path / "a.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="became shorter while it was read"):
        reader.read(10)
    reader.close()


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_parquet(tmp_path, np.zeros(3))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r'needs pyarrow, .* pip install "fastloss\[files\]"'):
        open_reader(spec)


@pytest.mark.parametrize("write", [write_npz_deflated, *ONE_OF_EACH[:-1]])
@given(data=st.data())
@settings(max_examples=40)
def test_damage_is_an_input_error_or_harmless(write: Writer, data: st.DataObject, tmp_path_factory: Any) -> None:
    """Flipped bytes anywhere, or a cut: rows, or one line; no other exception, whatever the damage."""
    path = tmp_path_factory.mktemp("damage")
    spec = write(path, np.arange(60, dtype="float32").reshape(-1, 4))
    (file,) = (entry for entry in path.iterdir())
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        reader = open_reader(spec)
    except InputError:
        return
    try:
        # damage may turn the number of rows into any other: a few are enough
        reader.read(min(reader.rows, 20) if reader.row_bytes < 1 << 20 else 0)
    except InputError:
        pass
    finally:
        reader.close()


# ---- memory stays bounded


def sparse_npy(path: Path, order: str) -> str:
    """160 MB of zeros, which take no room on the disk."""
    with open(path / "a.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": order == "F", "shape": (40_000, 1000)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 160_000_000)
    return f"{path}/a.npy"


MEASURE = """
import resource, sys
import numpy as np
from fastloss.files import open_reader
reader = open_reader(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(float(reader.read(800).sum()) for start in range(0, reader.rows, 800))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(reader.rows, total, (after - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["C", "F", "npz"])
def test_memory_is_bounded_by_the_chunk(kind: str, tmp_path: Path) -> None:
    """160 MB by chunks of 3.2 MB: two blocks of 8 MB, a chunk and what libraries take are below 48 MB."""
    spec = sparse_npy(tmp_path, "F" if kind == "F" else "C")
    if kind == "npz":
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.write(spec, "rows.npy")
        spec = f"{tmp_path}/a.npz"
    done = subprocess.run([sys.executable, "-c", MEASURE, spec], capture_output=True, text=True, check=True)
    rows, total, megabytes = done.stdout.split()
    assert (rows, total) == ("40000", "0.0")
    assert int(megabytes) < 48


# A collector that runs Python code often lets threads take turns where they otherwise hardly would: within NumPy's
# reading of a header.
MANY_THREADS = """
import gc, sys, threading, warnings
from concurrent.futures import ThreadPoolExecutor
from fastloss.files import open_reader

filters = list(warnings.filters)
sys.setswitchinterval(1e-6)
gc.callbacks.append(lambda *_: sum(range(200)))
gc.set_threshold(5)
with ThreadPoolExecutor(4) as pool:
    for reader in pool.map(lambda _: open_reader(sys.argv[1]), range(400)):
        reader.close()
assert warnings.filters == filters
"""


def test_many_threads_open_files(tmp_path: Path) -> None:
    """Workers of a cluster do: CPython 3.11's parser fails, and filters of warnings are lost, when they meet."""
    spec = write_npy(tmp_path, np.zeros((5, 2), "float32"))
    subprocess.run([sys.executable, "-c", MANY_THREADS, spec], check=True)


def test_files_are_closed(tmp_path: Path) -> None:
    """An unclosed file would be a ResourceWarning, which pytest makes an error."""
    for write in ALL:
        folder = tmp_path / write.__name__
        folder.mkdir()
        read(write(folder, np.zeros((5, 2), "float32")))
    gc.collect()
