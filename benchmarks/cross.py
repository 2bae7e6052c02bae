"""Tensors from few entries: functions and maxvol against the peers, real grids, a grid in chunks, coded files.

python benchmarks/cross.py                             about 15 minutes on 2 cores
python benchmarks/cross.py --only headline,maxvol      some parts: functions, headline, maxvol, grids, chunks, coding
python benchmarks/cross.py --only chunks --size 512    a smaller grid than 1024^3 (which takes 3 GB of disk)
python benchmarks/cross.py --seeds 5                   seeds of the functions (3)

Rows are kept in runs/bench-cross.json: a part that is there is not run again (--again runs it). Peers come with
make bench-env; parts that need an absent one say so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cross_chunks
import cross_functions
import cross_grids
import numpy as np
import torch
from cross_functions import CASES, Case, Counted, error_of
from timing import Gate, compare, markdown, publish
from torch import Tensor

from cross_approx import maxvol, tt_cross
from decompositions import st_hosvd, to_dense, tt_svd
from tnlayers.files import write_atomic
from tnlayers.grids.fitting import fit_error
from tnlayers.grids.store import grid_bytes

ROOT = Path(__file__).parent.parent
STORE = ROOT / "runs" / "bench-cross.json"
HEADLINE = "1 / sqrt(sum of squares)"
Row = dict[str, Any]


def functions_part(arguments: argparse.Namespace) -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the processes of the runs are forked
    found = cross_functions.rows(list(CASES), list(cross_functions.METHODS), arguments.seeds, 12.0)
    torch.set_num_threads(threads)
    return found


def functions_table(found: list[Row]) -> str:
    return "## Standard functions\n\n" + cross_functions.table(found)


def run_ours(counted: Counted, case: Case, seed: int, dtype: torch.dtype) -> tuple[list[Tensor], str]:
    def function(index: Tensor) -> Tensor:
        return counted(index).to(dtype)

    result = tt_cross(function, shape=case.shape, tol=1e-6, generator=torch.Generator().manual_seed(seed))
    cores = list(result.network.cores)
    return [cores[0][None], *cores[1:-1], cores[-1][..., None]], result.reason


def run_teneva(counted: Counted, case: Case, seed: int, cache: bool) -> tuple[list[Tensor], str]:
    import teneva

    info: dict[str, Any] = {}
    cores = teneva.cross(
        lambda i: counted(torch.from_numpy(np.ascontiguousarray(i))).numpy(),
        teneva.rand(case.shape, 2, seed=seed),
        e=1e-6,
        dr_max=2,
        nswp=50,
        cache={} if cache else None,
        info=info,
    )
    return [torch.from_numpy(core) for core in cores], f"stop: {info['stop']}"


def headline_part(_: argparse.Namespace) -> list[Row]:
    """In turn, seed by seed: both see the same machine."""
    case = CASES[HEADLINE]
    methods: dict[str, Callable[[Counted, int], tuple[list[Tensor], str]]] = {
        "teneva": lambda f, seed: run_teneva(f, case, seed, False),
        "teneva, cache": lambda f, seed: run_teneva(f, case, seed, True),
        "ours": lambda f, seed: run_ours(f, case, seed, torch.float64),
        "ours, float32": lambda f, seed: run_ours(f, case, seed, torch.float32),
    }
    found = []
    for seed in range(3):
        for name, method in methods.items():
            counted = Counted(case, 120.0)
            start = time.perf_counter()
            cores, said = method(counted, seed)
            row: Row = {"method": name, "seed": seed, "seconds": time.perf_counter() - start, "said": said}
            row |= {"evaluations": counted.count, "rank": max(core.shape[2] for core in cores)}
            found.append(row | {"error": error_of([core.double() for core in cores], case)})
    return found


def headline_table(found: list[Row]) -> str:
    names = list(dict.fromkeys(row["method"] for row in found))

    def of(name: str, key: str) -> list[Any]:
        return [row[key] for row in found if row["method"] == name]

    base = statistics.median(of("teneva", "seconds"))
    rows = [
        [
            name,
            f"{statistics.median(of(name, 'evaluations')):,.0f}",
            f"{max(of(name, 'error')):.1e}",
            max(of(name, "rank")),
            f"{statistics.median(of(name, 'seconds')):.2f} s",
            f"{statistics.median(of(name, 'seconds')) / base:.2f}",
            of(name, "said")[0],
        ]
        for name in names
    ]
    head = ["method", "evaluations", "worst error", "rank", "time", "of teneva's", "ended by"]
    return (
        "## 1 / sqrt(sum i_k^2), d = 10, n = 32, tol 1e-6\n\nReach: <= 250,000 evaluations, error <= 1e-6, <= 0.4 of "
        "teneva's time; float32 stops by itself. Medians of 3 seeds; the error as above.\n\n" + markdown(head, rows)
    )


class Permutation:
    """The permutation matrix of an LU factorization, of which only the first columns are looked at."""

    def __init__(self, places: np.ndarray) -> None:
        self.rows = np.argsort(places)

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        rows = self.rows[key[1]]
        columns = np.zeros((len(self.rows), len(rows)), dtype=bool)
        columns[rows, np.arange(len(rows))] = True
        return columns


def lu(a: np.ndarray, check_finite: bool = True) -> tuple[Any, np.ndarray, np.ndarray]:
    """scipy's, without the permutation as an n x n matrix: 75 GB at n = 100,000."""
    from scipy.linalg import lu

    places, lower, upper = lu(a, p_indices=True, check_finite=check_finite)
    return Permutation(places), lower, upper


def maxvol_part(_: argparse.Namespace) -> list[Row]:
    import teneva

    module: Any = sys.modules[teneva.maxvol.__module__]
    published = module.lu
    rng = torch.Generator().manual_seed(0)
    found = []
    for name, a in {
        "normal, n = 20,000, as published": torch.randn(20_000, 50, dtype=torch.float64, generator=rng),
        "normal": torch.randn(100_000, 50, dtype=torch.float64, generator=rng),
        "orthonormal": torch.linalg.qr(torch.randn(100_000, 50, dtype=torch.float64, generator=rng)).Q,
        "graded": torch.randn(100_000, 50, dtype=torch.float64, generator=rng) * torch.logspace(0, -8, 50),
    }.items():
        array = a.numpy()
        module.lu = published if "published" in name else lu
        base, times = compare(
            lambda array=array: teneva.maxvol(array, e=1.05, k=10_000), {"ours": lambda a=a: maxvol(a, 0.05)}, Gate()
        )
        rows = {"ours": maxvol(a, 0.05), "teneva": torch.from_numpy(teneva.maxvol(array, e=1.05, k=10_000)[0]).long()}
        found.append(
            {
                "matrix": name,
                "teneva": base,
                **times["ours"],
                "largest": {k: float(torch.linalg.solve(a[i], a, left=False).abs().max()) for k, i in rows.items()},
                "log volume": {k: float(torch.linalg.slogdet(a[i]).logabsdet) for k, i in rows.items()},
            }
        )
    return found


def maxvol_table(found: list[Row]) -> str:
    rows = [
        [
            row["matrix"],
            f"{row['teneva']:.2f} s",
            f"{row['seconds']:.3f} s",
            f"{row['ratio']:.2f}",
            "0.30",
            f"{row['largest']['teneva']:.3f} / {row['largest']['ours']:.3f}",
            f"{row['log volume']['ours'] - row['log volume']['teneva']:+.2f}",
        ]
        for row in found
    ]
    head = [
        "matrix",
        "teneva",
        "ours",
        "ratio",
        "reach",
        "largest coefficient, teneva / ours",
        "log volume, ours - teneva",
    ]
    return (
        "## maxvol, n x 50, tolerance 0.05 for both\n\nteneva as published makes the permutation of its LU a matrix, "
        "75 GB at n = 100,000, which this machine refuses; there its LU is replaced by one that returns indices.\n\n"
        + markdown(head, rows)
    )


def grids_part(arguments: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(2)
    found = cross_grids.mni(arguments.data / "volume-mni152-t1" / "mni152_t1_1mm.npz", seeds=range(3))
    file = arguments.data / "climate-air-temperature" / "north_america_1860_2099.npz"
    return found + cross_grids.climate(file, seeds=range(3))


def grids_table(found: list[Row]) -> str:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault((row["grid"], row["method"], row["rank"], tuple(row["chunks"])), []).append(row)

    def over(rows: list[Row], key: str, worst: Callable[[list[float]], float], form: str) -> str:
        return format(worst([row[key] for row in rows]), form)

    lines = [
        [
            f"{grid}, {method}, rank {rank}, chunks {chunks[0]}x{chunks[1]}x{chunks[2]}",
            f"{rows[0]['svd_psnr']:.2f}",
            over(rows, "psnr", min, ".2f"),
            over(rows, "foreground_psnr", min, ".2f"),
            f"{over(rows, 'error', max, '.3f')} / {over(rows, 'held_out_error', min, '.3f')}",
            over(rows, "entries_percent", max, ".1f"),
            over(rows, "chunks_percent", max, ".1f"),
            over(rows, "bytes_percent", max, ".1f"),
            over(rows, "seconds", statistics.median, ".1f"),
        ]
        for (grid, method, rank, chunks), rows in groups.items()
    ]
    head = ["cross", "SVD dB", "dB", "foreground dB", "error / claimed", "entries %", "chunks %", "bytes %", "seconds"]
    return (
        "## Real grids in zarr, with a part of their bytes\n\nReach on the MNI volume: within 1 dB of the SVD of the "
        "same ranks with 5 % of the entries and 30 % of the bytes. Worst of 3 seeds. Chunks that zarr did not write, "
        "because they hold its fill value only, are known without being read: on the MNI volume, 78 % zeros, all "
        "depends on them.\n\n" + markdown(head, lines)
    )


def chunks_part(arguments: argparse.Namespace) -> list[Row]:
    works = ("read", "gemm", "gram", "sketch", "sketch2")
    return cross_chunks.rows(arguments.size, threads=2, works=works, folder=arguments.folder)


def chunks_table(found: list[Row]) -> str:
    names = {
        "read": "reading the file through zarr",
        "gemm": "the products of the Gram passes, data in memory",
        "gram": "tucker_gram",
        "sketch": "tucker_sketch, 1 pass",
        "sketch2": "tucker_sketch, 2 passes",
    }
    reach = {"gram": "1.3", "sketch": "2"}
    lines = [
        [
            names[row["work"]],
            f"{row['seconds']:.1f} s",
            f"{row['cpu_seconds']:.1f} s",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            reach.get(row["work"], ""),
            f"{row['peak_mb']:.0f} MB",
            f"{row['error']:.4f}" if "error" in row else "",
            row.get("passes", ""),
        ]
        for row in found
    ]
    first = found[0]
    head = ["work", "wall", "CPU", "ratio", "reach", "peak memory above the imports", "error", "passes"]
    return (
        f"## A grid of {first['size']}^3 float32 ({first['grid_mb'] / 1024:.1f} GB) in chunks, Tucker rank 32\n\nRank "
        f"32 and noise of .05, chunks of {first['chunk']}^3, {first['codec']}, {first['stored_mb'] / 1024:.1f} GB "
        f"stored, {first['threads']} threads, load {max(row['load'] for row in found)}. Reach of memory: 1 GB. Ratios: "
        "sketches to the reading, Gram to its products. The error of one pass is an estimate.\n\n"
        + markdown(head, lines)
    )


def coding_part(arguments: argparse.Namespace) -> list[Row]:
    volume = torch.from_numpy(np.load(arguments.data / "volume-mni152-t1" / "mni152_t1_1mm.npz")["vol"]).double()
    norm = float(volume.norm())
    found = []
    for name, svd in {"Tucker": st_hosvd, "TT": tt_svd}.items():
        fine = svd(volume, tol=0.02)
        error = float((to_dense(fine) - volume).norm()) / norm
        for tol in (0.128, 0.075, 0.05, 0.04):
            row: Row = {"format": name, "error asked": tol}
            row["float32"] = len(grid_bytes(svd(volume, tol=tol).to(torch.float32), shape=volume.shape)[0])
            fitted = fit_error(fine, error, tol, "planes")
            row["coded"] = len(grid_bytes(fitted, shape=volume.shape)[0])
            row["error"] = float((to_dense(fitted.network()) - volume).norm()) / norm
            found.append(row)
    return found


def coding_table(found: list[Row]) -> str:
    lines = [
        [
            row["format"],
            f"{row['error asked']}",
            f"{row['float32']:,}",
            f"{row['coded']:,}",
            f"{row['coded'] / row['float32']:.3f}",
            "0.3",
            f"{row['error']:.4f}",
        ]
        for row in found
    ]
    head = ["format", "relative error asked", "bytes, float32 factors", "bytes, bit planes", "ratio", "reach", "error"]
    return (
        "## Files of coded cores, MNI volume\n\nThe smallest float32 file of the same error against bit planes and "
        "LZMA; the error of the coded file as decoded.\n\n" + markdown(head, lines)
    )


PARTS: dict[str, tuple[Callable[[argparse.Namespace], list[Row]], Callable[[list[Row]], str], tuple[str, ...]]] = {
    "functions": (functions_part, functions_table, ("teneva", "tntorch", "torchtt")),
    "headline": (headline_part, headline_table, ("teneva",)),
    "maxvol": (maxvol_part, maxvol_table, ("teneva",)),
    "grids": (grids_part, grids_table, ("zarr",)),
    "chunks": (chunks_part, chunks_table, ("zarr",)),
    "coding": (coding_part, coding_table, ()),
}
"""What measures a part, what prints it, and the packages that it needs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts by commas: " + ", ".join(PARTS))
    parser.add_argument("--again", action="store_true", help="run parts that are there once more")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="of grids and coding")
    parser.add_argument("--size", type=int, default=1024, help="of the grid in chunks: size^3 float32")
    parser.add_argument("--folder", help="where that grid is written (a temporary folder)")
    parser.add_argument("--seeds", type=int, default=3, help="of the functions")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    for part in chosen:
        if part not in PARTS:
            parser.error(f"no part {part!r}, expected some of {', '.join(PARTS)}")
    store: dict[str, list[Row]] = json.loads(STORE.read_text()) if STORE.exists() else {}
    for part in chosen:
        work, _, packages = PARTS[part]
        absent = [name for name in packages if importlib.util.find_spec(name) is None]
        if absent:
            print(f"{part}: {', '.join(absent)} not installed (make bench-env)", file=sys.stderr)
        elif part not in store or arguments.again:
            start = time.perf_counter()
            store[part] = work(arguments)
            print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            STORE.parent.mkdir(exist_ok=True)
            write_atomic(STORE, json.dumps(store, indent=1) + "\n")
    text = "\n\n".join(PARTS[part][1](store[part]) for part in PARTS if part in store)
    peers = [name for name in ("teneva", "tntorch", "torchTT") if importlib.util.find_spec(name.lower())]
    notes = [", ".join(f"{name} {version(name)}" for name in peers)] if peers else []
    publish("cross", "Tensors from few entries", text, store, notes)


if __name__ == "__main__":
    main()
