"""JAX programs around the losses: errors, ways into the kernels, threads, other processes, and optax."""

import ctypes
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastloss
import reference
from table import Rng

# JAX's threads stay in one worker.
pytestmark = pytest.mark.xdist_group("jax")
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy

import fastloss.jax  # noqa: E402
from fastloss.jax import ffi, rules, sites  # noqa: E402
from fastloss.kernels import xla  # noqa: E402

HEADER = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[sites.Site]:
    """The sites that were evaluated through Python."""
    taken: list[sites.Site] = []
    evaluate = ffi.evaluate

    def noting(site: sites.Site, *rest: Any) -> Any:
        taken.append(site)
        return evaluate(site, *rest)

    monkeypatch.setattr(ffi, "evaluate", noting)
    return taken


def drawn(rng: Rng, n: int = 32, c: int = 10) -> tuple[Any, Any]:
    """Logits and class indices."""
    return jnp.asarray(rng.standard_normal((n, c)), np.float32), jnp.asarray(rng.integers(0, c, n))


# ---- errors


def test_a_program_raises_for_invalid_numbers(rng: Rng) -> None:
    """On the first call and on those that compiled code serves; the next valid call is right again."""
    x, y = drawn(rng)
    for loss in (jax.jit(fastloss.cross_entropy), jax.jit(jax.value_and_grad(fastloss.cross_entropy))):
        for _ in range(3):
            with pytest.raises(
                (ValueError, RuntimeError), match=r"target 77 at position \(3,\) is out of range for 10"
            ):
                jax.block_until_ready(loss(x, y.at[3].set(77)))
            found = jax.tree.leaves(loss(x, y))[0]
            np.testing.assert_allclose(found, reference.cross_entropy(np.asarray(x), np.asarray(y)).value, rtol=3e-7)
    bce = jax.jit(lambda p: fastloss.binary_cross_entropy(p, jnp.ones(3)))
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match=r"input 1.5 at position \(1,\) is outside"):
            jax.block_until_ready(bce(jnp.array([0.5, 1.5, 0.5])))
    assert float(bce(jnp.ones(3))) == 0


def test_what_can_be_checked_while_tracing_is(rng: Rng) -> None:
    x, y = drawn(rng)
    jitted: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"target has shape \(31,\), expected \(32,\)", lambda a: fastloss.cross_entropy(a, y[1:])),
        (ValueError, "reduction is 'median'", lambda a: fastloss.mse_loss(a, a, reduction="median")),
        (ValueError, "label_smoothing is 2", lambda a: fastloss.cross_entropy(a, y, label_smoothing=2)),
        (TypeError, "input has dtype int32", lambda a: fastloss.cross_entropy(a.astype(int), y)),
        (TypeError, "arrays of JAX never change", lambda a: fastloss.mse_loss(a, a, out=np.zeros(()))),
        (TypeError, "check=True waits", lambda a: fastloss.cross_entropy(a, y, check=True)),
        (
            TypeError,
            "arrays of JAX never change",
            lambda a: fastloss.value_and_grad(fastloss.mse_loss)(a, a, grad_out=np.zeros((32, 10))),
        ),
        (
            ValueError,
            r"grad_output has shape \(2,\), expected \(\)",
            lambda a: fastloss.value_and_grad(fastloss.mse_loss)(a, a, grad_output=jnp.ones(2)),
        ),
        (
            ValueError,
            "integers that int32 cannot",
            lambda a: fastloss.cross_entropy(a, np.full(32, 2**40)),
        ),
        (TypeError, "meter|numbers yet", lambda a: fastloss.Meter("mse_loss").update(a, a)),
    ]
    for error, words, function in jitted:
        with pytest.raises(error, match=words):
            jax.jit(function)(x)
    with pytest.warns(fastloss.BroadcastWarning):
        jax.jit(lambda a: fastloss.mse_loss(a, jnp.zeros(10)))(x)
    with pytest.warns(DeprecationWarning, match="size_average"):
        total = jax.jit(lambda a: fastloss.mse_loss(a, 0 * a, size_average=False))(x)
    np.testing.assert_allclose(total, (np.asarray(x, float) ** 2).sum(), rtol=1e-6)


# ---- ways into the kernels


def test_only_the_first_call_goes_through_python(long_ways: list[sites.Site], rng: Rng) -> None:
    """One of a pointwise loss with weights, one over classes; value and gradient; a batch."""
    x, y = drawn(rng, 17, 9)
    w = jnp.ones_like(x)
    programs = (
        (jax.jit(fastloss.cross_entropy), (x, y)),
        (jax.jit(jax.value_and_grad(fastloss.cross_entropy)), (x, y)),
        (jax.jit(jax.vmap(lambda a, b: fastloss.mse_loss(a, b, reduction="sum"))), (x, 0 * x)),
        (jax.jit(lambda a, b: fastloss.binary_cross_entropy_with_logits(a, b, w)), (x, 0 * x)),
        (jax.jit(lambda a, b: fastloss.huber_loss(a, b, reduction="none")), (x, x)),
    )
    for program, arrays in programs:
        first = program(*arrays)
        assert len(long_ways) == 1
        again = program(*arrays)
        assert len(long_ways) == 1
        jax.tree.map(np.testing.assert_array_equal, first, again)
        long_ways.clear()


def test_the_same_bits_as_numpy(rng: Rng) -> None:
    """Of sizes that threads share."""
    x, y = drawn(rng, 4000, 100)
    loss = jax.jit(fastloss.value_and_grad(fastloss.cross_entropy))
    expected = fastloss.value_and_grad(fastloss.cross_entropy)(np.asarray(x), np.asarray(y))
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, tuple(loss(x, y)), expected)


def test_ugly_inputs(rng: Rng) -> None:
    """Nothing at all, NaN in an ignored row, all ignored, infinities, the same array twice."""
    loss = jax.jit(jax.value_and_grad(fastloss.cross_entropy))
    x, y = drawn(rng, 6, 4)
    for _ in range(2):
        value, grad = loss(x[:0], y[:0])
        assert (bool(jnp.isnan(value)), grad.shape) == (True, (0, 4))
        value, grad = loss(x.at[2].set(jnp.nan), y.at[2].set(-100))
        keep = np.arange(6) != 2
        truth = reference.cross_entropy(np.asarray(x)[keep], np.asarray(y)[keep], grad_output=1.0)
        np.testing.assert_allclose(value, truth.value, rtol=1e-6)
        np.testing.assert_allclose(grad[keep], truth.input, rtol=1e-5, atol=1e-7)
        assert (np.asarray(grad[2]) == 0).all()
        value, grad = loss(x, jnp.full(6, -100))
        assert (bool(jnp.isnan(value)), bool((grad == 0).all())) == (True, True)
        value, grad = loss(x.at[0, y[0]].set(-jnp.inf), y)
        assert (bool(jnp.isinf(value)), bool(jnp.isfinite(grad).all())) == (True, True)
        assert float(jax.jit(lambda a: fastloss.mse_loss(a, a))(x)) == 0


def test_many_threads(rng: Rng) -> None:
    """At once, of one program and of new ones."""
    cases = [drawn(rng, 20 + k % 3, 5) for k in range(12)]
    truths = [float(reference.cross_entropy(np.asarray(x), np.asarray(y)).value) for x, y in cases]
    program = jax.jit(fastloss.cross_entropy)
    wrong = []

    def work(k: int) -> None:
        for _ in range(50):
            found = float(program(*cases[k]))
            if abs(found - truths[k]) > 1e-6 * truths[k]:
                wrong.append((k, found))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_more_sites_than_the_first_table_holds(rng: Rng) -> None:
    """Each number stands, once, where it is looked for, with its own address; also of numbers that crowd."""
    table = ffi.Table()
    numbers = [int(n) for n in rng.integers(-(2**63), 2**63, 300)] + [64 * k + 1 for k in range(9)]
    for address, number in enumerate(numbers, 1):
        table.add(number, address)
        mask = ctypes.c_int64.from_address(table.address).value
        words = np.ctypeslib.as_array((ctypes.c_int64 * (3 + 2 * mask)).from_address(table.address))
        slots = [1 + 2 * ((number + k) & mask) for k in range(xla.PROBES)]
        assert [int(words[slot + 1]) for slot in slots if words[slot] == number] == [address]
    assert sorted(words[1::2][words[1::2] != 0].tolist()) == sorted(numbers)


@pytest.fixture
def without_ffi(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A release of XLA whose structures we do not know."""
    monkeypatch.setattr(ffi, "available", lambda: False)
    rules._kernel.cache_clear()
    jax.clear_caches()
    yield
    rules._kernel.cache_clear()
    jax.clear_caches()


def test_other_releases_of_xla(without_ffi: None, rng: Rng) -> None:
    """A callback of JAX's serves them: right under jit, grad and vmap."""
    x, y = drawn(rng, 6, 4)
    loss = jax.jit(jax.value_and_grad(fastloss.cross_entropy))
    assert "@fastloss" not in loss.lower(x, y).as_text()
    value, grad = loss(x, y)
    truth = reference.cross_entropy(np.asarray(x), np.asarray(y), grad_output=1.0)
    np.testing.assert_allclose(value, truth.value, rtol=1e-6)
    np.testing.assert_allclose(grad, truth.input, rtol=1e-5, atol=1e-7)
    sums = jax.vmap(lambda a: fastloss.mse_loss(a, jnp.zeros(4), reduction="sum"))(x)
    np.testing.assert_allclose(sums, (np.asarray(x, float) ** 2).sum(1), rtol=1e-6)


def test_the_interface_is_read_from_the_header() -> None:
    header = HEADER.read_text()
    assert xla.api_version(header) == (0, int(header.split("XLA_FFI_API_MINOR ")[1].split()[0]))
    for old, new in (
        ("XLA_FFI_ExecutionStage stage;", ""),
        ("void* data;\n  int64_t rank;", "int64_t rank;\n  void* data;"),
        ("#define XLA_FFI_API_MAJOR 0", "#define XLA_FFI_API_MAJOR 1"),
        ("struct XLA_FFI_Scalar", "struct XLA_FFI_Number"),
    ):
        assert old in header
        assert xla.api_version(header.replace(old, new)) is None


LOWERED = """
import jax, jax.numpy as jnp, fastloss
print(jax.jit(jax.value_and_grad(fastloss.cross_entropy)).lower(jnp.ones((1, 3)), jnp.zeros(1, int)).as_text())
"""


def test_programs_are_the_same_in_every_process() -> None:
    """They hold no addresses: JAX's cache of compiled programs, and what it exports, may be shared by processes."""
    path = str(Path(fastloss.__file__).parents[1])
    command = [sys.executable, "-c", LOWERED]
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    program = jax.jit(jax.value_and_grad(fastloss.cross_entropy)).lower(jnp.ones((1, 3)), jnp.zeros(1, int)).as_text()
    assert "@fastloss" in program
    assert done.stdout.strip() == program.strip()


def test_inside_of_control_flow(rng: Rng) -> None:
    """scan, cond, remat and a training step."""
    x, y = drawn(rng, 8, 4)

    def step(w: Any, _: Any) -> Any:
        value, grad = jax.value_and_grad(jax.checkpoint(lambda w: fastloss.cross_entropy(x @ w, y)))(w)
        return w - 0.5 * grad, value

    def optax_step(w: Any, _: Any) -> Any:
        loss = lambda w: optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean()  # noqa: E731
        value, grad = jax.value_and_grad(loss)(w)
        return w - 0.5 * grad, value

    (w, values), (truth, expected) = (jax.lax.scan(f, jnp.eye(4), None, length=20) for f in (step, optax_step))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(w, truth, rtol=1e-4, atol=1e-5)
    either = jax.jit(lambda flag: jax.lax.cond(flag, lambda: fastloss.cross_entropy(x, y), lambda: 0.0))
    assert float(either(False)) == 0
    assert float(either(True)) == pytest.approx(float(fastloss.cross_entropy(x, y)), rel=1e-6)


# ---- optax


def test_optax_integer_labels(rng: Rng) -> None:
    """Value and gradient, any batch dimensions, axes, masks, labels that count from the end or are out of range."""
    ours = fastloss.jax.softmax_cross_entropy_with_integer_labels
    theirs = optax.softmax_cross_entropy_with_integer_labels

    def same(x: Any, y: Any, **options: Any) -> None:
        def with_grad(function: Any) -> Any:
            value, pull = jax.vjp(lambda a: function(a, y, **options), x)
            return value, *pull(jnp.ones_like(value))

        found, expected = (jax.jit(with_grad, static_argnums=0)(f) for f in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    x = jnp.asarray(rng.standard_normal((2, 3, 4, 5)), np.float32)
    y = jnp.asarray(rng.integers(0, 5, (2, 3, 4)))
    mask = jnp.asarray(rng.uniform(size=(2, 3, 4)) < 0.5)
    same(x[:, :, :1], y)
    same(jnp.moveaxis(x, 3, 1), y[:1], axis=1)
    same(x, jnp.asarray(rng.integers(0, 8, (3, 5))), axis=(2, 0))
    same(x, y, where=mask)
    jitted, expected = jax.jit(ours), jax.jit(theirs)
    assert float(jitted(x[0, 0, 0], y[0, 0, 0])) == pytest.approx(float(expected(x[0, 0, 0], y[0, 0, 0])), rel=1e-6)
    everywhere = jnp.asarray(rng.uniform(size=x.shape) < 0.7).at[0, 0, 0].set(False)
    np.testing.assert_allclose(jitted(x, y, where=everywhere), expected(x, y, where=everywhere), rtol=1e-5, atol=1e-6)
    odd = (y - 5) * (y % 2) + y * (1 - y % 2)  # every odd class from the end
    np.testing.assert_allclose(jitted(x, odd), expected(x, odd), rtol=1e-6, atol=1e-6)
    odd = y.at[0, 0, 0].set(5).at[1, 1, 1].set(-6)
    np.testing.assert_allclose(jitted(x, odd), expected(x, odd), rtol=1e-6, atol=1e-6)
    for wrong, words in (
        ((x, y * 1.0), "labels have dtype"),
        ((x, y[0]), "labels have shape"),
        ((x, y, 4), "axis is 4"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            ours(*wrong)


def test_optax_probabilities_and_sigmoid(rng: Rng) -> None:
    x = jnp.asarray(rng.standard_normal((2, 3, 5)), np.float32)
    q = jax.nn.softmax(jnp.asarray(rng.standard_normal((3, 5)), np.float32))
    mask = jnp.asarray(rng.uniform(size=(2, 3)) < 0.5)
    for options in ({"axis": 1}, {"axis": (0, 2)}, {"axis": None}, {"where": mask}):
        both = fastloss.jax.softmax_cross_entropy, optax.softmax_cross_entropy
        ours, theirs = (jax.jit(partial(f, **options))(x, q) for f in both)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for labels in (q, jnp.asarray(rng.integers(0, 2, (2, 3, 5)))):
        ours, theirs = (f.sigmoid_binary_cross_entropy(x, labels) for f in (fastloss.jax, optax))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("c", [10, 1000])
def test_value_and_grad_equals_optax(c: int, rng: Rng) -> None:
    """To 1e-6, jitted."""
    x, y = drawn(rng, 300, c)
    value, grad = jax.jit(jax.value_and_grad(fastloss.cross_entropy))(x, y)
    expected, slope = jax.jit(
        jax.value_and_grad(lambda a, b: optax.softmax_cross_entropy_with_integer_labels(a, b).mean())
    )(x, y)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(grad, slope, rtol=0, atol=1e-6 * float(abs(slope).max()))
