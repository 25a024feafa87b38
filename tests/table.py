"""The table of losses that drives the tests: inputs, options, gradients and tolerances of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import fastloss
import reference
from reference import Truth

Shape = tuple[int, ...]
Rng = np.random.Generator
Options = dict[str, Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")} | {"bfloat16": BFLOAT16}
ARGNUM = {"input": 0, "target": 1, "weight": 2}


# ---- drawing


def n_classes(shape: Shape) -> int:
    """C of (C) or (N, C, d1, ...)."""
    return shape[0] if len(shape) == 1 else shape[1]


def samples(shape: Shape) -> Shape:
    """The shape without its classes: () of (C), (N, d1, ...) of (N, C, d1, ...)."""
    return () if len(shape) == 1 else shape[:1] + shape[2:]


@dataclass(frozen=True)
class Array:
    """An option that is an array: uniform in [low, high), in the input's dtype, of a shape made from its."""

    shape: Callable[[Shape], Shape]
    low: float = 0.1
    high: float = 2.0


CLASSES = Array(lambda shape: (n_classes(shape),))
FULL = Array(lambda shape: shape)
LAST = Array(lambda shape: shape[-1:])


def normal(rng: Rng, shape: Shape, options: Options) -> NDArray[Any]:
    return 4 * rng.standard_normal(shape)


def unit(rng: Rng, shape: Shape, options: Options) -> NDArray[Any]:
    return rng.uniform(0, 1, shape)


def probabilities(rng: Rng, shape: Shape, options: Options) -> NDArray[Any]:
    """Per class, summing to anything between 0.5 and 1.5 over a row."""
    raw = rng.exponential(1, shape)
    return raw / raw.sum(min(1, len(shape) - 1), keepdims=True) * rng.uniform(0.5, 1.5)


def indices(rng: Rng, shape: Shape, options: Options) -> NDArray[Any]:
    """Class indices, one in eight of them ignored (ignore_index may also be a class: then its rows are)."""
    target = rng.integers(0, n_classes(shape), samples(shape))
    ignore = options.get("ignore_index", -100)
    return target if ignore >= 0 else np.where(rng.uniform(size=target.shape) < 0.125, ignore, target)


def log_or_plain(rng: Rng, shape: Shape, options: Options) -> NDArray[Any]:
    """The target of kl_div: probabilities, one in eight of them 0, or logarithms of some."""
    p = rng.uniform(0.01, 1, shape)
    return np.log(p) if options.get("log_target") else p * (rng.uniform(size=shape) > 0.125)


@dataclass(frozen=True)
class Sample:
    """One drawn call: operands and options as they are handed to fastloss and to the oracle."""

    input: NDArray[Any]
    target: NDArray[Any]
    options: Options


# ---- the table


@dataclass(frozen=True)
class Row:
    """A loss. `options` holds, for each name, values other than the default."""

    id: str
    name: str
    oracle: Callable[..., Truth]
    draw_input: Callable[[Rng, Shape, Options], NDArray[Any]]
    draw_target: Callable[[Rng, Shape, Options], NDArray[Any]]
    options: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    gradients: tuple[str, ...] = ("input",)
    reductions: tuple[str, ...] = ("none", "mean", "sum")
    classes: bool = False  # (N, C, ...) with one sample a row; else one sample an element
    indices: bool = False  # the target holds class indices

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(fastloss, self.name)  # type: ignore[no-any-return]

    def choices(self) -> Iterator[Options]:
        """The defaults, each option's values alone, and all options at once."""
        yield {}
        for name, values in self.options.items():
            for value in values:
                yield {name: value}
        if len(self.options) > 1:
            yield self.everything()

    def everything(self) -> Options:
        """All options at once. Tests of other things take it: they compile few kernels of their own."""
        return {name: values[0] for name, values in self.options.items()}

    def dtypes(self, choice: Options) -> tuple[str, ...]:
        """float32 for every choice of options; float64, the same formulas in other kernels, for all at once."""
        return ("float32", "float64") if choice == self.everything() else ("float32",)

    def any_choice(self, rng: Rng) -> Options:
        """Each option at its default or one of its values, independently."""
        drawn = {name: rng.integers(0, len(values) + 1) for name, values in self.options.items()}
        return {name: self.options[name][i - 1] for name, i in drawn.items() if i}

    def draw(self, rng: Rng, shape: Shape, dtype: Any = np.float32, choice: Options | None = None) -> Sample:
        """Operands for one choice of options, in `dtype`; class indices are int64."""
        choice = choice or {}
        options = {
            name: rng.uniform(value.low, value.high, value.shape(shape)).astype(dtype)
            if isinstance(value, Array)
            else value
            for name, value in choice.items()
        }
        target = self.draw_target(rng, shape, options)
        return Sample(
            self.draw_input(rng, shape, options).astype(dtype),
            target if self.indices else target.astype(dtype),
            options,
        )

    def truth(self, sample: Sample, reduction: str = "mean", grad_output: Any = None) -> Truth:
        return self.oracle(sample.input, sample.target, **sample.options, reduction=reduction, grad_output=grad_output)

    def call(self, sample: Sample, **more: Any) -> Any:
        return self.function(sample.input, sample.target, **sample.options, **more)

    def gradient(self, sample: Sample, operand: str = "input", **more: Any) -> tuple[Any, Any]:
        """(value, gradient to `operand`)."""
        fused = fastloss.value_and_grad(self.function, argnums=ARGNUM[operand])
        return fused(sample.input, sample.target, **sample.options, **more)  # type: ignore[no-any-return]


SOFTMAX: dict[str, tuple[Any, ...]] = {
    "weight": (CLASSES,),
    "label_smoothing": (0.1, 1.0),
    "lse_square_scale": (1e-3,),
    "softcap": (5.0,),
}
SHAPED: dict[str, tuple[Any, ...]] = {"weight": (FULL,)}

ROWS = (
    Row(
        "cross_entropy",
        "cross_entropy",
        reference.cross_entropy,
        normal,
        indices,
        options=SOFTMAX | {"ignore_index": (1, 10**6)},
        classes=True,
        indices=True,
    ),
    Row(
        "cross_entropy-probabilities",
        "cross_entropy",
        reference.cross_entropy,
        normal,
        probabilities,
        options=SOFTMAX,
        gradients=("input", "target", "weight"),
        classes=True,
    ),
    Row(
        "nll_loss",
        "nll_loss",
        reference.nll_loss,
        normal,
        indices,
        options={"weight": (CLASSES,), "ignore_index": (1,)},
        classes=True,
        indices=True,
    ),
    Row("l1_loss", "l1_loss", reference.l1_loss, normal, normal, SHAPED, ("input", "target")),
    Row("mse_loss", "mse_loss", reference.mse_loss, normal, normal, SHAPED, ("input", "target")),
    Row(
        "binary_cross_entropy",
        "binary_cross_entropy",
        reference.binary_cross_entropy,
        unit,
        unit,
        {"weight": (FULL, LAST)},
        ("input", "target"),
    ),
    Row(
        "binary_cross_entropy_with_logits",
        "binary_cross_entropy_with_logits",
        reference.binary_cross_entropy_with_logits,
        normal,
        unit,
        {"weight": (FULL, LAST), "pos_weight": (LAST, FULL)},
        ("input", "target"),
    ),
    Row(
        "smooth_l1_loss",
        "smooth_l1_loss",
        reference.smooth_l1_loss,
        normal,
        normal,
        {"beta": (3.0, 0.0)},
        ("input", "target"),
    ),
    Row(
        "huber_loss",
        "huber_loss",
        reference.huber_loss,
        normal,
        normal,
        {"delta": (3.0,), "weight": (FULL,)},
        ("input", "target"),
    ),
    Row(
        "kl_div",
        "kl_div",
        reference.kl_div,
        normal,
        log_or_plain,
        {"log_target": (True,)},
        ("input", "target"),
        ("none", "mean", "sum", "batchmean"),
    ),
)
BY_ID = {row.id: row for row in ROWS}
CLASS_ROWS = tuple(row for row in ROWS if row.classes)
POINTWISE = tuple(row for row in ROWS if not row.classes)


def name_of(value: Any) -> str:
    """A short test id for a row or a choice of options."""
    if isinstance(value, Row):
        return value.id
    if isinstance(value, dict):
        shown = {CLASSES: "classes", FULL: "full", LAST: "last"}
        return "-".join(f"{k}={shown[v] if isinstance(v, Array) else v}" for k, v in value.items()) or "defaults"
    return str(value)


# ---- tolerances


def ulp(value: Any, dtype: Any) -> NDArray[Any]:
    """The spacing of `dtype` at |value|, in the value's own, wider format; its least subnormal at 0."""
    info = ml_dtypes.finfo(dtype)
    value = np.where(np.isfinite(value), abs(value), 0)
    _, exponent = np.frexp(np.maximum(value, float(info.tiny)))
    return np.ldexp(value.dtype.type(float(info.eps)), exponent - 1)


def compute_dtype(dtype: Any) -> np.dtype[Any]:
    """float64 for float64, else float32: what the arithmetic of a loss runs in."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


# 1e-6 for cross-entropy at |logit| up to 1e4, in units of float32's eps (1.19e-7); float64 likewise.
CANCELLATION = 8.4


def sample_bound(truth: Truth, dtype: Any) -> NDArray[Any]:
    """The bound of one sample's loss: ulps of the compute dtype, and `CANCELLATION` eps of what cancels.

    2 ulp in float32. 4 in float64, where nothing wider stands behind a formula of up to eight roundings.
    """
    compute = compute_dtype(dtype)
    eps = float(np.finfo(compute).eps)
    ulps = 2 if compute == np.float32 else 4
    return ulps * ulp(truth.value, compute) + CANCELLATION * eps * truth.terms.get("value", 0)


def value_bound(row: Row, sample: Sample, reduction: str, dtype: Any) -> NDArray[Any]:
    """The bound of a result before it is rounded to `dtype`.

    Sums of a thousand samples and more: 3e-7 (float32), 1e-15 log2(N) (float64) of the sum of |losses|: the
    samples' own errors average out. Of fewer: the sum of their bounds.
    """
    each = row.truth(sample, "none")
    bound = sample_bound(each, dtype)
    if reduction == "none":
        return bound
    n = each.value.size
    if n >= 1000:
        relative = 3e-7 if compute_dtype(dtype) == np.float32 else 1e-15 * np.log2(n)
        bound = relative * abs(each.value)
    total = row.truth(sample, "sum").value
    value = row.truth(sample, reduction).value
    with np.errstate(all="ignore"):
        divided = abs(value / total) if total != 0 and np.isfinite(value) else 1
    return np.asarray(bound.sum() * divided + ulp(value, compute_dtype(dtype)))


def gradient_bound(truth: Truth, operand: str, dtype: Any) -> NDArray[Any]:
    """The bound of a gradient: eight roundings of half an ulp, and `CANCELLATION` eps of what cancels."""
    compute = compute_dtype(dtype)
    eps = float(np.finfo(compute).eps)
    # exp stops at the least normal number (where tables give powers of 2 at its double; and it is relative to a maximum
    # rounded to a power of 2) instead of going on to 0.
    least = 3 * float(np.finfo(compute).tiny) * np.maximum(1, truth.terms.get(operand, 0))
    bound = 4 * ulp(getattr(truth, operand), compute) + CANCELLATION * eps * truth.terms.get(operand, 0)
    return np.asarray(bound + least)


def assert_within(got: Any, truth: Any, bound: Any, dtype: Any, what: str = "") -> None:
    """`got` has the dtype, the truth's shape, and lies within the bound (and half an ulp of a half)."""
    __tracebackhide__ = True
    dtype = np.dtype(dtype).newbyteorder("=")
    got, truth = np.asarray(got), np.asarray(truth)
    assert got.dtype == dtype, f"{what}: dtype {got.dtype}, expected {dtype}"
    assert got.shape == truth.shape, f"{what}: shape {got.shape}, expected {truth.shape}"
    if got.size == 0:
        return
    wide = got.astype(truth.dtype)
    bound = np.broadcast_to(bound, truth.shape)
    if dtype.itemsize == 2:
        # 1% over half an ulp: the sum of float32's error and the rounding may cross one more tie.
        bound = bound + 0.505 * ulp(truth, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        error = abs(wide - truth)
        good = error <= bound
    good |= np.isnan(wide) & np.isnan(truth)
    good |= wide == truth
    # Past the largest finite number of the dtype infinity is the right rounding, and at it either may be.
    largest = float(ml_dtypes.finfo(dtype).max)
    good |= np.isinf(wide) & (np.sign(wide) == np.sign(truth)) & (abs(truth) >= largest * (1 - 1e-7))
    if not good.all():
        at = np.unravel_index(np.argmax(~good), good.shape)
        ratio = np.where(good, 0, error / np.where(bound == 0, np.inf, bound))
        raise AssertionError(
            f"{what}: {(~good).sum()} of {good.size} out of bounds, first at {tuple(map(int, at))}: "
            f"got {wide[at]!r}, truth {truth[at]!r}, error {error[at]:.3g}, bound {bound[at]:.3g}; "
            f"worst {np.nanmax(ratio):.3g} times its bound"
        )


def check_value(row: Row, sample: Sample, reduction: str, dtype: Any = None, **more: Any) -> Any:
    """Calls the loss and compares it with the oracle; returns the result."""
    __tracebackhide__ = True
    dtype = np.dtype(dtype or sample.input.dtype)
    got = row.call(sample, reduction=reduction, **more)
    truth = row.truth(sample, reduction).value
    assert_within(got, truth, value_bound(row, sample, reduction, sample.input.dtype), dtype, f"{row.id} {reduction}")
    return got


def check_gradient(
    row: Row, sample: Sample, reduction: str, operand: str = "input", grad_output: Any = None, **more: Any
) -> Any:
    """Calls value_and_grad and compares both with the oracle; returns the gradient."""
    __tracebackhide__ = True
    dtype = sample.input.dtype
    own = {"input": sample.input, "target": sample.target, "weight": sample.options.get("weight")}[operand]
    own_dtype, what = own.dtype, f"{row.id} {reduction}"
    # The oracle first: with grad_out=input the call overwrites its input.
    truth = row.truth(sample, reduction, 1.0 if grad_output is None else grad_output)
    bound = value_bound(row, sample, reduction, dtype)
    value, grad = row.gradient(sample, operand, reduction=reduction, grad_output=grad_output, **more)
    assert_within(value, truth.value, bound, dtype, what)
    bound = gradient_bound(truth, operand, dtype)
    assert_within(grad, getattr(truth, operand), bound, own_dtype, f"{what}, gradient to {operand}")
    return grad
