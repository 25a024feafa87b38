"""`fastloss warmup`: what it compiles is there for the processes that come after."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastloss
from commands import run
from fastloss import cli, warmup
from fastloss.files import InputError

ROOT = Path(fastloss.__file__).resolve().parents[1]

# What a later process calls, and whether LLVM then had to compile anything for it.
AFTER = """
import json, sys
import numpy as np
import fastloss
from fastloss.kernels import compiler
compiled = []
emit = compiler.optimised
compiler.optimised = lambda *arguments: compiled.append(1) or emit(*arguments)
rng = np.random.default_rng(0)
def call(function, x, y, gradient):
    loss = getattr(fastloss, function)
    (fastloss.value_and_grad(loss) if gradient else loss)(x, y)
for function, shape, gradient in json.loads(sys.argv[1]):
    x = rng.standard_normal(shape).astype(np.float32)
    y = rng.integers(0, shape[1], (shape[0], *shape[2:])) if function == "cross_entropy" else 0 * x
    call(function, x, y, gradient)
print(len(compiled))
"""


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {
        "FASTLOSS_CACHE_DIR": str(cache),
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


def warmed(cache: Path, *arguments: str) -> list[str]:
    """Lines that the command prints, run in a process of its own with this cache."""
    done = subprocess.run(
        [sys.executable, "-m", "fastloss", "warmup", *arguments],
        env=environment(cache), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def compiled_after(cache: Path, *calls: tuple[str, tuple[int, ...], bool]) -> int:
    """Kernels that a fresh process compiles for these calls."""
    done = subprocess.run(
        [sys.executable, "-c", AFTER, json.dumps(calls)],
        env=environment(cache), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def failed(words: str, capture: pytest.CaptureFixture[str]) -> str:
    """The one line of error of a command that prints nothing else and exits 2."""
    status, out, err = run(*words.split(), capture=capture)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fastloss: error: ")
    return err


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_later_process_compiles_nothing(tmp_path: Path, jobs: str) -> None:
    *lines, last = warmed(tmp_path, "cross-entropy", "mse", "--grad", "--jobs", jobs)
    expected = {str(item) for item in warmup.items([cli.loss_named("cross-entropy"), cli.loss_named("mse")])}
    assert {line.partition(" s  ")[2] for line in lines} == expected
    kernels = len(list(tmp_path.glob("*.o")))
    assert last.startswith(f"{kernels} kernels compiled in ")
    assert last.endswith(f"; in {tmp_path}")
    before = files(tmp_path)
    shapes = [(7, 2), (7, 10), (7, 100), (3, 1000), (2, 21, 5, 5), (30_000, 100), (300_000, 10)]
    calls = [("cross_entropy", shape, gradient) for shape in shapes for gradient in (False, True)]
    calls += [("mse_loss", shape, gradient) for shape in ((5,), (3_000_000,)) for gradient in (False, True)]
    assert compiled_after(tmp_path, *calls) == 0
    assert files(tmp_path) == before
    assert compiled_after(tmp_path, ("huber_loss", (5,), False)) > 0  # what was not named, so that the count counts
    assert len(files(tmp_path)) > len(before)


def test_a_second_warmup_compiles_nothing(tmp_path: Path) -> None:
    assert not warmed(tmp_path, "l1")[-1].startswith("0 kernels")
    assert warmed(tmp_path, "l1")[-1].startswith("0 kernels compiled in ")


@pytest.mark.parametrize("dtype", warmup.DTYPES)
@pytest.mark.parametrize("loss", cli.LOSSES, ids=lambda loss: loss.name)
def test_every_item_can_be_run(loss: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "LARGE", 3000)
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    for options in [{}] + [{"weight": True}] * (loss.weight is not None):
        for item in warmup.items([loss], [dtype], ["none", *loss.reductions], options=options):
            assert item.run() > 0


def test_options_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    class Spy:
        def __call__(self, input: Any, target: Any, **options: Any) -> None:
            seen.append(options | {"input": input.shape, "target": (target.shape, target.dtype.name)})

    monkeypatch.setattr(fastloss, "cross_entropy", Spy())
    options = {"probabilities": True, "weight": True, "label_smoothing": 0.5}
    item = warmup.items([cli.loss_named("cross-entropy")], ["float16"], ["sum"], gradient=False, options=options)[-1]
    item.run()
    assert str(item) == (
        "cross-entropy float16 sum value, (N, C, d), 21 classes, probabilities, weight, label-smoothing=0.5"
    )
    small = {"reduction": "sum", "label_smoothing": 0.5, "input": (1, 21, 2), "target": ((1, 21, 2), "float16")}
    large = small | {"input": (1, 21, warmup.LARGE // 21), "target": ((1, 21, warmup.LARGE // 21), "float16")}
    assert [found.pop("weight").shape for found in seen] == [(21,), (21,)]
    assert seen == [small, large]


def test_options_that_are_zero_count_as_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cross-entropy has no --beta" in failed("warmup cross-entropy --beta 0", capsys)


def test_large_items_are_past_every_threshold() -> None:
    from fastloss.backends import cpu

    smallest = min(np.dtype(dtype).itemsize for dtype in ("float16", "float32"))
    assert smallest * warmup.LARGE >= max(cpu.STREAM_BYTES, cpu.PARALLEL_BYTES)


def test_the_common_set_is_every_loss() -> None:
    names = [item.loss.name for item in warmup.items()]
    assert list(dict.fromkeys(names)) == [loss.name for loss in cli.LOSSES]
    assert {(item.dtype, item.reduction, item.gradient) for item in warmup.items()} == {("float32", "mean", True)}


def test_processes_are_started_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert [warmup.default_jobs(count) for count in (0, 1, 3, 4, 7, 8, 100)] == [1, 1, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hinge", "unknown loss 'hinge', expected one of: cross-entropy"),
        ("mse --dtype float8", "unknown dtype 'float8', expected one of: float16, bfloat16, float32, float64"),
        ("mse --reduction batchmean", "mse has no --reduction batchmean, expected none or mean or sum"),
        ("mse --softcap 3", "mse has no --softcap"),
        ("l1 mse --probabilities", "l1 has no --probabilities"),
        ("cross-entropy --label-smoothing 2", "label_smoothing"),
        ("mse --jobs 0", "argument --jobs: invalid number value: '0'"),
        ("mse --grad=1", "argument --grad"),
    ],
)
def test_errors_are_one_line_and_status_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failed(f"warmup {words}", capsys)


def test_a_cache_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLOSS_CACHE_DIR", str(tmp_path / "file"))
    assert f"the kernel cache {tmp_path / 'file'} cannot be written" in failed("warmup mse", capsys)
    with pytest.raises(InputError):
        warmup.compiled_kernels()


# A shell that starts pytest in the background has it ignore SIGINT, and that is inherited.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastloss import cli
sys.exit(cli.main())
"""


def test_an_interrupt_ends_all_of_its_processes(tmp_path: Path) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "warmup", "--jobs", "2"],
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert command.stdout is not None
    command.stdout.readline()
    os.killpg(command.pid, signal.SIGINT)
    _, errors = command.communicate(timeout=120)
    assert (command.returncode, errors) == (130, "fastloss: interrupted\n")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # its processes end what they are at
        try:
            os.killpg(command.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a process was left")


def test_classes_are_counts_of_rows() -> None:
    chosen = warmup.items([cli.loss_named("cross-entropy")], classes=[7, 300])
    assert [(item.classes, item.segmented) for item in chosen] == [(7, False), (300, False), (21, True)]
