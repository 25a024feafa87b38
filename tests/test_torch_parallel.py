"""Vocabulary-parallel cross-entropy: ranks of a gloo group beside one process that holds all classes."""

import os
import pickle
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastloss
import fastloss.torch as ft
from fastloss.torch.parallel import vocab_parallel_cross_entropy

RANKS = 4
CLASSES = 320
CUTS = {1: (0, CLASSES), 2: (0, 180, CLASSES), 4: (0, 80, 80, 180, CLASSES)}  # one of the ranks has no classes
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.1, "lse_square_scale": 1e-3},
    {"weight": True, "ignore_index": 3, "reduction": "sum"},
    {"softcap": 5.0, "reduction": "none"},
    {"weight": True, "label_smoothing": 0.2, "lse_square_scale": 1e-3, "softcap": 5.0, "reduction": "none"},
    {"probabilities": True, "weight": True, "label_smoothing": 0.1, "lse_square_scale": 1e-3},
)
CASES = [((12, CLASSES), options) for options in OPTIONS]
CASES += [((2, CLASSES, 9), OPTIONS[1]), ((CLASSES,), OPTIONS[0])]
SHAPE = CASES[0][0]


def drawn(seed: int, shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Logits, target and options of the whole, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(shape, generator=generator)
    axis = min(1, len(shape) - 1)
    samples = shape[:axis] + shape[axis + 1 :]
    options = dict(options)
    if options.pop("probabilities", False):
        target = torch.rand(shape, generator=generator)
    else:
        target = torch.randint(0, shape[axis], samples, generator=generator)
        if target.ndim:
            target[0] = options.get("ignore_index", -100)
    if options.get("weight"):
        options["weight"] = torch.rand(shape[axis], generator=generator) + 0.5
    return x, target, options


def part(tensor: Any, axis: int, rank: int, ranks: int) -> Any:
    start, stop = CUTS[ranks][rank : rank + 2]
    return tensor.narrow(axis, start, stop - start)


def evaluated(seed: int, rank: int, ranks: int, group: Any) -> list[Any]:
    """Loss and own gradient of each case."""
    found = []
    for shape, given in CASES:
        axis = min(1, len(shape) - 1)
        x, target, options = drawn(seed, shape, given)
        shard = part(x, axis, rank, ranks).clone().requires_grad_()
        target = part(target, axis, rank, ranks) if target.is_floating_point() else target
        if "weight" in options:
            options["weight"] = part(options["weight"], 0, rank, ranks)
        loss = vocab_parallel_cross_entropy(shard, target, process_group=group, **options)
        (loss * upstream(loss)).sum().backward()
        found.append((loss.detach(), shard.grad))
    return found


def upstream(loss: Any) -> Any:
    """A gradient of the loss that no two samples share."""
    return torch.linspace(0.5, 2, max(1, loss.numel())).reshape(loss.shape)


def outcome(call: Any) -> tuple[str, str]:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - it is what is asked for
        return type(error).__name__, str(error)
    return "", ""


def failures(rank: int) -> dict[str, tuple[str, str]]:
    """What a rank sees where a call cannot succeed, on it or on another one."""
    x, target, _ = drawn(0, SHAPE, {})
    shard, group = part(x, 1, rank, RANKS).clone(), dist.group.WORLD
    far = torch.full_like(target, CLASSES)
    short, learning = (target[:3] if rank == 3 else target), shard.clone().requires_grad_()

    def call(*args: Any, **options: Any) -> Any:
        return vocab_parallel_cross_entropy(*args, process_group=options.pop("group", group), **options)

    def twice() -> None:
        loss = call(learning, target)
        (grad,) = torch.autograd.grad(loss, learning, create_graph=True)
        grad.sum().backward()

    return {
        "out of range": outcome(lambda: call(shard, far)),
        "one rank's target": outcome(lambda: call(shard, short)),
        "one rank's tensor": outcome(lambda: call(None if rank == 1 else shard, target)),
        "samples": outcome(lambda: call(shard[:5] if rank == 2 else shard, target)),
        "ignored elsewhere": outcome(lambda: call(shard, far * 0 - 100 if rank == 0 else far * 0)),
        "reduction": outcome(lambda: call(shard, target, reduction="average")),
        "label_smoothing": outcome(lambda: call(shard, target, label_smoothing=2.0)),
        "target requires grad": outcome(lambda: call(shard, torch.zeros_like(shard).requires_grad_())),
        "twice": outcome(twice),
        "other group": outcome(lambda: call(shard, target, group=dist.GroupMember.NON_GROUP_MEMBER)),
    }


def dtypes(rank: int, ranks: int) -> list[Any]:
    """Losses and gradients of half-precision shards, and of a loss in another dtype than the shard."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x, target, _ = drawn(1, SHAPE, {})
        shard = part(x, 1, rank, ranks).to(dtype).requires_grad_()
        loss = ft.cross_entropy(shard, target, process_group=dist.group.WORLD)
        loss.backward()
        with torch.no_grad():
            wide = ft.cross_entropy(shard, target, process_group=dist.group.WORLD, dtype=torch.float64)
        found.append((loss.detach(), shard.grad, wide))
    return found


def alone(seed: int) -> None:
    """The cases in a group of one, whose kernels all ranks then read from the disk cache."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        evaluated(seed, 0, 1, dist.group.WORLD)
        dtypes(0, 1)
    finally:
        dist.destroy_process_group()


def work(rank: int, port: int, seed: int, out: str) -> None:
    """All cases on one rank, over the group of four and, for the first two ranks, a group of their own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    pair = dist.new_group([0, 1])
    found: dict[str, Any] = {"four": evaluated(seed, rank, 4, dist.group.WORLD)}
    if rank < 2:
        found["two"] = evaluated(seed, rank, 2, pair)
    else:
        found["not a member"] = outcome(lambda: evaluated(seed, 0, 2, pair))
    found["failures"], found["dtypes"] = failures(rank), dtypes(rank, RANKS)
    Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seed() -> int:
    return int(os.environ["FASTLOSS_TEST_SEED"]) % 2**31


@pytest.fixture(scope="module")
def ranks(seed: int, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes found; they are started once for all tests."""
    alone(seed)
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port), str(seed), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(said)
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(RANKS)]


def one_process(seed: int) -> list[Any]:
    """Losses and gradients by all classes, of the unsharded loss."""
    found = []
    for shape, given in CASES:
        x, target, options = drawn(seed, shape, given)
        x.requires_grad_()
        loss = ft.cross_entropy(x, target, **options)
        (loss * upstream(loss)).sum().backward()
        found.append((loss.detach(), x.grad))
    return found


@pytest.mark.parametrize(("name", "count"), [("four", 4), ("two", 2)])
def test_equal_to_one_process(name: str, count: int, ranks: list[dict[str, Any]], seed: int) -> None:
    """Losses to 1e-6 of themselves, gradients to 1e-6 of the largest upstream gradient and weight."""
    for case, ((shape, _), (loss, grad)) in enumerate(zip(CASES, one_process(seed), strict=True)):
        axis = min(1, len(shape) - 1)
        for rank in range(count):
            value, own = ranks[rank][name][case]
            assert value.equal(ranks[0][name][case][0]), "ranks disagree"
            torch.testing.assert_close(value, loss, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(own, part(grad, axis, rank, count), rtol=1e-6, atol=1e-6)


def test_dtypes(ranks: list[dict[str, Any]]) -> None:
    for case, dtype in enumerate((torch.bfloat16, torch.float16, torch.float64)):
        x, target, _ = drawn(1, SHAPE, {})
        whole = x.to(dtype).requires_grad_()
        loss = fastloss.cross_entropy(whole.detach().double(), target)
        ft.cross_entropy(whole.to(torch.float64), target).backward()
        eps = torch.finfo(dtype).eps
        for rank in range(RANKS):
            value, grad, wide = ranks[rank]["dtypes"][case]
            assert (value.dtype, grad.dtype, wide.dtype) == (dtype, dtype, torch.float64)
            assert wide.equal(ranks[0]["dtypes"][case][2])
            torch.testing.assert_close(wide, loss, rtol=3e-7, atol=0)
            torch.testing.assert_close(value.double(), loss, rtol=max(eps, 1e-12), atol=0)
            own = part(whole.grad, 1, rank, RANKS)
            torch.testing.assert_close(grad.double(), own.double(), rtol=2 * eps, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "rank", "kind", "message"),
    [
        ("out of range", None, "ClassIndexError", "target 320 at position (0,) is out of range for 320 classes"),
        ("one rank's target", 3, "ValueError", "target has shape (3,), expected (12,)"),
        ("one rank's tensor", 1, "TypeError", "input is a NoneType"),
        ("samples", None, "ValueError", "[12, 12, 5, 12] samples"),
        ("ignored elsewhere", None, "ValueError", "different targets"),
        ("reduction", None, "ValueError", "reduction is 'average'"),
        ("label_smoothing", None, "ValueError", "label_smoothing is 2.0"),
        ("target requires grad", None, "TypeError", "target requires grad"),
        ("twice", None, "RuntimeError", "no gradient of its own"),
        ("other group", None, "ValueError", "not in the process group"),
    ],
)
def test_failures(name: str, rank: int | None, kind: str, message: str, ranks: list[dict[str, Any]]) -> None:
    """A problem of all ranks is each one's own; of one rank's problem the others hear, and nobody waits."""
    for k in range(RANKS):
        found, said = ranks[k]["failures"][name]
        if rank in (None, k):
            assert (found, message in said) == (kind, True), said
        else:
            assert (found, said) == (
                "RuntimeError",
                f"rank {rank} of the process group cannot take part: it says why itself",
            )


def test_who_is_not_in_the_group(ranks: list[dict[str, Any]]) -> None:
    for k in (2, 3):
        assert ranks[k]["not a member"] == (
            "ValueError",
            "this process is not in the process group, whose ranks hold the classes",
        )


if __name__ == "__main__":
    try:
        work(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    except BaseException:
        traceback.print_exc()
        raise
