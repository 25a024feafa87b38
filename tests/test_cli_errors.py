"""`fastloss evaluate` on bad input: one line that says what and where, exit 2, nothing left behind."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastloss
from commands import BCE, CE, CLASSES, ONE_ROW, ROWS, files_of, fill, prepared, result, run
from fastloss import outputs

Array = NDArray[Any]


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files to evaluate."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, rng)
    return tmp_path


def npy(name: str, array: Array) -> Callable[[], None]:
    return lambda: np.save(name, array, allow_pickle=True)


def cut(name: str, size: int) -> Callable[[], None]:
    def truncate() -> None:
        with open(name, "r+b") as file:
            file.truncate(size)

    return truncate


def changed(name: str, place: tuple[int, ...], value: float) -> Callable[[], None]:
    def change() -> None:
        array = np.load(name)
        array[place] = value
        np.save(name, array)

    return change


# name: command, what is done to the files before, what the line must say
BAD: dict[str, tuple[str, Callable[[], object] | None, str]] = {
    "no words": ("", None, "no command, expected evaluate, warmup or doctor"),
    "unknown command": ("evaluat a b c", None, "invalid choice: 'evaluat'"),
    "missing words": ("evaluate mse a.npy", None, "required: TARGET"),
    "unknown loss": (
        "evaluate hinge a.npy b.npy",
        None,
        "unknown loss 'hinge', expected one of: cross-entropy, nll",
    ),
    "unknown flag": (f"evaluate {CE} --gamma 2", None, "unrecognized arguments: --gamma 2"),
    "abbreviated flag": (f"evaluate {CE} --label 0.1", None, "unrecognized arguments"),
    "foreign flag": (
        "evaluate l1 a.npy b.npy --beta 1",
        None,
        "l1 has no --beta, expected only: --weight, --red",
    ),
    "foreign weight": ("evaluate kl-div a.npy b.npy --weight w.npy", None, "kl-div has no --weight"),
    "foreign pos_weight": (f"evaluate {BCE} --pos-weight w.npy", None, "bce has no --pos-weight"),
    "foreign reduction": (
        f"evaluate {CE} --reduction batchmean",
        None,
        "no --reduction batchmean, expected mean or",
    ),
    "reduction none": (f"evaluate {CE} --reduction none", None, "no --reduction none"),
    "no number": ("evaluate huber a.npy b.npy --delta x", None, "argument --delta: invalid float value: 'x'"),
    "chunk": (f"evaluate {CE} --chunk-mb 0", None, "argument --chunk-mb: invalid size value: '0'"),
    "chunk nan": (f"evaluate {CE} --chunk-mb nan", None, "invalid size value: 'nan'"),
    "smoothing": (f"evaluate {CE} --label-smoothing 1.5", None, "label_smoothing is 1.5"),
    "delta": ("evaluate huber unit.npy logits.npy --delta 0", None, "delta is 0.0"),
    "softcap": (f"evaluate {CE} --softcap -1", None, "softcap is -1.0"),
    "by class of bce": (f"evaluate {BCE} --by-class", None, "bce has no classes"),
    "by class of probabilities": (
        "evaluate cross-entropy logits.npy probabilities.npy --by-class",
        None,
        "probabilities.npy: class probabilities, but --by-class needs class indices",
    ),
    "by class of both": (
        f"evaluate {CE} --by-class --weight class_weight.npy --lse-square-scale 1",
        None,
        "--by-class cannot separate",
    ),
    "missing input": ("evaluate mse none.npy line.npy", None, "none.npy: No such file or directory"),
    "missing target": ("evaluate mse line.npy none.npy", None, "none.npy: No such file or directory"),
    "missing weight": (f"evaluate {CE} --weight none.npy", None, "none.npy: No such file or directory"),
    "missing zarr": ("evaluate mse none.zarr line.npy", None, "none.zarr: No such file or directory"),
    "directory": ("evaluate mse . line.npy", None, "unknown kind of file"),
    "truncated": (
        f"evaluate {CE}",
        cut("logits.npy", 1000),
        r"logits.npy: truncated: 872 bytes of data, expected 3416 for shape \(61, 7\) of float64",
    ),
    "empty": (f"evaluate {CE}", cut("index.npy", 0), r"index.npy: is empty \(0 bytes\)"),
    "objects": (f"evaluate {CE}", npy("logits.npy", np.array([{}])), "logits.npy: holds Python objects"),
    "complex": (
        f"evaluate {CE}",
        npy("logits.npy", np.zeros((ROWS, 3), complex)),
        "logits.npy: has dtype complex128",
    ),
    "integers": (
        f"evaluate {CE}",
        npy("logits.npy", np.zeros((ROWS, CLASSES), int)),
        "logits.npy: input has dtype int64, expected .*float32",
    ),
    "float classes": (
        f"evaluate {CE}",
        npy("index.npy", np.zeros(ROWS)),
        "index.npy: has dtype float64, expected class indices of an integer dtype",
    ),
    "lengths": (
        f"evaluate {CE}",
        npy("index.npy", np.zeros(60, int)),
        "index.npy: 60 rows, expected 61 as in logits",
    ),
    "row shapes": (
        "evaluate mse line.npy t.npy",
        npy("t.npy", np.zeros((ROWS, 1))),
        r"t.npy: shape \(61, 1\), expected \(61,\) for line.npy \(61,\)",
    ),
    "class shapes": (
        f"evaluate {CE}",
        npy("index.npy", np.zeros((ROWS, 2), int)),
        r"index.npy: shape \(61, 2\), expected \(61,\) of class indices or \(61, 7\) of class prob",
    ),
    "a single number": (
        "evaluate nll n.npy n.npy",
        npy("n.npy", np.array(1.0)),
        r"n.npy: a single number, expected",
    ),
    "out of range": (
        f"evaluate {CE} --chunk-mb 0.001",
        changed("index.npy", (50,), 7),
        r"index.npy: target 7 at position \(50,\) is out of range for 7 classes",
    ),
    "out of range maps": (
        "evaluate nll maps.npy index_maps.npy --chunk-mb 0.001",
        changed("index_maps.npy", (60, 1, 2), -1),
        r"index_maps.npy: target -1 at position \(60, 1, 2\) is out of range for 7 classes",
    ),
    "nan probability": (
        f"evaluate {BCE} --chunk-mb 0.001",
        changed("unit.npy", (40, 2), np.nan),
        r"unit.npy: input nan at position \(40, 2\) is outside \[0, 1\]",
    ),
    "negative label": (
        f"evaluate {BCE} --chunk-mb {ONE_ROW}",
        changed("probabilities.npy", (60, 0), -0.5),
        r"probabilities.npy: target -0.5 at position \(60, 0\) is outside \[0, 1\]",
    ),
    "class weight": (
        f"evaluate {CE} --weight line_weight.npy",
        None,
        r"line_weight.npy: shape \(61,\), expected \(7,\), one weight per class",
    ),
    "element weight": (
        "evaluate l1 logits.npy unit.npy --weight class_weight.npy",
        None,
        r"expected \(61, 7\), one w",
    ),
    "broadcast weight": (
        f"evaluate {BCE} --weight line_weight.npy",
        None,
        r"line_weight.npy: shape \(61,\), expected o",
    ),
    "complex weight": (
        f"evaluate {CE} --weight w.npy",
        npy("w.npy", np.zeros(CLASSES, complex)),
        "w.npy: has dtype complex128",
    ),
    "per sample suffix": (
        f"evaluate {CE} --per-sample out.txt",
        None,
        "out.txt: unknown kind of file, expected a name",
    ),
    "per sample folder": (
        f"evaluate {CE} --per-sample none/out.npy",
        None,
        "none/out.npy: the folder .* does not exist",
    ),
    "per sample is input": (f"evaluate {CE} --per-sample logits.npy", None, "logits.npy: is also an input"),
    "per sample is link": (
        f"evaluate {CE} --per-sample link.npy",
        lambda: os.link("index.npy", "link.npy"),
        "link.npy: is also an input",
    ),
    "per sample is a folder": (
        f"evaluate {CE} --per-sample d.npy",
        lambda: os.mkdir("d.npy"),
        "d.npy: is a directory",
    ),
    "per sample is a device": (
        f"evaluate {CE} --per-sample null.npy",
        lambda: os.symlink("/dev/null", "null.npy"),
        "null.npy: is not a regular file",
    ),
    "plot suffix": (
        f"evaluate {CE} --plot p.gif",
        None,
        "p.gif: unknown kind of picture, expected a name in .png, .svg",
    ),
    "plot folder": (f"evaluate {CE} --plot none/p.png", None, "none/p.png: the folder .* does not exist"),
    "error after output began": (
        f"evaluate {CE} --per-sample out.npy --plot p.png --chunk-mb 0.001",
        changed("index.npy", (60,), 9),
        r"target 9 at position \(60,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, spoil, message = BAD[case]
    if spoil is not None:
        spoil()
    before = files_of(folder)
    status, out, err = run(*command.split(), capture=capsys)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"fastloss: error: [^\n]+\n", err)
    assert re.search(message, err)
    assert files_of(folder) == before


def test_bad_input_in_a_process_of_its_own(folder: Path) -> None:
    changed("index.npy", (50,), 7)()
    words = ["evaluate", *CE.split(), "--per-sample", "out.npy"]
    done = subprocess.run([sys.executable, "-m", "fastloss", *words], capture_output=True, text=True)
    line = "fastloss: error: index.npy: target 7 at position (50,) is out of range for 7 classes\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    assert not [path for path in os.listdir() if path.startswith(("out", "."))]


def test_permission_denied(folder: Path) -> None:
    """Root may read everything, so the command becomes nobody."""
    os.chmod("logits.npy", 0)
    done = prepared("if os.geteuid() == 0: os.seteuid(65534)", "evaluate", *CE.split())
    assert done.returncode == 2
    assert re.fullmatch(r"fastloss: error: \S+: Permission denied\n", done.stderr)


@pytest.mark.parametrize("flags", [["--per-sample", "out.npy"], ["--plot", "out.png", "--per-sample", "small.npy"]])
def test_file_that_does_not_fit(flags: list[str], folder: Path) -> None:
    """A limit on the size of files: the system refuses to write on, as it does on a full disk."""
    rows = 61 if "--plot" in flags else 40_000
    np.save("x.npy", np.zeros((rows, 2)))
    np.save("t.npy", np.zeros(rows, int))
    before = files_of(folder)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    done = prepared(limit, "evaluate", "cross-entropy", "x.npy", "t.npy", *flags, stdout=subprocess.PIPE)
    line = f"fastloss: error: {flags[1]}: cannot be written: File too large\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    assert files_of(folder) == before


@pytest.mark.parametrize("when", ["write", "flush"])
def test_full_disk(
    when: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older file of that name is as it was."""

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file
            self.written = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> int:
            self.written += 1
            if when == "write" and self.written > 2:  # the header and one chunk fit
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(data))

        def flush(self) -> None:
            if when == "flush":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file.flush()

    np.save("out.npy", np.arange(3))
    before = files_of(folder)
    monkeypatch.setattr(outputs, "open", lambda *words: Full(open(*words)), raising=False)  # noqa: SIM115
    status, out, err = run("evaluate", *CE.split(), "--per-sample", "out.npy", "--chunk-mb", "0.001", capture=capsys)
    assert (status, out) == (2, "")
    assert err == "fastloss: error: out.npy: cannot be written: No space left on device\n"
    assert files_of(folder) == before


def test_output_replaces_and_has_ordinary_rights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An older file is replaced; a link goes on pointing; nothing else is left; others may read."""
    Path("real.npy").write_text("old")
    os.symlink("real.npy", "out.npy")
    before = set(os.listdir())
    mask = os.umask(0o022)
    try:
        result(*CE.split(), "--per-sample", "out.npy", capture=capsys)
    finally:
        os.umask(mask)
    assert os.path.islink("out.npy")
    assert np.load("real.npy").shape == (ROWS,)
    assert os.stat("real.npy").st_mode & 0o777 == 0o644
    assert set(os.listdir()) == before


def test_without_matplotlib(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run("evaluate", *CE.split(), "--plot", "p.png", capture=capsys)
    line = 'fastloss: error: --plot needs matplotlib, which is not installed: pip install "fastloss[plots]"\n'
    assert (status, err) == (2, line)


def test_memory_that_does_not_suffice(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*words: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(fastloss.Meter, "update", fail)
    status, _, err = run("evaluate", *CE.split(), capture=capsys)
    assert (status, err) == (2, "fastloss: error: not enough memory; a smaller --chunk-mb needs less\n")


def test_a_mistake_of_ours_is_no_input_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear line is for bad input; a bug keeps its traceback."""

    def fail(*words: Any, **options: Any) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(fastloss.Meter, "update", fail)
    with pytest.raises(RuntimeError, match="bug"):
        run("evaluate", *CE.split(), capture=capsys)
