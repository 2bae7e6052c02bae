"""Change one line, and the layers find their ranks: a small classifier trained by RankAdaptive.

The loop is an ordinary one; only the optimizer differs. Ranks grow from 1 while the loss asks for more, settle after
60 % of the steps, and `compact` gives the model to ship. The figure (ranks and loss over the steps) is written to
train_rank_adaptive.png.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tnlayers
from decompositions import LowRank, TTMatrix


def data(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in 64 dimensions whose class depends on three quadratic forms of low rank."""
    x = torch.randn(count, 64, generator=generator)
    fixed = torch.Generator().manual_seed(7)
    forms = torch.randn(3, 4, 64, generator=fixed) / 8
    return x, torch.einsum("krn,bn->bkr", forms, x).square().sum(-1).argmax(-1)


def main(quick: bool = False, folder: str = ".") -> dict[str, tuple[int, ...]]:
    """Train, print, draw the figure, return the ranks."""
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    steps = 60 if quick else 600
    small = 0.1 / (3 * 64) ** 0.5  # a tenth of torch's standard deviation: what is learned outgrows the random start
    model = nn.Sequential(
        tnlayers.Linear(64, 128, network=tnlayers.random_network(LowRank, rank=1, std=small)),
        nn.ReLU(),
        tnlayers.Linear(
            128,
            64,
            network=tnlayers.random_network(TTMatrix, rank=1, std=small, row_modes=(8, 8), col_modes=(16, 8)),
        ),
        nn.ReLU(),
        nn.Linear(64, 3),
    )
    optimizer = tnlayers.RankAdaptive(model, lr=3e-3, tol=0.1, settle=int(0.6 * steps))  # the one line
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x, y = data(256, generator)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    shipped = tnlayers.compact(model)
    x, y = data(4000, generator)
    with torch.no_grad():
        right = float((shipped(x).argmax(-1) == y).float().mean())
    kept = sum(p.numel() for p in shipped.parameters())
    dense = sum(p.numel() for p in tnlayers.densify(shipped).parameters())
    print(f"accuracy {100 * right:.1f} %, {kept:,} of {dense:,} parameters, ranks {optimizer.ranks()}")

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    at = [entry["step"] for entry in optimizer.history]
    for name in optimizer.ranks():
        axes.plot(at, [max(entry["ranks"][name]) for entry in optimizer.history], label=f"largest rank of layer {name}")
    axes.axvline(0.6 * steps, color="gray", linewidth=1, linestyle=":")
    axes.set_xlabel("step")
    axes.set_ylabel("rank")
    second = axes.twinx()
    second.plot(range(1, steps + 1), losses, color="gray", linewidth=0.7, alpha=0.7)
    second.set_ylabel("loss", color="gray")
    axes.legend(fontsize=8, loc="center right")
    figure.savefig(Path(folder) / "train_rank_adaptive.png", dpi=150)
    return optimizer.ranks()


if __name__ == "__main__":
    main()
