"""Integrators and geometry: what generality costs against plain code, and what it saves against the dense field.

python benchmarks/integrators.py            3 processes, about 6 minutes

Rows: one parallel step of a matrix against the same step in plain numpy; projection onto the tangent space of a tensor
train against a per-core projection by einsum; a long-range Ising chain on a tensor train and on a balanced tree against
the same scheme with a dense field, and against the exact solution.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from timing import Gate, compare, in_processes, markdown, median_of, publish, seconds
from torch import Tensor

from decompositions import TT, LowRank, Network, Tree, balanced_tree, to_dense
from decompositions.geometry import project
from tnlayers.integrators import KroneckerField, OperatorField, integrate, kronecker_sum

SIZE, RANK = 2000, 32
METHODS = "augmented,midpoint,parallel,parallel2"
Array = Any


def rk4(f: Callable[[Array], Array], y: Array, h: float) -> Array:
    k1 = f(y)
    k2 = f(y + h / 2 * k1)
    k3 = f(y + h / 2 * k2)
    k4 = f(y + h * k3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def numpy_parallel_step(u: Array, s: Array, v: Array, w1: Array, w2: Array, h: float) -> tuple[Array, Array, Array]:
    """The plain reference: Y' = W1 Y + Y + Y W2^T, matrices only, as one would write it from the paper."""
    r = s.shape[0]
    a, b = u.T @ (w1 @ u), v.T @ (w2 @ v)
    k = rk4(lambda y: w1 @ y + y + y @ b.T, u @ s, h)
    l = rk4(lambda y: w2 @ y + y + y @ a.T, v @ s.T, h)  # noqa: E741
    c = rk4(lambda y: a @ y + y + y @ b.T, s, h)
    new_u = np.linalg.qr(np.hstack([u, k]))[0][:, r:]
    new_v = np.linalg.qr(np.hstack([v, l]))[0][:, r:]
    core = np.block([[c, l.T @ new_v], [new_u.T @ k, np.zeros((r, r))]])
    p, sigma, qh = np.linalg.svd(core)
    return np.hstack([u, new_u]) @ p[:, :r], np.diag(sigma[:r]), np.hstack([v, new_v]) @ qh[:r].T


def skew(rng: np.random.Generator, size: int) -> Array:
    a = rng.standard_normal((size, size))
    a = a - a.T
    return a / np.linalg.norm(a, 2)


def matrix_row(gate: Gate) -> dict[str, float]:
    rng, h = np.random.default_rng(0), 0.01
    w1, w2 = skew(rng, SIZE), skew(rng, SIZE)
    u, v = (np.linalg.qr(rng.standard_normal((SIZE, RANK)))[0] for _ in range(2))
    s = np.diag(2.0 ** -np.arange(1, RANK + 1))
    net = LowRank(*map(torch.from_numpy, (u, s, v)))
    field = KroneckerField([{0: torch.from_numpy(w1)}, {}, {1: torch.from_numpy(w2)}])

    def ours() -> Network:
        return integrate(field, net, (0.0, h), 1, method="parallel").network

    theirs = numpy_parallel_step(u, s, v, w1, w2, h)
    expected = torch.from_numpy(theirs[0] @ theirs[1] @ theirs[2].T)
    difference = float((to_dense(ours()) - expected).norm() / expected.norm())
    assert difference < 1e-12, difference
    base, found = compare(lambda: numpy_parallel_step(u, s, v, w1, w2, h), {"ours": ours}, gate, budget=20)
    return {"ratio": found["ours"]["ratio"], "reference": base, "ours": found["ours"]["seconds"], "error": difference}


def per_core_projection(point: Sequence[Tensor], z: Sequence[Tensor]) -> list[Tensor]:
    """The plain reference: both orthogonalizations, messages and one delta a core, all by einsum on (r, n, r) cores."""
    d = len(point)
    left = list(point)
    for k in range(d - 1):
        a, n, _ = left[k].shape
        q, r = torch.linalg.qr(left[k].reshape(a * n, -1))
        left[k], left[k + 1] = q.reshape(a, n, -1), torch.einsum("ab,bnc->anc", r, left[k + 1])
    right = list(left)
    for k in range(d - 1, 0, -1):
        _, n, b = right[k].shape
        q, r = torch.linalg.qr(right[k].reshape(-1, n * b).T)
        right[k], right[k - 1] = q.T.reshape(-1, n, b), torch.einsum("anb,cb->anc", right[k - 1], r)
    from_right = [z[0].new_ones(1, 1)] * (d + 1)
    for k in range(d - 1, 0, -1):
        from_right[k] = torch.einsum("anb,cnd,bd->ac", z[k], right[k], from_right[k + 1])
    from_left, deltas = z[0].new_ones(1, 1), []
    for k in range(d):
        part = torch.einsum("ca,anb->cnb", from_left, z[k])
        if k < d - 1:
            from_left = torch.einsum("cnd,cnb->db", left[k], part)
            part = part - torch.einsum("cnd,db->cnb", left[k], from_left)
        deltas.append(torch.einsum("cnb,bd->cnd", part, from_right[k + 1]))
    return deltas


def projection_row(gate: Gate) -> dict[str, float]:
    d, n, r = 20, 4, 64
    point = TT.random(row_modes=(n,) * d, rank=r, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = TT.random(row_modes=(n,) * d, rank=r, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def cores(net: TT) -> list[Tensor]:
        made = list(net.cores)
        made[0], made[-1] = made[0].reshape(1, n, -1), made[-1].reshape(-1, n, 1)
        return made

    ours = project(point, z)
    theirs = per_core_projection(cores(point), cores(z))
    size = float(torch.stack([delta.norm() for delta in theirs]).norm())
    difference = abs(float(ours.norm()) / size - 1)
    assert difference < 1e-10, difference
    call = {"ours": lambda: project(point, z)}
    base, found = compare(lambda: per_core_projection(cores(point), cores(z)), call, gate, budget=20)
    return {"ratio": found["ours"]["ratio"], "reference": base, "ours": found["ours"]["seconds"], "error": difference}


class Ising:
    """`H = Omega sum X_k + Delta sum n_k + nu / 2 sum_{k != l} n_k n_l / |k - l|^alpha`, n = (1 - Z) / 2.

    Omega = Delta = alpha = 1, nu = 2; the start is all spins down.
    """

    def __init__(self, sites: int) -> None:
        self.sites = sites
        x = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        n = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
        self.terms: list[dict[int, Tensor]] = [{k: x} for k in range(sites)] + [{k: n} for k in range(sites)]
        self.coefficients = [1.0] * (2 * sites)
        for k in range(sites):
            for j in range(k + 1, sites):
                self.terms.append({k: n, j: n})
                self.coefficients.append(2.0 / (j - k))
        self.diagonal = torch.zeros((2,) * sites, dtype=torch.float64)
        for term, c in zip(self.terms[sites:], self.coefficients[sites:], strict=True):
            view = self.diagonal
            for axis in term:
                view = view.narrow(axis, 1, 1)
            view += c

    def dense(self, t: float, y: Tensor) -> Tensor:
        """-i H y: the diagonal at once, the flips as reversed axes."""
        total = self.diagonal * y
        for axis in range(self.sites):
            total = total + y.flip(axis)
        return -1j * total

    def exact(self, end: float) -> Tensor:
        """The solution by Runge-Kutta steps far below the tolerance."""
        y = torch.zeros((2,) * self.sites, dtype=torch.complex128)
        y[(0,) * self.sites] = 1
        steps = 1000
        for _ in range(steps):
            y = rk4(lambda x: self.dense(0.0, x), y, end / steps)
        return y

    def start(self, tree: str) -> Network:
        shape = (2,) * self.sites
        make: Any = TT if tree == "tensor train" else Tree
        more = {} if tree == "tensor train" else {"tree": balanced_tree(self.sites)}
        net = make.random(row_modes=shape, rank=1, dtype=torch.complex128, **more)
        cores = []
        for leg, core in zip(net.legs, net.cores, strict=True):
            one = torch.zeros_like(core)
            one[(0,) * len(leg)] = 1
            cores.append(one)
        return net.replace(cores)  # type: ignore[no-any-return]


def ising_row(tree: str, method: str, exact: Tensor, sites: int, steps: int, gate: Gate) -> dict[str, Any]:
    problem, start = Ising(sites), Ising(sites).start(tree)
    begin = time.perf_counter()
    operator = kronecker_sum(start, problem.terms, coefficients=problem.coefficients)
    build = time.perf_counter() - begin
    more: dict[str, Any] = {"method": method, "tol": 1e-8, "max_rank": 40}
    gate.pass_through()
    begin = time.perf_counter()
    done = integrate(OperatorField(operator, -1j), start, (0.0, 0.01 * steps), steps, keep=True, **more)
    ours = time.perf_counter() - begin
    error = float((to_dense(done.network) - exact).norm() / exact.norm())
    # the dense field is too slow for all steps: single steps from a few points of the same solution
    places = [steps // 4, steps // 2, 3 * steps // 4, steps - 1]

    def single(field: Any) -> float:
        return sum(seconds(lambda k=k: integrate(field, done.networks[k], (0.0, 0.01), 1, **more)) for k in places)

    dense, network = single(problem.dense), single(OperatorField(operator, -1j))
    return {
        "tree": tree,
        "method": method,
        "seconds": ours,
        "build": build,
        "operator": max(operator.ranks),
        "rank": max(max(r) for r in done.ranks),
        "norm": abs(float(torch.linalg.vector_norm(to_dense(done.network))) - 1),
        "error": error,
        "against dense field": dense / network,
    }


def one(sites: int, steps: int, methods: Sequence[str]) -> dict[str, Any]:
    gate = Gate()
    found: dict[str, Any] = {"matrix": matrix_row(gate), "projection": projection_row(gate), "ising": []}
    exact = Ising(sites).exact(0.01 * steps)
    for tree in ("tensor train", "balanced tree"):
        for method in methods:
            row = ising_row(tree, method, exact, sites, steps, gate)
            found["ising"].append(row)
            print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", action="store_true", help="one process; prints JSON")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--methods", default=METHODS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.sites, options.steps, options.methods.split(","))))
        return
    size = [f"--sites={options.sites}", f"--steps={options.steps}"]
    # the slower schemes are timed in one process, the rows with a figure to reach in all
    runs = in_processes(__file__, [*size, f"--methods={METHODS}"], 1)
    runs += in_processes(__file__, [*size, f"--methods={METHODS.partition(',')[0]}"], options.processes - 1)
    rows = []
    for key, title, reach in (
        ("matrix", f"one parallel step, matrix {SIZE}, rank {RANK}, RK4 / plain numpy", "1.1"),
        ("projection", "projection of a train on a train, d = 20, n = 4, ranks 64 / per-core einsum", "1.0"),
    ):
        parts = [run[key] for run in runs]
        ratios = ", ".join(f"{part['ratio']:.2f}" for part in parts)
        rows.append(
            [title, reach, f"{median_of(parts, 'ratio'):.2f} ({ratios})", f"{1e3 * median_of(parts, 'ours'):.1f} ms"]
        )
    text = markdown(["work", "reach", "measured (processes)", "time"], rows)
    table = []
    for row in runs[0]["ising"]:
        same = row["tree"], row["method"]
        parts = [other for run in runs for other in run["ising"] if (other["tree"], other["method"]) == same]
        table.append(
            [
                row["tree"],
                row["method"],
                f"{median_of(parts, 'seconds'):.1f} s",
                row["operator"],
                row["rank"],
                f"{row['error']:.1e}",
                f"{row['norm']:.1e}",
                f"{median_of(parts, 'against dense field'):.1f} x",
            ]
        )
    head = [
        "tree",
        "method",
        "100 steps",
        "operator rank",
        "largest rank",
        "error",
        "norm off by",
        "dense field / ours",
    ]
    head[2] = f"{options.steps} steps"
    publish(
        "integrators",
        "Integrators and geometry",
        text + "\n\n" + markdown(head, table),
        runs,
        [
            f"Long-range Ising chain, {options.sites} sites, step .01, tol 1e-8 a step, ranks at most 40, from a "
            "product state; errors against a dense Runge-Kutta solution at a tenth of the step. The last column is the "
            "time of single steps with the field evaluated densely (2^sites numbers) over that with the operator tree, "
            "at four points of the solution.",
        ],
    )


if __name__ == "__main__":
    main()
