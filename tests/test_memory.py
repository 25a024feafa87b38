"""Memory of large results: kept when they are gone, never while anything still looks at it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fastloss
from fastloss import memory

pytestmark = pytest.mark.skipif(not memory.AVAILABLE, reason="memory is kept on Linux")
ROWS, CLASSES = memory.LARGE // 4000 + 1, 1000  # float32 logits that are large


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    memory._kept.clear()
    yield
    memory._kept.clear()


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_the_next_result_lies_where_one_lay_that_is_gone() -> None:
    first = memory.empty((ROWS, CLASSES), np.float32)
    first[...] = 7
    place = address(first)
    assert place % 64 == 0
    del first
    assert len(memory._kept) == memory.KEPT
    again = memory.empty((CLASSES, ROWS), np.float32)
    assert address(again) == place
    assert not memory._kept


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[5:, 3:],
        lambda array: array.view(np.int32),
        torch.from_numpy,
        lambda array: array[5:].T.reshape(-1, order="F")[:10],
    ],
    ids=["slice", "dtype", "tensor", "of a view"],
)
def test_memory_is_not_given_away_while_it_is_seen(view: Callable[[np.ndarray], Any]) -> None:
    first = memory.empty((ROWS, CLASSES), np.float32)
    first[...] = 7
    place, kept = address(first), view(first)
    del first
    assert not memory._kept
    other = memory.empty((ROWS, CLASSES), np.float32)
    assert address(other) != place
    other[...] = 8
    assert (np.asarray(kept).view(np.float32) == 7).all()


def test_small_results_and_smaller_ones_do_not_take_it() -> None:
    big = memory.empty((4 * memory.LARGE,), np.uint8)
    place = address(big)
    del big
    assert memory.empty((memory.LARGE - 1,), np.uint8).base is None  # NumPy's own
    assert len(memory._kept) == 1
    assert address(memory.empty((memory.LARGE,), np.uint8)) != place  # a quarter of it would be used


def test_one_piece_is_kept() -> None:
    pieces = [memory.empty((memory.LARGE,), np.uint8) for _ in range(3)]
    last = address(pieces[-1])
    while pieces:
        del pieces[0]
    assert len(memory._kept) == memory.KEPT
    assert address(memory.empty((memory.LARGE,), np.uint8)) == last


def test_layouts() -> None:
    columns = np.empty((CLASSES, ROWS), np.float32).T
    assert memory.empty_like(columns).strides == columns.strides
    assert memory.empty_like(columns.T, np.float16).dtype == np.float16


def test_gradients_use_it_and_are_right(rng: np.random.Generator) -> None:
    """What lay in the memory before is no part of the result, the first call's and the plan's."""
    x = rng.standard_normal((ROWS, CLASSES)).astype(np.float32)
    t = rng.integers(0, CLASSES, len(x))
    t[::7] = -100
    fused = fastloss.value_and_grad(fastloss.cross_entropy)
    expected = fused(x, t, grad_out=np.empty_like(x))[1]
    places = set()
    for _ in range(3):
        _, grad = fused(x, t)
        np.testing.assert_array_equal(grad, expected)
        places.add(address(grad))
        grad[...] = np.nan
        del grad
    assert len(places) == 1
    tensors = torch.from_numpy(x), torch.from_numpy(t)
    for _ in range(2):
        _, tensor = fused(*tensors)
        np.testing.assert_array_equal(tensor.numpy(), expected)
        places.add(tensor.data_ptr())
        del tensor
    assert len(places) == 1


def test_without_memory_there_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="allocate"):
        memory.empty((1 << 60,), np.uint8)


def test_threads_never_share_a_piece() -> None:
    failures = []

    def work(number: int) -> None:
        for _ in range(20):
            piece = memory.empty((memory.LARGE,), np.uint8)
            piece[:: 4096 * 64] = number
            if (piece[:: 4096 * 64] != number).any():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_process_ends_with_memory_in_use() -> None:
    source = """
        import numpy as np, fastloss.memory as memory
        kept = memory.empty((memory.LARGE,), np.uint8)
        gone = memory.empty((memory.LARGE,), np.uint8)
        del gone
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
