"""Cross-entropy in JAX programs beside XLA's own and beside the plain call on the same memory.

`python benchmarks/frameworks_jax.py [--rounds N]`. A forward call reads x and the class indices; one with gradient
writes dx too. Contenders take turns, and every time is a median; XLA's own is optax's loss, jitted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import limits
import numpy as np
import optax

import fastloss

SHAPES = ((32, 10), (2_048, 32_000))
SECONDS = 5e-3  # a round of a contender that takes less calls it several times


def own(x: jax.Array, t: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(x, t).mean()


def contenders(x: jax.Array, t: jax.Array, gradient: bool) -> dict[str, Callable[[], Any]]:
    """Calls on these arrays, the first of them made, that return when their results are there."""
    arrays = np.asarray(x), np.asarray(t)  # the same memory
    plain = fastloss.value_and_grad(fastloss.cross_entropy) if gradient else fastloss.cross_entropy
    ours, theirs = (jax.jit(jax.value_and_grad(f) if gradient else f) for f in (fastloss.cross_entropy, own))
    calls: dict[str, Callable[[], Any]] = {
        "fastloss, NumPy": lambda: plain(*arrays),
        "fastloss, jax.jit": lambda: jax.block_until_ready(ours(x, t)),
        "optax, jax.jit": lambda: jax.block_until_ready(theirs(x, t)),
    }
    values, grads = zip(*(call() if gradient else (call(), 0.0) for call in calls.values()), strict=True)
    for value, grad in zip(values, grads, strict=True):
        assert abs(float(value) - float(values[0])) <= 1e-6 * abs(float(values[0]))
        assert float(abs(grad - grads[0]).max() if gradient else 0) <= 1e-6 / len(x)
    return calls


def seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call, which take turns."""
    repeats = {name: max(1, int(SECONDS / min(seconds(call, 1) for _ in range(5)))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    rng = np.random.default_rng(0)
    print(f"jax {jax.__version__}, optax {optax.__version__}, {fastloss.get_num_threads()} threads")
    read, nbytes = limits.limit("read", 4 * SHAPES[-1][0] * SHAPES[-1][1])
    print(f"reading memory: {nbytes / medians({'read': read}, rounds)['read'] / 1e9:.1f} GB/s")
    for n, c in SHAPES:
        x = jnp.asarray(rng.standard_normal((n, c)), jnp.float32)
        t = jnp.asarray(rng.integers(0, c, n))
        for gradient in (False, True):
            nbytes = x.nbytes * (1 + gradient) + t.nbytes
            what = "value and gradient: reads x and t, writes dx" if gradient else "value: reads x and t"
            print(f"\n{n:,} x {c:,} float32, {what}, {nbytes / 1e6:.3f} MB")
            found = medians(contenders(x, t, gradient), rounds)
            for name, time_ in found.items():
                ratio = time_ / found["fastloss, jax.jit"]
                print(
                    f"  {name:20}{time_ * 1e6:12,.1f} us {nbytes / time_ / 1e9:8.2f} GB/s {ratio:8.2f} of ours in JAX"
                )


if __name__ == "__main__":
    main()
