"""The classes: their functions with options kept, torch's constructor order, callable over any array."""

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import fastloss
from table import BY_ID, ROWS, Options, Rng, Row, name_of

CLASS_OF = {
    "cross_entropy": "CrossEntropyLoss",
    "nll_loss": "NLLLoss",
    "l1_loss": "L1Loss",
    "mse_loss": "MSELoss",
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "smooth_l1_loss": "SmoothL1Loss",
    "huber_loss": "HuberLoss",
    "kl_div": "KLDivLoss",
}


def kept(row: Row, choice: Options) -> Options:
    """The options that a constructor takes: those of torch's class, and ours."""
    import inspect

    names = inspect.signature(getattr(fastloss, CLASS_OF[row.name])).parameters
    return {name: value for name, value in choice.items() if name in names}


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_classes_are_their_functions(row: Row, rng: Rng) -> None:
    """The same bits, for every option and reduction; again after pickling; gradients too."""
    for choice in row.choices():
        sample = row.draw(rng, (12, 5), choice=kept(row, choice))
        for reduction in row.reductions:
            loss = getattr(fastloss, CLASS_OF[row.name])(**sample.options, reduction=reduction)
            expected = row.call(sample, reduction=reduction)
            for one in (loss, pickle.loads(pickle.dumps(loss))):
                np.testing.assert_array_equal(one(sample.input, sample.target), expected)
        value, grad = fastloss.value_and_grad(getattr(fastloss, CLASS_OF[row.name])(**sample.options))(
            sample.input, sample.target
        )
        expected_value, expected_grad = row.gradient(sample)
        assert value == expected_value
        np.testing.assert_array_equal(grad, expected_grad)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_any_array(row: Row, rng: Rng) -> None:
    sample = row.draw(rng, (12, 5))
    loss = getattr(fastloss, CLASS_OF[row.name])()
    got = loss(torch.from_numpy(sample.input), torch.from_numpy(sample.target))
    assert isinstance(got, torch.Tensor)
    assert float(got) == float(loss(sample.input, sample.target))
    assert loss(sample.input.tolist(), sample.target.tolist()) == pytest.approx(float(got), rel=2e-6)


def test_positional_construction(rng: Rng) -> None:
    """Weight first, as in torch.nn."""
    weight = rng.uniform(0.1, 2, 5).astype(np.float32)
    sample = BY_ID["cross_entropy"].draw(rng, (12, 5))
    got = fastloss.CrossEntropyLoss(weight, None, -100, None, "sum", 0.1)(sample.input, sample.target)
    expected = fastloss.cross_entropy(sample.input, sample.target, weight, reduction="sum", label_smoothing=0.1)
    assert got == expected
    got = fastloss.NLLLoss(weight, None, 1)(sample.input, np.abs(sample.target) % 5)
    assert got == fastloss.nll_loss(sample.input, np.abs(sample.target) % 5, weight, ignore_index=1)
    assert fastloss.HuberLoss("sum", 2.0)([4.0], [0.0]) == 6
    assert fastloss.SmoothL1Loss(None, None, "sum", 2.0)([1.0], [0.0]) == 0.25
    assert fastloss.KLDivLoss(None, None, "batchmean", True)([[0.0]], [[0.0]]) == 0
    pos_weight = np.array([2.0])
    got = fastloss.BCEWithLogitsLoss(None, None, None, "sum", pos_weight)(np.array([0.0]), np.array([1.0]))
    assert got == pytest.approx(2 * np.log(2), rel=1e-15)


@pytest.mark.parametrize("name", sorted(set(CLASS_OF.values()) - {"HuberLoss"}))
def test_legacy_arguments(name: str) -> None:
    """They warn where the class is made, and not again at every call."""
    legacy: list[tuple[dict[str, Any], str]] = [({"size_average": False}, "sum"), ({"reduce": False}, "none")]
    for options, reduction in legacy:
        with pytest.warns(DeprecationWarning, match=reduction):
            loss = getattr(fastloss, name)(**options)
        x = np.full((3, 2), 0.5, np.float32)
        target = np.array([0, 1, 1]) if name in ("CrossEntropyLoss", "NLLLoss") else x
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = loss(x, target)
        np.testing.assert_array_equal(got, getattr(fastloss, name)(reduction=reduction)(x, target))


@pytest.mark.parametrize("name", sorted(CLASS_OF.values()))
def test_bad_options_fail_when_made_or_used(name: str) -> None:
    with pytest.raises(ValueError, match="reduction is 'average'"):
        getattr(fastloss, name)(reduction="average")([[0.5, 0.5]], [[0.5, 0.5]])


@pytest.mark.parametrize("name", sorted(CLASS_OF.values()))
def test_repr_shows_the_options(name: str) -> None:
    shown = repr(getattr(fastloss, name)(reduction="sum"))
    assert shown.startswith(f"{name}(")
    assert "reduction='sum'" in shown
