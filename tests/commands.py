"""What the tests of the command share: files to evaluate, and ways to run it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastloss import cli

ONE_ROW = "0.000001"  # --chunk-mb: smaller than any row
ROWS, CLASSES = 61, 7
CE = "cross-entropy logits.npy index.npy"
BCE = "bce unit.npy probabilities.npy"


def fill(folder: Path, rng: np.random.Generator) -> None:
    """Predictions, targets and weights; what is floating also in float32, under a name that ends in 32."""
    index = rng.integers(0, CLASSES, ROWS)
    index[::9] = -100
    index[4] = 0
    arrays = {
        "logits": 3 * rng.standard_normal((ROWS, CLASSES)),
        "maps": rng.standard_normal((ROWS, CLASSES, 2, 3)),
        "index": index,
        "index_maps": rng.integers(0, CLASSES, (ROWS, 2, 3)),
        "probabilities": rng.dirichlet(np.ones(CLASSES), ROWS),
        "unit": rng.random((ROWS, CLASSES)),
        "line": rng.standard_normal(ROWS),
        "line_target": rng.standard_normal(ROWS),
        "class_weight": rng.random(CLASSES) + 0.1,
        "element_weight": rng.random((ROWS, CLASSES)) + 0.1,
        "line_weight": rng.random(ROWS) + 0.1,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        if array.dtype == np.float64:
            np.save(folder / f"{name}32.npy", array.astype(np.float32))


def run(*words: str, capture: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command in this process."""
    status = cli.main([str(word) for word in words])
    out, err = capture.readouterr()
    return status, out, err


def result(*words: str, capture: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON of an evaluation that must succeed, silently."""
    status, out, err = run("evaluate", *words, "--json", capture=capture)
    assert (status, err) == (0, "")
    content: dict[str, Any] = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return content


def files_of(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# Runs `fastloss` after some preparation that only a process of its own can have.
PREPARED = """
import os, resource, signal, sys
import fastloss.meter
from fastloss.cli import main
{}
sys.exit(main(sys.argv[1:]))
"""


def prepared(code: str, *words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PREPARED.format(code), *words]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, **settings)
