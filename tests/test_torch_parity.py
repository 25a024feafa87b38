"""torch 2.13 beside us: random products of all options; every "Differs from torch" as a difference."""

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastloss
from table import BY_ID, DTYPES, ROWS, Rng, Row, Sample, name_of

INF, NAN = np.inf, np.nan
COMBINATIONS = 12  # for each loss and dtype in each run; most of them kernels of their own


def tensor(x: Any) -> Any:
    """A torch tensor of an array (bfloat16 too); other options as they are."""
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def torch_loss(row: Row, *operands: Any, **options: Any) -> Any:
    """torch's function, without its advice about reduction='mean' of kl_div."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "reduction: 'mean' divides")
        return getattr(F, row.name)(*operands, **options)


def shape_for(row: Row, rng: Rng) -> tuple[int, ...]:
    """A random shape of one to four dimensions; for class losses sometimes (C) alone."""
    n, c = int(rng.integers(1, 40)), int(rng.integers(1, 40))
    more = tuple(int(d) for d in rng.integers(1, 6, rng.integers(0, 3)))
    return (c,) if rng.uniform() < 0.1 else (n, c, *more)


def extra(choice: dict[str, Any]) -> dict[str, Any]:
    """The choice without the options that torch does not have."""
    return {name: value for name, value in choice.items() if name not in ("lse_square_scale", "softcap")}


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_oracle_agrees_with_torch(row: Row, rng: Rng) -> None:
    """What we measure ourselves by: values and gradients in float64, to what torch's own rounding leaves."""
    for _ in range(COMBINATIONS):
        sample = row.draw(rng, shape_for(row, rng), "float64", extra(row.any_choice(rng)))
        for reduction in row.reductions:
            operands = {"input": tensor(sample.input), "target": tensor(sample.target)}
            operands |= {name: tensor(value) for name, value in sample.options.items()}
            wanted = [name for name in row.gradients if name in operands]
            for name in wanted:
                operands[name].requires_grad_()
            value = torch_loss(row, **operands, reduction=reduction)
            grad_output = rng.standard_normal(value.shape)
            value.backward(torch.from_numpy(np.asarray(grad_output)))
            truth = row.truth(sample, reduction, grad_output)
            np.testing.assert_allclose(np.float64(truth.value), value.detach(), rtol=1e-11, atol=1e-12)
            for name in wanted:
                expected = np.float64(getattr(truth, name))
                if row.id == "kl_div" and name == "target":
                    expected[sample.target == 0] = NAN  # torch has nan there, the oracle 0
                np.testing.assert_allclose(operands[name].grad, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_random_options(row: Row, dtype: str, rng: Rng) -> None:
    """Tensors in, tensors out: value, dtype, shape and gradient are torch's, to torch's own accuracy."""
    # torch sums float32 in float32: some hundred eps. The oracle holds us to more than this.
    rtol, atol = {"float32": (2e-5, 2e-6), "float64": (1e-11, 1e-12)}[dtype]
    for _ in range(COMBINATIONS):
        sample = row.draw(rng, shape_for(row, rng), dtype, extra(row.any_choice(rng)))
        reduction = str(rng.choice(row.reductions))
        x, y = tensor(sample.input), tensor(sample.target)
        options = {name: tensor(value) for name, value in sample.options.items()} | {"reduction": reduction}
        got = row.function(x, y, **options)
        leaf = x.clone().requires_grad_()
        expected = torch_loss(row, leaf, y, **options)
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, expected.detach(), rtol=rtol, atol=atol, equal_nan=True)
        grad_output = tensor(np.asarray(rng.standard_normal(tuple(expected.shape)), dtype))
        expected.backward(grad_output)
        _, grad = fastloss.value_and_grad(row.function)(x, y, **options, grad_output=grad_output)
        assert isinstance(grad, torch.Tensor)
        torch.testing.assert_close(grad, leaf.grad, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_positional_order_is_torchs(row: Row) -> None:
    """Our positional parameters are torch's, names and defaults too; what we add is keyword-only."""
    ours = inspect.signature(row.function).parameters.values()
    theirs = inspect.signature(getattr(F, row.name)).parameters.values()
    positional = [(p.name, p.default) for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [(p.name, p.default) for p in theirs]
    assert {p.name for p in ours if p.kind is p.KEYWORD_ONLY} >= {"dtype", "out"}


CLASSES = (
    "L1Loss", "MSELoss", "CrossEntropyLoss", "BCELoss", "NLLLoss",
    "BCEWithLogitsLoss", "SmoothL1Loss", "HuberLoss", "KLDivLoss",
)  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_constructors_are_torchs(name: str) -> None:
    ours = inspect.signature(getattr(fastloss, name)).parameters.values()
    theirs = inspect.signature(getattr(torch.nn, name)).parameters.values()
    positional = [(p.name, p.default) for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [(p.name, p.default) for p in theirs]


def test_legacy_arguments_agree(rng: Rng) -> None:
    x, y = (torch.from_numpy(rng.standard_normal((3, 4))) for _ in range(2))
    for size_average in (None, True, False):
        for reduce in (None, True, False):
            legacy = {"size_average": size_average, "reduce": reduce}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = F.mse_loss(x, y, **legacy, reduction="sum")
                got = fastloss.mse_loss(x, y, **legacy, reduction="sum")
            torch.testing.assert_close(got, expected)


# ---- "Differs from torch": torch's behaviour and ours are both asserted, so that neither changes unnoticed


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_differs_in_index_dtypes(dtype: torch.dtype) -> None:
    x, y = torch.zeros(2, 3), torch.tensor([0, 2], dtype=dtype)
    with pytest.raises(RuntimeError, match="expected target dtype to be Long or Byte"):
        F.cross_entropy(x, y)
    torch.testing.assert_close(fastloss.cross_entropy(x, y), torch.tensor(3.0).log())


@pytest.mark.parametrize("smoothing", [-0.1, NAN])
def test_differs_in_label_smoothing_out_of_range(smoothing: float) -> None:
    x, y = torch.zeros(2, 3), torch.tensor([0, 2])
    F.cross_entropy(x, y, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="label_smoothing"):
        fastloss.cross_entropy(x, y, label_smoothing=smoothing)


def test_differs_in_the_gradient_of_ignored_nan() -> None:
    x = torch.tensor([[1.0, 2.0], [NAN, NAN]])
    y = torch.tensor([0, -100])
    leaf = x.clone().requires_grad_()
    F.cross_entropy(leaf, y).backward()
    assert leaf.grad is not None
    assert leaf.grad[1].isnan().all()
    value, grad = fastloss.value_and_grad(fastloss.cross_entropy)(x, y)
    assert torch.isfinite(value)
    assert not grad[1].any()
    torch.testing.assert_close(grad[0], leaf.grad[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_differs_in_half_precision_sums(dtype: str) -> None:
    """65,536 rows of 64 classes: torch adds in the dtype: off in bfloat16, nan in float16."""
    # One draw, one thread: torch's error depends on both. This draw is one of eight, chosen because torch is 1.1% off
    # on it; on the others 0.04% to 1.1%.
    x = np.random.default_rng(3).standard_normal((65_536, 64)).astype(DTYPES[dtype])
    y = np.arange(65_536) % 64
    truth = float(BY_ID["cross_entropy"].oracle(x, y).value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    theirs = float(F.cross_entropy(tensor(x), tensor(y)))
    torch.set_num_threads(threads)
    assert not abs(theirs - truth) <= 0.01 * truth
    ours = fastloss.cross_entropy(tensor(x), tensor(y))
    assert str(ours.dtype) == f"torch.{dtype}"
    # Half an ulp of 4 <= loss < 8: 2**-6 of bfloat16's 8 bits, 2**-9 of float16's 11.
    assert abs(float(ours) - truth) <= {"bfloat16": 2**-6, "float16": 2**-9}[dtype] + 3e-7 * truth


def test_differs_in_bce_with_logits_at_infinity() -> None:
    x, y = torch.tensor([INF, INF, -INF, -INF]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert F.binary_cross_entropy_with_logits(x, y, reduction="none").isnan().any()
    ours = fastloss.binary_cross_entropy_with_logits(x, y, reduction="none")
    assert ours.tolist() == [0, INF, 0, INF]


def test_differs_in_the_small_tail_of_bce_with_logits() -> None:
    x, y = torch.tensor([-37.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    assert F.binary_cross_entropy_with_logits(x, y) == 0
    assert float(fastloss.binary_cross_entropy_with_logits(x, y)) == pytest.approx(np.exp(-37), rel=1e-15)


def test_differs_in_the_gradient_of_l1_at_nan() -> None:
    x, y = torch.tensor([1.0, NAN]), torch.tensor([1.0, 1.0])
    leaf = x.clone().requires_grad_()
    F.l1_loss(leaf, y, reduction="sum").backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [0, 0]
    _, grad = fastloss.value_and_grad(fastloss.l1_loss)(x, y, reduction="sum")
    assert grad[0] == 0
    assert grad[1].isnan()


def test_differs_in_integer_input() -> None:
    """An error in both; ours says which dtype to cast to."""
    x = torch.tensor([1, 2])
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        F.mse_loss(x, x)
    with pytest.raises(TypeError, match="float32"):
        fastloss.mse_loss(x, x)


def test_differs_in_impossible_classes_of_no_probability() -> None:
    """A logit of -inf where the target's probability is 0: 0 * inf is nan in torch; ours costs nothing."""
    x, y = torch.tensor([0.0, -INF]), torch.tensor([1.0, 0.0])
    assert F.cross_entropy(x, y).isnan()
    assert fastloss.cross_entropy(x, y) == 0


def test_differs_in_classes_of_length_zero() -> None:
    x = torch.zeros(2, 0)
    assert F.cross_entropy(x, x).isnan()
    with pytest.raises(ValueError, match="class"):
        fastloss.cross_entropy(x, x)


@pytest.mark.parametrize(
    ("name", "operands", "options", "theirs", "ours"),
    [
        ("cross_entropy", ([[0.0, 1.0]], [5]), {}, IndexError, IndexError),
        ("cross_entropy", ([[0.0, 1.0]], [-1]), {}, IndexError, IndexError),
        ("binary_cross_entropy", ([1.5], [1.0]), {}, RuntimeError, ValueError),
        ("binary_cross_entropy", ([0.5], [1.5]), {}, RuntimeError, ValueError),
        ("huber_loss", ([0.5], [1.5]), {"delta": 0.0}, RuntimeError, ValueError),
        ("smooth_l1_loss", ([0.5], [1.5]), {"beta": -1.0}, RuntimeError, ValueError),
        ("mse_loss", ([0.5], [1.5]), {"reduction": "avg"}, ValueError, ValueError),
        ("cross_entropy", ([[0.5, 1.0]], [[0.5, 0.5]]), {"ignore_index": 1}, RuntimeError, ValueError),
        ("binary_cross_entropy", ([0.5, 0.5], [1.0]), {}, ValueError, ValueError),
    ],
)
def test_refused_by_both(
    name: str, operands: Any, options: dict[str, Any], theirs: type[Exception], ours: type[Exception]
) -> None:
    x, y = (torch.tensor(operand) for operand in operands)
    with pytest.raises(theirs):
        getattr(F, name)(x, y, **options)
    with pytest.raises(ours):
        getattr(fastloss, name)(x, y, **options)


@pytest.mark.parametrize("weight", [None, [-1.0, 2.0, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_special_values_agree(weight: list[float] | None, smoothing: float) -> None:
    """All -inf, any +inf, -inf at the target or elsewhere: torch's nan, inf and numbers are ours."""
    rows = [[-INF] * 3, [INF, 0, 0], [-INF, 0, 1], [0, -INF, 1], [NAN, 0, 0], [1e4, -1e4, 0]]
    x = torch.tensor(rows, dtype=torch.float64)
    y = torch.zeros(len(rows), dtype=torch.int64)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    for reduction in ("none", "sum"):
        options: dict[str, Any] = {"weight": w, "label_smoothing": smoothing, "reduction": reduction}
        expected = F.cross_entropy(x, y, **options)
        got = fastloss.cross_entropy(x, y, **options)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_half_tensors(rng: Rng) -> None:
    """float16 and bfloat16 tensors per sample: torch computes these in float32 too, and rounds once."""
    for dtype in (torch.float16, torch.bfloat16):
        for row in ROWS:
            sample = row.draw(rng, (20, 7))
            x = torch.from_numpy(sample.input).to(dtype)
            y = torch.from_numpy(sample.target) if row.indices else torch.from_numpy(sample.target).to(dtype)
            got = row.function(x, y, reduction="none")
            assert got.dtype == dtype
            as_double = Sample(x.double().numpy(), y.double().numpy() if not row.indices else sample.target, {})
            truth = row.truth(as_double, "none").value
            eps = float(torch.finfo(dtype).eps)
            np.testing.assert_allclose(
                got.double(), np.float64(truth), rtol=0.51 * eps, atol=float(torch.finfo(dtype).tiny) + 1e-6
            )
