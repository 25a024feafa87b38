"""Values on a GPU against the oracle: every option and reduction, dtypes, class counts, sizes, layouts."""

from typing import Any

import numpy as np
import pytest
from on_device import LAYOUTS, Room, check_value, host, on_device, upload, value_bound

import fastloss
from table import BY_ID, CLASS_ROWS, DTYPES, POINTWISE, ROWS, Options, Rng, Row, Sample, assert_within, name_of, ulp

CHOICES = [(row, choice) for row in ROWS for choice in row.choices()]


@pytest.mark.parametrize(("row", "choice"), CHOICES, ids=name_of)
def test_each_option_and_reduction(row: Row, choice: Options, rng: Rng) -> None:
    """All reductions in one layout; how a sample is read does not depend on them, so one drawn serves two others."""
    sample = row.draw(rng, (9, 5) if row.classes else (7, 10), choice=choice)
    for reduction in row.reductions:
        check_value(row, sample, reduction)
    others = [(2, 21), (2, 5, 8), (7,), (2, 131), (2, 259), (1, 1030)]
    for shape in (others[n] for n in rng.permutation(len(others))[:2]) if row.classes else ((2, 3, 5),):
        check_value(row, row.draw(rng, shape, choice=choice), str(rng.choice(row.reductions)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_dtypes(row: Row, dtype: str, rng: Rng) -> None:
    """The result has the input's dtype unless another is asked for, and is rounded to it once."""
    for shape in ((9, 5), (2, 27), (2, 4, 16)) if row.classes else ((67,),):
        sample = row.draw(rng, shape, DTYPES[dtype], row.everything())
        check_value(row, sample, str(rng.choice(row.reductions)))
        other = str(rng.choice([name for name in DTYPES if name != dtype]))
        got = host(row.call(upload(sample), reduction="none", dtype=other))
        truth = row.truth(sample, "none").value
        bound = value_bound(row, sample, "none") + ulp(truth, DTYPES[other]) * (other == "float32")
        assert_within(got, truth, bound, DTYPES[other], f"{row.id} as {other}")


@pytest.mark.parametrize("n_classes", [*range(1, 5), *range(15, 19), 31, 33, 64, 127, 129, 255, 257])
@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_class_counts(row: Row, n_classes: int, rng: Rng) -> None:
    """Rows of every length, some with a maximum 500 above whatever the row began with."""
    sample = row.draw(rng, (2, n_classes))
    sample.input[1:, -1 - rng.integers(0, min(n_classes, 3))] += np.float32(500)
    check_value(row, sample, "none")


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 65, 97])
@pytest.mark.parametrize("row", CLASS_ROWS, ids=name_of)
def test_sample_counts(row: Row, n: int, rng: Rng) -> None:
    for shape in ((n, 3), (1, 3, n)):
        check_value(row, row.draw(rng, shape), "mean")


@pytest.mark.parametrize("n", [1, 3, 4, 31, 33, 128, 511, 512, 517])
@pytest.mark.parametrize("row", POINTWISE, ids=name_of)
def test_sizes(row: Row, n: int, rng: Rng) -> None:
    check_value(row, row.draw(rng, (n,)), str(rng.choice(["none", "mean"])))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_layouts(row: Row, rng: Rng) -> None:
    """Every operand in a layout of its own, steps of either sign among them."""
    for shape in ((5, 6), (2, 19), (2, 3, 4)):
        for _ in range(2):
            sample = row.draw(rng, shape, choice=row.any_choice(rng))

            def laid_out(x: Any) -> Any:
                name = str(rng.choice(list(LAYOUTS)))
                return on_device(LAYOUTS[name](x) if isinstance(x, np.ndarray) and x.ndim else x)

            device = upload(sample, laid_out)
            check_value(row, sample, str(rng.choice(row.reductions)), device)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_views_that_repeat_elements(row: Row, rng: Rng) -> None:
    """Strides of 0 are read like any others."""
    drawn = row.draw(rng, (1, 21))
    x, y = (np.broadcast_to(a, (6, *a.shape[1:])) for a in (drawn.input, drawn.target))
    for reduction in ("none", "mean"):
        check_value(row, Sample(x, y, {}), reduction)


@pytest.mark.parametrize("row", [row for row in POINTWISE if not row.name.startswith("binary")], ids=name_of)
def test_broadcasting(row: Row, rng: Rng) -> None:
    for left, right in (((4, 1, 3), (5, 3)), ((3,), (2, 3)), ((2, 3), ()), ((), (4,))):
        sample = Sample(np.asarray(row.draw(rng, left).input), np.asarray(row.draw(rng, right).target), {})
        with pytest.warns(fastloss.BroadcastWarning):
            check_value(row, sample, str(rng.choice(["none", "mean"])))


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64"])
def test_class_indices_of_every_integer_dtype(kind: str, rng: Rng) -> None:
    """As many classes as the dtype tells apart where these are few."""
    for row in (BY_ID["cross_entropy"], BY_ID["nll_loss"]):
        for shape in ((3, 7), (2, 40), (2, 5, 8), (2, min(260, np.iinfo(kind).max + 1))):
            sample = row.draw(rng, shape)
            target = np.where(sample.target < 0, 2, sample.target).astype(kind)
            target.flat[0] = shape[1] - 1
            check_value(row, Sample(sample.input, target, {"ignore_index": 2}), "mean")


@pytest.mark.parametrize("kind", ["int64", "uint8", "bool", "float16", "float64"])
def test_operands_of_other_dtypes(kind: str, rng: Rng) -> None:
    """Weights and targets of any real dtype beside float32 and float16 inputs, promoted as on the CPU."""
    dtype = np.dtype(kind)
    for row, name in ((BY_ID["mse_loss"], "float32"), (BY_ID["l1_loss"], "float16")):
        drawn = row.draw(rng, (3, 45), name)
        target = abs(drawn.target).astype(dtype)
        sample = Sample(drawn.input, target, {"weight": (1 + abs(drawn.target)).astype(dtype)})
        for call in (Sample(drawn.input, target, {}), sample):
            wide = "float64" if kind == "float64" else name
            got = host(row.call(upload(call)))
            bound = value_bound(row, Sample(drawn.input, call.target.astype(wide), call.options), "mean")
            assert_within(got, row.truth(call).value, bound, wide, f"{row.id} {kind}")
    for row in (BY_ID["cross_entropy"], BY_ID["nll_loss"]):
        for shape in ((3, 5), (2, 40)):
            sample = row.draw(rng, shape)
            weight = (1 + 2 * rng.uniform(size=shape[1])).astype(dtype)
            check_value(row, Sample(sample.input, sample.target, {"weight": weight}), "mean")


def test_probabilities_of_other_dtypes(rng: Rng) -> None:
    """Promoted as on the CPU; vectors are as long as the narrower dtype's."""
    row = BY_ID["cross_entropy-probabilities"]
    for shape in ((3, 7), (3, 33), (2, 5, 16)):
        for left, right, result in (
            ("float32", "float16", "float32"),
            ("float16", "float32", "float32"),
            ("float16", "float64", "float64"),
            ("float64", "bfloat16", "float64"),
            ("float16", "bfloat16", "float32"),
        ):
            drawn = row.draw(rng, shape, "float64")
            sample = Sample(drawn.input.astype(DTYPES[left]), drawn.target.astype(DTYPES[right]), {})
            got = host(row.call(upload(sample)))
            like = Sample(sample.input.astype(DTYPES[result]), sample.target, {})
            bound = value_bound(row, like, "mean")
            assert_within(got, row.truth(sample).value, bound, DTYPES[result], f"{left} {right}")


@pytest.mark.parametrize(("left", "right"), [("float64", "float16"), ("float32", "bfloat16"), ("float16", "float32")])
def test_the_same_call_elsewhere_in_memory(left: str, right: str, rng: Rng) -> None:
    """A call like an earlier one repeats its launches, which suit arrays aligned as those were: in vectors of as many
    elements, 16 bytes of the narrower dtype and more of the wider."""
    for row, shape in ((BY_ID["cross_entropy-probabilities"], (2, 37)), (BY_ID["mse_loss"], (150,))):
        for shift in (0, 8, 2, 4, 6, 1, 0):
            drawn = row.draw(rng, shape, "float64")
            sample = Sample(drawn.input.astype(DTYPES[left]), drawn.target.astype(DTYPES[right]), {})
            device = Sample(Room(sample.input, shift).array, Room(sample.target).array, {})
            got = host(row.call(device, dtype="float64"))
            like = Sample(sample.input.astype(np.result_type(np.float32, left)), sample.target, {})
            truth = row.truth(sample).value
            bound = value_bound(row, like, "mean") + ulp(truth, np.float32)
            assert_within(got, truth, bound, np.float64, f"{row.id} {left} {right} {shift}")
