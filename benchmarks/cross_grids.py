"""Crosses of real grids in zarr: PSNR against TT-SVD and ST-HOSVD, and what was read for it.

    python -m benchmarks.cross_grids --data DATA

DATA holds volume-mni152-t1/mni152_t1_1mm.npz and climate-air-temperature/north_america_1860_2099.npz. Every row is one
cross with the error of the SVD of the same ranks beside it; bytes are those of whole chunks, chunks that zarr did not
write (nothing but the fill value) are known without being read.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from math import log10
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cross_approx import ZarrSource, tt_cross, tucker_cross
from decompositions import st_hosvd, to_dense, tt_svd

METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "tucker": (tucker_cross, st_hosvd),
    "tt": (tt_cross, tt_svd),
}


def measure(
    name: str,
    x: np.ndarray,
    rank: int,
    chunks: Sequence[Sequence[int]],
    *,
    entries: float = 0.05,
    fraction: float | None = 0.3,
    seeds: Sequence[int] = (0,),
) -> list[dict[str, Any]]:
    """Rows of one grid: both formats, every chunk shape and seed."""
    zarr = __import__("zarr")
    exact = torch.from_numpy(x).double()
    foreground = exact > exact.min()
    span = float(exact.max() - exact.min())

    def psnr(y: torch.Tensor, where: torch.Tensor | None = None) -> float:
        error = (y - exact) if where is None else (y - exact)[where]
        return 20 * log10(span / float(error.square().mean().sqrt()))

    rows = []
    for method, (cross, svd) in METHODS.items():
        best = psnr(to_dense(svd(exact.float(), rank=rank)).double())
        for shape in chunks:
            for seed in seeds:
                with tempfile.TemporaryDirectory() as folder:
                    array = zarr.create_array(
                        str(Path(folder) / "x"), shape=x.shape, chunks=tuple(shape), dtype=x.dtype, fill_value=0
                    )
                    array[:] = x
                    source = ZarrSource(array)
                    start = time.perf_counter()
                    result = cross(
                        source,
                        rank=rank,
                        tol=1e-4,
                        max_evals=int(entries * x.size),
                        chunk_fraction=fraction,
                        generator=torch.Generator().manual_seed(seed),
                    )
                    seconds = time.perf_counter() - start
                    found = to_dense(result.network).double()
                    rows.append(
                        {
                            "grid": name,
                            "method": method,
                            "rank": rank,
                            "chunks": tuple(shape),
                            "seed": seed,
                            "psnr": psnr(found),
                            "svd_psnr": best,
                            "foreground_psnr": psnr(found, foreground),
                            "error": float((found - exact).norm() / exact.norm()),
                            "held_out_error": result.error,
                            "entries_percent": 100 * result.evaluations / x.size,
                            "chunks_percent": 100 * source.chunks_read / array.nchunks,
                            "stored_percent": 100 * array.nchunks_initialized / array.nchunks,
                            "bytes_percent": 100 * result.bytes_read / x.nbytes,
                            "seconds": seconds,
                            "reason": result.reason,
                        }
                    )
    return rows


def mni(
    path: str | Path, chunks: Sequence[int] = (8, 16, 32), seeds: Sequence[int] = (0,), rank: int = 16
) -> list[dict[str, Any]]:
    """The MNI152 T1 volume, 197 x 233 x 189 of uint8, in cubic chunks."""
    volume = np.load(path)["vol"]
    return measure("mni152", volume, rank, [(c, c, c) for c in chunks], seeds=seeds)


def climate(path: str | Path, rank: int = 6, seeds: Sequence[int] = (0,)) -> list[dict[str, Any]]:
    """Yearly air temperature of scenario A1B, 240 x 37 x 49 of float32."""
    with np.load(path) as file:
        name = next(key for key in file if file[key].ndim == 3)
        grid = np.ascontiguousarray(file[name])
    return measure("climate", grid, rank, [(16, 4, 4), (16, 8, 8)], entries=0.1, fraction=0.35, seeds=seeds)


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    seeds = range(args.seeds)
    rows = mni(args.data / "volume-mni152-t1" / "mni152_t1_1mm.npz", seeds=seeds)
    rows += climate(args.data / "climate-air-temperature" / "north_america_1860_2099.npz", seeds=seeds)
    for row in rows:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
