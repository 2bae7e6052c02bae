"""How much an attack costs a low-rank classifier, and what a bound on its condition numbers does about it.

The same small network on the same data three times: dense, low rank by AdamW, and low rank by CondLR. Printed are the
accuracies without an attack and under FGSM and PGD, and the largest condition number of a layer.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import tnlayers
from decompositions import svd
from tnlayers.attacks import fgsm, pgd, robust_accuracy


def data(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of 8 x 8 pixels in [0, 1]: one of five smooth patterns under noise."""
    fixed = torch.Generator().manual_seed(7)
    coarse = torch.rand(5, 1, 3, 3, generator=fixed)
    patterns = F.interpolate(coarse, 8, mode="bilinear", align_corners=True).flatten(1)
    y = torch.randint(0, 5, (count,), generator=generator)
    return (patterns[y] + 0.2 * torch.randn(count, 64, generator=generator)).clamp(0, 1), y


def network(rank: int | None) -> nn.Sequential:
    """64-96-96-5; all layers but the last at a rank, or dense."""

    def linear(n: int, m: int) -> nn.Module:
        return nn.Linear(n, m) if rank is None else tnlayers.Linear(n, m, recipe=partial(svd, rank=rank))

    return nn.Sequential(linear(64, 96), nn.LeakyReLU(), linear(96, 96), nn.LeakyReLU(), nn.Linear(96, 5))


def condition(model: nn.Module) -> float:
    """Largest quotient of singular values of a hidden layer, over the values that are not zero."""
    found = []
    for layer in model:
        if isinstance(layer, tnlayers.NetworkLayer):
            values = torch.linalg.svdvals(layer.weight.detach().double())[: layer.network.ranks[0]]
            found.append(float(values[0] / values[-1]))
    return max(found, default=float("nan"))


def main(quick: bool = False) -> dict[str, dict[str, float]]:
    """Train three times, attack, print a table, return the accuracies."""
    steps, eps = (40 if quick else 400), 0.1
    arms = {
        "dense, AdamW": (None, lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3)),
        "low rank, AdamW": (12, lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3)),
        "low rank, CondLR": (12, lambda model: tnlayers.CondLR(model, 0.05, condition=1.2, momentum=0.9)),
    }
    test = data(2000, torch.Generator().manual_seed(2))
    strong = partial(pgd, step=eps / 4, steps=10, low=0, high=1, generator=torch.Generator().manual_seed(3))
    found = {}
    print(f"{'arm':18} {'clean':>7} {'FGSM':>7} {'PGD':>7} {'cond':>8}   (per cent; eps = {eps} of a pixel's range)")
    for name, (rank, make) in arms.items():
        torch.manual_seed(0)
        model, generator = network(rank), torch.Generator().manual_seed(1)
        optimizer = make(model)
        for _ in range(steps):
            x, y = data(128, generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        attacks = {"clean": (0.0, fgsm), "FGSM": (eps, partial(fgsm, low=0, high=1)), "PGD": (eps, strong)}
        row = {kind: robust_accuracy(model, [test], size, attack=attack) for kind, (size, attack) in attacks.items()}
        print(f"{name:18} " + " ".join(f"{100 * value:7.1f}" for value in row.values()) + f" {condition(model):8.3g}")
        found[name] = row
    return found


if __name__ == "__main__":
    main()
