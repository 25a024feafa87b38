"""Errors: their class, a message with the numbers and what would be right, and nothing changed by them."""

import inspect
import re
from typing import Any

import numpy as np
import pytest

import fastloss
from table import BY_ID, CLASS_ROWS, DTYPES, POINTWISE, ROWS, Rng, Row, Sample, name_of

NAN = np.nan
LOGITS = np.zeros((4, 5), np.float32)
INDEX = np.array([0, 1, 2, 3])
UNIT = np.full((4, 3), 0.5, np.float32)
ANY = np.zeros((4, 3), np.float32)


def unit_with(value: float) -> np.ndarray[Any, Any]:
    """Probabilities with one value at (2, 1)."""
    x = UNIT.copy()
    x[2, 1] = value
    return x


def index_with(value: int, kind: Any = np.int64) -> np.ndarray[Any, Any]:
    """Class indices with one value at position 3."""
    target = INDEX.astype(kind)
    target[3] = value
    return target


F32 = np.float32
# By function: the error, the words that its message must hold, arguments and options.
BAD: dict[str, list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]]] = {
    "cross_entropy": [
        (
            IndexError,
            r"^target 7 at position \(3,\) is out of range for 5 classes$",
            (LOGITS, index_with(7)),
            {},
        ),
        (IndexError, r"target 5 at position \(3,\)", (LOGITS, index_with(5)), {}),
        (IndexError, r"target -1 at position \(3,\)", (LOGITS, index_with(-1)), {}),
        (IndexError, r"target -100 at position \(3,\)", (LOGITS, index_with(-100)), {"ignore_index": -1}),
        (IndexError, r"target -9223372036854775808 at", (LOGITS, index_with(-(2**63))), {}),
        (
            IndexError,
            "18446744073709551615",
            (LOGITS, index_with(2**64 - 1, np.uint64)),
            {"ignore_index": -1},
        ),
        (IndexError, "4294967296", (LOGITS, index_with(2**32, np.uint64)), {}),
        (IndexError, "target 156", (LOGITS, index_with(156, np.uint8)), {}),
        (
            IndexError,
            r"target 9 at position \(\) is out of range for 5 classes",
            (LOGITS[0], np.array(9)),
            {},
        ),
        (
            IndexError,
            r"target 3 at position \(0, 1, 0\) is out of range for 3 classes",
            (np.zeros((1, 3, 2, 2), F32), np.array([[[0, 1], [3, 2]]])),
            {},
        ),
        (ValueError, r"target has shape \(3,\), expected \(4,\)", (LOGITS, INDEX[:3]), {}),
        (ValueError, r"target has shape \(4, 1\)", (LOGITS, np.zeros((4, 1), int)), {}),
        (TypeError, "target has dtype float32", (LOGITS, np.zeros((4, 4), F32)), {}),
        (ValueError, "shape", (np.zeros((), F32), np.array(0)), {}),
        (ValueError, r"\(2, 5\).*\(2, 4\)", (np.zeros((2, 3, 4), F32), np.zeros((2, 5), int)), {}),
        (ValueError, "class", (np.zeros((4, 0), F32), INDEX), {}),
        (ValueError, "class", (np.zeros((4, 0), F32), np.zeros((4, 0), F32)), {}),
        (ValueError, r"weight has shape \(4,\).*5", (LOGITS, INDEX), {"weight": np.ones(4, F32)}),
        (ValueError, r"weight has shape \(1, 5\)", (LOGITS, INDEX), {"weight": np.ones((1, 5), F32)}),
        (
            ValueError,
            "reduction is 'average'.*'none'.*'mean'.*'sum'",
            (LOGITS, INDEX),
            {"reduction": "average"},
        ),
        (ValueError, "reduction is 'batchmean'", (LOGITS, INDEX), {"reduction": "batchmean"}),
        (ValueError, "label_smoothing is -0.1", (LOGITS, INDEX), {"label_smoothing": -0.1}),
        (ValueError, "label_smoothing is 1.5", (LOGITS, INDEX), {"label_smoothing": 1.5}),
        (ValueError, "label_smoothing is nan", (LOGITS, INDEX), {"label_smoothing": NAN}),
        (ValueError, "softcap", (LOGITS, INDEX), {"softcap": 0.0}),
        (ValueError, "softcap", (LOGITS, INDEX), {"softcap": -5.0}),
        (ValueError, "softcap", (LOGITS, INDEX), {"softcap": NAN}),
        (ValueError, "lse_square_scale", (LOGITS, INDEX), {"lse_square_scale": NAN}),
        (ValueError, "ignore_index", (LOGITS, LOGITS), {"ignore_index": 1}),
        (ValueError, "ignore_index", (LOGITS, LOGITS), {"ignore_index": 0}),
        (TypeError, "target has dtype float32.*integer", (LOGITS, INDEX.astype(F32)), {}),
        (TypeError, "target has dtype bool", (LOGITS, INDEX.astype(bool)), {}),
        (TypeError, "target has dtype int64", (LOGITS, np.zeros((4, 5), int)), {}),
        (TypeError, "input has dtype int64.*float32", (LOGITS.astype(int), INDEX), {}),
        (TypeError, "input has dtype complex64", (LOGITS.astype(np.complex64), INDEX), {}),
        (TypeError, "dtype is 'int32'.*float32", (LOGITS, INDEX), {"dtype": "int32"}),
    ],
    "nll_loss": [
        (
            IndexError,
            r"^target 7 at position \(3,\) is out of range for 5 classes$",
            (LOGITS, index_with(7)),
            {},
        ),
        (IndexError, r"target -1 at position \(3,\)", (LOGITS, index_with(-1)), {}),
        (ValueError, r"target has shape \(3,\), expected \(4,\)", (LOGITS, INDEX[:3]), {}),
        (ValueError, "weight", (LOGITS, INDEX), {"weight": np.ones(6, F32)}),
        (ValueError, "class", (np.zeros((4, 0), F32), INDEX), {}),
        (TypeError, "target has dtype float32.*integer", (LOGITS, INDEX.astype(F32)), {}),
    ],
    "l1_loss": [
        (ValueError, r"target has shape \(4, 4\)", (ANY, np.zeros((4, 4), F32)), {}),
        (ValueError, r"weight has shape \(3,\), expected \(4, 3\)", (ANY, ANY), {"weight": np.ones(3, F32)}),
    ],
    "mse_loss": [
        (
            ValueError,
            r"weight has shape \(4, 1\), expected \(4, 3\)",
            (ANY, ANY),
            {"weight": np.ones((4, 1), F32)},
        ),
        (TypeError, "int64.*float32", (ANY.astype(int), ANY.astype(int)), {}),
        (TypeError, "input has dtype complex128", (ANY.astype(np.complex128), ANY), {}),
        (TypeError, "target has dtype datetime64", (ANY, ANY.astype("datetime64[s]")), {}),
        (TypeError, "input has dtype object", (ANY.astype(object), ANY), {}),
        (TypeError, "input has dtype str", (np.array(["a"]), ANY), {}),
    ],
    "huber_loss": [
        (ValueError, r"weight has shape \(\), expected \(4, 3\)", (ANY, ANY), {"weight": np.ones((), F32)}),
        (ValueError, "delta is 0.0", (ANY, ANY), {"delta": 0.0}),
        (ValueError, "delta is -1.0", (ANY, ANY), {"delta": -1.0}),
        (ValueError, "delta is nan", (ANY, ANY), {"delta": NAN}),
    ],
    "binary_cross_entropy": [
        (ValueError, r"target has shape \(1, 3\), expected \(4, 3\)", (UNIT, UNIT[:1]), {}),
        (ValueError, r"weight has shape \(2, 4, 3\)", (UNIT, UNIT), {"weight": np.ones((2, 4, 3), F32)}),
        (ValueError, r"weight has shape \(4,\)", (UNIT, UNIT), {"weight": np.ones(4, F32)}),
        (ValueError, r"^input 1.5 at position \(2, 1\) is outside \[0, 1\]$", (unit_with(1.5), UNIT), {}),
        (ValueError, r"input -0.25 at position \(2, 1\)", (unit_with(-0.25), UNIT), {}),
        (ValueError, r"input nan at position \(2, 1\)", (unit_with(NAN), UNIT), {}),
        (ValueError, r"input inf at position \(2, 1\)", (unit_with(np.inf), UNIT), {}),
        (ValueError, r"input 1.0000001 at position \(2, 1\)", (np.nextafter(unit_with(1), F32(2)), UNIT), {}),
        (ValueError, r"input -1e-45 at position \(2, 1\)", (unit_with(-1e-45), UNIT), {}),
        (ValueError, r"target 2.0 at position \(2, 1\) is outside \[0, 1\]", (UNIT, unit_with(2)), {}),
        (ValueError, r"target nan at position \(2, 1\)", (UNIT, unit_with(NAN)), {}),
    ],
    "binary_cross_entropy_with_logits": [
        (ValueError, r"target has shape \(3,\), expected \(4, 3\)", (ANY, ANY[0]), {}),
        (ValueError, r"pos_weight has shape \(4,\)", (ANY, ANY), {"pos_weight": np.ones(4, F32)}),
        (ValueError, r"weight has shape \(5, 4, 3\)", (ANY, ANY), {"weight": np.ones((5, 4, 3), F32)}),
    ],
    "smooth_l1_loss": [
        (ValueError, "beta is -1.0", (ANY, ANY), {"beta": -1.0}),
        (ValueError, "beta is nan", (ANY, ANY), {"beta": NAN}),
    ],
}


CASES = [
    pytest.param(name, *row, id=f"{name}-{i}-{row[1][:24]}") for name, rows in BAD.items() for i, row in enumerate(rows)
]


@pytest.mark.parametrize(("name", "error", "match", "arguments", "options"), CASES)
def test_message(
    name: str, error: type[Exception], match: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """The same for a value, for per-sample losses and for a gradient."""
    fn = getattr(fastloss, name)
    for call in (fn, fastloss.value_and_grad(fn)):
        for more in ({}, {"reduction": "none"}):
            with pytest.raises(error, match=match):
                call(*arguments, **(more | options))


@pytest.mark.parametrize("n_classes", [2, 3, 8, 9, 40, 300])
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_the_first_bad_index_is_named(name: str, n_classes: int, rng: Rng) -> None:
    """In every code path, wherever it lies, threads or none; with nothing read outside the array."""
    row = BY_ID[name]
    for shape in ((70, n_classes), (3, n_classes, 7), (20_003, n_classes)):
        sample = row.draw(rng, shape)
        flat = sample.target.reshape(-1)
        places = np.sort(rng.choice(flat.size, 2, replace=False))
        flat[places] = n_classes + 2**40, -(2**50)
        first = tuple(int(i) for i in np.unravel_index(places[0], sample.target.shape))
        message = f"target {n_classes + 2**40} at position {first} is out of range for {n_classes} classes"
        expected = f"^{re.escape(message)}$"
        for reduction in row.reductions:
            with pytest.raises(IndexError, match=expected):
                row.call(sample, reduction=reduction)
        with pytest.raises(IndexError, match=expected):
            row.gradient(sample)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 16, 17, 100, 70_001])
def test_the_first_bad_probability_is_named(size: int, dtype: str, rng: Rng) -> None:
    row = BY_ID["binary_cross_entropy"]
    for operand in ("input", "target"):
        sample = row.draw(rng, (size,), DTYPES[dtype])
        first = int(rng.integers(0, size))
        getattr(sample, operand)[first:] = 1.5
        with pytest.raises(ValueError, match=rf"{operand} 1.5 at position \({first},\) is outside \[0, 1\]"):
            row.call(sample)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "binary_cross_entropy"])
def test_a_failed_call_changes_nothing(name: str, rng: Rng) -> None:
    """`out` and `grad_out` keep their bits when an element deep in the arrays is refused."""
    row = BY_ID[name]
    for shape in ((200, 7), (200, 40), (30_000, 7)):
        sample = row.draw(rng, shape)
        (sample.target if row.indices else sample.input).flat[150] = 99
        error = IndexError if row.indices else ValueError
        samples = (shape[0],) if row.classes else shape
        for reduction, out_shape in (("none", samples), ("mean", ())):
            out, grad_out = np.full(out_shape, 7, np.float32), np.full(shape, 7, np.float32)
            with pytest.raises(error):
                row.call(sample, reduction=reduction, out=out)
            with pytest.raises(error):
                row.gradient(sample, reduction=reduction, out=out, grad_out=grad_out)
            in_place = sample.input.copy()
            with pytest.raises(error):
                row.gradient(Sample(in_place, sample.target, {}), reduction=reduction, grad_out=in_place)
            assert (out == 7).all()
            assert (grad_out == 7).all()
            np.testing.assert_array_equal(in_place, sample.input)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_out_must_fit(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (12, 5))
    for reduction in ("none", "mean"):
        shape = np.shape(row.call(sample, reduction=reduction))
        good = np.zeros(shape, np.float32)
        read_only = good.copy()
        read_only.flags.writeable = False
        for out, error, match in (
            (np.zeros((*shape, 2), np.float32), ValueError, "out has shape"),
            (np.zeros(shape, np.float64), TypeError, "out has dtype float64, expected float32"),
            (read_only, ValueError, "out.*read-only"),
            ("text", TypeError, "str"),
            (0.0, (TypeError, ValueError), "out"),
        ):
            with pytest.raises(error, match=match):
                row.call(sample, reduction=reduction, out=out)
    for grad_out, error, match in (
        (np.zeros((12, 6), np.float32), ValueError, r"grad_out has shape \(12, 6\), expected \(12, 5\)"),
        (np.zeros((12, 5), np.float16), TypeError, "grad_out has dtype float16, expected float32"),
    ):
        with pytest.raises(error, match=match):
            row.gradient(sample, grad_out=grad_out)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_grad_output_must_fit(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (12, 5))
    for reduction, shape in (("none", (11,)), ("none", ()), ("mean", (12,)), ("sum", (1, 1))):
        with pytest.raises(ValueError, match=r"grad_output has shape"):
            row.gradient(sample, reduction=reduction, grad_output=np.ones(shape, np.float32))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_gradients_that_do_not_exist(row: Row, rng: Rng) -> None:
    """Refused by name, before anything is computed."""
    sample = row.draw(rng, (12, 5), choice={"weight": row.options["weight"][0]} if "weight" in row.options else {})
    for operand in {"target", "weight"} & set(row.options | {"target": None}) - set(row.gradients):
        fused = fastloss.value_and_grad(row.function, argnums=fn_position(row, operand))
        with pytest.raises((ValueError, TypeError), match=operand):
            fused(sample.input, sample.target, **sample.options)


def fn_position(row: Row, operand: str) -> int:
    """Where the argument stands in the function's signature."""
    return list(inspect.signature(row.function).parameters).index(operand)


def test_value_and_grad_takes_losses_only() -> None:
    with pytest.raises(TypeError, match="value_and_grad"):
        fastloss.value_and_grad(np.mean)(ANY, ANY)
    with pytest.raises((ValueError, TypeError), match="argnums"):
        fastloss.value_and_grad(fastloss.mse_loss, argnums=9)(ANY, ANY)


@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_shapes_that_do_not_broadcast(row: Row, rng: Rng) -> None:
    x, y = row.draw(rng, (4, 3)).input, row.draw(rng, (4, 2)).target
    with pytest.raises(ValueError, match=r"target has shape \(4, 2\), expected \(4, 3\)"):
        row.call(Sample(x, y, {}))


@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_batchmean_is_for_kl_div_alone(row: Row, rng: Rng) -> None:
    with pytest.raises(ValueError, match="batchmean"):
        row.call(row.draw(rng, (4, 3)), reduction="batchmean")
