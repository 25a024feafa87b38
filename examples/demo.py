"""Real models, real data: `fastloss evaluate` beside scikit-learn's own metrics, on held-out predictions."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss, mean_absolute_error, mean_squared_error
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDER = Path(__file__).resolve().parent.parent / "build" / "demo"

# The same sums in another order: float64 agrees far below this, float32 files are rounded to 6e-8 beforehand.
BOUNDS = {"float64": 1e-12, "float32": 1e-6}


def fastloss(*words: str) -> str:
    """What the command prints, run as a shell would in the demo's folder."""
    command = [sys.executable, "-m", "fastloss", *words]
    done = subprocess.run(command, cwd=FOLDER, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # it has said why
        sys.exit(done.returncode)
    return done.stdout


def digits() -> Iterator[tuple[str, str, np.ndarray, np.ndarray, float]]:
    """Ten classes of 8 x 8 images: logits (450, 10)."""
    x, x_test, t, t_test = train_test_split(*load_digits(return_X_y=True), random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, t)
    expected = log_loss(t_test, model.predict_proba(x_test))
    yield "digits", "cross-entropy", model.decision_function(x_test), t_test, expected


def breast_cancer() -> Iterator[tuple[str, str, np.ndarray, np.ndarray, float]]:
    """Benign or malignant: probabilities (143,)."""
    x, x_test, t, t_test = train_test_split(*load_breast_cancer(return_X_y=True), random_state=0)
    p = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, t).predict_proba(x_test)[:, 1]
    yield "cancer", "bce", p, t_test.astype(p.dtype), log_loss(t_test, p)


def diabetes() -> Iterator[tuple[str, str, np.ndarray, np.ndarray, float]]:
    """Progress of the disease after a year: numbers (111,)."""
    x, x_test, y, y_test = train_test_split(*load_diabetes(return_X_y=True), random_state=0)
    y_hat = LinearRegression().fit(x, y).predict(x_test)
    yield "diabetes", "l1", y_hat, y_test, mean_absolute_error(y_test, y_hat)
    yield "diabetes", "mse", y_hat, y_test, mean_squared_error(y_test, y_hat)


def main() -> int:
    """Prints the comparison; returns 1 if any loss disagrees."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    worst = dict.fromkeys(BOUNDS, 0.0)
    print(f"{'data':<10}{'loss':<15}{'files':<9}{'fastloss':>22}{'scikit-learn':>22}{'difference':>12}")
    for dataset in (digits, breast_cancer, diabetes):
        for name, loss, predictions, targets, expected in dataset():
            for dtype in BOUNDS:
                files = (f"{name}-predictions-{dtype}.npy", f"{name}-targets-{dtype}.npy")
                np.save(FOLDER / files[0], predictions.astype(dtype))
                np.save(FOLDER / files[1], targets if targets.dtype.kind == "i" else targets.astype(dtype))
                value = json.loads(fastloss("evaluate", loss, *files, "--json"))["value"]
                difference = abs(value - expected) / expected
                worst[dtype] = max(worst[dtype], difference)
                print(f"{name:<10}{loss:<15}{dtype:<9}{value:>22.16g}{expected:>22.16g}{difference:>12.1e}")

    words = ["evaluate", "cross-entropy", "digits-predictions-float64.npy", "digits-targets-float64.npy"]
    words += ["--by-class", "--plot", "digits.png"]
    print(f"\n$ cd {os.path.relpath(FOLDER)}\n$ fastloss {' '.join(words)}\n{fastloss(*words)}")
    print(f"the picture: {os.path.relpath(FOLDER / 'digits.png')}")

    wrong = [dtype for dtype, bound in BOUNDS.items() if not worst[dtype] <= bound]
    for dtype, bound in BOUNDS.items():
        verdict = "DISAGREES" if dtype in wrong else "agrees"
        print(f"{dtype} {verdict} with scikit-learn: relative difference at most {worst[dtype]:.1e}, bound {bound:g}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
