"""Forks, spawns, threads and caches: after a first parallel call every process and thread is still right.

The file is also the script that its tests run in fresh processes: `python test_processes.py SCENARIO`.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastloss
import reference
from fastloss.backends import entry

HERE = Path(__file__).resolve()
ROOT = Path(fastloss.__file__).resolve().parents[1]
LAYERS = ("tbb", "omp", "workqueue")
PATIENCE = 240  # seconds until a process counts as hung

# ---- what the processes do


def right(seed: int) -> bool:
    """Whether losses and gradients large enough for threads equal the oracle's."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((4_000, 50)).astype(np.float32), rng.integers(0, 50, 4_000)
    truth = reference.cross_entropy(x, y, grad_output=1.0)
    value, grad = fastloss.value_and_grad(fastloss.cross_entropy)(x, y)
    squares = reference.mse_loss(x, x[::-1])
    # Mean: 3e-7 relative. Gradient: each element at most 1 / 4,000, its error at most 4 ulp of that.
    return bool(
        abs(value - truth.value) <= 3e-7 * truth.value
        and abs(grad - truth.input).max() <= 4 * 2.0**-36
        and abs(fastloss.mse_loss(x, x[::-1]) - squares.value) <= 3e-7 * squares.value
    )


def check(*answers: bool) -> None:
    if not all(answers):
        raise SystemExit(f"wrong answers: {answers}")


def in_child(work: Callable[[], bool]) -> None:
    """Fork, work in the child, and expect it to end well."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE // 2)  # a child that hangs is killed, and its status tells
        os._exit(0 if work() else 1)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise SystemExit(f"the forked child ended with status {status}")


def grandchild() -> bool:
    in_child(lambda: right(3))
    return right(4)


def fork() -> None:
    check(right(1))
    in_child(lambda: right(2))
    in_child(grandchild)
    check(right(5))


def fork_while_threads_work() -> None:
    """Locks that other threads hold at the fork are not held for ever in the child."""
    check(right(1))
    stop = threading.Event()
    answers: list[bool] = []

    def keep_busy(seed: int) -> None:
        while not stop.is_set():
            answers.append(right(seed))

    threads = [threading.Thread(target=keep_busy, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(5):
            in_child(lambda seed=seed: right(seed))  # type: ignore[misc]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    check(*answers)


def pool(method: str) -> None:
    check(right(1))
    with multiprocessing.get_context(method).Pool(2) as workers:
        check(*workers.map_async(right, range(4)).get(timeout=PATIENCE))
    check(right(2))


class Items:
    """A map-style dataset whose items are computed with fastloss in the workers."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> bool:
        return right(i)


def data_loader() -> None:
    from torch.utils.data import DataLoader

    check(right(1))
    loader: Any = DataLoader(Items(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE)
    check(*(bool(answer) for batch in loader for answer in batch))
    check(right(2))


def eight_threads() -> None:
    """At once from the first call on, so that they compile, start the pool and run together."""
    barrier = threading.Barrier(8)
    answers: list[bool] = []

    def work(seed: int) -> None:
        barrier.wait()
        answers.extend(right(seed + k) for k in range(3))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(len(answers) == 24, *answers)


def bits() -> None:
    """Print a digest of every loss, reduction and gradient, of inputs large enough for threads."""
    from table import ROWS

    rng = np.random.default_rng(7)
    digests = {}
    for row in ROWS:
        for shape in ((9_001, 20), (2, 5, 150, 151)):
            sample = row.draw(rng, shape, choice=row.everything())
            digest = hashlib.sha256()
            for reduction in row.reductions:
                for result in (
                    row.call(sample, reduction=reduction),
                    *row.gradient(sample, reduction=reduction),
                ):
                    digest.update(np.ascontiguousarray(result).tobytes())
            digests[f"{row.id} {shape}"] = digest.hexdigest()
    print(json.dumps(digests))


def value() -> None:
    """Print one small result: what the tests of the caches ask for, as it needs the fewest kernels."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    print(float(fastloss.mse_loss(x, 0 * x)))


SCENARIOS: dict[str, Callable[[], None]] = {
    "fork": fork,
    "fork-while-threads-work": fork_while_threads_work,
    "pool-fork": lambda: pool("fork"),
    "pool-spawn": lambda: pool("spawn"),
    "data-loader": data_loader,
    "eight-threads": eight_threads,
}

if __name__ == "__main__":
    name = sys.argv[1]
    {"bits": bits, "value": value, **SCENARIOS}[name]()
    wanted = os.environ.get("NUMBA_THREADING_LAYER")
    if name in SCENARIOS and wanted:
        import numba

        if numba.threading_layer() != wanted:
            raise SystemExit(f"ran on {numba.threading_layer()}, not on {wanted}")

# ---- the tests


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Cache directories that these processes share with each other and with nobody else."""
    folder = tmp_path_factory.mktemp("caches")
    yield {"FASTLOSS_CACHE_DIR": str(folder / "fastloss"), "NUMBA_CACHE_DIR": str(folder / "numba")}
    shutil.rmtree(folder)


def run(scenario: str, *, root: Path = ROOT, **environment: str) -> str:
    """Run a scenario in a fresh interpreter with two threads; what it printed."""
    path = os.pathsep.join([str(root), str(HERE.parent)])
    env = os.environ | {"NUMBA_NUM_THREADS": "2", "PYTHONPATH": path} | environment
    done = subprocess.run(
        [sys.executable, str(HERE), scenario],
        env=env,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, f"{scenario} ended with {done.returncode}:\n{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_after_a_parallel_call(scenario: str, layer: str, caches: dict[str, str]) -> None:
    run(scenario, NUMBA_THREADING_LAYER=layer, **caches)


def test_the_same_bits_for_any_number_of_threads(caches: dict[str, str]) -> None:
    """One thread, two, and two again on another threading layer."""
    one = json.loads(run("bits", NUMBA_NUM_THREADS="1", **caches))
    for environment in ({}, {"NUMBA_THREADING_LAYER": "workqueue"}):
        assert json.loads(run("bits", **environment, **caches)) == one


def test_set_num_threads_changes_no_bits() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((9_000, 30)).astype(np.float32), rng.integers(0, 30, 9_000)
    before = fastloss.get_num_threads()
    results = []
    try:
        for threads in (1, before):
            fastloss.set_num_threads(threads)
            assert fastloss.get_num_threads() == threads
            results.append(fastloss.cross_entropy(x, y, dtype="float64"))
    finally:
        fastloss.set_num_threads(before)
    assert results[0] == results[1]
    for bad in (0, -1, 10_000):
        with pytest.raises(ValueError, match="thread"):
            fastloss.set_num_threads(bad)


def test_entries_of_threads_that_meet_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads whose first calls meet each define what their functions point at; no definition is freed under them."""
    barrier = threading.Barrier(2)
    machine_code = entry.address

    def meet() -> int:
        barrier.wait()
        return machine_code()

    monkeypatch.setattr(entry, "address", meet)
    entry._definition.cache_clear()
    with ThreadPoolExecutor(2) as threads:
        found = {*threads.map(lambda _: entry._definition(), range(2))}
    assert len(found) == 2
    assert found <= {ctypes.addressof(definition) for definition in entry._definitions}


# ---- the disk cache


def check_value(printed: str) -> None:
    """The squares of 0 to 5, averaged."""
    assert float(printed.strip().splitlines()[-1]) == pytest.approx(55 / 6, rel=3e-7)


def files(caches: dict[str, str]) -> dict[Path, tuple[int, bytes]]:
    """Every cache file, when it was written and what it holds."""
    found = [p for folder in caches.values() for p in Path(folder).rglob("*") if p.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


@pytest.fixture
def own_caches(tmp_path: Path) -> dict[str, str]:
    """Cache directories of one test."""
    return {"FASTLOSS_CACHE_DIR": str(tmp_path / "fastloss"), "NUMBA_CACHE_DIR": str(tmp_path / "numba")}


def test_a_second_process_hits_the_cache(own_caches: dict[str, str]) -> None:
    """Nothing is compiled and nothing written again."""
    check_value(run("value", **own_caches))
    before = files(own_caches)
    assert any(path.is_relative_to(own_caches["FASTLOSS_CACHE_DIR"]) for path in before)
    printed = run("value", NUMBA_DEBUG_CACHE="1", **own_caches)
    assert "data saved" not in printed
    check_value(printed)
    assert files(own_caches) == before


def flipped(content: bytes, at: int) -> bytes:
    """One bit of one byte changed."""
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


CORRUPTIONS: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: b"",
    lambda content: content[: len(content) // 2],
    lambda content: flipped(content, 0),
    lambda content: flipped(content, len(content) // 2),
    lambda content: b"\x7fELF" + bytes(range(256)) * 20,
)


def test_corrupted_cache_files_are_no_error(own_caches: dict[str, str], rng: np.random.Generator) -> None:
    """Every file spoilt, each in its own way, three times; then a folder in place of each: right answers."""
    check_value(run("value", **own_caches))
    good = files(own_caches)
    for turn in rng.permutation(len(CORRUPTIONS))[:3]:
        for i, (path, (_, content)) in enumerate(good.items()):
            path.write_bytes(CORRUPTIONS[(i + turn) % len(CORRUPTIONS)](content))
        check_value(run("value", **own_caches))
    for path in files(own_caches):
        path.unlink()
        path.mkdir()
    check_value(run("value", **own_caches))


@pytest.mark.parametrize("which", ["FASTLOSS_CACHE_DIR", "NUMBA_CACHE_DIR", "both", "no home"])
def test_unwritable_cache_directories_are_no_error(which: str, caches: dict[str, str], tmp_path: Path) -> None:
    """A file where the directory should be refuses root, too; so does a package in a read-only place."""
    obstacle = tmp_path / "file"
    obstacle.touch()
    refused = str(obstacle / "cache")
    if which == "no home":
        root = copy_of_package(tmp_path)
        (root / "kernels" / "__pycache__").touch()
        environment = {"HOME": refused, "XDG_CACHE_HOME": refused, "FASTLOSS_CACHE_DIR": "", "NUMBA_CACHE_DIR": ""}
        check_value(run("value", root=root, PYTHONDONTWRITEBYTECODE="1", **environment))
        return
    environment = {name: refused if which in (name, "both") else folder for name, folder in caches.items()}
    check_value(run("value", **environment))


def copy_of_package(tmp_path: Path) -> Path:
    """The package as source files elsewhere, to be changed."""
    root = tmp_path / "copy"
    skip = shutil.ignore_patterns("__pycache__")
    kernels = Path(fastloss.__file__).parent / "kernels"
    shutil.copytree(ROOT / "fastloss", root / "fastloss", ignore=lambda at, names: [*skip(at, names), "kernels"])
    shutil.copytree(kernels, root / "kernels", ignore=skip)
    (root / "fastloss" / "kernels").symlink_to("../kernels")
    return root


def test_changed_sources_are_never_stale(tmp_path: Path, own_caches: dict[str, str]) -> None:
    """A formula, then an operator of a driver: seen even where size and time of the file stay as they were."""
    root = copy_of_package(tmp_path)
    run_copy = partial(run, "value", root=root, PYTHONDONTWRITEBYTECODE="1", **own_caches)
    check_value(run_copy())
    changes = (
        ("mse.py", "return d * d", "return d + d"),
        ("drivers.py", "start = chunk * self.field(PER_CHUNK)", "start = chunk + self.field(PER_CHUNK)"),
    )
    for file, old, new in changes:
        source = root / "kernels" / file
        status, text = source.stat(), source.read_text()
        assert old in text
        assert len(old) == len(new)
        source.write_text(text.replace(old, new, 1))
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert float(run_copy()) != pytest.approx(55 / 6)
        source.write_text(text)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        check_value(run_copy())
