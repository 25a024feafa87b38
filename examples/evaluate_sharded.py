"""The loss of a set that is sharded over files, by Dask: on threads, or on a cluster with --scheduler.

    python examples/evaluate_sharded.py --folder SHARDS

A shard is a pair of files, logits-K.npy of shape (samples, classes) and target-K.npy of shape (samples). Without shards
in the folder some are made. No process ever holds more than the shards that its tasks work on.
"""

import argparse
import sys
from pathlib import Path

import dask
import dask.array as da
import numpy as np

import fastloss

FOLDER = Path(__file__).resolve().parent.parent / "build" / "sharded"


def make_shards(folder: Path, shards: int = 8, classes: int = 100) -> None:
    """Shards of different lengths; 1 in 20 samples has no label, -100."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        samples = int(rng.integers(500, 1500))
        target = rng.integers(0, classes, samples)
        logits = rng.standard_normal((samples, classes), np.float32)
        logits[np.arange(samples), target] += 3
        np.save(folder / f"logits-{shard}.npy", logits)
        np.save(folder / f"target-{shard}.npy", np.where(rng.uniform(size=samples) < 0.05, -100, target))


def from_files(paths: list[Path]) -> da.Array:
    """The arrays of several files, one after the other: a chunk is a file, which its task reads."""
    parts = []
    for path in paths:
        header = np.load(path, mmap_mode="r")  # its shape and dtype; the numbers stay on the disk
        parts.append(da.from_delayed(dask.delayed(np.load)(path), header.shape, header.dtype))
    return da.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster, tcp://HOST:8786")
    args = parser.parse_args()
    if args.scheduler:
        from distributed import Client

        Client(args.scheduler)  # from here on Dask computes there

    found = sorted(args.folder.glob("logits-*.npy"))
    if not found:
        print(f"making shards in {args.folder}", file=sys.stderr)
        make_shards(args.folder)
        found = sorted(args.folder.glob("logits-*.npy"))
    logits = from_files(found)
    target = from_files([path.with_name(path.name.replace("logits", "target")) for path in found])

    # Graphs so far: two numbers and one loss for every sample, of which the ten highest are asked for.
    mean = fastloss.cross_entropy(logits, target, dtype="float64")
    losses = fastloss.cross_entropy(logits, target, reduction="none")
    labelled = (target != -100).sum()
    mean, labelled, worst = dask.compute(mean, labelled, da.argtopk(losses, 10))  # each shard is read once

    print(f"shards      {len(found)}")
    print(f"samples     {len(target):,}, {labelled:,} of them labelled")
    print(f"mean loss   {mean:.9f}")
    print(f"worst ten   {', '.join(map(str, worst))}")


if __name__ == "__main__":
    main()
