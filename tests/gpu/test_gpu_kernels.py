"""Every kernel in every way that it can go, by calls that are known to take it there."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from on_device import (
    BRANCHES,
    SIMULATED,
    Room,
    branches,
    check_gradient,
    check_value,
    every_second,
    has_gradient,
    host,
    kinds,
    on_device,
    overlapping,
    upload,
    upstream,
    wider_rows,
)

import fastloss
from fastloss.backends.cuda.driver import Launch
from fastloss.backends.cuda.tuning import SIMULATOR, TUNING, Tuning
from fastloss.kernels.cuda.folding import FoldingKernel
from fastloss.kernels.cuda.nll import NLLKernel
from fastloss.kernels.cuda.pointwise import PointwiseKernel
from fastloss.kernels.cuda.rows import RowsKernel
from fastloss.kernels.cuda.samples import SamplesKernel
from fastloss.kernels.cuda.sums import Combination
from table import BY_ID, CLASSES, FULL, LAST, Options, Rng, Row, Sample, name_of

H100 = TUNING[9, 0]
# Blocks of several warps, threads with several vectors, and rows that are never cut.
LARGE = replace(
    SIMULATOR,
    pointwise_threads=64,
    pointwise_blocks=3,
    row_threads=(64, 128),
    vectors=2,
    slice_classes=10**6,
    sample_threads=64,
    tile_classes=64,
)
MANY_BLOCKS = replace(SIMULATOR, pointwise_blocks=16)
SAVING = {"weight": CLASSES, "label_smoothing": 0.1, "lse_square_scale": 1e-3}


def shifted(x: Any) -> Any:
    """One element off the alignment of the memory."""
    return Room(x, shift=1).array if isinstance(x, np.ndarray) else x


def spaced(x: Any) -> Any:
    return on_device(every_second(x)) if isinstance(x, np.ndarray) else x


def unlike(x: Any) -> Any:
    """Rows that are aligned otherwise than those of packed arrays."""
    return on_device(wider_rows(x)) if isinstance(x, np.ndarray) and x.ndim > 1 else on_device(x)


@dataclass(frozen=True)
class Case:
    """A call, and the branches of the kernel that it takes beside others."""

    kernel: type[Any]
    words: str  # of `BRANCHES`, separated by commas
    row: str
    shape: tuple[int, ...]
    choice: Options = field(default_factory=dict)
    dtype: str = "float32"
    place: Callable[[Any], Any] = on_device
    sizes: Tuning = SIMULATOR
    reduction: str = "none"  # of the gradient; a mean of weights needs their sum

    def __str__(self) -> str:
        sizes = {SIMULATOR: "", LARGE: "-large", MANY_BLOCKS: "-many", H100: "-h100"}[self.sizes]
        place = "" if self.place is on_device else f"-{self.place.__name__}"
        shape = "x".join(map(str, self.shape))
        return f"{self.words}-{self.row}-{shape}-{self.dtype}-{name_of(self.choice)}{place}{sizes}"


CE, SOFT, NLL, MSE = "cross_entropy", "cross_entropy-probabilities", "nll_loss", "mse_loss"
CASES = [
    Case(SamplesKernel, "tiled", CE, (70, 7)),
    Case(SamplesKernel, "tiled", CE, (70, 3), SAVING, "float16"),
    Case(SamplesKernel, "tiled", SOFT, (33, 6), SAVING),
    Case(SamplesKernel, "tiled", CE, (1, 15), {}, "float64"),
    Case(SamplesKernel, "tiled", CE, (66, 17), sizes=LARGE),
    Case(SamplesKernel, "tiled", CE, (130, 5), {"softcap": 5.0}, "bfloat16", sizes=H100),
    Case(SamplesKernel, "tiled", CE, (20, 34), SAVING, "float64", sizes=H100),
    Case(SamplesKernel, "one sample a thread", CE, (40, 7), SAVING, place=shifted),
    Case(SamplesKernel, "one sample a thread", CE, (2, 5, 19), SAVING),
    Case(SamplesKernel, "one sample a thread", SOFT, (2, 20, 2, 3), SAVING, place=spaced),
    Case(SamplesKernel, "neighbours", CE, (2, 5, 24)),
    Case(SamplesKernel, "neighbours", SOFT, (2, 21, 4, 4), SAVING | {"softcap": 5.0}),
    Case(SamplesKernel, "neighbours", CE, (1, 6, 80), SAVING, "bfloat16"),
    Case(SamplesKernel, "neighbours", CE, (2, 3, 2), {}, "float64"),
    Case(RowsKernel, "warp", CE, (5, 32), SAVING),
    Case(RowsKernel, "warp,head,tail", CE, (5, 21), SAVING),
    Case(RowsKernel, "warp,head,tail", SOFT, (3, 27), SAVING | {"softcap": 5.0}, "float16"),
    Case(RowsKernel, "warp,head,tail,several in a block", CE, (9, 203), {}, sizes=LARGE),
    Case(RowsKernel, "warp,head,tail,several in a block", CE, (6, 203), {}, sizes=H100),
    Case(RowsKernel, "warp,scalar", CE, (3, 37), SAVING, place=unlike),
    Case(RowsKernel, "block,head,tail", CE, (3, 207), SAVING),
    Case(RowsKernel, "block,head", CE, (2, 250), {"softcap": 5.0}, place=shifted),
    Case(
        RowsKernel, "block,head,tail", SOFT, (2, 303), {"label_smoothing": 0.1, "lse_square_scale": 1e-3}, sizes=LARGE
    ),
    Case(RowsKernel, "block,tail", CE, (2, 127), {}, "float64"),
    Case(RowsKernel, "longer than a block,head,tail", CE, (2, 611), SAVING),
    Case(RowsKernel, "longer than a block,head,tail", SOFT, (2, 535), {"label_smoothing": 0.1}, "bfloat16"),
    Case(RowsKernel, "longer than a block,scalar", SOFT, (2, 261), place=unlike),
    Case(RowsKernel, "longer than a block,head,tail", CE, (2, 1103), sizes=LARGE),
    Case(RowsKernel, "part,merge,spread,tail", CE, (1, 1103), SAVING),
    Case(RowsKernel, "part,merge,spread,head,tail", CE, (2, 1061), {"softcap": 5.0}),
    Case(RowsKernel, "part,merge,spread,head,tail", SOFT, (2, 1031), {"label_smoothing": 0.1}, "float16"),
    Case(RowsKernel, "part,merge,spread,scalar", CE, (2, 1105), {}, place=unlike),
    Case(RowsKernel, "part,merge,spread,head,tail", CE, (1, 1101), {}, place=shifted),
    Case(NLLKernel, "value,weights,gradient", NLL, (70, 7), {"weight": CLASSES}, reduction="mean"),
    Case(NLLKernel, "value,weights,gradient", NLL, (3, 200), {}, "float16", sizes=LARGE, reduction="mean"),
    Case(NLLKernel, "value,gradient of classes that lie apart", NLL, (2, 5, 33), {"weight": CLASSES}),
    Case(NLLKernel, "value,gradient", NLL, (40,), {}, "float64"),
    Case(PointwiseKernel, "vectors", MSE, (1024,), {"weight": FULL}),
    Case(PointwiseKernel, "vectors,tail,sum", MSE, (1030,), {"weight": FULL}, reduction="mean"),
    Case(PointwiseKernel, "vectors,tail", "kl_div", (513,), {}, "bfloat16"),
    Case(PointwiseKernel, "vectors,tail", "huber_loss", (130,), {}, "float64"),
    Case(PointwiseKernel, "vectors,head,tail", "smooth_l1_loss", (600,), place=shifted),
    Case(PointwiseKernel, "vectors,tail", "l1_loss", (4111,), sizes=H100),
    Case(PointwiseKernel, "vectors,tail", "binary_cross_entropy", (1050,), sizes=LARGE),
    Case(PointwiseKernel, "no vectors", MSE, (7, 43)),
    Case(PointwiseKernel, "strided", "binary_cross_entropy_with_logits", (7, 23), {"pos_weight": FULL}, place=spaced),
    Case(PointwiseKernel, "strided,broadcast", "binary_cross_entropy", (3, 4, 11), {"weight": LAST}, place=unlike),
    Case(Combination, "few blocks", CE, (130, 3)),
    Case(Combination, "more blocks than threads", NLL, (1057, 2), sizes=MANY_BLOCKS),
]


def test_every_kernel_and_branch_has_a_case() -> None:
    """`BRANCHES` knows every kernel there is, and some case takes every branch; two have tests of their own below."""
    assert set(kinds()) == set(BRANCHES)
    covered = {(case.kernel, word) for case in CASES for word in case.words.split(",")}
    elsewhere = {(PointwiseKernel, "copy"), (FoldingKernel, "warp"), (FoldingKernel, "block")}
    assert covered | elsewhere == {(kind, word) for kind, words in BRANCHES.items() for word in words}


def taken(launches: list[Launch], kernel: type[Any]) -> set[str]:
    return {word for launch in launches if isinstance(launch.kernel, kernel) for word in branches(launch)}


@pytest.mark.parametrize(
    ("layout", "case"), [pytest.param(case.sizes, case, id=str(case)) for case in CASES], indirect=["layout"]
)
def test_case(case: Case, launches: list[Launch], rng: Rng) -> None:
    row = BY_ID[case.row]
    sample = row.draw(rng, case.shape, case.dtype, case.choice)
    device = upload(sample, case.place)
    check_value(row, sample, "mean", device)
    operand = str(rng.choice([operand for operand in row.gradients if has_gradient(sample, operand)]))
    check_gradient(row, sample, case.reduction, operand, upstream(row, sample, rng, case.reduction), device)
    assert taken(launches, case.kernel) >= set(case.words.split(","))


@pytest.mark.parametrize("layout", [SIMULATOR, LARGE], ids=["small", "large"], indirect=True)
def test_sums_over_axes(launches: list[Launch], rng: Rng) -> None:
    """Gradients of what was broadcast, and of class weights: by a warp, or by a block where there is much to add."""
    row = BY_ID[MSE]
    for left, right in (((4, 1, 3), (5, 3)), ((1,), (70,)), ((), (40,))):
        sample = Sample(row.draw(rng, left).input, row.draw(rng, right).target, {})
        for operand in row.gradients:
            with pytest.warns(fastloss.BroadcastWarning):
                check_gradient(row, sample, "mean", operand)
    soft = BY_ID[SOFT]
    for shape in ((70, 3), (2, 3, 24), (5,)):
        check_gradient(soft, soft.draw(rng, shape, choice={"weight": CLASSES}), "mean", "weight")
    large = launches[0].kernel.threads == LARGE.pointwise_threads
    assert taken(launches, FoldingKernel) == ({"warp", "block"} if large else {"warp"})


@pytest.mark.parametrize("row", [BY_ID[name] for name in (CE, SOFT, NLL, MSE)], ids=name_of)
def test_copies_where_a_result_lies_across_its_input(row: Row, launches: list[Launch], rng: Rng) -> None:
    """A result is copied to its place from other memory where its kernel would write what it still has to read."""
    sample = row.draw(rng, (3, 30))
    x, grad_out = overlapping(sample.input, (3, 30), 1)
    check_gradient(row, sample, "sum", device=Sample(x, on_device(sample.target), {}), grad_out=grad_out)
    assert "copy" in taken(launches, PointwiseKernel)


@pytest.mark.skipif(not SIMULATED, reason="a GPU orders its threads itself")
@pytest.mark.parametrize("shape", [(70, 5), (2, 30), (1, 140), (1, 300), (1, 1100), (2, 3, 8)], ids=str)
def test_threads_in_any_order(shape: tuple[int, ...], rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but barriers and exchanges orders the threads of a block: any other order gives the same bits."""
    from fastloss.kernels.cuda.simulator import Block

    met = Block._met
    for row in (BY_ID[SOFT], BY_ID[CE]) if shape[0] < 70 else (BY_ID[CE], BY_ID[NLL], BY_ID[MSE]):
        sample = row.draw(rng, shape)
        sample.target.flat[-1] = -100 if row.indices else 0
        device, up = upload(sample), on_device(upstream(row, sample, rng))
        found = [(*row.gradient(device, reduction="none", grad_output=up), row.call(device))]
        for shuffle in (lambda threads: threads[::-1], rng.permutation)[: 2 if shape[-1] < 100 else 1]:
            monkeypatch.setattr(Block, "_met", staticmethod(lambda alive, shuffle=shuffle: list(shuffle(met(alive)))))
            in_place = upload(sample)
            pair = row.gradient(in_place, reduction="none", grad_output=up, grad_out=in_place.input)
            found.append((*pair, row.call(device)))
        monkeypatch.setattr(Block, "_met", staticmethod(met))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                np.testing.assert_array_equal(host(a), host(b))
