"""`fastloss evaluate`: the value of one call in memory, whatever file, chunks and terminal."""

import importlib.metadata
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.numpy
from numpy.typing import NDArray

import fastloss
import reference
from commands import CE, CLASSES, ONE_ROW, PREPARED, ROWS, fill, result, run
from fastloss import cli
from fastloss.kernels import compiler
from fastloss.plots import Histogram

Array = NDArray[Any]


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files to evaluate."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, rng)
    return tmp_path


def close(got: float, expected: float) -> bool:
    """Within 1 ulp of float64, the bound of a Meter; 4 where the call in memory has a rounding of its own."""
    return abs(got - expected) <= 4 * np.spacing(abs(expected)) or (math.isnan(got) and math.isnan(expected))


# ---- values

# loss, files (input, target, flags for more), options by their name in Python
VALUES: dict[str, tuple[str, str, str, dict[str, str], dict[str, Any]]] = {
    "indices": ("cross-entropy", "logits", "index", {}, {}),
    "class weights": ("cross_entropy", "logits", "index", {"weight": "class_weight"}, {}),
    "smoothing": ("CROSS-ENTROPY", "logits", "index", {"weight": "class_weight"}, {"label_smoothing": 0.1}),
    "z-loss": ("cross-entropy", "logits", "index", {}, {"lse_square_scale": 0.01, "softcap": 5.0}),
    "ignore": ("cross-entropy", "maps", "index_maps", {}, {"ignore_index": 3}),
    "maps sum": ("cross-entropy", "maps", "index_maps", {}, {"reduction": "sum"}),
    "probabilities": ("cross-entropy", "logits", "probabilities", {"weight": "class_weight"}, {}),
    "nll": ("nll", "logits", "index", {"weight": "class_weight"}, {}),
    "nll maps": ("nll-loss", "maps", "index_maps", {}, {"ignore_index": 0}),
    "l1": ("l1", "logits", "unit", {}, {}),
    "l1 weights": ("l1_loss", "logits", "unit", {"weight": "element_weight"}, {}),
    "mse line": ("mse", "line", "line_target", {}, {}),
    "mse weights": ("mse", "line", "line_target", {"weight": "line_weight"}, {"reduction": "sum"}),
    "bce": ("bce", "unit", "probabilities", {}, {}),
    "bce weights": ("bce", "unit", "probabilities", {"weight": "element_weight"}, {}),
    "bce broadcast": ("binary_cross_entropy", "unit", "probabilities", {"weight": "class_weight"}, {}),
    "bce logits": ("bce-with-logits", "logits", "unit", {}, {"reduction": "sum"}),
    "bce pos": ("bce-with-logits", "logits", "unit", {"pos_weight": "class_weight"}, {}),
    "bce both": (
        "binary-cross-entropy-with-logits",
        "logits",
        "unit",
        {"pos_weight": "class_weight", "weight": "element_weight"},
        {},
    ),
    "smooth": ("smooth-l1", "logits", "unit", {}, {"beta": 0.5}),
    "huber": ("huber", "logits", "unit", {"weight": "element_weight"}, {"delta": 2.0}),
    "kl": ("kl-div", "logits", "probabilities", {}, {"reduction": "batchmean"}),
    "kl log": ("kl_div", "logits", "unit", {}, {"log_target": True}),
}


def flags_of(files: dict[str, str], options: dict[str, Any], suffix: str = "") -> list[str]:
    words: list[str] = []
    for name, value in {**{role: f"{file}{suffix}.npy" for role, file in files.items()}, **options}.items():
        words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return words


@pytest.mark.parametrize("chunk", [ONE_ROW, "0.001", "64"])
@pytest.mark.parametrize("case", VALUES)
def test_value_is_that_of_one_call(case: str, chunk: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row at a time, some, or all at once; and the losses of the samples in a file."""
    loss, input, target, files, options = VALUES[case]
    words = [loss, f"{input}.npy", f"{target}.npy", *flags_of(files, options), "--chunk-mb", chunk]
    got = result(*words, "--per-sample", "out.npy", capture=capsys)

    function = cli.loss_named(loss).function
    arrays = {role: np.load(f"{file}.npy") for role, file in files.items()}
    x, y = np.load(f"{input}.npy"), np.load(f"{target}.npy")
    assert close(got["value"], float(getattr(fastloss, function)(x, y, **arrays, **options)))
    truth = getattr(reference, function)(x, y, **arrays, **options)
    assert got["value"] == pytest.approx(float(truth.value), rel=1e-14)

    none = {**options, "reduction": "none"}
    samples = np.load("out.npy")
    assert samples.dtype == np.float64
    np.testing.assert_array_equal(samples, getattr(fastloss, function)(x, y, **arrays, **none))
    ignored = int((y == options.get("ignore_index", -100)).sum()) if y.dtype.kind == "i" else 0
    assert (got["samples"], got["ignored"]) == (samples.size, ignored)
    assert got["bytes"] >= x.nbytes + y.nbytes
    assert got["per_sample"] == "out.npy"


@pytest.mark.parametrize("case", ["indices", "bce weights", "mse line"])
def test_float32(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss, input, target, files, options = VALUES[case]
    x = np.load(f"{input}32.npy")
    suffix = "" if target == "index" else "32"
    y = np.load(f"{target}{suffix}.npy")
    arrays = {role: np.load(f"{file}32.npy") for role, file in files.items()}
    words = [loss, f"{input}32.npy", f"{target}{suffix}.npy", *flags_of(files, options, "32")]
    got = result(*words, "--per-sample", "out.npy", capture=capsys)
    value = getattr(fastloss, cli.loss_named(loss).function)(x, y, **arrays, **options)
    assert value.dtype == np.float32
    assert np.float32(got["value"]) == value
    assert np.load("out.npy").dtype == np.float32


def test_half_types_from_safetensors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, t = np.load("logits.npy"), np.load("index.npy")
    halves = {"b": x.astype(ml_dtypes.bfloat16), "h": x.astype(np.float16)}
    safetensors.numpy.save_file({**halves, "t": t.astype(np.int16)}, "all.safetensors")
    for name, half in halves.items():
        got = result(
            "cross-entropy",
            f"all.safetensors:{name}",
            "all.safetensors:t",
            "--chunk-mb",
            "0.001",
            capture=capsys,
        )
        truth = reference.cross_entropy(half, t).value
        assert got["value"] == pytest.approx(float(truth), rel=1e-6)  # losses of float32 precision, summed exactly
        assert got["files"]["input"]["dtype"] == str(half.dtype)


def test_formats_give_one_value(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, t = np.load("logits.npy"), np.load("index.npy")
    np.save("fortran.npy", np.asfortranarray(x))
    np.savez_compressed("both.npz", x=x, t=t)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), CLASSES)
    pyarrow.parquet.write_table(pa.table({"x": lists, "t": t}), "both.parquet", row_group_size=10)
    files = [("logits.npy", "index.npy"), ("fortran.npy", "index.npy"), ("both.npz:x", "both.npz:t")]
    files += [("both.parquet:x", "both.parquet:t"), ("both.npz:x", "both.parquet:t")]
    values = {result("cross-entropy", *pair, "--chunk-mb", "0.001", capture=capsys)["value"] for pair in files}
    assert len(values) == 1


def test_one_sample_without_a_batch_axis(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three classes (person, dog, cat), logits [0.8, 0.1, 0.2], target 0."""
    np.save("x.npy", np.array([0.8, 0.1, 0.2]))
    np.save("t.npy", np.array(0))
    got = result("cross-entropy", "x.npy", "t.npy", "--per-sample", "out.npy", "--by-class", capture=capsys)
    assert round(got["value"], 4) == 0.7156
    assert np.load("out.npy").shape == ()
    assert [entry["count"] for entry in got["by_class"]] == [1, 0, 0]
    np.save("n.npy", np.array(2.5))
    assert result("mse", "n.npy", "n.npy", capture=capsys)["value"] == 0


def test_nothing_to_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What JSON has no number for is text that float() reads."""
    np.save("x.npy", np.zeros((0, 5)))
    np.save("t.npy", np.zeros(0, int))
    got = result("cross-entropy", "x.npy", "t.npy", "--by-class", "--per-sample", "out.npy", capture=capsys)
    assert (got["value"], got["perplexity"], got["samples"]) == ("nan", "nan", 0)
    assert math.isnan(float(got["value"]))
    assert np.load("out.npy").shape == (0,)
    assert result("cross-entropy", "x.npy", "t.npy", "--reduction", "sum", capture=capsys)["value"] == 0


def test_infinite_loss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("x.npy", np.array([[0.0, -np.inf], [0.0, 0.0]]))
    np.save("t.npy", np.array([1, 0]))
    got = result("cross-entropy", "x.npy", "t.npy", "--plot", "p.svg", capture=capsys)
    assert (got["value"], got["perplexity"]) == ("inf", "inf")
    assert "1 infinite" in Path("p.svg").read_text()


def test_perplexity_only_where_it_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("logits.npy", "index.npy")
    mean = result("cross-entropy", *files, capture=capsys)
    assert mean["perplexity"] == pytest.approx(math.exp(mean["value"]), rel=1e-14)
    total = result("cross-entropy", *files, "--reduction", "sum", capture=capsys)
    assert total["perplexity"] == pytest.approx(mean["perplexity"], rel=1e-14)
    assert "perplexity" not in result("cross-entropy", *files, "--label-smoothing", "0.1", capture=capsys)
    assert "perplexity" not in result("nll", *files, capture=capsys)
    assert "perplexity" not in result("cross-entropy", "logits.npy", "probabilities.npy", capture=capsys)


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize(("input", "target"), [("logits", "index"), ("maps", "index_maps")])
def test_by_class(input: str, target: str, weight: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each class has the value that its samples have alone."""
    flags = ["--weight", "class_weight.npy"] if weight else []
    words = [
        "cross-entropy",
        f"{input}.npy",
        f"{target}.npy",
        *flags,
        "--label-smoothing",
        "0.2",
        "--by-class",
    ]
    w = np.load("class_weight.npy") if weight else np.ones(CLASSES)
    losses = np.asarray(
        reference.cross_entropy(
            np.load(f"{input}.npy"), t := np.load(f"{target}.npy"), w, label_smoothing=0.2, reduction="none"
        ).value
    )
    for chunk in (ONE_ROW, "0.001", "64"):
        classes = result(*words, "--chunk-mb", chunk, capture=capsys)["by_class"]
        assert [entry["class"] for entry in classes] == list(range(CLASSES))
        assert [entry["count"] for entry in classes] == [int((t == c).sum()) for c in range(CLASSES)]
        for entry in classes:
            c = entry["class"]
            assert entry["mean"] == pytest.approx(float(losses[t == c].mean() / w[c]), rel=1e-13)


def test_class_that_does_not_occur(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("t.npy", np.zeros(ROWS, np.uint8))
    words = ("cross-entropy", "logits.npy", "t.npy", "--by-class")
    classes = result(*words, capture=capsys)["by_class"]
    assert classes[1] == {"class": 1, "count": 0, "mean": "nan"}
    assert re.search(r"\n +1 +0 +nan\n", run("evaluate", *words, capture=capsys)[1])


# ---- the table


def test_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("evaluate", "cross-entropy", "logits.npy", "index.npy", "--label-smoothing", "0.1")
    status, out, err = run(*words, capture=capsys)
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith("weight sum"))
    assert (status, err) == (0, "")
    assert lines["loss"] == "cross-entropy, mean"
    assert lines["input"] == f"logits.npy  ({ROWS}, {CLASSES}) float64"
    value = fastloss.cross_entropy(np.load("logits.npy"), np.load("index.npy"), label_smoothing=0.1)
    assert close(float(lines["value"]), float(value))
    assert (lines["samples"], lines["ignored"]) == (str(ROWS), "7")
    assert re.search(r"^weight sum +54$", out, re.MULTILINE)
    assert len({re.match(r"(?:\w|[/ ](?! ))+\s+", line).end() for line in out.splitlines()}) == 1  # type: ignore[union-attr]


def test_many_classes_are_cut_in_the_table_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("x.npy", np.zeros((300, 200), np.float32))
    np.save("t.npy", np.arange(300) % 150)
    words = ("cross-entropy", "x.npy", "t.npy", "--by-class")
    out = run("evaluate", *words, capture=capsys)[1]
    assert out.endswith("the 60 of 200 classes with the highest mean; --json has all\n")
    assert len(re.findall(r"^ +\d+ +2 +5.29832$", out, re.MULTILINE)) == 60  # log(200)
    assert len(result(*words, capture=capsys)["by_class"]) == 200


def test_version_doctor_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version", capture=capsys) == (0, f"fastloss {fastloss.__version__}\n", "")
    facts = doctor(capsys)
    assert facts["numpy"].startswith("2.")
    assert facts["kernel cache"] == str(compiler.cache_directory())
    assert facts["threading layer"] in ("tbb", "omp", "workqueue", "not started")
    assert facts["NVIDIA driver"]
    done = subprocess.run([sys.executable, "-m", "fastloss", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fastloss {fastloss.__version__}\n")


def doctor(capture: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What `fastloss doctor` prints, by the name of the fact."""
    status, out, err = run("doctor", capture=capture)
    assert (status, err) == (0, "")
    return dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("libcuda"), "no NVIDIA driver found"),  # how cuda-pathfinder says so
        (Exception("CUDA_ERROR_NO_DEVICE"), "does not work: CUDA_ERROR_NO_DEVICE"),
    ],
    ids=["none", "no device"],
)
def test_doctor_without_a_gpu(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    core = pytest.importorskip("cuda.core")

    def get_all_devices() -> None:
        raise error

    monkeypatch.setattr(core, "Device", SimpleNamespace(get_all_devices=get_all_devices))
    facts = doctor(capsys)
    assert facts["NVIDIA driver"] == line
    assert not {name for name in facts if name.startswith("GPU")}


@pytest.mark.parametrize("named", [True, False], ids=["number", "no number"])
def test_doctor_with_gpus(named: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    core = pytest.importorskip("cuda.core")
    driver = pytest.importorskip("cuda.bindings.driver")

    def number() -> tuple[int, ...]:
        if not named:
            raise RuntimeError("libnvidia-ml")
        return 580, 65, 6

    gpus = [SimpleNamespace(device_id=k, name=f"Model {k}", compute_capability=(9, k)) for k in range(2)]
    monkeypatch.setattr(core, "Device", SimpleNamespace(get_all_devices=lambda: tuple(gpus)))
    monkeypatch.setattr(core, "system", SimpleNamespace(get_kernel_mode_driver_version=number))
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, 13020))
    facts = doctor(capsys)
    assert facts["NVIDIA driver"] == ("580.65.06, " if named else "") + "for CUDA up to 13.2"
    assert facts["GPU 0"] == "Model 0, compute capability 9.0"
    assert facts["GPU 1"] == "Model 1, compute capability 9.1"
    gpus.clear()
    assert doctor(capsys)["GPUs"] == "none"


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing for GPUs is installed; then CuPy alone, under one of the names of its wheels."""
    installed = {"numpy": "2.3.4"}
    version, find_spec = importlib.metadata.version, importlib.util.find_spec

    def version_of(package: str) -> str:
        if package in ("fastloss", "packaging", *installed):
            return installed.get(package) or version(package)
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba_cuda" else find_spec(name))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    facts = doctor(capsys)
    assert facts["numpy"] == "2.3.4"
    assert facts["cuda-core"] == facts["cuda-bindings"] == facts["cupy"] == "not installed"
    assert re.fullmatch(r'not installed; .*pip install "fastloss\[cuda12\]" or .*', facts["numba-cuda"])
    assert facts["NVIDIA driver"] == "not looked for without cuda-core"
    installed["cupy-cuda13x"] = "14.2.0"
    assert doctor(capsys)["cupy"] == "14.2.0"


def test_help_says_every_loss_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom fastloss.cli import main\nstatus = main(['evaluate', '--help'])\n"
        "heavy = {'numba', 'llvmlite', 'torch', 'matplotlib', 'pyarrow', 'zarr', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(status or ' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"{loss.name}" in done.stdout for loss in cli.LOSSES)


# ---- pictures


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot(suffix: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("cross-entropy", "logits.npy", "index.npy", "--by-class", "--plot", f"p.{suffix}")
    assert result(*words, capture=capsys)["plot"] == f"p.{suffix}"
    content = Path(f"p.{suffix}").read_bytes()
    if suffix == "png":
        pixels = matplotlib.image.imread("p.png")
        assert pixels.shape[0] > 1000
        assert pixels.std() > 0.05
    elif suffix == "svg":
        for text in ("cross-entropy of logits.npy", "54 samples", "nats", "mean loss by class", "median"):
            assert text in content.decode()
    else:
        assert content.startswith(b"%PDF")


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [1.0],
        [2.0] * 9,
        [0.0] * 9,
        [0.0, 1e-300, 1e300],
        [-3.0, -1e-9, 5.0],
        [np.nan] * 3,
        [np.inf, -np.inf, 1.0],
    ],
    ids=str,
)
def test_plot_of_odd_losses(losses: list[float], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """nll: the loss is what one likes."""
    np.save("x.npy", -np.array(losses).reshape(-1, 1))
    np.save("t.npy", np.zeros(len(losses), int))
    result("nll", "x.npy", "t.npy", "--plot", "p.png", "--by-class", capture=capsys)
    assert matplotlib.image.imread("p.png").std() > 0.01


def test_histogram_counts_are_exact(rng: np.random.Generator) -> None:
    """Bins are the float32 numbers that share their first 12 significant bits."""
    finite = np.concatenate([rng.lognormal(0, 8, 300_000), -rng.lognormal(0, 5, 1000)])
    losses = rng.permutation(np.concatenate([finite, [0.0, -0.0, np.nan, np.inf, np.inf, -np.inf]]))
    histogram = Histogram()
    for part in np.split(losses, [1, 7, 1000, 290_000]):
        histogram.add(part)
    lower, upper, count = histogram.counts()
    assert (histogram.size, histogram.nan) == (len(losses), 1)
    assert (lower[0], count[0], upper[-1], count[-1]) == (-np.inf, 1, np.inf, 2)
    assert count[lower == 0] == 2

    fraction, exponent = np.frexp(finite.astype(np.float32))
    towards_0, number = np.unique(np.ldexp(np.trunc(fraction * 2**12), exponent - 12), return_counts=True)
    inner = np.flatnonzero((lower != 0) & np.isfinite(upper) & np.isfinite(lower))
    np.testing.assert_array_equal(count[inner], number)
    near, far = np.sort(np.abs([lower[inner], upper[inner]]), axis=0)
    np.testing.assert_allclose(near, np.abs(towards_0), rtol=1e-6)  # an edge below 0 is a float32 off
    assert ((far - near) / near).max() < 2**-11 * 1.001


# ---- signals, pipes and terminals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal(number: signal.Signals, status: int, folder: Path) -> None:
    """In the middle of a run that would take hours: one row at a time out of 100 million, in a sparse file."""
    with open("x.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (100_000_000, 2)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 800_000_000)
    before = set(os.listdir())
    # a shell that starts pytest in the background has it ignore SIGINT, nohup SIGHUP, and that is inherited
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code = PREPARED.format(heard)
    words = ["evaluate", "mse", "x.npy", "x.npy", "--chunk-mb", ONE_ROW, "--per-sample", "out.npy"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    try:
        while True:
            assert process.poll() is None
            parts = set(os.listdir()) - before
            if parts and os.stat(parts.pop()).st_size > 1000:  # some losses are written
                break
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    what = "interrupted" if number == signal.SIGINT else "terminated"
    assert (process.returncode, err) == (status, f"fastloss: {what}\n")
    assert set(os.listdir()) == before


def test_signal_that_python_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception from a destructor is dropped by Python; the command ends all the same."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(cli.Stopped), cli.Signals() as signals:  # noqa: PT012
        with pytest.raises(cli.Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb the tidying up
        signals.check()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_reader_of_the_pipe_that_leaves(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "fastloss", "evaluate", *CE.split()], stdout=pipe, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_stdout_that_is_full(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastloss", "evaluate", *CE.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    line = "fastloss: error: stdout: cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_progress_on_a_terminal_only(folder: Path) -> None:
    command = [sys.executable, "-m", "fastloss", "evaluate", *CE.split(), "--chunk-mb", ONE_ROW]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")

    main, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(main, 4096):
            shown += piece
    except OSError:  # how a terminal says that the other side has closed it
        pass
    os.close(main)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert re.search(rb"B/s", shown)
    assert b"value" in out
