"""Trains a classifier of handwritten digits twice, with torch.nn's loss and with fastloss.torch's, from one seed.

    python examples/train_digits.py            # 200 steps, a second or two
    python examples/train_digits.py --steps 50 --hidden 16

Needs torch and scikit-learn, whose digits it reads: 1,797 images of 8 x 8 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastloss.torch


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64), 0 to 1, and their digits (1797)."""
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def train(loss: nn.Module, images: Tensor, labels: Tensor, steps: int, hidden: int) -> tuple[nn.Module, list[float]]:
    """A model after so many steps of SGD on batches of 64, and the loss of each step. The seed is always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    curve = []
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        value = loss(model(images[batch]), labels[batch])
        value.backward()
        optimizer.step()
        curve.append(value.item())
    return model, curve


def main(argv: Sequence[str] | None = None) -> float:
    """Trains both and prints their curves; returns the largest difference between their parameters."""
    parser = argparse.ArgumentParser(description="torch.nn.CrossEntropyLoss and fastloss.torch.CrossEntropyLoss")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=32)
    args = parser.parse_args(argv)
    images, labels = digits()
    runs = {
        "torch.nn": train(nn.CrossEntropyLoss(label_smoothing=0.1), images, labels, args.steps, args.hidden),
        "fastloss.torch": train(
            fastloss.torch.CrossEntropyLoss(label_smoothing=0.1), images, labels, args.steps, args.hidden
        ),
    }
    print(f"{'step':>6}" + "".join(f"{name:>18}" for name in runs))
    shown = sorted({*range(0, args.steps, max(1, args.steps // 10)), args.steps - 1})
    for step in shown:
        print(f"{step:>6}" + "".join(f"{curve[step]:>18.9f}" for _, curve in runs.values()))
    for name, (model, _) in runs.items():
        print(f"{name}: {(model(images).argmax(1) == labels).double().mean():.1%} of the images right")
    (a, _), (b, _) = runs.values()
    difference = max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    print(f"largest difference between parameters: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
