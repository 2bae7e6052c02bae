"""Decompositions against plain-torch references and peers: time ratios, each with the error it reached.

python benchmarks/decomposition.py     3 processes, about 5 minutes (peers where they are installed: make bench-env)

Not named after the package: a script's folder comes first on the path, and would hide it from every benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timing import Gate, compare, in_processes, markdown, median_of, publish
from torch import Tensor

import decompositions as tn
from decompositions.linalg import relative_error

SIDE = 64
Cores = Sequence[Tensor]


def movedim_gram_st_hosvd(x: Tensor, rank: int) -> tuple[Tensor, list[Tensor]]:
    """The plain reference: unfold by movedim, float32 Gram matrix, eigenvectors."""
    core, factors = x, []
    for k in range(x.ndim):
        moved = core.movedim(k, 0)
        matrix = moved.reshape(moved.shape[0], -1)
        u = torch.linalg.eigh(matrix @ matrix.T)[1][:, -rank:]
        core = (u.T @ matrix).reshape(rank, *moved.shape[1:]).movedim(0, k)
        factors.append(u)
    return core, factors


def svd_tt(x: Tensor, rank: int | None = None, tol: float | None = None) -> list[Tensor]:
    """The plain reference: torch.linalg.svd at every cut."""
    rest, left, cores, norm = x, 1, [], float(x.norm())
    for size in x.shape[:-1]:
        u, s, vh = torch.linalg.svd(rest.reshape(left * size, -1), full_matrices=False)
        kept = len(s) if rank is None else min(rank, len(s))
        if tol is not None:
            tails = s.double().square().flip(0).cumsum(0).flip(0)
            kept = max(1, int((tails > (tol * norm) ** 2 / (x.ndim - 1)).sum()))
        cores.append(u[:, :kept].reshape(left, size, kept))
        rest, left = s[:kept, None] * vh[:kept], kept
    return [*cores, rest.reshape(left, x.shape[-1], 1)]


def qr_svd_round(cores: Cores, rank: int) -> list[Tensor]:
    """The plain reference: QR from left to right, SVD back."""
    made = list(cores)
    for k in range(len(made) - 1):
        a, n, b = made[k].shape
        q, r = torch.linalg.qr(made[k].reshape(a * n, b))
        made[k] = q.reshape(a, n, -1)
        made[k + 1] = torch.tensordot(r, made[k + 1], dims=1)
    for k in range(len(made) - 1, 0, -1):
        a, n, b = made[k].shape
        u, s, vh = torch.linalg.svd(made[k].reshape(a, n * b), full_matrices=False)
        made[k] = vh[:rank].reshape(-1, n, b)
        made[k - 1] = torch.tensordot(made[k - 1], u[:, :rank] * s[:rank], dims=1)
    return made


def full(cores: Cores) -> Tensor:
    dense = cores[0]
    for core in cores[1:]:
        dense = torch.tensordot(dense, core, dims=1)
    return dense.squeeze(0).squeeze(-1)


def noisy(net: tn.Network, generator: torch.Generator) -> Tensor:
    """A signal of norm 1 and noise of relative norm 1e-3."""
    x = tn.to_dense(net)
    return x / x.norm() + 1e-3 * torch.randn(x.shape, generator=generator) / x.numel() ** 0.5


def peer(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """The call, silenced; None where the peer is not installed or cannot run."""

    def quiet() -> Any:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return call()

    try:
        quiet()
    except Exception:
        return None
    return quiet


def tucker_peers(x: Tensor) -> dict[str, Callable[[], Any]]:
    def tensorly_(**options: Any) -> Callable[[], Any]:
        def run() -> Any:
            import tensorly
            from tensorly.decomposition import tucker

            tensorly.set_backend("pytorch")
            return tucker(x, rank=[8] * 4, n_iter_max=1, **options)

        return run

    return {"tensorly tucker, one sweep": tensorly_(), "tensorly tucker, randomized": tensorly_(svd="randomized_svd")}


def tt_peers(x: Tensor) -> dict[str, Callable[[], Any]]:
    def tensorly_() -> Any:
        import tensorly
        from tensorly.decomposition import tensor_train

        tensorly.set_backend("pytorch")
        return tensor_train(x, rank=[1, 8, 8, 8, 1])

    def torchtt_() -> Any:
        import torchtt

        return torchtt.TT(x, rmax=8)

    def tntorch_() -> Any:
        import tntorch

        return tntorch.Tensor(x, ranks_tt=8)

    return {"tensorly tensor_train": tensorly_, "torchTT": torchtt_, "tntorch": tntorch_}


def round_peers(cores: Cores) -> dict[str, Callable[[], Any]]:
    def torchtt_() -> Any:
        import torchtt

        return torchtt.TT([core.clone() for core in cores]).round(0, 50)

    def tntorch_() -> Any:
        import tntorch

        made = tntorch.Tensor([core.clone() for core in cores])
        made.round_tt(rmax=50)
        return made

    return {"torchTT round": torchtt_, "tntorch round_tt": tntorch_}


def one(quick: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    gate, found = Gate(), {}
    budget = 2.0 if quick else 12.0

    def section(
        reference: Callable[[], Any],
        ours: dict[str, Callable[[], Any]],
        peers: dict[str, Callable[[], Any]],
        errors: dict[str, float],
        least: int = 3,
    ) -> None:
        calls = {**ours, **{name: quiet for name, call in peers.items() if (quiet := peer(call)) is not None}}
        base, rows = compare(reference, calls, gate, budget=budget, least=least)
        for name, row in rows.items():
            found[name] = {**row, "reference": base, "error": errors.get(name), "optimal": errors.get(name + " ref")}

    x = noisy(tn.Tucker.random(row_modes=(SIDE,) * 4, rank=8, generator=generator), generator)
    core, factors = movedim_gram_st_hosvd(x, 8)
    name = "st_hosvd 64^4 r8 / movedim Gram"
    section(
        lambda: movedim_gram_st_hosvd(x, 8),
        {name: lambda: tn.st_hosvd(x, rank=8)},
        tucker_peers(x) if not quick else {},
        {
            name: relative_error(tn.to_dense(tn.st_hosvd(x, rank=8)), x),
            name + " ref": relative_error(tn.to_dense(tn.Tucker(core, factors)), x),
        },
        least=5,
    )

    x = noisy(tn.TT.random(row_modes=(SIDE,) * 4, rank=8, generator=generator), generator)
    cases: dict[str, dict[str, Any]] = {
        "tt_svd 64^4 r8 / SVD": {"rank": 8},
        "tt_svd 64^4 tol 1e-2 / SVD": {"tol": 1e-2},
        "tt_svd 64^4 tol 3e-4 / SVD": {"tol": 3e-4},
    }
    for name, limits in cases.items():
        if "3e-4" in name:  # below the noise of the other rows: a cleaner signal
            x = x + 0.0
            clean = tn.to_dense(tn.tt_svd(x, rank=8))
            x = clean / clean.norm() + 5e-5 * torch.randn(x.shape, generator=generator) / x.numel() ** 0.5
        section(
            lambda x=x, limits=limits: svd_tt(x, **limits),
            {name: lambda x=x, limits=limits: tn.tt_svd(x, **limits)},
            tt_peers(x) if "r8" in name and not quick else {},
            {
                name: relative_error(tn.to_dense(tn.tt_svd(x, **limits)), x),
                name + " ref": relative_error(full(svd_tt(x, **limits)), x),
            },
        )

    u, v = (torch.linalg.qr(torch.randn(4096, 4096, generator=generator)).Q for _ in range(2))
    spectrum = 1 / torch.arange(1, 4097)
    matrix = (u * spectrum) @ v.T
    best = float(spectrum[64:].double().norm() / spectrum.double().norm())
    name, certified = "svd 4096^2 r64 randomized / torch.svd_lowrank", "svd 4096^2 r64 certified / torch.svd_lowrank"
    sketch = partial(tn.svd, matrix, rank=64, method="randomized", generator=generator)

    def lowrank() -> tuple[Tensor, Tensor, Tensor]:
        return torch.svd_lowrank(matrix, q=80, niter=2)

    section(
        lowrank,
        {name: sketch, certified: lambda: tn.svd(matrix, rank=64)},
        {},
        {
            name: relative_error(tn.to_matrix(sketch()), matrix),
            name + " ref": best,
            certified: relative_error(tn.to_matrix(tn.svd(matrix, rank=64)), matrix),
            certified + " ref": best,
        },
    )

    # would equal layers gain from one batched call? Gram matrix and eigenvectors, stacked against one by one
    for count, size in ((32, 128), (16, 512)):
        stack = torch.randn(count, size, size, generator=generator)
        section(
            lambda stack=stack: [torch.linalg.eigh(w @ w.T) for w in stack],
            {f"{count} layers of {size}^2 stacked / one by one": lambda s=stack: torch.linalg.eigh(torch.bmm(s, s.mT))},
            {},
            {},
            least=5,
        )

    net = tn.TT.random(row_modes=(4,) * 20, rank=50, std=1.0, generator=generator)
    extra = tn.TT.random(row_modes=(4,) * 20, rank=50, std=1e-3, generator=generator)
    doubled = tn.add(net, extra)  # ranks 100, of which 50 carry the norm
    shaped = [core.reshape(*((1,) if k == 0 else ()), *core.shape, *((1,) if k == 19 else ()))
              for k, core in enumerate(doubled.cores)]  # fmt: skip
    name = "round d20 n4 100 -> 50 / QR + SVD"
    plain = qr_svd_round(shaped, 50)
    reference_net = tn.TT([plain[0][0], *plain[1:-1], plain[-1][..., 0]])

    def distance(other: tn.Network) -> float:
        exact = doubled.to(torch.float64)
        return float(tn.norm(tn.add(exact, tn.scale(other.to(torch.float64), -1.0))) / tn.norm(exact))

    section(
        lambda: qr_svd_round(shaped, 50),
        {name: lambda: tn.round(doubled, rank=50)},
        round_peers(shaped) if not quick else {},
        {name: distance(tn.round(doubled, rank=50)), name + " ref": distance(reference_net)},
        least=9,
    )
    return found


REACH = {
    "st_hosvd 64^4 r8 / movedim Gram": 1.05,
    "tt_svd 64^4 r8 / SVD": 0.04,
    "tt_svd 64^4 tol 1e-2 / SVD": 0.04,
    "tt_svd 64^4 tol 3e-4 / SVD": 0.08,
    "svd 4096^2 r64 randomized / torch.svd_lowrank": 1.05,
    "round d20 n4 100 -> 50 / QR + SVD": 0.85,
}


def main(count: int, quick: bool) -> None:
    runs = in_processes(__file__, ["--quick"] if quick else [], count)
    table, rows = [], {}
    for name in runs[0]:
        same = [run[name] for run in runs if name in run]
        row: dict[str, Any] = {key: median_of(same, key) for key in ("ratio", "median", "seconds", "reference")}
        error, optimal = same[0]["error"], same[0]["optimal"]
        goal = REACH.get(name)
        row |= {"processes": [round(run["ratio"], 4) for run in same], "reach": goal, "error": error, "best": optimal}
        rows[name] = row
        table.append(
            [
                name,
                f"{row['ratio']:.3f}",
                "" if goal is None else f"{goal:.3g}",
                "" if goal is None else ("reached" if row["ratio"] <= goal else "**missed**"),
                f"{row['median']:.3f}",
                f"{1e3 * row['seconds']:.3g} / {1e3 * row['reference']:.3g}",
                "" if error is None else f"{error:.4g} / {optimal:.4g}",
            ]
        )
    notes = [
        "float32; each row against its reference in plain torch (peers: against the reference of the row above them)."
        f" 20th percentiles, median of {count} processes. *error*: relative, ours / the reference's (svd: the optimum)."
        " *certified*: method='auto', which proves its error to be within 1.005 of the optimum before it returns."
    ]
    head = ["row", "ratio", "reach", "", "median", "ms / reference ms", "error / reference"]
    publish("decompositions", "Decompositions", markdown(head, table), rows, notes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a sixth of the calls, no peers")
    parser.add_argument("--one", action="store_true", help="one process, JSON on the last line")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.quick)))
    else:
        main(options.processes, options.quick)
