"""A long-range Ising chain in time, on a tensor train and on a balanced tree: one code, no densification.

H = sum_{i<j} Z_i Z_j / |i - j| + sum_i X_i on d sites, from a product state. The Hamiltonian of d (d - 1) / 2 + d terms
is an operator tree of small ranks; ranks of the state grow with the entanglement. The figure is written to
ode_spin_chain.png.
"""

import time
from pathlib import Path

import torch

from decompositions import TT, Network, Tree, norm, scale
from tnlayers.integrators import OperatorField, Solution, integrate, kronecker_sum


def ising(state: Network) -> Network:
    """The Hamiltonian on the tree of the state."""
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    z = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    d = len(state.shape)
    terms = [{i: z, j: z} for i in range(d) for j in range(i + 1, d)] + [{i: x} for i in range(d)]
    return kronecker_sum(
        state, terms, coefficients=[1 / (j - i) for i in range(d) for j in range(i + 1, d)] + [1.0] * d
    )


def main(quick: bool = False, folder: str = ".") -> dict[str, Solution]:
    """Print a table, draw the figure, return the solutions."""
    from matplotlib.figure import Figure

    sites, steps = (6, 5) if quick else (16, 50)
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    found = {}
    for name, format in (("tensor train", TT), ("balanced tree", Tree)):
        generator = torch.Generator().manual_seed(1)
        start = format.random(row_modes=(2,) * sites, rank=1, dtype=torch.complex128, generator=generator)  # type: ignore[attr-defined]
        start = scale(start, 1 / float(norm(start)))
        operator = ising(start)
        begin = time.perf_counter()
        done = integrate(OperatorField(operator, -1j), start, (0.0, 0.5), steps, method="augmented", tol=1e-6)
        seconds = time.perf_counter() - begin
        drift = abs(float(norm(done.network)) - 1)
        print(
            f"{name:13}: operator ranks at most {max(operator.ranks)}, state ranks at most {max(done.ranks[-1])}, "
            f"norm off by {drift:.1e}, {seconds:.1f} s"
        )
        axes.plot(done.times, [max(r) for r in done.ranks], label=name)
        found[name] = done
    axes.set_xlabel("t")
    axes.set_ylabel("largest rank")
    axes.set_title(f"long-range Ising chain, {sites} sites", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(Path(folder) / "ode_spin_chain.png", dpi=150)
    return found


if __name__ == "__main__":
    main()
