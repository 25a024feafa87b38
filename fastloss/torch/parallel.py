"""Cross-entropy of a vocabulary whose classes are spread over the ranks of a torch.distributed process group.

Each rank reads its own shard once and tells the others three numbers a sample (see `fastloss.Partials`); no logits
travel. The backward pass reads the shard once more, and has nothing to ask of the other ranks.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..kernels.storage import FLOATS
from ..partials import Partials, cross_entropy_partials, cross_entropy_partials_grad

_STATE = ("lse", "mass", "loss", "weight", "found")  # of `Partials`: what is exchanged of each sample
_DTYPES = tuple(FLOATS)


def vocab_parallel_cross_entropy(
    shard: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    process_group: dist.ProcessGroup,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`fastloss.cross_entropy` of the classes of all ranks; every rank of the group calls it, and gets the same bits.

    Args:
        shard: this rank's logits, of shape (C), (N, C) or (N, C, d1, ..., dK), in the CPU's memory. The whole's classes
            are those of the group's ranks one after another; how many a rank has may differ, even be 0.
        target: class indices of the whole, of any integer dtype and shape (), (N) or (N, d1, ..., dK), the same on all
            ranks; or class probabilities of this rank's classes and the shape of shard.
        weight: (C) class weights of this rank's classes.
        process_group: whose ranks hold the shards; its back end moves tensors of the CPU, as gloo does.
        ignore_index, reduction, label_smoothing, lse_square_scale, softcap, dtype: as in `fastloss.cross_entropy`, the
            same on all ranks.

    Returns:
        The loss of the whole. Its gradient by the shard is recorded for autograd: once, not of itself.

    Raises:
        ValueError: shapes, options, ranks that do not fit each other, a process that is not in the group. IndexError:
        a class index out of range. TypeError: tensors and dtypes, target or weight that require a gradient.
        RuntimeError: where another rank raised one of these; no rank is left waiting.

    Source: Shoeybi et al., Megatron-LM (2019), section 3.
    """
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("this process is not in the process group, whose ranks hold the classes")
    checks.reduction_of(None, None, reduction, checks.REDUCTIONS)
    # a rank that fails takes part in the exchange all the same: the others would wait for it
    problem: Exception | None = None
    classes, shape = -1, torch.Size()
    try:
        classes, shape = _extents(shard, target, weight)
    except Exception as error:  # noqa: BLE001 - the other ranks wait: all raise it together
        problem = error
    samples = shape.numel()
    extents = _gathered(torch.tensor([classes, samples]), process_group)
    _raise_first(problem, extents[:, 0] < 0)
    if (extents[:, 1] != samples).any():
        raise ValueError(f"the ranks' shards have {extents[:, 1].tolist()} samples, expected one number of them")
    options: dict[str, Any] = {
        "offset": int(extents[:rank, 0].sum()),
        "num_classes": int(extents[:, 0].sum()),
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
    }
    weights = None if weight is None else weight.detach()
    given = target.detach(), weights

    message = torch.zeros(3 + len(_STATE) * samples, dtype=torch.float64)
    try:
        own = cross_entropy_partials(shard.detach(), given[0], weight=weights, **options)
        message[:3] = torch.tensor([1, own.by_probability, _DTYPES.index(own.dtype)])
        for name, part in zip(_STATE, message[3:].view(len(_STATE), samples), strict=True):
            part.numpy()[...] = getattr(own, name).reshape(-1)
    except Exception as error:  # noqa: BLE001 - the other ranks wait: all raise it together
        problem = error
    messages = _gathered(message, process_group)
    _raise_first(problem, messages[:, 0] == 0)
    merged = reduce(Partials.merge, [_received(numbers, shape) for numbers in messages])
    how = {"reduction": reduction, "lse_square_scale": lse_square_scale}
    found: Tensor = _Merged.apply(shard, given, merged, options, how, dtype)
    return found


class _Merged(torch.autograd.Function):
    """The loss out of the merged state, whose gradient is the own shard's."""

    @staticmethod
    def forward(
        ctx: Any,
        shard: Tensor,
        given: tuple[Tensor, Tensor | None],
        merged: Partials,
        options: dict[str, Any],
        how: dict[str, Any],
        dtype: torch.dtype | None,
    ) -> Tensor:
        value: Tensor = merged.finish(**how, dtype=dtype)
        ctx.save_for_backward(shard, *given)
        ctx.merged, ctx.options = merged, options | how
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("with a process_group the gradient of a loss has no gradient of its own (create_graph)")
        shard, target, weight = ctx.saved_tensors
        grad = cross_entropy_partials_grad(
            shard.detach(), target, ctx.merged, weight=weight, grad_output=grad_output, **ctx.options
        )
        return grad, None, None, None, None, None


def _extents(shard: Tensor, target: Tensor, weight: Tensor | None) -> tuple[int, torch.Size]:
    """How many classes a shard has, and the shape of its samples."""
    for name, tensor in (("input", shard), ("target", target), ("weight", weight)):
        if name == "weight" and tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            what = f"on {tensor.device}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise TypeError(f"{name} is {what}; with a process_group losses of tensors on the CPU only are computed")
        if name != "input" and tensor.requires_grad and torch.is_grad_enabled():
            raise TypeError(f"{name} requires grad, but with a process_group a loss has a gradient for input only")
    if not shard.ndim:
        raise ValueError("input has shape (), expected (C), (N, C) or (N, C, d1, ..., dK)")
    axis = min(shard.ndim - 1, 1)
    return shard.shape[axis], shard.shape[:axis] + shard.shape[axis + 1 :]


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> np.ndarray:
    """Every rank's tensor, in the order of ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group)
    return torch.stack(parts).numpy()


def _raise_first(problem: Exception | None, failed: np.ndarray) -> None:
    """Raise a rank's own problem, or that of the first other one."""
    if problem is not None:
        raise problem
    if failed.any():
        raise RuntimeError(f"rank {int(failed.argmax())} of the process group cannot take part: it says why itself")


def _received(message: np.ndarray, shape: torch.Size) -> Partials:
    """The state that a rank has sent, of samples in this shape."""
    _, by_probability, dtype = message[:3]
    columns = dict(zip(_STATE, message[3:].reshape(len(_STATE), *shape), strict=True))
    columns["found"] = columns["found"].astype(np.int32)
    return Partials(**columns, by_probability=bool(by_probability), dtype=_DTYPES[int(dtype)], like=torch.empty(0))
