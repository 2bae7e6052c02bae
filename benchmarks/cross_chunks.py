"""Tucker rank 32 of a noisy grid in chunks: seconds, peak memory, and the reading and the products it is held against.

    python benchmarks/cross_chunks.py --size 256 --folder FOLDER

The grid is float32, low multilinear rank plus noise, rounded to 12 bits of mantissa so that a fast codec has something
to do, written chunk by chunk. Every figure comes from a process of its own; memory is the peak above the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHUNK, RANK, NOISE = 64, 32, 0.05
CODEC = "blosc lz4, level 1, shuffled"
WORKS = ("read", "gemm", "gram", "sketch", "sketch2", "tt_gram", "tt_sketch")


def factors(size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Core and factors of the low-rank part, of root mean square one."""
    rng = np.random.default_rng(0)
    core = rng.standard_normal((RANK,) * 3) * (1.0 / np.arange(1, RANK + 1))[:, None, None]
    bases = [np.linalg.qr(rng.standard_normal((size, RANK)))[0] for _ in range(3)]
    return (core * size**1.5 / np.linalg.norm(core)).astype("f4"), [u.astype("f4") for u in bases]


def write(path: Path, size: int) -> None:
    """The grid, one chunk in memory at a time."""
    import zarr

    core, (a, b, c) = factors(size)
    codec = zarr.codecs.BloscCodec(cname="lz4", clevel=1, shuffle="shuffle")
    chunk = (min(CHUNK, size),) * 3
    array = zarr.create_array(str(path), shape=(size,) * 3, chunks=chunk, dtype="f4", compressors=codec)
    rng = np.random.default_rng(1)
    for i in range(0, size, CHUNK):
        first = np.tensordot(a[i : i + CHUNK], core, 1)
        for j in range(0, size, CHUNK):
            second = np.einsum("jb,ibc->ijc", b[j : j + CHUNK], first, optimize=True)
            for k in range(0, size, CHUNK):
                x = second @ c[k : k + CHUNK].T
                x += NOISE * rng.standard_normal(x.shape, dtype="f4")
                array[i : i + CHUNK, j : j + CHUNK, k : k + CHUNK] = (x.view("u4") & np.uint32(0xFFFFF800)).view("f4")


def gemm_seconds(size: int) -> float:
    """The products of `tucker_gram` alone on data in memory: the Gram matrix of rows of chunks, and the projection."""
    from cross_approx.streaming.frames import Star
    from decompositions.linalg import gram

    row = torch.randn(size, min(CHUNK, size), min(CHUNK, size))
    u = torch.linalg.qr(torch.randn(size, RANK, dtype=torch.float64)).Q
    frame = Star((size,) * 3, [RANK] * 3)
    frame.add(0, u)
    box = (slice(0, size), slice(0, row.shape[1]), slice(0, row.shape[2]))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        gram(row.reshape(1, size, -1), single=True)
        frame.project(row.double(), box)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[3] * (size / CHUNK) ** 2 if size > CHUNK else sorted(times[1:])[3]


def one(work: str, path: Path, size: int) -> dict[str, Any]:
    """One figure, in this process."""
    import zarr

    import cross_approx
    from cross_approx import as_source, tt_gram, tt_sketch, tucker_gram, tucker_sketch

    assert cross_approx
    torch.manual_seed(0)
    torch.randn(64, 64) @ torch.randn(64, 64)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load, start, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    row: dict[str, Any] = {"work": work, "size": size, "load": round(load, 1)}
    if work == "read":
        array = zarr.open_array(str(path), mode="r")
        total = 0.0
        for i in range(0, size, CHUNK):
            for j in range(0, size, CHUNK):
                for k in range(0, size, CHUNK):
                    total += float(array[i : i + CHUNK, j : j + CHUNK, k : k + CHUNK][0, 0, 0])
    elif work == "gemm":
        row["seconds"] = gemm_seconds(size)
    else:
        source = as_source(path, cache_bytes=0)
        generator = torch.Generator().manual_seed(0)
        result = {
            "gram": lambda: tucker_gram(source, rank=RANK),
            "sketch": lambda: tucker_sketch(source, RANK, passes=1, generator=generator),
            "sketch2": lambda: tucker_sketch(source, RANK, passes=2, generator=generator),
            "tt_gram": lambda: tt_gram(source, rank=RANK),
            "tt_sketch": lambda: tt_sketch(source, RANK, passes=1, generator=generator),
        }[work]()
        row |= {
            "error": result.error,
            "ranks": result.network.ranks,
            "passes": len(result.history),
            "bytes_read": result.bytes_read,
            "reason": result.reason,
        }
    row.setdefault("seconds", time.perf_counter() - start)
    row["cpu_seconds"] = time.process_time() - cpu
    row["peak_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    return row


def rows(
    size: int = 256, *, threads: int = 2, works: tuple[str, ...] = WORKS, folder: str | None = None
) -> list[dict[str, Any]]:
    """Write the grid, measure every work in a child process, remove the grid.

    A row: work, seconds, cpu_seconds, peak_mb, and for decompositions error, passes, bytes_read, and `ratio`: of a
    sketch to one plain reading through zarr, of a Gram decomposition to its products on data in memory.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        write(place / "x.zarr", size)
        stored = sum(file.stat().st_size for file in (place / "x.zarr").rglob("*") if file.is_file())
        found = []
        for work in works:
            command = [sys.executable, __file__, "--one", work, "--path", str(place / "x.zarr"), "--size", str(size)]
            # a team that spins while it waits would take the core from the thread that reads
            environment = {
                **os.environ,
                "OMP_WAIT_POLICY": "PASSIVE",
                "OMP_NUM_THREADS": str(threads),
                "MKL_NUM_THREADS": str(threads),
            }
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(place)
    seconds = {row["work"]: row["seconds"] for row in found}
    for row in found:
        against = "read" if "sketch" in row["work"] else "gemm" if row["work"] == "gram" else None
        if against in seconds:
            row["ratio"] = row["seconds"] / seconds[against]
        row |= {"threads": threads, "codec": CODEC, "chunk": CHUNK, "grid_mb": 4 * size**3 / 2**20}
        row["stored_mb"] = stored / 2**20
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder")
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=WORKS)
    parser.add_argument("--one", choices=WORKS)
    parser.add_argument("--path", type=Path)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.path, given.size)))
    else:
        for line in rows(given.size, threads=given.threads, works=tuple(given.works), folder=given.folder):
            print(json.dumps(line))
