"""torch.nn's losses on fastloss's kernels, for training: autograd, torch.compile, torch.func, autocast.

    import fastloss.torch as ft

    loss = ft.cross_entropy(model(x), y)        # torch.nn.functional.cross_entropy's arguments
    loss.backward()

    with ft.patched():                          # or: torch.nn's modules, unchanged, on fastloss
        torch.nn.CrossEntropyLoss()(model(x), y).backward()

The functions and modules take what torch's take, and keyword arguments of fastloss after them. A gradient that is
needed is written by the kernel that computes the value. docs/torch.md says which way a call takes.
"""

from ..extras import needed

with needed("torch", by="fastloss.torch", extra="torch"):
    from ..linear import linear_cross_entropy
    from . import errors
    from .functional import (
        binary_cross_entropy,
        binary_cross_entropy_with_logits,
        cross_entropy,
        huber_loss,
        kl_div,
        l1_loss,
        mse_loss,
        nll_loss,
        smooth_l1_loss,
    )
    from .modules import (
        BCELoss,
        BCEWithLogitsLoss,
        CrossEntropyLoss,
        HuberLoss,
        KLDivLoss,
        L1Loss,
        MSELoss,
        NLLLoss,
        SmoothL1Loss,
    )
    from .patch import patched

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "NLLLoss",
    "SmoothL1Loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "errors",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",
    "mse_loss",
    "nll_loss",
    "patched",
    "smooth_l1_loss",
]
