"""A Schroedinger equation on matrices of low rank: error against the step, and rank against time, for every scheme.

i Y' = D Y + Y D^T + V Y V on 100 x 100 points (D tridiagonal, V a cosine potential), from singular values 10^-k. The
first-order schemes show slope 1, the second-order ones 2, whatever the small singular values are; ranks are found by
the tolerance. The figure is written to ode_schroedinger.png.
"""

from pathlib import Path

import torch

from decompositions import LowRank, to_dense
from tnlayers.integrators import KroneckerField, integrate


def problem(points: int) -> tuple[LowRank, KroneckerField]:
    """Start and right-hand side, a sum of Kronecker products that is applied term by term."""
    ones = torch.ones(points - 1, dtype=torch.float64)
    d = torch.eye(points, dtype=torch.float64) - (torch.diag(ones, 1) + torch.diag(ones, -1)) / 2
    j = torch.arange(points, dtype=torch.float64) - points // 2
    v = torch.diag(1 - torch.cos(2 * torch.pi * j / points))
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(points, 8, dtype=torch.complex128, generator=generator)).Q for _ in range(2)]
    s = torch.diag(10.0 ** -torch.arange(8, dtype=torch.float64)).to(torch.complex128)
    start = LowRank(bases[0], s / s.norm(), bases[1])
    return start, KroneckerField([{0: d}, {1: d}, {0: v, 1: v}], factor=-1j)


def main(quick: bool = False, folder: str = ".") -> dict[str, list[float]]:
    """Print errors, draw the figure, return the errors of every method."""
    from matplotlib.figure import Figure

    points, steps = (24, (10, 20)) if quick else (100, (10, 20, 40, 80))
    start, field = problem(points)
    y, fine = to_dense(start), 400 if quick else 1600
    h = 1 / fine
    for _ in range(fine):  # dense Runge-Kutta as the reference
        k1 = field(0.0, y)
        k2 = field(0.0, y + h / 2 * k1)
        k3 = field(0.0, y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(0.0, y + h * k3))
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    found: dict[str, list[float]] = {}
    for method in ("bug", "parallel", "augmented", "parallel2", "midpoint"):
        errors = []
        for n in steps:
            options = {} if method == "bug" else {"theta": 1e-5 / n}
            done = integrate(field, start, (0.0, 1.0), n, method=method, **options)  # type: ignore[arg-type]
            errors.append(float((to_dense(done.network) - y).norm()))
        found[method] = errors
        print(f"{method:10} rank {done.ranks[-1][0]:3}  errors " + "  ".join(f"{e:.1e}" for e in errors))
        left.loglog([1 / n for n in steps], errors, "o-", markersize=4, label=method)
        right.plot(done.times, [r[0] for r in done.ranks], label=method)
    for order, style in ((1, "--"), (2, ":")):
        guide = [found["parallel"][0] * (steps[0] / n) ** order / 3 for n in steps]
        left.loglog([1 / n for n in steps], guide, style, color="gray", linewidth=1, label=f"slope {order}")
    left.set_xticks([1 / n for n in steps], [f"1/{n}" for n in steps])
    left.minorticks_off()
    left.set_xlabel("step h")
    left.set_ylabel("error at t = 1")
    left.legend(fontsize=8)
    right.set_xlabel("t")
    right.set_ylabel("rank")
    right.legend(fontsize=8)
    figure.savefig(Path(folder) / "ode_schroedinger.png", dpi=150)
    return found


if __name__ == "__main__":
    main()
