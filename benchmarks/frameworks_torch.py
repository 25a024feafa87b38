"""fastloss.torch beside torch and beside the bare kernel: small calls, a training step's loss, and its memory.

    python benchmarks/frameworks_torch.py [--rounds N]

Calls are interleaved as benchmarks/compare.py does it; medians. Bytes are those of the logits, read, and of the
gradient, written.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from compare import measured
from peak import peak
from torch import Tensor
from torch.nn import functional as F

import fastloss
import fastloss.torch as ft

Calls = dict[str, Callable[[], object]]
SHORTEST = 2e-3  # seconds of a turn: shorter calls are repeated


def show(title: str, calls: Calls, rounds: int, unit: str, nbytes: int = 0) -> None:
    """One table."""
    scale = {"us": 1e6, "ms": 1e3}[unit]
    for call in calls.values():
        call()  # compiled
    times = measured(calls, rounds, SHORTEST)
    found = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"\n{title}" + (f": {nbytes / 1e6:.0f} MB" if nbytes else ""))
    for name, seconds in found.items():
        speed = f"{nbytes / seconds / 1e9:8.1f} GB/s" if nbytes else ""
        print(f"  {name:<48}{seconds * scale:10.2f} {unit}{speed}")


def batch(n: int, c: int) -> tuple[Tensor, Tensor]:
    """Logits and labels."""
    torch.manual_seed(0)
    return torch.randn(n, c), torch.randint(c, (n,))


def small(rounds: int) -> None:
    """Calls that are all overhead."""
    x, t = batch(32, 10)
    theirs, ours = torch.nn.CrossEntropyLoss(), ft.CrossEntropyLoss()
    calls: Calls = {
        "torch.nn.functional.cross_entropy": lambda: F.cross_entropy(x, t),
        "fastloss.torch.cross_entropy": lambda: ft.cross_entropy(x, t),
        "torch.nn.CrossEntropyLoss()": lambda: theirs(x, t),
        "fastloss.torch.CrossEntropyLoss()": lambda: ours(x, t),
        "fastloss.cross_entropy, of the tensors": lambda: fastloss.cross_entropy(x, t),
    }
    show("cross-entropy (32, 10) float32, no gradient", calls, rounds, "us")
    leaf = x.clone().requires_grad_()
    calls = {
        "torch": lambda: torch.autograd.grad(F.cross_entropy(leaf, t), leaf),
        "fastloss.torch": lambda: torch.autograd.grad(ft.cross_entropy(leaf, t), leaf),
    }
    show("forward and backward (32, 10)", calls, rounds, "us")


def step(rounds: int, n: int = 2048, c: int = 32000) -> None:
    """Forward and backward of a language model's loss."""
    x, t = batch(n, c)
    leaf = x.clone().requires_grad_()
    fused = fastloss.value_and_grad(fastloss.cross_entropy)

    def backward(loss: Callable[[Tensor, Tensor], Tensor], factor: float = 1.0) -> Callable[[], None]:
        def call() -> None:
            (loss(leaf, t) * factor if factor != 1 else loss(leaf, t)).backward()
            leaf.grad = None  # to give memory back is part of a step

        return call

    compiled = torch.compile(ft.cross_entropy, fullgraph=True, backend="aot_eager")
    calls: Calls = {
        "fastloss.value_and_grad, no autograd": lambda: fused(x, t),
        "fastloss.torch": backward(ft.cross_entropy),
        "fastloss.torch, loss times 2": backward(ft.cross_entropy, 2.0),
        "fastloss.torch in torch.compile(aot_eager)": backward(compiled),
        "torch eager": backward(F.cross_entropy),
    }
    show(f"forward and backward ({n}, {c}) float32", calls, rounds, "ms", 2 * x.nbytes)
    held = peak(reset=True)  # a gradient that is gone, and kept for the next, is part of it
    backward(ft.cross_entropy)()
    more = peak() - held
    print(f"  memory beside what was held: {more / 1e6:.0f} MB; one gradient is {x.nbytes / 1e6:.0f} MB")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, fastloss {fastloss.__version__}, {torch.get_num_threads()} threads")
    small(rounds)
    step(rounds)


if __name__ == "__main__":
    main()
