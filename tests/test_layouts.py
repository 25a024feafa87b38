"""Any memory layout of the operands gives what contiguous copies give; outputs may have any, too."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from table import CLASS_ROWS, POINTWISE, ROWS, Rng, Row, Sample, check_gradient, check_value, name_of

Array = NDArray[Any]


def padded(x: Array) -> Array:
    """Every second element of a larger array, along every axis."""
    room = np.zeros(tuple(2 * n + 1 for n in x.shape), x.dtype)
    view = room[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    view[...] = x
    return view


def misaligned(x: Array) -> Array:
    """Starts one byte off the alignment of its items."""
    room = np.zeros(x.nbytes + 1, np.uint8)
    view = room[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def permuted(x: Array) -> Array:
    """Memory in the order of rotated axes: neither C nor Fortran order past two dimensions."""
    axes = [*range(1, x.ndim), 0] if x.ndim > 2 else [*range(x.ndim)][::-1]
    return np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))


def read_only(x: Array) -> Array:
    view = x.copy()
    view.flags.writeable = False
    return view


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "permuted": permuted,
    "every-second": padded,
    "reversed": lambda x: np.ascontiguousarray(x[(slice(None, None, -1),) * x.ndim])[(slice(None, None, -1),) * x.ndim],
    "reversed-last": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "big-endian-strided": lambda x: padded(x.astype(x.dtype.newbyteorder(">"))),
    "misaligned": misaligned,
    "read-only": read_only,
    "column-of-record": lambda x: np.rec.fromarrays([x, np.zeros(x.shape, np.uint8)]).f0,
}


def laid_out(sample: Sample, layouts: tuple[str, ...]) -> Sample:
    """Input, target and array options each in its layout; the last layout serves all options."""
    arrange = [LAYOUTS[name] for name in layouts]
    options = {k: arrange[2](v) if isinstance(v, np.ndarray) else v for k, v in sample.options.items()}
    return Sample(arrange[0](sample.input), arrange[1](sample.target), options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_each_layout(row: Row, layout: str, rng: Rng) -> None:
    """All operands, the input alone, the others alone; small, and large enough for threads."""
    plain = "contiguous"
    for shape in ((37, 10), (6, 5, 3, 7)):
        for layouts in ((layout,) * 3, (layout, plain, plain), (plain, layout, layout)):
            sample = laid_out(row.draw(rng, shape, choice=row.everything()), layouts)
            for reduction in ("none", "mean"):
                check_value(row, sample, reduction)
            check_gradient(row, sample, "mean")
    for shape in ((2_111, 20), (2, 12, 60, 31)):
        check_gradient(row, laid_out(row.draw(rng, shape, choice=row.everything()), (layout,) * 3), "mean")


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_layouts_at_random(row: Row, rng: Rng) -> None:
    """Every operand and both outputs each in a layout of its own, in every dtype."""
    writable = [name for name in LAYOUTS if name not in ("read-only",)]
    for shape in itertools.islice(itertools.cycle([(23, 10), (2, 9, 5), (3, 4, 2, 5)]), 12):
        dtype = rng.choice(["float16", "float32", "float64"])
        layouts = tuple(rng.choice(list(LAYOUTS), 3))
        sample = laid_out(row.draw(rng, shape, dtype, row.everything()), layouts)
        value, grad = row.gradient(sample, reduction="none")
        out, grad_out = (
            LAYOUTS[name](np.zeros_like(a)) for name, a in zip(rng.choice(writable, 2), (value, grad), strict=True)
        )
        got = row.gradient(sample, reduction="none", out=out, grad_out=grad_out)
        assert got[0] is out
        assert got[1] is grad_out
        np.testing.assert_array_equal(out, value)
        np.testing.assert_array_equal(grad_out, grad)


@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_sliced_and_sparse_classes(row: Row, rng: Rng) -> None:
    """Classes cut from a wider array: strides between rows and between classes."""
    wide = row.draw(rng, (50, 64)).input
    for x in (wide[:, ::2], wide[:, 5:23], wide[::3, 1::7], wide[:, ::-2], wide[:1], wide[:, :1]):
        drawn = row.draw(rng, x.shape)
        for reduction in ("none", "mean"):
            check_value(row, Sample(x, drawn.target, {}), reduction)
            check_gradient(row, Sample(x, drawn.target, {}), reduction)


@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 1),
        (1, 3, 4),
        (5, 2, 3),
        (2, 21, 16, 16),
        (3, 4, 2, 3, 2),
        (2, 1, 5),
        (2, 130, 33),
        (1, 7, 2049),
        (2, 1000, 3),
    ],
    ids=str,
)
def test_trailing_dimensions(row: Row, shape: tuple[int, ...], rng: Rng) -> None:
    """(N, C, d1, ...) is what the same samples as (M, C) give, without a copy of ours."""
    sample = row.draw(rng, shape, choice=row.everything())
    for reduction in ("none", "mean", "sum"):
        check_value(row, sample, reduction)
        check_gradient(row, sample, reduction)


@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_views_that_repeat_elements(row: Row, rng: Rng) -> None:
    """Strides of 0 are read like any others; nothing warns, as the shapes are the same."""
    drawn = row.draw(rng, (1, 30))
    x, y = (np.broadcast_to(a, (40, 30)) for a in (drawn.input, drawn.target))
    for reduction in ("none", "mean"):
        check_value(row, Sample(x, y, {}), reduction)
        check_gradient(row, Sample(x, y, {}), reduction)


def test_zero_dimensional(rng: Rng) -> None:
    for row in POINTWISE:
        sample = row.draw(rng, ())
        for reduction in ("none", "mean", "sum"):
            check_value(row, sample, reduction)
            check_gradient(row, sample, reduction)
