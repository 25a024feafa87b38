"""fastloss.torch where torch traces, exports, transforms or intercepts what is called."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn import functional as F

import fastloss.torch as ft
from fastloss.torch.ops import OPERATORS
from fastloss.torch.spec import SPECS
from table import ROWS, Options, Row, name_of
from torch_losses import ROUTES, Rng, composed, drop_in, learning, tensors

CHOICES = [(row, choice) for row in ROWS for choice in row.choices()]
SHAPE = (3, 4)


def operands(row: Row, x: Tensor, y: Tensor, options: Options, reduction: str) -> tuple[Any, ...]:
    """The arguments of the loss's operator."""
    spec = next(spec for spec in SPECS if spec.name == row.name)
    known = {name: default for name, (_, default) in spec.options.items()} | options | {"reduction": reduction}
    return x, y, *(options.get(name) for name in spec.tensors[2:]), *(known[name] for name in spec.options)


@pytest.mark.parametrize(("row", "choice"), CHOICES, ids=name_of)
def test_opcheck(row: Row, choice: Options, rng: Rng) -> None:
    """torch's own check of an operator: schema, registrations, fake results, tracing with symbolic shapes."""
    for reduction in row.reductions if choice == row.everything() else ("mean",):
        x, y, options = tensors(row, rng, SHAPE, choice)
        learning(row, x, y, options)
        opcheck(OPERATORS[row.name].value._opoverload, operands(row, x, y, options, reduction))


@pytest.mark.parametrize(("row", "choice"), ROUTES, ids=name_of)
def test_opcheck_of_gradients(row: Row, choice: Options, rng: Rng) -> None:
    x, y, options = tensors(row, rng, SHAPE, choice)
    wanted = [any(leaf is t for leaf in learning(row, x, y, options)) for t in (x, y, options.get("weight"))]
    arguments = operands(row, x, y, options, "mean")
    n = len(next(spec for spec in SPECS if spec.name == row.name).tensors)
    mask = [*wanted, False][:n]
    opcheck(OPERATORS[row.name].backward._opoverload, (torch.ones((), dtype=x.dtype), *arguments, mask))


@pytest.mark.parametrize(("row", "choice"), ROUTES, ids=name_of)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_in_one_graph(row: Row, choice: Options, reduction: str, rng: Rng) -> None:
    """fullgraph=True: no break, one operator, the gradients of the eager call."""
    x, y, options = tensors(row, rng, SHAPE, choice, np.float32)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, _)

    def model(x: Tensor, y: Tensor) -> Tensor:
        return drop_in(row)(x * 0.9, y, reduction=reduction, **options) * 3

    leaves = learning(row, x, y, {})
    value = torch.compile(model, fullgraph=True, backend=keep)(x, y)
    grads = torch.autograd.grad(value.sum(), leaves)
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum(f"fastloss.{row.name}" in name for name in called) == 1, called
    expected = model(x, y)
    torch.testing.assert_close(value, expected)
    for got, its in zip(grads, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(got, its)
    torch._dynamo.reset()


def test_compiled_for_other_shapes_and_options(rng: Rng) -> None:
    """Dynamic shapes; a module; a wrong option is told."""
    module = ft.CrossEntropyLoss(label_smoothing=0.1, softcap=5.0)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, c in ((4, 5), (7, 3), (2, 100)):
        x = torch.from_numpy(rng.standard_normal((n, c))).requires_grad_()
        t = torch.from_numpy(rng.integers(0, c, n))
        torch.testing.assert_close(compiled(x, t), module(x, t))
        (grad,) = torch.autograd.grad(compiled(x, t), x)
        torch.testing.assert_close(grad, torch.autograd.grad(module(x, t), x)[0])
    with pytest.raises(Exception, match="label_smoothing is 2"):
        torch.compile(lambda x, t: ft.cross_entropy(x, t, label_smoothing=2.0), backend="aot_eager")(x, t)
    torch._dynamo.reset()


def test_compiled_autocast(rng: Rng) -> None:
    x = torch.from_numpy(rng.standard_normal((4, 5))).bfloat16().requires_grad_()
    t = torch.from_numpy(rng.integers(0, 5, 4))

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ft.cross_entropy(x, t)

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value, loss(x))
    torch._dynamo.reset()


def test_exported(rng: Rng) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = ft.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0]))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.loss(x * 2, t)

    x, t = torch.from_numpy(rng.standard_normal((4, 3)).astype(np.float32)), torch.from_numpy(rng.integers(0, 3, 4))
    program = torch.export.export(Model(), (x, t))
    assert "fastloss.cross_entropy" in str(program.graph)
    torch.testing.assert_close(program.module()(x, t), Model()(x, t))


def test_fake_tensors_and_traces_see_an_operator(rng: Rng) -> None:
    x, t = torch.from_numpy(rng.standard_normal((4, 3))), torch.from_numpy(rng.integers(0, 3, 4))
    with FakeTensorMode() as mode:
        fake = ft.cross_entropy(mode.from_tensor(x), mode.from_tensor(t), reduction="none")
    assert fake.shape == (4,)
    assert fake.dtype is torch.float64
    meta = ft.mse_loss(x.to("meta"), x.to("meta"))
    assert meta.is_meta
    graph = make_fx(lambda x: ft.cross_entropy(x, t))(x)
    assert "fastloss.cross_entropy" in graph.code
    torch.testing.assert_close(graph(x + 1), ft.cross_entropy(x + 1, t))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")  # torch's own forward-mode derivatives
@pytest.mark.parametrize(("row", "choice"), ROUTES, ids=name_of)
def test_function_transforms(row: Row, choice: Options, rng: Rng) -> None:
    """torch.func: grad, vmap, jvp, and a Hessian, of what the kernel computes."""
    x, y, options = tensors(row, rng, SHAPE, choice)
    xs = torch.stack([x, x.flip(0), x * 0.5])

    def loss(x: Tensor) -> Tensor:
        return drop_in(row)(x, y, **options)

    def reference(x: Tensor) -> Tensor:
        return composed(row, x, y, options)

    torch.testing.assert_close(torch.func.vmap(loss)(xs), torch.stack([loss(one) for one in xs]))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    tangent = torch.from_numpy(rng.standard_normal(SHAPE))
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (tangent,))[1], (expected * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(found, (expected * tangent).sum())
    hessian = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(reference, x))
    torch.testing.assert_close(torch.func.hessian(loss)(x), hessian)


@pytest.mark.parametrize(("row", "choice"), ROUTES, ids=name_of)
def test_operators_under_vmap(row: Row, choice: Options, rng: Rng) -> None:
    x, y, options = tensors(row, rng, SHAPE, choice)
    xs = torch.stack([x, x.flip(0)], dim=1)
    op = OPERATORS[row.name].value
    arguments = operands(row, x, y, options, "none")
    found = torch.func.vmap(lambda x: op(x, *arguments[1:]), in_dims=1)(xs)
    expected = torch.stack([drop_in(row)(xs[:, k], y, reduction="none", **options) for k in range(2)])
    torch.testing.assert_close(found, expected)


def test_subclasses_and_modes_hear_of_a_call(rng: Rng) -> None:
    """__torch_function__ sees our function with its arguments, as torch's own."""
    heard: list[Any] = []

    class Listening(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x, t = torch.from_numpy(rng.standard_normal((4, 3))), torch.from_numpy(rng.integers(0, 3, 4))
    value = ft.cross_entropy(x.as_subclass(Listening), t)
    assert ft.cross_entropy in heard
    torch.testing.assert_close(value.as_subclass(Tensor), F.cross_entropy(x, t))
    with torch.device("cpu"):  # a mode
        torch.testing.assert_close(ft.cross_entropy(x, t), F.cross_entropy(x, t))
