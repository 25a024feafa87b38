"""Perplexity of a language model's logits that lie in memory-mapped files, in the memory of a few sequences.

    python examples/perplexity.py LOGITS.npy TOKENS.npy [LOGITS.npy TOKENS.npy ...]

Logits have shape (sequences, length, vocabulary), next tokens (sequences, length); padding is --padding, -100. Without
files, some are made: a chain of tokens, and a model that has learnt the chain's probabilities except for some noise.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fastloss

FOLDER = Path(__file__).resolve().parent.parent / "build" / "perplexity"


def make_files(
    folder: Path, shards: int = 3, sequences: int = 40, length: int = 64, vocabulary: int = 1000
) -> list[Path]:
    """Shards of logits in float16 and of tokens, sequences of different lengths padded with -100."""
    rng = np.random.default_rng(0)
    chain = 3 * rng.standard_normal((vocabulary, vocabulary), np.float32)  # log-odds of the next token
    probabilities = np.exp(chain)
    cumulative = (probabilities / probabilities.sum(1, keepdims=True)).cumsum(1, dtype=np.float64)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        here = np.empty((sequences, length + 1), np.int64)
        here[:, 0] = rng.integers(0, vocabulary, sequences)
        for k in range(length):
            above = rng.uniform(size=(sequences, 1)) < cumulative[here[:, k]]
            here[:, k + 1] = np.where(above[:, -1], above.argmax(1), vocabulary - 1)
        tokens = here[:, 1:].astype(np.int32)
        tokens[np.arange(length) >= rng.integers(length // 4, length + 1, (sequences, 1))] = -100
        pair = folder / f"logits-{shard}.npy", folder / f"tokens-{shard}.npy"
        shape = sequences, length, vocabulary
        logits = np.lib.format.open_memmap(pair[0], mode="w+", dtype=np.float16, shape=shape)
        for k in range(sequences):
            logits[k] = chain[here[k, :-1]] + 0.5 * rng.standard_normal((length, vocabulary), np.float32)
        logits.flush()
        np.save(pair[1], tokens)
        paths += pair
    return paths


def perplexity(paths: Sequence[Path], padding: int = -100, at_once: int = 8) -> tuple[float, fastloss.Meter]:
    """exp of the mean negative log-likelihood of all tokens that are no padding, `at_once` sequences at a time.

    The mean is over tokens: a mean of the sequences' or the shards' means would count tokens of short ones for more.
    """
    meter = fastloss.Meter("cross_entropy", ignore_index=padding)
    for logits_path, tokens_path in zip(paths[::2], paths[1::2], strict=True):
        logits, tokens = (np.load(path, mmap_mode="r") for path in (logits_path, tokens_path))
        if logits.shape[:-1] != tokens.shape:
            raise ValueError(f"{logits_path} has shape {logits.shape}, but {tokens_path} {tokens.shape}")
        for start in range(0, len(tokens), at_once):
            part = slice(start, start + at_once)
            # float16 is read as it is; the classes of cross_entropy are axis 1
            meter.update(logits[part].reshape(-1, logits.shape[-1]), tokens[part].reshape(-1))
    return math.exp(meter.compute()), meter


def main() -> int:
    """Prints the perplexity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="LOGITS.npy TOKENS.npy")
    parser.add_argument("--padding", type=int, default=-100, help="token that is padding (default -100)")
    parser.add_argument("--at-once", type=int, default=8, help="sequences that are read together (default 8)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where files are made if none are given")
    options = parser.parse_args()
    if len(options.paths) % 2:
        parser.error("each file of logits needs its file of tokens")
    paths = options.paths or make_files(options.folder)
    value, meter = perplexity(paths, options.padding, options.at_once)
    size = sum(path.stat().st_size for path in paths)
    print(f"{len(paths) // 2} shards, {size / 1e6:.1f} MB, {options.at_once} sequences at a time")
    print(f"tokens      {meter.samples - meter.ignored:>14,}   and {meter.ignored:,} of padding")
    print(f"nats        {meter.compute():>14.10f}   a token")
    print(f"bits        {meter.compute() / math.log(2):>14.10f}   a token")
    print(f"perplexity  {value:>14.10f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
