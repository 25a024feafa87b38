"""What is installed: an sdist that builds the wheel, a pure-Python wheel with the kernels, a light import."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastloss

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = {"torch", "jax", "cupy", "dask", "distributed", "pyarrow", "safetensors", "zarr", "matplotlib"}
HEAVY = OPTIONAL | {"numba", "llvmlite"}

pytestmark = pytest.mark.skipif(
    not (ROOT / "fastloss" / "kernels" / "__init__.py").exists(), reason="not a checkout with its link"
)


def run_python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Standard output of this Python, run with `arguments` and without the caller's PYTHONPATH."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist, of a copy of the checkout."""
    tree = tmp_path_factory.mktemp("dist") / "checkout"
    hidden = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "docs", "benchmarks")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=hidden)
    # Without options `build` makes the sdist, unpacks it, and builds the wheel from what it unpacked.
    run_python("-P", "-m", "build", "--no-isolation", "--outdir", str(tree.parent / "out"), cwd=tree)
    return tree.parent / "out"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel alone is installed."""
    target = tmp_path_factory.mktemp("installed") / "site"
    arguments = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--target", str(target))
    run_python("-P", "-m", "pip", "install", *arguments, str(wheel), cwd=target.parent)
    return target


def test_sdist_holds_what_a_wheel_is_built_from(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "pyproject.toml", "LICENSE", "README.md", "fastloss/py.typed"} <= names
    kernels = {f"kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    assert kernels <= names
    assert not any(name.startswith("fastloss/kernels") for name in names)  # the link stays behind


def test_wheel_is_pure_python_and_whole(wheel: Path) -> None:
    assert wheel.name == f"fastloss-{fastloss.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in (".", "arrays", "backends", "backends/cuda", "jax", "torch")
        for path in (ROOT / "fastloss" / folder).glob("*.py")
    }
    kernels = {f"fastloss/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert "fastloss/kernels/__init__.py" in kernels
    assert names == sources | kernels | {"fastloss/py.typed"}


def test_wheel_metadata(wheel: Path) -> None:
    info = f"fastloss-{fastloss.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Version"] == fastloss.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastloss.__version__)
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "fastloss = fastloss.cli:main" in scripts
    base = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [re.split(r"[^\w]", line)[0] for line in base] == ["numpy", "numba", "llvmlite", "tbb"]
    extras = set(metadata.get_all("Provides-Extra", []))
    assert {"torch", "jax", "cuda12", "cuda13", "dask", "files", "plots", "cli", "test", "docs"} <= extras


def test_installed_wheel_computes_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    """The wheel needs neither the checkout nor the link; the value is (1 + 4) / 2."""
    script = """if True:
        import fastloss, fastloss.kernels
        print(fastloss.__file__, fastloss.kernels.__file__, sep="\\n")
        print(fastloss.mse_loss([1.0, 2.0], [2.0, 4.0]))
    """
    output = run_python("-P", "-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    package, kernels, value = output.splitlines()
    assert Path(package) == installed / "fastloss" / "__init__.py"
    assert Path(kernels) == installed / "fastloss" / "kernels" / "__init__.py"
    assert float(value) == 2.5


def test_checkout_computes_uninstalled(tmp_path: Path) -> None:
    """A checkout on the path is enough, and `fastloss.kernels` is its kernels/."""
    script = "import fastloss.kernels; print(fastloss.kernels.__file__)"
    (file,) = run_python("-P", "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT)).splitlines()
    assert Path(file).samefile(ROOT / "kernels" / "__init__.py")


def test_import_loads_no_array_library_but_numpy(tmp_path: Path) -> None:
    """Numba alone would cost half a second; what the import costs is printed, for a time is no test."""
    script = """if True:
        import json, sys, time
        import numpy
        start = time.perf_counter()
        import fastloss
        cost = time.perf_counter() - start
        print(json.dumps([cost, sorted({name.partition(".")[0] for name in sys.modules})]))
    """
    cost, loaded = json.loads(run_python("-P", "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT)))
    print(f"import fastloss: {1e3 * cost:.1f} ms beyond NumPy")
    assert not HEAVY & set(loaded)
    assert {"numpy", "fastloss"} <= set(loaded)


MISSING = {"torch": "torch", "jax": "jax"}  # module of fastloss -> the extra that brings its library


@pytest.mark.parametrize("module", MISSING)
def test_a_missing_library_is_named_with_its_extra(module: str, tmp_path: Path) -> None:
    script = f"import sys; sys.modules[{module!r}] = None; import fastloss.{module}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    expected = f'fastloss.{module} needs {module}, which is not installed: pip install "fastloss[{MISSING[module]}]"'
    assert last == f"ModuleNotFoundError: {expected}"


def test_everything_else_works_without_optional_libraries(tmp_path: Path) -> None:
    """With NumPy, Numba and llvmlite alone: values, gradients, a Meter, shards, the command on .npy files."""
    script = f"""if True:
        import sys
        sys.modules |= dict.fromkeys({sorted(OPTIONAL | {"ml_dtypes", "tqdm"})!r})
        import numpy as np
        import fastloss
        from fastloss.cli import main
        x, t = np.array([[0.0, 0.0]]), np.array([1])
        value, grad = fastloss.value_and_grad(fastloss.cross_entropy)(x, t)
        meter = fastloss.Meter("cross_entropy")
        meter.update(x, t)
        shard = fastloss.cross_entropy_partials(x, t, num_classes=2)
        linear = fastloss.linear_cross_entropy(x, np.zeros((2, 2)), t)
        np.testing.assert_allclose([value, meter.compute(), shard.finish(), linear], np.log(2))
        np.testing.assert_allclose(grad, [[0.5, -0.5]])
        np.save("x.npy", x)
        np.save("t.npy", t)
        sys.exit(main(["evaluate", "cross-entropy", "x.npy", "t.npy"]))
    """
    assert "0.69314" in run_python("-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT))
