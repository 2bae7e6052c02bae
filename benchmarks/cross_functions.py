"""Crosses of standard functions on grids: evaluations, time and true error of ours and of the peers.

python benchmarks/cross_functions.py                       all rows, one seed
python benchmarks/cross_functions.py --only ackley,sum --methods ours --seeds 3

Every run is a process of its own, ended at 5 M evaluations or after some seconds; evaluations are counted by the
function itself. The error is the larger one of the relative errors on 10,000 uniform entries and on entries near the
largest values (those of 100,000 more entries, climbing, and places that the row knows of). Peers are run at several
settings, and the one that meets tol with the fewest evaluations is taken, which a user could not know beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import markdown
from torch import Tensor

from cross_approx import tt_cross
from cross_approx.reading.held_out import train_entries

MOST_EVALUATIONS = 5_000_000
F64 = torch.float64
Function = Callable[[Tensor], Tensor]  # indices (B, d) to values (B,)
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A function of indices, its grid, what is asked for, and the places where to look besides a sample."""

    function: Function
    shape: tuple[int, ...]
    tol: float = 1e-6
    places: tuple[tuple[int, ...], ...] = ()
    undefined: tuple[int, ...] | None = None  # the entry that is NaN


def drawn(seed: int, d: int) -> tuple[Tensor, Tensor]:
    """Difficulties and centers of Genz's families."""
    rng = torch.Generator().manual_seed(seed)
    c, w = torch.rand(d, dtype=F64, generator=rng), torch.rand(d, dtype=F64, generator=rng)
    return c / c.sum(), w


def on(low: float, high: float, n: int, function: Function) -> Function:
    return lambda index: function(low + (high - low) / (n - 1) * index.to(F64))


def genz(family: str, d: int, n: int) -> Function:
    c, w = drawn(sum(map(ord, family)), d)
    functions: dict[str, Function] = {
        "oscillatory": lambda x: torch.cos(2 * math.pi * w[0] + 9 * (x @ c)),
        "product peak": lambda x: (1 / (1 / (7.25 * c).square() + (x - w).square())).prod(1),
        "corner peak": lambda x: (1 + 1.85 * (x @ c)) ** -(d + 1),
        "Gaussian": lambda x: torch.exp(-((x - w).square() @ (7.03 * c).square())),
        "continuous": lambda x: torch.exp(-((x - w).abs() @ (20.4 * c))),
        "discontinuous": lambda x: torch.where((x[:, :2] > w[:2]).any(1), 0.0, torch.exp(4.3 * (x @ c))),
    }
    return on(0.0, 1.0, n, functions[family])


def ackley(x: Tensor) -> Tensor:
    near = torch.exp(-0.2 * x.square().mean(1).sqrt())
    return 20 - 20 * near + math.e - torch.exp(torch.cos(2 * math.pi * x).mean(1))


def griewank(x: Tensor) -> Tensor:
    k = torch.arange(1, x.shape[1] + 1, dtype=F64)
    return 1 + x.square().sum(1) / 4000 - torch.cos(x / k.sqrt()).prod(1)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[:, 1:] - x[:, :-1].square()).square() + (1 - x[:, :-1]).square()).sum(1)


def dixon_price(x: Tensor) -> Tensor:
    k = torch.arange(2, x.shape[1] + 1, dtype=F64)
    return (x[:, 0] - 1).square() + (k * (2 * x[:, 1:].square() - x[:, :-1]).square()).sum(1)


def sinc_of_sum(index: Tensor) -> Tensor:
    s = 0.1 * index.to(F64).sum(1)
    return torch.sin(s) / s  # 0 / 0 at the origin


def random_train(d: int, n: int, rank: int) -> Function:
    rng = torch.Generator().manual_seed(18)
    ranks = [1, *[rank] * (d - 1), 1]
    cores = [torch.randn(ranks[k], n, ranks[k + 1], dtype=F64, generator=rng) for k in range(d)]
    return lambda index: train_entries(cores, index)


PEAK = (3, 1, 4, 1, 5)
CASES: dict[str, Case] = {
    "Genz oscillatory": Case(genz("oscillatory", 10, 32), (32,) * 10),
    "Genz product peak": Case(genz("product peak", 10, 32), (32,) * 10),
    "Genz corner peak": Case(genz("corner peak", 10, 32), (32,) * 10, places=((0,) * 10,)),
    "Genz Gaussian": Case(genz("Gaussian", 10, 32), (32,) * 10),
    "Genz continuous": Case(genz("continuous", 20, 32), (32,) * 20),
    "Genz discontinuous": Case(genz("discontinuous", 8, 32), (32,) * 8),
    "Schwefel": Case(
        on(-500, 500, 64, lambda x: 418.9829 * x.shape[1] - (x * x.abs().sqrt().sin()).sum(1)), (64,) * 15
    ),
    "Rosenbrock": Case(on(-2.048, 2.048, 32, rosenbrock), (32,) * 10),
    "Ackley": Case(on(-32.768, 32.768, 33, ackley), (33,) * 6, places=((16,) * 6,)),
    "Griewank": Case(on(-600, 600, 64, griewank), (64,) * 10),
    "Dixon-Price": Case(on(-10, 10, 32, dixon_price), (32,) * 12),
    "Rastrigin": Case(
        on(-5.12, 5.12, 33, lambda x: (10 + x.square() - 10 * torch.cos(2 * math.pi * x)).sum(1)), (33,) * 20
    ),
    "Hilbert 1 / sum": Case(lambda i: 1 / (i + 1).to(F64).sum(1), (32,) * 10, places=((0,) * 10,)),
    "1 / sqrt(sum of squares)": Case(
        lambda i: 1 / (i + 1).to(F64).square().sum(1).sqrt(), (32,) * 10, places=((0,) * 10,)
    ),
    "sum": Case(lambda i: i.to(F64).sum(1), (32,) * 20, 1e-8),
    "product": Case(lambda i: (1 + i.to(F64)).prod(1), (32,) * 20, 1e-8, places=((31,) * 20,)),
    "constant": Case(lambda i: torch.full((len(i),), 3.0, dtype=F64), (32,) * 10, 1e-8),
    "random train, rank 4": Case(random_train(8, 20, 4), (20,) * 8, 1e-8),
    "one cell": Case(lambda i: (i == torch.tensor(PEAK)).all(1).to(F64), (8,) * 5, places=(PEAK,)),
    "NaN at one cell": Case(sinc_of_sum, (16,) * 6, undefined=(0,) * 6),
}


class Limit(Exception):
    """Raised out of the counted function."""


class Counted:
    """The function as a method sees it: counts, and ends the run at its limits."""

    def __init__(self, case: Case, most_seconds: float) -> None:
        self.case, self.count, self.end = case, 0, time.monotonic() + most_seconds

    def __call__(self, index: Tensor) -> Tensor:
        if self.count + len(index) > MOST_EVALUATIONS:
            raise Limit(f"{MOST_EVALUATIONS:,} evaluations")
        if time.monotonic() > self.end:
            raise Limit("time")
        self.count += len(index)
        return self.case.function(index)


# --- the methods: (counted function, case, seed) to cores (r, n, s), and whether they claim to have converged ---

Found = tuple[list[Tensor], bool | None, str]


def ours(f: Counted, case: Case, seed: int) -> Found:
    generator = torch.Generator().manual_seed(seed)
    result = tt_cross(f, shape=case.shape, tol=case.tol, generator=generator)
    cores = list(result.network.cores)
    cores = [cores[0][None], *cores[1:-1], cores[-1][..., None]]
    return cores, result.converged, result.reason


def with_teneva(start: int, growth: int) -> Callable[[Counted, Case, int], Found]:
    def run(f: Counted, case: Case, seed: int) -> Found:
        import teneva

        info: dict[str, Any] = {}
        cores = teneva.cross(
            lambda i: f(torch.from_numpy(np.ascontiguousarray(i))).numpy(),
            teneva.rand(case.shape, start, seed=seed),
            e=case.tol,
            nswp=50,
            dr_max=growth,
            cache={},
            info=info,
        )
        return [torch.from_numpy(core) for core in cores], info["stop"] in ("e", "conv"), str(info["stop"])

    return run


def with_tntorch(kick: int) -> Callable[[Counted, Case, int], Found]:
    def run(f: Counted, case: Case, seed: int) -> Found:
        import tntorch

        np.random.seed(seed)  # noqa: NPY002 its own generator is the global one
        t, info = tntorch.cross(
            lambda x: f(x.round().long()),
            domain=[torch.arange(n, dtype=F64) for n in case.shape],
            function_arg="matrix",
            eps=case.tol,
            kickrank=kick,
            return_info=True,
            verbose=False,
            suppress_warnings=True,
        )
        return list(t.cores), bool(info["val_epss"][-1] <= case.tol), "iterations"

    return run


def with_torchtt(method: str) -> Callable[[Counted, Case, int], Found]:
    def run(f: Counted, case: Case, seed: int) -> Found:
        import torchtt

        if method == "cross":
            t = torchtt.interpolate.dmrg_cross(lambda i: f(i.long()), list(case.shape), eps=case.tol)
            return [core.to(F64) for core in t.cores], None, ""
        seen: list[float] = []
        grid = torchtt.meshgrid([torch.arange(n, dtype=F64) for n in case.shape])
        t = torchtt.interpolate.function_interpolate(
            lambda x: f(x.round().long()),
            grid,
            eps=case.tol,
            method=method,
            callback=lambda _tt, _sweep, error: seen.append(float(error)),
        )
        return [core.to(F64) for core in t.cores], bool(seen and seen[-1] <= case.tol), ""

    return run


METHODS: dict[str, dict[str, Callable[[Counted, Case, int], Found]]] = {
    "ours": {"": ours},
    "teneva": {"r0 1, dr_max 1": with_teneva(1, 1), "r0 2, dr_max 2": with_teneva(2, 2)},
    "tntorch": {"kickrank 3": with_tntorch(3), "kickrank 1": with_tntorch(1)},
    "torchTT": {"dmrg_cross": with_torchtt("cross"), "amen": with_torchtt("amen")},
}


ONE_SEED = ("torchTT",)
"""Never the best peer, and slow: one seed."""


def looked_at(case: Case) -> list[Tensor]:
    """Uniform entries, and entries near the largest values."""
    rng = torch.Generator().manual_seed(12345)
    sizes = torch.tensor(case.shape)

    def uniform(count: int) -> Tensor:
        return (torch.rand(count, len(sizes), dtype=F64, generator=rng) * sizes).long()

    fresh, pool = uniform(10_000), uniform(100_000)
    if case.undefined is not None:
        bad = torch.tensor(case.undefined)
        fresh, pool = (index[(index != bad).any(1)] for index in (fresh, pool))
    for _ in range(20):
        value = case.function(pool).abs().nan_to_num(-1)
        top = pool[value.topk(500).indices]
        near = top.repeat(4, 1)
        mode = torch.randint(len(sizes), (len(near),), generator=rng)
        near[torch.arange(len(near)), mode] = (torch.rand(len(near), dtype=F64, generator=rng) * sizes[mode]).long()
        pool = torch.cat([top, near]).unique(dim=0)
    known = torch.tensor(case.places, dtype=torch.long).reshape(-1, len(sizes))
    pool = torch.cat([pool, known])
    return [fresh, pool[case.function(pool).isfinite()]]


def error_of(cores: list[Tensor], case: Case) -> float:
    worst = 0.0
    for index in looked_at(case):
        true = case.function(index)
        size = float(true.norm())
        off = float((train_entries(cores, index) - true).norm())
        worst = max(worst, off / size if size > 0 else (math.inf if off > 1e-12 else 0.0))
    return worst if math.isfinite(worst) else math.inf


def work(method: str, setting: str, name: str, seed: int, seconds: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(F64)
    torch.manual_seed(seed)
    case = CASES[name]
    counted = Counted(case, seconds)
    row: Row = {"function": name, "method": method, "setting": setting, "seed": seed, "tol": case.tol}
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            cores, claim, said = METHODS[method][setting](counted, case, seed)
        row |= {"seconds": time.perf_counter() - start, "claim": claim, "said": said}
        row |= {"rank": max(core.shape[2] for core in cores), "error": error_of(cores, case)}
    except Limit as limit:
        row |= {"seconds": time.perf_counter() - start, "claim": False, "said": f"stopped: {limit}", "error": math.inf}
    except Exception as error:
        last = traceback.format_exception_only(error)[-1].strip()
        row |= {"seconds": time.perf_counter() - start, "claim": False, "said": last[:200], "error": math.inf}
    pipe.send(row | {"evaluations": counted.count})


def one(method: str, setting: str, name: str, seed: int, seconds: float) -> Row:
    """A run in a process of its own, killed where the limits of the function do not end it."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(method, setting, name, seed, seconds, there))
    child.start()
    there.close()
    row: Row | None = None
    with contextlib.suppress(EOFError):
        if here.poll(seconds + 30):
            row = here.recv()
    child.kill()
    child.join()
    if row is None:
        row = {"function": name, "method": method, "setting": setting, "seed": seed, "tol": CASES[name].tol}
        row |= {"seconds": seconds, "claim": False, "said": "killed", "error": math.inf, "evaluations": -1}
    row["meets"] = row["error"] <= row["tol"]
    bad = CASES[name].undefined
    row["refused"] = bad is not None and f"index {bad}" in row["said"]
    return row


def rows(names: Sequence[str], methods: Sequence[str], seeds: int, seconds: float) -> list[Row]:
    """All runs, printed as they end."""
    found = []
    for name in names:
        for method in methods:
            for setting in METHODS[method]:
                for seed in range(1 if method in ONE_SEED else seeds):
                    row = one(method, setting, name, seed, seconds)
                    found.append(row)
                    print(
                        f"{name:26} {method:8} {setting:15} {seed} {row['evaluations']:>9,} {row['seconds']:6.2f} s  "
                        f"error {row['error']:.1e}  rank {row.get('rank', 0):3}  claim {row['claim']}  {row['said']}",
                        file=sys.stderr,
                        flush=True,
                    )
    return found


def summary(found: Sequence[Row]) -> list[Row]:
    """A line a function: ours, and the peer that meets tol in every seed with the fewest evaluations (median)."""
    lines: list[Row] = []
    for name in dict.fromkeys(row["function"] for row in found):
        runs: dict[tuple[str, str], list[Row]] = {}
        for row in found:
            if row["function"] == name:
                runs.setdefault((row["method"], row["setting"]), []).append(row)
        own = runs.pop(("ours", ""))
        meeting = {key: own_rows for key, own_rows in runs.items() if all(row["meets"] for row in own_rows)}
        best = min(meeting, key=lambda key: statistics.median(row["evaluations"] for row in meeting[key]), default=None)
        line: Row = {
            "function": name,
            "tol": own[0]["tol"],
            "evaluations": statistics.median(row["evaluations"] for row in own),
            "most": max(row["evaluations"] for row in own),
            "error": max(row["error"] for row in own),
            "rank": max(row.get("rank", 0) for row in own),
            "seconds": statistics.median(row["seconds"] for row in own),
            "claims": sum(bool(row["claim"]) for row in own),
            "meets": all(row["meets"] for row in own),
            "refused": all(row["refused"] for row in own),
            "wrong claims of peers": sum(
                bool(row["claim"]) and not row["meets"] for own_rows in runs.values() for row in own_rows
            ),
            "peer": None,
        }
        if best is not None:
            line |= {
                "peer": " ".join(best),
                "peer evaluations": statistics.median(row["evaluations"] for row in meeting[best]),
                "peer error": max(row["error"] for row in meeting[best]),
                "peer seconds": statistics.median(row["seconds"] for row in meeting[best]),
                "peer rank": max(row["rank"] for row in meeting[best]),
            }
        line["at most"] = line["meets"] and (best is None or line["evaluations"] <= line["peer evaluations"])
        lines.append(line)
    return lines


def table(found: Sequence[Row]) -> str:
    """The page's table and what it counts up to."""
    cells, lines = [], summary(found)
    for line in lines:
        said = "refused, with its index" if line["refused"] else f"{line['error']:.0e}"
        peer = ["none meets tol", "", "", ""]
        if line["peer"] is not None:
            peer = [
                line["peer"],
                f"{line['peer evaluations']:,.0f}",
                f"{line['peer error']:.0e}",
                f"{line['peer seconds']:.2f} s",
            ]
        d, n = len(CASES[line["function"]].shape), CASES[line["function"]].shape[0]
        cells.append(
            [
                line["function"],
                f"{n}^{d}",
                f"{line['tol']:.0e}",
                f"{line['evaluations']:,.0f}",
                said,
                line["rank"] or "",
                f"{line['seconds']:.2f} s",
                *peer,
                "yes" if line["at most"] else ("" if line["refused"] else "no"),
            ]
        )
    head = ["function", "grid", "tol", "evaluations", "error", "rank", "time", "best peer", "evaluations", "error",
            "time", "at most the peer's"]  # fmt: skip
    fewer = sum(line["at most"] for line in lines)
    refused = sum(line["refused"] for line in lines)
    wrong = [line["function"] for line in lines if line["claims"] and not line["meets"]]
    return (
        markdown(head, cells)
        + f"\n\nAt most the evaluations of the best peer on {fewer} of {len(lines)} (reach 15), not counting {refused} "
        f"refused by name. Claimed to have converged, and wrong: ours {', '.join(wrong) or 'nowhere'}; peers in "
        f"{sum(line['wrong claims of peers'] for line in lines)} runs. Medians over seeds, worst errors. The best peer "
        "is chosen after the fact among teneva (two settings, with cache), tntorch (two) and torchTT (two, one seed). "
        "One cell of 32,768 is among the uniform half of 1,000 held-out entries with a chance of 2 %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of names, by commas")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = [part.lower() for part in arguments.only.split(",")]
    names = [name for name in CASES if any(part in name.lower() for part in parts)]
    found = rows(names, arguments.methods.split(","), arguments.seeds, arguments.seconds)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))
    if "ours" in arguments.methods:
        print(table(found))


if __name__ == "__main__":
    main()
