"""Learn a global parameter of 3-D fields from less than a percent of their voxels, in two ways.

Each field holds two bumps. A network maps the value of a voxel to a number, and the mean of these numbers over all
voxels shall be the label, the mean square of the field. The mean is taken from a tensor train through the entries of a
cross, or from as many voxels drawn at random. The pivots of the cross are searched once a field, for the field plus its
square, and then kept, so that every epoch reads the same voxels: it is told which functions of the field will matter.

What to expect: random sampling is hard to beat at a plain mean over voxels, and is the better one here at both sizes.
The network leaves the quadratic functions that the kept pivots serve, and the train is then no longer exact. The script
shows how gradients pass through a cross, and what it reads.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cross_approx import DifferentiableCross

Field = Callable[[Tensor], Tensor]


class Seen:
    """A field that remembers which voxels were looked at."""

    def __init__(self, field: Field, points: int) -> None:
        self.field, self.points, self.voxels = field, points, torch.zeros(0, dtype=torch.long)

    def __call__(self, index: Tensor) -> Tensor:
        """The field at some voxels."""
        flat = (index[:, 0] * self.points + index[:, 1]) * self.points + index[:, 2]
        self.voxels = torch.cat([self.voxels, flat]).unique()
        return self.field(index)


def bumps(centers: Tensor, widths: Tensor, heights: Tensor, points: int, index: Tensor) -> Tensor:
    """sum_k heights_k exp(-|x - centers_k|^2 / widths_k^2) at the voxels `index` of a points^3 grid of [0, 1]^3."""
    x = index.double() / (points - 1)
    distance = (x[:, None] - centers).square().sum(2)  # (B, bumps)
    return (heights * torch.exp(-distance / widths**2)).sum(1)


class OfAVoxel(nn.Module):
    """u -> 100 u mlp(u): an empty voxel counts for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, u: Tensor) -> Tensor:
        """Values (B,) of voxels (B,)."""
        return 100 * u * self.mlp(u[:, None])[:, 0]


def draw_field(points: int, generator: torch.Generator) -> tuple[Field, float]:
    """A field, and its mean square on the grid: every product of two bumps is separable."""
    centers = 0.2 + 0.6 * torch.rand(2, 3, generator=generator, dtype=torch.float64)
    widths = 0.08 + 0.1 * torch.rand(2, generator=generator, dtype=torch.float64)
    heights = 0.5 + torch.rand(2, generator=generator, dtype=torch.float64)
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    factors = torch.exp(-((x[:, None, None] - centers) ** 2) / widths[:, None] ** 2)  # (points, bumps, axes)
    gram = torch.einsum("pka,pla->kla", factors, factors).prod(2)
    mean_square = heights @ gram @ heights / points**3
    return partial(bumps, centers, widths, heights, points), 100 * mean_square.item()


def mean_by_cross(cross: DifferentiableCross, field: Field, net: nn.Module) -> Tensor:
    """Mean of the network's output over the whole grid, from the entries of a cross."""
    train = cross(lambda index: net(field(index)))
    return torch.einsum("ia,ajb,bk->", *train.cores) / train.cores[0].shape[0] ** 3


def fit(means: list[Callable[[nn.Module], Tensor]], labels: Tensor, epochs: int) -> nn.Module:
    """Train a small network of one voxel so that its means are the labels."""
    torch.manual_seed(0)
    net = OfAVoxel()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = (torch.stack([mean(net) for mean in means]) - labels).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


def main(quick: bool = False) -> dict[str, dict[str, float]]:
    """Print a table and return, for each way of reading, the voxels read and the relative error on new fields."""
    points, fields, epochs = (128, 6, 60) if quick else (256, 16, 200)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_field(points, generator) for _ in range(2 * fields)]
    labels = torch.tensor([label for _, label in drawn], dtype=torch.float64)
    print(f"{2 * fields} fields of {points}^3 voxels, half of them to learn from; {epochs} epochs")
    print(f"{'voxels':<10}{'read of a field':>18}{'error, seen fields':>22}{'error, new fields':>22}")
    rows: dict[str, dict[str, float]] = {}

    def run(name: str, means: list[Callable[[nn.Module], Tensor]], read: Callable[[], float]) -> None:
        net = fit(means[:fields], labels[:fields], epochs)
        with torch.no_grad():
            errors = torch.stack([mean(net) for mean in means]) - labels
        old, new = ((part.square().mean() / labels.var()).sqrt().item() for part in (errors[:fields], errors[fields:]))
        rows[name] = {"share": read() / points**3, "seen": old, "new": new}
        print(f"{name:<10}{read():>10,.0f} {read() / points**3:>6.2%}{old:>22.1%}{new:>22.1%}")

    seen = [Seen(field, points) for field, _ in drawn]
    crosses = [DifferentiableCross((points,) * 3, tol=1e-3, every=None, generator=generator) for _ in drawn]
    for cross, field in zip(crosses, seen, strict=True):
        cross(lambda index, field=field: field(index) + field(index) ** 2)
    means = [partial(mean_by_cross, cross, field) for cross, field in zip(crosses, seen, strict=True)]
    run("cross", means, lambda: sum(len(field.voxels) for field in seen) / len(seen))
    budget = max(len(field.voxels) for field in seen)  # as many as of the dearest field
    values = [field(torch.randint(points, (budget, 3), generator=generator)) for field, _ in drawn]
    run("random", [partial(lambda u, net: net(u).mean(), u) for u in values], lambda: budget)
    print("errors are root mean squares over the fields, relative to the spread of the labels")
    return rows


if __name__ == "__main__":
    main()
