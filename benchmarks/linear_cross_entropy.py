"""linear_cross_entropy beside what it replaces: time of value and gradients, and peak memory above their arrays.

`python benchmarks/linear_cross_entropy.py` measures each contender in processes of its own, `--rounds` of them in turn.
Each reads hidden states (N, D) and a weight (C, D), multiplies three times (2 N C D operations each: the logits, the
hidden states' gradient, the weight's), and writes both gradients.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from peak import peak

MB = 1e6


# ---- contenders: a function of hidden, weight and target that gives both gradients


def numpy_fused() -> Callable[..., Any]:
    import fastloss

    return lambda x, w, t: fastloss.value_and_grad(fastloss.linear_cross_entropy, (0, 1))(x, w, t)[1]


def numpy_plain() -> Callable[..., Any]:
    import fastloss

    fused = fastloss.value_and_grad(fastloss.cross_entropy)

    def run(x: np.ndarray, w: np.ndarray, t: np.ndarray) -> Any:
        logits = x @ w.T
        _, grad = fused(logits, t, grad_out=logits)
        return grad @ w, grad.T @ x

    return run


def of_torch(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward through autograd."""
    import torch

    def run(x: np.ndarray, w: np.ndarray, t: np.ndarray) -> Any:
        hidden, weight = (torch.from_numpy(a).requires_grad_() for a in (x, w))
        loss(hidden, weight, torch.from_numpy(t)).backward()
        return hidden.grad, weight.grad

    return run


def torch_fused() -> Callable[..., Any]:
    import fastloss

    return of_torch(fastloss.linear_cross_entropy)


def torch_with_fastloss() -> Callable[..., Any]:
    import torch

    import fastloss

    fused = fastloss.value_and_grad(fastloss.cross_entropy)

    def run(x: np.ndarray, w: np.ndarray, t: np.ndarray) -> Any:
        hidden, weight = torch.from_numpy(x), torch.from_numpy(w)
        logits = hidden @ weight.t()
        _, grad = fused(logits, torch.from_numpy(t), grad_out=logits)
        return grad @ weight, grad.t() @ hidden

    return run


def torch_plain() -> Callable[..., Any]:
    from torch.nn import functional as F

    return of_torch(lambda x, w, t: F.cross_entropy(F.linear(x, w), t))


def torch_own() -> Callable[..., Any]:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn import functional as F

    return of_torch(lambda x, w, t: F.linear_cross_entropy(x, w, t, options=LinearCrossEntropyOptions()))


CONTENDERS: dict[str, Callable[[], Callable[..., Any]]] = {
    "fastloss.linear_cross_entropy, torch": torch_fused,
    "F.linear and F.cross_entropy": torch_plain,
    "matmul and fastloss.cross_entropy, torch": torch_with_fastloss,
    "F.linear_cross_entropy, chunked": torch_own,
    "fastloss.linear_cross_entropy, NumPy": numpy_fused,
    "matmul and fastloss.cross_entropy, NumPy": numpy_plain,
}


def arrays(n: int, d: int, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((k, d), np.float32) for k in (n, c))
    return x, w / np.sqrt(np.float32(d)), rng.integers(0, c, n)


def measure(name: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """Seconds and bytes of one contender, in this process."""
    run = CONTENDERS[name]()
    x, w, t = arrays(*shape)
    run(x[:64], w[:4096].copy(), t[:64] % 4096)  # libraries load, kernels compile, threads start
    before = peak(reset=True)
    start = time.perf_counter()
    grads = run(x, w, t)
    seconds = time.perf_counter() - start
    extra = peak() - before - sum(grad.nbytes for grad in grads)
    return {"seconds": seconds, "bytes": extra, "checksum": float(abs(np.asarray(grads[1], np.float64)).sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs=3, type=int, default=[4096, 1024, 32000], metavar=("N", "D", "C"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    n, d, c = options.shape
    if options.contender:
        print(json.dumps(measure(options.contender, (n, d, c))))
        return

    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(options.threads))
    words = [sys.executable, __file__, "--shape", *map(str, options.shape), "--contender"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, results in found.items():
            done = subprocess.run([*words, name], env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout))

    logits = 4 * n * c
    print(f"{n} x {d} to {c} classes, float32, {options.threads} threads, value and gradients; median of "
          f"{options.rounds}")  # fmt: skip
    print(f"logits: {logits / MB:.0f} MB; memory: the most above inputs and gradients\n")
    print(f"{'':42}{'seconds':>9}{'GFLOP/s':>9}{'ratio':>7}{'MB':>8}{'of logits':>11}")
    plain = statistics.median(r["seconds"] for r in found["F.linear and F.cross_entropy"])
    for name, results in found.items():
        seconds = statistics.median(r["seconds"] for r in results)
        most = max(r["bytes"] for r in results)
        print(
            f"{name:42}{seconds:9.2f}{6e-9 * n * d * c / seconds:9.0f}{seconds / plain:7.2f}{most / MB:8.0f}"
            f"{most / logits:11.1%}"
        )
    sums = [results[0]["checksum"] for results in found.values()]
    if max(sums) > min(sums) * (1 + 1e-4):
        sys.exit(f"the weight's gradients disagree: {dict(zip(found, sums, strict=True))}")


if __name__ == "__main__":
    main()
