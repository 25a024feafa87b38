"""Each example runs as its reader would run it, and what it prints is right."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def perplexity_is_the_oracles(printed: str, folder: Path) -> None:
    """exp of the mean over all tokens, from the files that it made, in float64 by NumPy alone."""
    total, count = 0.0, 0
    for path in sorted(folder.glob("logits-*.npy")):
        x, t = np.load(path).astype(np.float64), np.load(path.with_name(path.name.replace("logits", "tokens")))
        kept = t != -100
        assert 0 < kept.sum() < kept.size
        lse = np.log(np.exp(x).sum(-1))
        total += float((lse - np.take_along_axis(x, np.where(kept, t, 0)[..., None], -1)[..., 0])[kept].sum())
        count += int(kept.sum())
    tokens, value = re.search(r"tokens +([\d,]+)", printed), re.search(r"perplexity +([\d.]+)", printed)
    assert tokens is not None
    assert value is not None
    assert int(tokens[1].replace(",", "")) == count
    # each row's loss is float32's; the mean of thousands is nearer
    assert float(value[1]) == pytest.approx(np.exp(total / count), rel=1e-6)


def parameters_are_the_same(printed: str, folder: Path) -> None:
    """Of a model trained with torch.nn's loss and of one with fastloss.torch's."""
    difference = re.search(r"difference between parameters: ([\d.e+-]+)", printed)
    assert difference is not None
    assert float(difference[1]) <= 1e-5
    right = [float(share) for share in re.findall(r"([\d.]+)% of the images right", printed)]
    assert len(right) == 2
    assert min(right) > 95


def mean_is_the_oracles(printed: str, folder: Path) -> None:
    """Over all labelled samples of all shards, in float64 by NumPy alone; and the samples that cost most."""
    paths = sorted(folder.glob("logits-*.npy"))
    x = np.concatenate([np.load(path) for path in paths]).astype(np.float64)
    t = np.concatenate([np.load(path.with_name(path.name.replace("logits", "target"))) for path in paths])
    kept = t != -100
    losses = np.where(kept, np.log(np.exp(x).sum(1)) - x[np.arange(len(t)), np.where(kept, t, 0)], 0)
    mean, worst = re.search(r"mean loss +([\d.]+)", printed), re.search(r"worst ten +([\d, ]+)", printed)
    assert mean is not None
    assert worst is not None
    assert float(mean[1]) == pytest.approx(losses[kept].mean(), rel=1e-6)
    assert [int(k) for k in worst[1].split(",")] == np.argsort(-losses)[:10].tolist()


# example -> its arguments ("{}": an empty folder), and what is checked of its output and that folder
RUNS: dict[str, tuple[list[str], Callable[[str, Path], None]]] = {
    "evaluate_sharded.py": (["--folder", "{}"], mean_is_the_oracles),
    "perplexity.py": (["--folder", "{}"], perplexity_is_the_oracles),
    "train_digits.py": ([], parameters_are_the_same),
}
ELSEWHERE = {"demo.py"}  # `make demo` runs it, with the extra of its name


@pytest.mark.parametrize("name", RUNS)
def test_example(name: str, tmp_path: Path) -> None:
    words, check = RUNS[name]
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *(word.format(tmp_path) for word in words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(done.stdout, tmp_path)


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*RUNS} | ELSEWHERE
