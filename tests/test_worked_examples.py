"""The worked examples that the losses were specified with."""

import numpy as np
import pytest

import fastloss

CIFAR_LOGITS = [
    [-0.0729, -0.0768, -0.1316, -0.1054, 0.0700, 0.1325, 0.0323, 0.1132, 0.1797, -0.0037],
    [-0.0830, -0.0798, -0.1405, -0.1147, 0.0607, 0.1272, 0.0178, 0.1276, 0.2022, -0.0107],
]


def test_equal_one_hot_distributions_have_no_cross_entropy() -> None:
    """H(P, Q) = -sum P(x) log Q(x) is 0 where P = Q is one-hot."""
    p = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    with np.errstate(divide="ignore"):
        log_q = np.log(p)
    np.testing.assert_array_equal(fastloss.cross_entropy(log_q, p, reduction="none"), [0, 0])
    assert fastloss.cross_entropy(log_q, np.array([1, 2])) == 0
    assert fastloss.binary_cross_entropy(p, p) == 0
    assert fastloss.kl_div(np.maximum(log_q, -700), p, reduction="sum") == 0


def test_person_dog_cat() -> None:
    """-0.8 + ln(e^0.8 + e^0.1 + e^0.2)."""
    logits = np.array([0.8, 0.1, 0.2])
    expected = -0.8 + np.log(np.exp(logits).sum())
    assert round(expected, 4) == 0.7156
    got = fastloss.cross_entropy(logits, np.array(0))
    assert got == pytest.approx(expected, rel=1e-15)
    assert fastloss.cross_entropy([[0.8, 0.1, 0.2]], [0]) == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_first_batch_of_cifar_10(dtype: str) -> None:
    loss = fastloss.CrossEntropyLoss()
    value = loss(np.array(CIFAR_LOGITS, dtype), np.array([3, 8]))
    assert value.dtype == dtype
    assert round(float(value), 4) == 2.2721


def test_is_it_an_apple() -> None:
    """Three probabilities against (1, 1, 0): the mean of -log 0.9, -log 0.6 and -log(1 - 0.2)."""
    p, apple = np.array([0.9, 0.6, 0.2]), np.array([1.0, 1.0, 0.0])
    by_hand = -(np.log(0.9) + np.log(0.6) + np.log(1 - 0.2)) / 3
    assert fastloss.binary_cross_entropy(p, apple) == pytest.approx(by_hand, rel=1e-15)
    assert fastloss.BCELoss()(p, apple) == pytest.approx(by_hand, rel=1e-15)
    assert fastloss.binary_cross_entropy(p.astype("float32"), [1, 1, 0]) == pytest.approx(by_hand, rel=3e-7)


def test_label_smoothing_with_weights() -> None:
    weight = np.array([1.0, 2.0, 4.0])
    logits = np.array([[1.0, 2.0, 3.0], [1.0, 0.0, -1.0]])

    def loss(target: list[int], reduction: str) -> np.ndarray:  # type: ignore[type-arg]
        return fastloss.cross_entropy(  # type: ignore[no-any-return]
            logits, np.array(target), weight, label_smoothing=0.1, reduction=reduction
        )

    np.testing.assert_allclose(loss([2, 0], "none"), [1.69582, 0.79529], atol=5e-6)
    np.testing.assert_allclose(loss([2, 0], "mean"), 0.498222, atol=5e-7)
    np.testing.assert_allclose(loss([2, -100], "mean"), 0.423956, atol=5e-7)


def test_bce_of_certainty() -> None:
    """p = 0 against 1 costs 100, not infinity; a logit of -37 against 0 costs 8.5e-17, not 0."""
    assert fastloss.binary_cross_entropy(np.array([0.0]), np.array([1.0])) == 100
    tail = fastloss.binary_cross_entropy_with_logits(np.array([-37.0]), np.array([0.0]))
    assert tail == pytest.approx(8.5e-17, rel=5e-3)
