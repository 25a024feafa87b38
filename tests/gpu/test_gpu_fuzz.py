"""The device against the CPU path: shapes, layouts, alignments, dtypes and options drawn at random."""

from typing import Any

import numpy as np
import pytest
from on_device import (
    LAYOUTS,
    Room,
    gradient_bound,
    has_gradient,
    host,
    on_device,
    upload,
    upstream,
    value_bound,
)

import table
from table import ROWS, Rng, Row, Sample, assert_within, name_of


def shape_of(row: Row, rng: Rng) -> tuple[int, ...]:
    """Up to four dimensions; few elements, and now and then many classes."""
    while True:
        ndim = int(rng.integers(1, 5))
        shape = tuple(int(n) for n in rng.integers(1, (70, 40, 9, 5)[:ndim]))
        if row.classes and rng.uniform() < 0.3:
            shape = (int(rng.integers(1, 4)), int(rng.choice([60, 150, 300])) + int(rng.integers(60)))
        if np.prod(shape) < 700:
            return shape


def somewhere(x: Any, rng: Rng) -> tuple[Any, int]:
    """In any layout, at any alignment."""
    layout = LAYOUTS[str(rng.choice(list(LAYOUTS)))]
    return layout(x) if x.ndim else x, int(rng.integers(0, 8)) * int(rng.integers(2))


def placed(x: Any, rng: Rng) -> Any:
    """Somewhere on the device."""
    return Room(*somewhere(np.asarray(x), rng)).array if isinstance(x, np.ndarray | np.generic) else x


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_as_on_the_cpu(row: Row, turn: int, rng: Rng) -> None:
    """Within both sides' bounds. All options at once, losses with gradients: what is compiled for other tests too."""
    sample = row.draw(rng, shape_of(row, rng), choice=row.everything())
    sample = Sample(np.asarray(sample.input), np.asarray(sample.target), sample.options)
    up = upstream(row, sample, rng)
    losses, grad = row.gradient(sample, reduction="none", grad_output=up)
    device = upload(sample, lambda x: placed(x, rng))
    room = Room(*somewhere(np.zeros(sample.input.shape, np.float32), rng)) if turn % 2 else None
    grad_out = room.array if room else None
    found = row.gradient(device, reduction="none", grad_output=placed(up, rng), grad_out=grad_out)
    got_grad = room.read() if room else host(found[1])
    truth, what = row.truth(sample, "none", up), f"{row.id} {sample.input.shape}"
    both = value_bound(row, sample, "none") + table.value_bound(row, sample, "none", np.float32)
    assert_within(host(found[0]), np.asarray(losses, np.float64), both, np.float32, what)
    both = gradient_bound(row, truth, "input", np.float32) + table.gradient_bound(truth, "input", np.float32)
    assert_within(got_grad, np.asarray(grad, np.float64), both, np.float32, f"gradient of {what}")
    if room:
        assert found[1] is grad_out
        room.check()


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_as_the_oracle_has_it(row: Row, turn: int, rng: Rng) -> None:
    """Any options, dtypes and operands."""
    dtype = table.DTYPES[str(rng.choice(list(table.DTYPES)))]
    sample = row.draw(rng, shape_of(row, rng), dtype, row.any_choice(rng))
    sample = Sample(np.asarray(sample.input), np.asarray(sample.target), sample.options)
    reduction = str(rng.choice(row.reductions))
    operand = str(rng.choice([operand for operand in row.gradients if has_gradient(sample, operand)]))
    up = upstream(row, sample, rng, reduction)
    device = upload(sample, lambda x: placed(x, rng))
    value, grad = row.gradient(device, operand, reduction=reduction, grad_output=on_device(up))
    truth = row.truth(sample, reduction, up)
    what = f"{row.id} {sample.input.shape} {dtype} {reduction} {operand} {sample.options}"
    assert_within(host(value), truth.value, value_bound(row, sample, reduction), dtype, what)
    assert_within(host(grad), getattr(truth, operand), gradient_bound(row, truth, operand, dtype), dtype, what)
