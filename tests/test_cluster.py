"""`fastloss evaluate --scheduler`: what the command gives without it, on workers that may be lost; files in shards."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zarr
from numpy.typing import NDArray

from commands import ONE_ROW, ROWS, fill, result, run
from fastloss import cluster
from fastloss.evaluate import LOSSES, Job, opened
from fastloss.files import InputError, open_reader
from test_files import ALL, Writer

ROOT = Path(__file__).parent.parent
Array = NDArray[Any]

# A cluster of two worker processes, which ends with its standard input.
CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a cluster whose workers have another working directory than the command."""
    folder = tmp_path_factory.mktemp("cluster")
    script = folder / "cluster.py"
    script.write_text(CLUSTER)
    with subprocess.Popen(
        [sys.executable, str(script)], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files to evaluate, some of them in shards."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, rng)
    shard(tmp_path, "logits")
    shard(tmp_path, "index")
    return tmp_path


def shard(folder: Path, name: str, parts: int = 11) -> None:
    """Cuts NAME.npy into NAME-0.npy to NAME-10.npy, one of them empty."""
    array = np.load(folder / f"{name}.npy")
    ends = [0, *range(1, parts - 1), parts - 2, len(array)]
    for number in range(parts):
        np.save(folder / f"{name}-{number}.npy", array[ends[number] : ends[number + 1]])


# ---- files in shards


def test_shards_are_one_array(folder: Path) -> None:
    """In the order of their numbers, not of their letters, in chunks that end anywhere."""
    whole = np.load("logits.npy")
    reader = open_reader("logits-*.npy")
    assert (reader.shape, reader.dtype, reader.rows) == (whole.shape, whole.dtype, ROWS)
    assert [Path(path).name for path in reader.paths] == [f"logits-{number}.npy" for number in range(11)]
    got = [reader.read(rows).copy() for rows in (1, 7, 0, 3, ROWS - 11)]
    reader.close()
    np.testing.assert_array_equal(np.concatenate(got), whole)


@pytest.mark.parametrize("suffix", ["parquet", "zarr", "npz"])
def test_shards_of_other_files(suffix: str, folder: Path) -> None:
    whole = np.load("logits32.npy")
    for number, part in enumerate(np.array_split(whole, 3)):
        name = f"part-{number}.{suffix}"
        if suffix == "zarr":
            zarr.create_array(name, data=part)
        elif suffix == "npz":
            np.savez(name, rows=part, other=part)
        else:
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1])
            pyarrow.parquet.write_table(pa.table({"rows": column}), name)
    reader = open_reader(f"part-*.{suffix}" + (":rows" if suffix != "zarr" else ""))
    np.testing.assert_array_equal(reader.read(ROWS), whole)
    reader.close()


def test_shards_without_a_cluster(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = result("cross-entropy", "logits.npy", "index.npy", capture=capsys)
    for chunk in (ONE_ROW, "64"):
        words = ("cross-entropy", "logits-*.npy", "index.npy", "--by-class", "--chunk-mb", chunk)
        got = result(*words, capture=capsys)
        assert got["value"] == pytest.approx(expected["value"], rel=4e-16)
        assert got["files"]["input"]["name"] == "logits-*.npy"


def test_errors_of_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("odd-0.npy", np.zeros((3, 4)))
    np.save("odd-1.npy", np.zeros((3, 5)))
    np.save("number-0.npy", np.zeros(()))
    for spec, message in {
        "nothing-*.npy": "nothing-*.npy: no file matches",
        "odd-*.npy": "odd-1.npy: rows of shape (5,) and dtype float64, expected (4,) and float64 as in odd-0.npy",
        "number-*.npy": "number-0.npy: a single number, expected an array as a part of number-*.npy",
    }.items():
        status, out, err = run("evaluate", "mse", spec, "line.npy", capture=capsys)
        assert (status, out, err) == (2, "", f"fastloss: error: {message}\n")
    words = ("evaluate", "cross-entropy", "logits-*.npy", "index.npy", "--per-sample", "logits-3.npy")
    assert run(*words, capture=capsys)[2] == (
        "fastloss: error: logits-3.npy: is also an input, expected another name to write to\n"
    )


@pytest.mark.parametrize("shape", [(23,), (23, 3)])
@pytest.mark.parametrize("write", ALL)
def test_skip(write: Writer, shape: tuple[int, ...], tmp_path: Path, rng: np.random.Generator) -> None:
    """Any reader goes on after rows that it passed over."""
    array = rng.standard_normal(shape).astype("float32")
    spec = write(tmp_path, array)
    for first, skipped in ((0, 0), (0, 5), (3, 4), (2, 17), (0, 23)):
        reader = open_reader(spec)
        np.testing.assert_array_equal(reader.read(first), array[:first])
        reader.skip(skipped)
        rest = len(array) - first - skipped
        np.testing.assert_array_equal(reader.read(rest).reshape(rest, *shape[1:]), array[first + skipped :])
        reader.close()


def test_errors_name_rows_of_the_file(tmp_path: Path) -> None:
    """Also where a reader began at a row group in the middle."""
    numbers = pa.array([None if k == 17 else float(k) for k in range(20)])
    pyarrow.parquet.write_table(pa.table({"x": numbers}), tmp_path / "x.parquet", row_group_size=4)
    reader = open_reader(str(tmp_path / "x.parquet"))
    assert reader.grain == 4
    reader.skip(8)
    with pytest.raises(InputError, match="null at row 17"):
        reader.read(12)
    reader.close()


# ---- on a cluster

COMMANDS = {
    "shards": "cross-entropy logits-*.npy index-*.npy --by-class",
    "smoothing": "cross-entropy maps.npy index_maps.npy --label-smoothing 0.1 --lse-square-scale 0.01",
    "probabilities": "cross-entropy logits.npy probabilities.npy --weight class_weight.npy",
    "class weights": "nll logits.npy index.npy --weight class_weight.npy --by-class",
    "element weights": "mse line.npy line_target.npy --weight line_weight.npy",
    "batchmean": "kl-div logits.npy probabilities.npy --reduction batchmean",
    "half": "huber unit32.npy probabilities32.npy --delta 0.5",
    "columns": "cross-entropy columns.npy index.npy",
    "Zarr": "cross-entropy logits.zarr index.npy",
    "Parquet": "cross-entropy logits.parquet index.npy",
    "archive": "cross-entropy logits.npz index.npy",
    "one sample": "cross-entropy one.npy class.npy",
    "no samples": "cross-entropy none.npy no_index.npy",
}


@pytest.fixture
def more_files(folder: Path) -> None:
    logits = np.load("logits.npy")
    np.save("columns.npy", np.asfortranarray(logits))
    np.savez_compressed("logits.npz", logits)
    zarr.create_array("logits.zarr", data=logits, chunks=(9, 4))
    column = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
    pyarrow.parquet.write_table(pa.table({"x": column}), "logits.parquet", row_group_size=8)
    for name, array in (("one", logits[1]), ("class", np.array(2)), ("none", logits[:0])):
        np.save(f"{name}.npy", array)
    np.save("no_index.npy", np.zeros(0, int))


@pytest.mark.parametrize("name", COMMANDS)
def test_cluster(name: str, more_files: None, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All numbers are those of the command alone; chunks of three rows or so make many tasks."""
    words = COMMANDS[name].split()
    alone = result(*words, capture=capsys)
    got = result(*words, "--chunk-mb", "0.0002", "--scheduler", address, capture=capsys)
    for key in ("value", "perplexity", "weight_sum"):
        if key in alone:
            assert float(got[key]) == pytest.approx(float(alone[key]), rel=4e-16, nan_ok=True)
    for key in ("samples", "ignored", "bytes", "options"):
        assert got[key] == alone[key]
    for a, b in zip(got.get("by_class", []), alone.get("by_class", []), strict=True):
        assert (a["class"], a["count"]) == (b["class"], b["count"])
        assert float(a["mean"]) == pytest.approx(float(b["mean"]), rel=1e-14, nan_ok=True)


def test_files_that_are_written(folder: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("cross-entropy", "logits.npy", "index.npy", "--chunk-mb", "0.001", "--plot")
    result(*words, "alone.svg", "--per-sample", "alone.npy", capture=capsys)
    result(*words, "cluster.svg", "--per-sample", "cluster.npy", "--scheduler", address, capture=capsys)
    np.testing.assert_array_equal(np.load("cluster.npy"), np.load("alone.npy"))
    assert Path("cluster.svg").stat().st_size == pytest.approx(Path("alone.svg").stat().st_size, rel=0.02)


def test_first_error_in_one_line(folder: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of several bad rows that of the first is told, whichever worker was faster; nothing is written."""
    index = np.load("index.npy")
    index[[25, 40, 59]] = 7
    np.save("bad.npy", index)
    words = ("evaluate", "cross-entropy", "logits.npy", "bad.npy", "--chunk-mb", "0.0002", "--per-sample", "out.npy")
    status, out, err = run(*words, "--scheduler", address, capture=capsys)
    assert (status, out) == (2, "")
    assert err == "fastloss: error: bad.npy: target 7 at position (25,) is out of range for 7 classes\n"
    assert not Path("out.npy").exists()


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("tcp://127.0.0.1:9", "Timed out"),
        ("nonsense", "missing port number"),
        ("foo://127.0.0.1:8786", "unknown address scheme"),
    ],
)
def test_no_scheduler(
    where: str, reason: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    status, out, err = run("evaluate", "mse", "line.npy", "line.npy", "--scheduler", where, capture=capsys)
    assert (status, out) == (2, "")
    assert err.startswith(f"fastloss: error: --scheduler {where}: no Dask scheduler answers: {reason}")
    assert err.count("\n") == 1


def test_without_dask(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = ("evaluate", "mse", "line.npy", "line.npy", "--scheduler", "tcp://127.0.0.1:8786")
    assert run(*words, capture=capsys) == (
        2,
        "",
        'fastloss: error: --scheduler needs distributed, which is not installed: pip install "fastloss[dask]"\n',
    )


def test_worker_sees_something_else(folder: Path) -> None:
    """A task compares the files that it opens with those that the client saw."""
    mse = next(loss for loss in LOSSES if loss.name == "mse")
    job = Job(mse, {"input": "line.npy", "target": "line_target.npy"})
    with opened(job) as plan:
        shapes = plan.shapes
    assert cluster.evaluate_rows(10, 5, job, shapes).meter.samples == 5
    np.save("line.npy", np.zeros(4))
    np.save("line_target.npy", np.zeros(4))
    with pytest.raises(InputError, match=r"line.npy: has \(\(4,\), 'float64'\) on a worker, expected"):
        cluster.evaluate_rows(0, 5, job, shapes)
    Path("line.npy").unlink()
    with pytest.raises(InputError, match=r"line.npy: No such file or directory on a worker"):
        cluster.evaluate_rows(0, 5, job, shapes)


def test_a_worker_is_killed() -> None:
    """The benchmark in small: a Zarr store on two workers, one of which is killed when half of the tasks are done."""
    command = [sys.executable, str(ROOT / "benchmarks" / "cluster.py"), "--gb", "0.04", "--chunk-mb", "0.25", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["killed_with_tasks_left"] > 0
    assert found["samples"] == found["rows"] == 10_000
    assert found["error"] < 1e-7  # the mean of float32 losses beside one of float64
    assert max(found["peak_mb"].values()) < 1500
