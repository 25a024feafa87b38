"""fastloss.torch's modules, errors and `patched`: drop-ins for torch.nn's."""

import copy
import inspect
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastloss
import fastloss.torch as ft
from fastloss.torch import functional
from fastloss.torch.spec import SPECS
from table import ROWS
from torch_losses import Rng

MODULES = (
    "L1Loss",
    "MSELoss",
    "CrossEntropyLoss",
    "NLLLoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "SmoothL1Loss",
    "HuberLoss",
    "KLDivLoss",
)
FUNCTIONS = sorted({row.name for row in ROWS})


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_torchs(name: str) -> None:
    """A subclass of torch's, with its constructor's arguments first and its buffers."""
    ours, theirs = getattr(ft, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    expected = list(inspect.signature(theirs).parameters)
    assert list(inspect.signature(ours).parameters)[: len(expected)] == expected
    module = ours()
    assert isinstance(module, nn.modules.loss._Loss)
    assert module.extra_repr() == theirs().extra_repr()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_torchs_signatures(name: str) -> None:
    ours = list(inspect.signature(getattr(ft, name)).parameters.values())
    theirs = list(inspect.signature(getattr(F, name)).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_buffers_travel(rng: Rng) -> None:
    weight = torch.from_numpy(rng.uniform(0.5, 2, 3).astype(np.float32))
    loss = ft.CrossEntropyLoss(weight, label_smoothing=0.1, softcap=5.0)
    assert list(loss.state_dict()) == ["weight"]
    other = ft.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1, softcap=5.0)
    other.load_state_dict(loss.state_dict())
    x, t = torch.from_numpy(rng.standard_normal((4, 3)).astype(np.float32)), torch.tensor([0, 2, 1, -100])
    for same in (other, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(same(x, t), loss(x, t))
    capped = 5 * torch.tanh(x / 5)
    torch.testing.assert_close(loss(x, t), F.cross_entropy(capped, t, weight, label_smoothing=0.1))
    assert loss.double()(x.double(), t).dtype is torch.float64
    pos = ft.BCEWithLogitsLoss(pos_weight=weight)
    assert list(pos.state_dict()) == ["pos_weight"]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # torch's advice about kl_div
def test_torchs_module_samples(name: str) -> None:
    """The inputs that torch tests its own modules with, values and gradients."""
    from torch.testing._internal.common_modules import module_db  # takes seconds

    infos = [info for info in module_db if info.module_cls is getattr(nn, name)]
    assert infos
    seen = 0
    for info in infos:
        inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True)
        for sample in inputs:
            made = sample.constructor_input
            ours, theirs = getattr(ft, name)(*made.args, **made.kwargs), getattr(nn, name)(*made.args, **made.kwargs)
            args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
            compare(partial(ours, *args, **kwargs), partial(theirs, *args, **kwargs), args)
            seen += 1
    assert seen


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # legacy arguments and broadcasts, which both warn of
def test_torchs_operator_samples(name: str) -> None:
    """The inputs that torch tests its own functions with, through `patched`."""
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    infos = [info for info in op_db if info.name == f"nn.functional.{name}"]
    assert infos
    seen = 0
    for info in infos:
        for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
            args, kwargs = (sample.input, *sample.args), sample.kwargs

            theirs = partial(getattr(F, name), *args, **kwargs)
            with ft.patched():
                ours = partial(getattr(F, name), *args, **kwargs)
            compare(ours, theirs, (*args, *kwargs.values()))
            seen += 1
    assert seen


def compare(ours: Any, theirs: Any, args: Any) -> None:
    """Both calls' values, and gradients by all that learns."""
    mine, its = ours(), theirs()
    torch.testing.assert_close(mine, its, equal_nan=True)
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    assert mine.requires_grad == its.requires_grad
    if leaves and its.requires_grad:
        upstream = torch.linspace(0.5, 1.5, its.numel(), dtype=its.dtype).reshape(its.shape)
        grads = [torch.autograd.grad(loss, leaves, upstream, allow_unused=True) for loss in (mine, its)]
        for got, expected in zip(*grads, strict=True):
            if expected is not None or (got is not None and got.any()):
                torch.testing.assert_close(got, expected, equal_nan=True)


# ---- errors and warnings


def test_errors_are_torchs_classes_too() -> None:
    x, t = torch.zeros(2, 3), torch.tensor([0, 3])
    with pytest.raises(IndexError, match=r"target 3 at position \(1,\)"):
        ft.cross_entropy(x, t)
    for kind in (RuntimeError, ValueError):
        with pytest.raises(kind, match="outside"):
            ft.binary_cross_entropy(x + 2, x)
        with pytest.raises(kind, match="shape"):
            ft.mse_loss(x, torch.zeros(2, 4))
        with pytest.raises(kind, match="label_smoothing"):
            ft.cross_entropy(x, t, label_smoothing=1.5)
        with pytest.raises(kind, match="reduction"):
            ft.mse_loss(x, x, reduction="median")
        with pytest.raises(kind, match="shape"):
            ft.cross_entropy(x.requires_grad_(), torch.zeros(3, dtype=torch.int64))
    for kind in (RuntimeError, TypeError):
        with pytest.raises(kind, match="dtype"):
            ft.cross_entropy(x, torch.zeros(2))
    with pytest.raises(ft.errors.LossDomainError) as raised:
        ft.binary_cross_entropy(x + 2, x)
    assert raised.value.position == (0, 0)


def test_legacy_arguments_warn_as_torchs() -> None:
    x = torch.ones(2, 3)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        assert ft.mse_loss(x, x + 1, size_average=False) == 6
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        assert ft.L1Loss(reduce=False)(x, x + 1).shape == (2, 3)
    with pytest.warns(fastloss.BroadcastWarning):
        ft.l1_loss(x, x[0])


def test_options_of_fastloss(rng: Rng) -> None:
    """z-loss and result dtype."""
    x = torch.from_numpy(rng.standard_normal((4, 3))).bfloat16()
    t = torch.from_numpy(rng.integers(0, 3, 4))
    found = ft.cross_entropy(x, t, lse_square_scale=0.1, dtype=torch.float32)
    z = 0.1 * x.float().logsumexp(1).square().mean()
    torch.testing.assert_close(found, F.cross_entropy(x.float(), t) + z)


# ---- patched


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The losses that fastloss evaluated."""
    names: list[str] = []
    original = functional._evaluate

    def evaluate(spec: Any, *rest: Any) -> Any:
        names.append(spec.name)
        return original(spec, *rest)

    monkeypatch.setattr(functional, "_evaluate", evaluate)
    for spec in SPECS:
        monkeypatch.setattr(spec.loss.plans, "find", lambda key: None)  # a plan made earlier would not come here
    return names


def test_patched_runs_torchs_modules(rng: Rng, calls: list[str]) -> None:
    x, t = torch.from_numpy(rng.standard_normal((4, 3))).requires_grad_(), torch.from_numpy(rng.integers(0, 3, 4))
    before = F.cross_entropy
    expected = nn.CrossEntropyLoss()(x, t)
    with ft.patched():
        found = nn.CrossEntropyLoss()(x, t)
        with ft.patched():
            nn.MSELoss()(x, x.detach() + 1)
        assert F.cross_entropy is not before
    assert F.cross_entropy is before
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))
    assert calls == ["cross_entropy", "mse_loss"]
    nn.CrossEntropyLoss()(x, t)
    assert len(calls) == 2


def test_patched_decorates_and_restores_after_errors(calls: list[str]) -> None:
    @ft.patched()
    def step(x: torch.Tensor) -> torch.Tensor:
        return F.l1_loss(x, x + 1)

    before = F.l1_loss
    x = torch.zeros(3, requires_grad=True)
    assert step(x) == 1
    assert step(x) == 1
    assert calls == ["l1_loss"] * 2
    with pytest.raises(ZeroDivisionError), ft.patched():
        raise ZeroDivisionError
    assert F.l1_loss is before


def test_patched_second_derivatives_come_from_torch(rng: Rng) -> None:
    """The composition calls torch's own functions, not the replaced ones."""
    x = torch.from_numpy(rng.standard_normal((4, 3))).requires_grad_()
    t = torch.from_numpy(rng.integers(0, 3, 4))
    with ft.patched():
        assert torch.autograd.gradgradcheck(lambda x: F.cross_entropy(x, t), (x,))


def test_patched_leaves_to_torch_what_fastloss_does_not_read(calls: list[str]) -> None:
    integers, complex_ = torch.arange(3), torch.ones(3, dtype=torch.complex64)
    with ft.patched():
        assert F.l1_loss(integers, integers + 2, reduction="sum") == 6
        assert F.mse_loss(integers.float(), integers.float() + 2) == 4
        torch.testing.assert_close(F.l1_loss(complex_, complex_ * 2), torch.tensor(1.0))
        sparse = torch.eye(3).to_sparse()
        with pytest.raises(NotImplementedError):  # torch's own answer
            F.cross_entropy(sparse, integers)
    assert calls == ["mse_loss"]


def test_patched_from_several_threads() -> None:
    before, started, leave = F.mse_loss, threading.Barrier(4), threading.Barrier(4)

    def work() -> None:
        with ft.patched():
            started.wait()
            assert F.mse_loss is not before
            leave.wait()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert F.mse_loss is before
