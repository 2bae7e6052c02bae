"""Losses of distillation: what a model's outputs and hidden states are compared by with those of its teacher."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers.recovery.feed import main_output, rows_that_count

Loss = Callable[[Any, Any, Any], Tensor]
"""(output of the model, output of the teacher, batch) -> loss."""


def relative_error(made: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """`‖y' - y‖^2 / ‖y‖^2` over the tokens that count.

    Example:
        >>> x = torch.ones(1, 2, 3)
        >>> float(relative_error(torch.zeros(1, 2, 3), x, torch.tensor([[True, False]])))
        1.0
    """
    y = rows_that_count(target, mask).to(made)
    power = y.square().sum().clamp_min(torch.finfo(made.dtype).tiny)
    return (rows_that_count(made, mask) - y).square().sum() / power


def pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """One vector a sample: the mean over the tokens that count of (batch, tokens, n), else the sample flattened."""
    if x.ndim != 3:
        return x.flatten(1) if x.ndim > 1 else x.reshape(1, -1)
    if mask is None or mask.shape != x.shape[:2]:
        return x.mean(1)
    weight = mask.to(x).unsqueeze(-1)
    return (x * weight).sum(1) / weight.sum(1).clamp_min(1)


def output_loss(made: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Relative squared error of the output, and one minus the mean cosine of the pooled vectors."""
    cosine = F.cosine_similarity(pooled(made, mask), pooled(target.to(made), mask), dim=-1)
    return relative_error(made, target, mask) + (1 - cosine).mean()


def logits_loss(made: Tensor, target: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """`T^2 KL(softmax(y / T) ‖ softmax(y' / T))`, the mean over samples (tokens that count).

    References:
        G. Hinton, O. Vinyals, J. Dean, Distilling the knowledge in a neural network, 2015, arXiv 1503.02531.
    """
    ours = F.log_softmax(rows_that_count(made, mask) / temperature, -1)
    theirs = F.log_softmax(rows_that_count(target, mask).to(made) / temperature, -1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Main outputs of modules in the passes inside the block, by name; hooks that change nothing."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = main_output(output, name)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
