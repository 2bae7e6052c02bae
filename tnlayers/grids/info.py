"""`tnlayers grid info`, `grid decode`, `grid compare`: what a folder holds, parts of it as arrays, errors."""

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decompositions.formats.algebra import numel
from decompositions.progress import Progress
from tnlayers.files import atomic_target
from tnlayers.grids.blocks import boxes
from tnlayers.grids.measures import Measures, compare_grid
from tnlayers.grids.opening import needed, open_grid_source, parse_slices
from tnlayers.grids.store import Grid, load_grid
from tnlayers.page import by, percent

DTYPES = ("float32", "float64", "float16", "uint8", "int8", "uint16", "int16", "int32")


def info(folder: str | Path) -> dict[str, Any]:
    """What a folder holds and how it was made, as JSON has it.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a damaged one.

    Example:
        >>> info("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: grid: expected a folder written by tnlayers grid compress, got no/such/folder (missing)
    """
    grid = load_grid(folder)
    return {"folder": str(folder), **facts(grid), **{k: v for k, v in grid.about.items() if k != "grid"}}


def facts(grid: Grid) -> dict[str, Any]:
    """What the numbers themselves say."""
    return {
        "shape": list(grid.shape), "format": "QTT" if grid.quantization else type(grid.network).__name__,
        "ranks": list(grid.network.ranks), "coding": grid.coding, "parameters": numel(grid.network),
        "bytes": grid.nbytes, "bits_per_entry": 8 * grid.nbytes / prod(grid.shape),
    }  # fmt: skip


def describe(grid: Grid, about: dict[str, Any]) -> str:
    """The same for people."""
    own = facts(grid)
    ranks = own["ranks"] if len(own["ranks"]) <= 12 else f"{own['ranks'][:12]} ... largest {max(own['ranks'])}"
    lines = [
        ("grid", f"{by(grid.shape)}, {prod(grid.shape)} entries"),
        (
            "network",
            f"{own['format']}, ranks {str(ranks).strip('[]()')}, {own['parameters']} numbers, coding {own['coding']}",
        ),
        ("file", f"{own['bytes']} bytes, {own['bits_per_entry']:.4g} bits an entry, coding {own['coding']}"),
    ]
    source, target = about.get("source"), about.get("target")
    if source:
        ratio = source["bytes"] / own["bytes"]
        lines.append(
            ("source", f"{source['path']}, {source['dtype']}, {source['bytes']} bytes: {ratio:.1f} times the file")
        )
    if target:
        lines.append(("target", f"{target['kind']} {target['value']:g}, {'met' if target.get('met') else 'MISSED'}"))
    if about.get("measured"):
        lines.append(("measured", _measured(about["measured"])))
    if about.get("method"):
        read = about.get("read", {})
        asked = read.get("evaluations", 0)
        parts = [f"{asked} entries asked for ({percent(asked, prod(grid.shape))} of the grid)"]
        if read.get("chunks_read"):
            parts.append(f"{read['chunks_read']} chunks")
        parts.append(f"{read.get('bytes_read', 0)} bytes read")
        lines.append(("made", f"method {about['method']}: {', '.join(parts)}; {about.get('reason', '')}"))
    return "\n".join(f"{name:<9} {text}" for name, text in lines)


def _measured(found: dict[str, Any]) -> str:
    known = {**found}
    for key in ("psnr", "relative_error", "max_error"):
        known[key] = float("inf") if known.get(key) is None else known[key]
    if found.get("psnr") is None and known["max_error"] > 0:
        known["psnr"] = -known["psnr"]  # JSON has neither infinity: this one is that of a range of 0
    return Measures(**known).text()


@dataclass(frozen=True)
class DecodeConfig:
    """What `tnlayers grid decode` is told.

    Args:
        folder: of the grid.
        out: .npy file or .zarr folder to write.
        slice: numpy's notation, `10:20,:,5`; None for all.
        stride: a number or one an axis, on top of the slices.
        dtype: of the array; integers are rounded and clipped.
        max_bytes: of decoded values held at once.
        overwrite: replace what is there.

    Raises:
        ValueError: an output of another kind, or one that is there.

    Example:
        >>> DecodeConfig("small", Path("part.npy"), slice=":,:,5").dtype
        'float32'
    """

    folder: str | Path
    out: Path
    slice: str | None = None
    stride: str | None = None
    dtype: str = "float32"
    max_bytes: int = 1 << 26
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.out.suffix not in (".npy", ".zarr"):
            raise ValueError(f"grid decode: --out must end in .npy or .zarr, got {self.out}")
        if self.dtype not in DTYPES:
            raise ValueError(f"grid decode: --dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.max_bytes >= 8:
            raise ValueError(f"grid decode: --max-bytes must hold a number (8), got {self.max_bytes}")
        if self.out.exists():
            if not self.overwrite:
                raise ValueError(f"grid decode: {self.out} exists; give another --out, or --overwrite")
            if self.out.suffix == ".zarr" and not any((self.out / mark).is_file() for mark in ("zarr.json", ".zarray")):
                raise ValueError(
                    f"grid decode: {self.out} holds no zarr array and is not overwritten; give another --out"
                )
        if not self.out.resolve().parent.is_dir():
            raise FileNotFoundError(f"grid decode: the folder must exist, got {self.out}; create it with mkdir")


def decode(config: DecodeConfig, progress: Progress | None = None) -> tuple[Path, tuple[int, ...]]:
    """Decode a box of a grid to a file, block by block; nothing outside it is decoded.

    Written under a temporary name, synced, renamed. Memory: `max_bytes` of values (in double precision) besides the
    network and what a block's contraction takes.

    Returns:
        The file, and the shape of its array.

    Raises:
        ValueError: slices that do not fit the grid.
        FileNotFoundError: no such grid.
        ImportError: zarr is missing.
    """
    grid = load_grid(config.folder)
    slices, dropped = parse_slices("grid decode", config.slice, grid.shape, config.stride)
    ranges = [range(s.start, s.stop, s.step) for s in slices]
    kept = [axis for axis in range(len(ranges)) if axis not in dropped]
    shape = tuple(len(ranges[axis]) for axis in kept)
    every = list(boxes([len(r) for r in ranges], max(1, config.max_bytes // 8)))
    write = _to_zarr if config.out.suffix == ".zarr" else _to_npy

    def fill(array: Any) -> None:
        for number, box in enumerate(every):
            if any(part.stop <= part.start for part in box):
                continue
            cut = tuple(slice(r[p.start], r[p.stop - 1] + 1, r.step) for r, p in zip(ranges, box, strict=True))
            values = _cast(grid.block(cut), config.dtype)
            array[tuple(box[axis] for axis in kept)] = values.reshape(
                [box[axis].stop - box[axis].start for axis in kept]
            )
            if progress is not None:
                progress(number + 1, len(every), "decode")

    write(config, shape, fill)
    return config.out, shape


def _cast(values: Tensor, dtype: str) -> np.ndarray:
    kind = np.dtype(dtype)
    array = values.numpy()
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        array = np.clip(np.rint(array), limits.min, limits.max)
    return array.astype(kind)


def _to_npy(config: DecodeConfig, shape: tuple[int, ...], fill: Callable[[Any], None]) -> None:
    with atomic_target(config.out) as temporary:
        if 0 in shape or not shape:
            array = np.zeros(shape, config.dtype)
            fill(array)
            with temporary.open("wb") as file:
                np.save(file, array)
            return
        mapped = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype(config.dtype), shape=shape)
        fill(mapped)
        mapped.flush()


def _to_zarr(config: DecodeConfig, shape: tuple[int, ...], fill: Callable[[Any], None]) -> None:
    zarr = needed("grid decode", "zarr")
    temporary = config.out.with_name(f".{config.out.name[:40]}.{secrets.token_hex(6)}.tmp")
    try:
        array = zarr.create_array(
            str(temporary), shape=shape, chunks=tuple(min(64, max(1, n)) for n in shape), dtype=config.dtype
        )
        fill(array)
        if config.out.exists():
            shutil.rmtree(config.out)
        temporary.rename(config.out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass(frozen=True)
class CompareConfig:
    """What `tnlayers grid compare` is told.

    Args:
        folder: of the grid.
        source: path of the original; None: the one it was made from.
        name: of the array in a file that holds several.
        fill_value: stored number that means missing.
        missing: value of missing entries.
        background: value that is not foreground.
        entries: compared, drawn uniformly; None for all.
        seed: of the draw.

    Raises:
        ValueError: a number of entries below 1.

    Example:
        >>> CompareConfig("small", "volume.npy").background
        0.0
    """

    folder: str | Path
    source: str | None = None
    name: str | None = None
    fill_value: float | None = None
    missing: float | None = None
    background: float = 0.0
    entries: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.entries is not None and self.entries < 1:
            raise ValueError(f"grid compare: --entries must be at least 1, got {self.entries}")


def compare(config: CompareConfig, progress: Progress | None = None) -> Measures:
    """Errors of a grid against its original, block by block.

    Raises:
        ValueError: another shape, or no source known.
        FileNotFoundError: no such grid or source.
    """
    grid = load_grid(config.folder)
    made_from = grid.about.get("source", {})
    path, name = config.source, config.name
    if path is None:
        path, name = made_from.get("path"), name or made_from.get("name")
        if path is None:
            raise ValueError(f"grid compare: {config.folder} does not say what it was made from; give the source")
    settings = grid.about.get("settings", {})
    fill = config.fill_value if config.fill_value is not None else settings.get("fill_value")
    missing = config.missing if config.missing is not None else settings.get("missing")
    source = open_grid_source("grid compare", path, name=name, fill_value=fill, missing=missing)
    return compare_grid(
        source, grid, background=config.background, entries=config.entries,
        generator=torch.Generator().manual_seed(config.seed), progress=progress,
    )  # fmt: skip
