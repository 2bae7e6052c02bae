"""A small model and an ordinary loop: what the tests of every optimizer of networks train."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnlayers
from decompositions import LowRank, TTMatrix


def generator(seed: int) -> torch.Generator:
    """A seeded one."""
    return torch.Generator().manual_seed(seed)


def small_model(seed: int = 0, *, matrices: bool = False) -> nn.Sequential:
    """16 -> 24 -> 12 -> 5: a matrix, then a train (or another matrix), a norm between, a dense head."""
    torch.manual_seed(seed)
    second: dict[str, Any] = {"row_modes": (4, 3), "col_modes": (6, 4)}
    random = tnlayers.random_network
    return nn.Sequential(
        tnlayers.Linear(16, 24, network=random(LowRank, rank=4)),
        nn.ReLU(),
        nn.LayerNorm(24),
        tnlayers.Linear(24, 12, network=random(LowRank, rank=3) if matrices else random(TTMatrix, rank=3, **second)),
        nn.ReLU(),
        nn.Linear(12, 5),
    )


def batch(seed: int, count: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs and labels, the same for whoever asks."""
    x = torch.randn(count, 16, generator=generator(seed))
    return x, torch.randint(0, 5, (count,), generator=generator(seed + 1))


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    change: Callable[[Any], object] = lambda optimizer: None,
) -> None:
    """An ordinary loop; `change` is called between backward and step."""
    for k in steps:
        x, y = batch(k)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        change(optimizer)
        optimizer.step()
