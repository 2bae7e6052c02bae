"""Workers that train as one under torchrun: each has a part of every batch, and gradients are summed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.distributed import prepare
from tnlayers.main_job.workers import count, number
from tnlayers.main_job.workers import joined as joined
from tnlayers.main_job.workers import told as told
from tnlayers.reduction import Reduction, broadcast


class Together:
    """One worker, and what it does together with the others; alone, nothing.

    Every worker starts from the parameters and buffers of worker 0. Networks are prepared by `tnlayers.distributed`, so
    that optimizers of ours decide ranks once; gradients of all parameters are summed here, after the last chunk of a
    batch.

    Args:
        model: the same on all workers.

    Raises:
        ValueError: an optimizer of ours was made before.

    Example:
        >>> together = Together(nn.Linear(2, 2))
        >>> together.worker, together.workers
        (0, 1)
    """

    def __init__(self, model: nn.Module) -> None:
        self.worker, self.workers, self.model = number(), count(), model
        self.reduction: Reduction | None = None
        if self.workers > 1:
            self.reduction = getattr(model, "reduction", None) or prepare(model, engine=None).reduction
            broadcast([*model.parameters(), *model.buffers()], None)

    def quiet(self) -> AbstractContextManager[Any]:
        """Inside, no backward is reduced by itself."""
        return nullcontext() if self.reduction is None else self.reduction.no_sync()

    @torch.no_grad()
    def reduce(self, value: Tensor) -> Tensor:
        """Sum the gradients of all workers, and their losses, which is returned. A missing gradient counts as zero."""
        if self.workers == 1:
            return value
        import torch.distributed as dist

        members = [p for p in self.model.parameters() if p.requires_grad]
        held = torch.tensor([float(p.grad is not None) for p in members], device=value.device)
        total = value.double().clone()
        dist.all_reduce(held)
        dist.all_reduce(total)
        moving = [p for p, some in zip(members, held.tolist(), strict=True) if some]
        for group in _alike(moving):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group])
            dist.all_reduce(flat)
            for p, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                p.grad = part.reshape(p.shape)
        return total

    def agreed(self, wish: bool) -> bool:
        """What worker 0 wishes."""
        return wish if self.workers == 1 else bool(told(wish))

    def share_buffers(self) -> None:
        """Statistics of batch norm become those of worker 0."""
        if self.workers > 1:
            broadcast(self.model.buffers(), None)


def _alike(members: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters of one dtype and device together."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in members:
        groups.setdefault((p.dtype, p.device), []).append(p)
    return list(groups.values())
