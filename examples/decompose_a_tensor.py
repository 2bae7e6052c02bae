"""Decompose a tensor in four ways to one tolerance, and see what each format pays for it.

A smooth function on a grid: 1 / (1 + |x|) on 32^4 points. Every network reaches the tolerance; the sizes differ.
"""

from collections.abc import Callable
from functools import partial

import torch

import decompositions as tn


def smooth_grid(points: int) -> torch.Tensor:
    """f(x) = 1 / (1 + |x|) on a regular grid of [0, 1]^4."""
    axes = torch.meshgrid(*[torch.linspace(0, 1, points, dtype=torch.float64)] * 4, indexing="ij")
    return 1 / (1 + torch.stack(axes).square().sum(0).sqrt())


def main(quick: bool = False) -> dict[str, tuple[int, float]]:
    """Print a table and return, for each format, (parameters, relative error)."""
    points, tol = (12, 1e-4) if quick else (32, 1e-6)
    x = smooth_grid(points)
    recipes: dict[str, Callable[[torch.Tensor], tuple[tn.Network, float]]] = {
        "svd of the 2 | 2 unfolding": lambda x: tn.svd(x.reshape(points**2, points**2), tol=tol, with_error=True),
        "st_hosvd": partial(tn.st_hosvd, tol=tol, with_error=True),
        "hooi": partial(tn.hooi, tol=tol, with_error=True),
        "tt_svd": partial(tn.tt_svd, tol=tol, with_error=True),
    }
    rows = {}
    print(f"{points}^4 = {x.numel():,} entries, tol {tol:g}")
    print(f"{'recipe':<28}{'ranks':<20}{'parameters':>12}{'relative error':>18}")
    for name, recipe in recipes.items():
        net, error = recipe(x)
        assert error <= tol
        rows[name] = (tn.numel(net), error)
        print(f"{name:<28}{net.ranks!s:<20}{tn.numel(net):>12,}{error:>18.2e}")

    # A network is a vector: add, scale, inner, norm, round, without ever making the dense tensor again.
    train = tn.tt_svd(x, tol=tol)
    doubled = tn.add(train, train)
    print(f"\nTT ranks {train.ranks}; of A + A {doubled.ranks}; rounded {tn.round(doubled, tol=tol).ranks}")
    print(f"<A, A> = {tn.inner(train, train).item():.6f}, |A|^2 = {tn.norm(train).item() ** 2:.6f}")
    return rows


if __name__ == "__main__":
    main()
