"""Sources of the grid commands: paths of arrays, and how their entries are stored."""

import importlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cross_approx import Source, as_source

HDF5 = (".h5", ".hdf5", ".he5", ".hdf")
NETCDF = (".nc", ".nc4", ".netcdf")


def open_grid_source(who: str, path: str | Path, *, name: str | None = None, **options: Any) -> Source:
    """The source at a path: .npy, .npz, .safetensors, zarr (array or group), HDF5, NetCDF, a folder of slices.

    An .npz is compressed as a whole, so its array is read into memory; the others are read where entries are asked for.

    Args:
        who: command, for messages.
        path: of the file or folder.
        name: of the array in a file that holds several.
        **options: of `as_source`: scale, offset, fill_value, missing, cache_bytes.

    Raises:
        FileNotFoundError: no such path.
        ValueError: a name that is missing or not there, entries that are not real numbers, an empty grid.
        ImportError: a package that is missing.

    Example:
        >>> open_grid_source("grid compress", "no/such/file.npy")
        Traceback (most recent call last):
        FileNotFoundError: grid compress: expected the path of an array, got no/such/file.npy, which does not exist
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{who}: expected the path of an array, got {path}, which does not exist")
    suffix = place.suffix.lower()
    given: Any = path
    if suffix == ".npz":
        given, name = _from_npz(who, place, name), None
    elif suffix in HDF5 and place.is_file():
        given, name = _from_hdf5(who, place, name), None
    elif suffix in NETCDF and place.is_file():
        given, name = _from_netcdf(who, place, name), None
    elif name is not None and place.is_dir():
        given, name = place / name, None
        if not given.exists():
            found = sorted(p.name for p in place.iterdir() if p.is_dir())
            raise ValueError(f"{who}: --name must be an array in {path}, expected one of {found[:8]}, got {given.name}")
    try:
        source = as_source(given, name=name, **options)
        if source.dtype in (torch.float16, torch.bfloat16):  # cores, norms and sums do not fit half precision
            source = as_source(given, name=name, dtype=torch.float32, **options)
    except TypeError as error:
        raise ValueError(f"{who}: {path} must hold real numbers: {error}") from None
    if source.dtype.is_complex:
        raise ValueError(f"{who}: {path} must hold real numbers, got {source.dtype}; store the two parts apart")
    if not source.shape or 0 in source.shape:
        raise ValueError(
            f"{who}: expected a grid with entries and at least one axis, got shape {source.shape} in {path}"
        )
    return source


def stored_dtype(source: Source) -> str:
    """The dtype of the entries in the store, by name: what ratios are counted against.

    Example:
        >>> import numpy as np
        >>> stored_dtype(as_source(np.zeros((2, 2), dtype="u1")))
        'uint8'
    """
    for holder, attribute in ((source, "_stored"), (getattr(source, "_x", None), "dtype")):
        kind = getattr(holder, attribute, None)
        if kind is not None:
            return str(kind).removeprefix("torch.").lstrip("<>=|")
    return str(source.dtype).removeprefix("torch.")


def stored_bytes(source: Source) -> int:
    """Bytes of all entries as they are stored, before any compression of the store."""
    kind = stored_dtype(source)
    found = getattr(torch, kind, None)
    size = found.itemsize if isinstance(found, torch.dtype) else np.dtype(kind).itemsize
    return prod(source.shape) * size


def parse_slices(
    who: str, text: str | None, shape: Sequence[int], stride: str | None = None
) -> tuple[list[slice], tuple[int, ...]]:
    """A box in numpy's notation, `10:20,:,5`, with `...` and negative numbers; and a stride on top of it.

    Returns:
        A slice an axis, 0 <= start <= stop, step >= 1; and the axes that one index was given for, which are dropped.

    Raises:
        ValueError: something else, an index out of range, more parts than axes, a stride below 1.

    Example:
        >>> parse_slices("grid decode", "2:-1,...,-3", (10, 9, 8), "2,1,1")
        ([slice(2, 9, 2), slice(0, 9, 1), slice(5, 6, 1)], (2,))
    """
    parts = [part.strip() for part in (text or "...").strip().strip("[]").split(",")]
    if parts.count("...") > 1 or len(parts) - parts.count("...") > len(shape):
        raise ValueError(f"{who}: --slice takes one part an axis ({len(shape)}) and one '...', got {text!r}")
    if "..." not in parts:
        parts.append("...")
    at = parts.index("...")
    parts[at : at + 1] = [":"] * (len(shape) - len(parts) + 1)
    steps = _strides(who, stride, len(shape))
    found, dropped = [], []
    for axis, (part, n, step) in enumerate(zip(parts, shape, steps, strict=True)):
        try:
            numbers = [int(piece) if piece.strip() else None for piece in part.split(":")]
        except ValueError:
            raise ValueError(f"{who}: --slice must be like 10:20,:,5, got {part!r} in {text!r}") from None
        if len(numbers) == 1:
            index = numbers[0]
            if index is None or not -n <= index < n:
                raise ValueError(f"{who}: indices of axis {axis} must be in {-n}..{n - 1}, got {part!r} in {text!r}")
            found.append(slice(index % n, index % n + 1, 1))
            dropped.append(axis)
            continue
        own = numbers[2] if len(numbers) == 3 and numbers[2] is not None else 1
        if len(numbers) > 3 or own < 1:
            raise ValueError(f"{who}: --slice takes start:stop:step with step >= 1, got {part!r} in {text!r}")
        start, stop, _ = slice(numbers[0], numbers[1]).indices(n)
        found.append(slice(start, max(start, stop), own * step))
    return found, tuple(dropped)


def _strides(who: str, stride: str | None, order: int) -> list[int]:
    if stride is None:
        return [1] * order
    try:
        steps = [int(part) for part in stride.split(",")]
    except ValueError:
        raise ValueError(f"{who}: --stride must be a number or one an axis, got {stride!r}") from None
    steps = steps * order if len(steps) == 1 else steps
    if len(steps) != order or min(steps) < 1:
        raise ValueError(f"{who}: --stride must be a number >= 1 or one an axis ({order}), got {stride!r}")
    return steps


def _named(who: str, path: Path, name: str | None, names: Sequence[str]) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name not in names:
        listed = ", ".join(names[:12]) or "none"
        raise ValueError(f"{who}: --name must be an array of {path}, expected one of {listed}, got {name}")
    return name


def _from_npz(who: str, path: Path, name: str | None) -> np.ndarray:
    import zipfile

    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            array: np.ndarray = file[_named(who, path, name, list(file.files))]
    except (zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ValueError(f"{who}: {path} is not a readable .npz ({error}); it may be cut short") from None
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise ValueError(f"{who}: {path} must hold real numbers, got Python objects, which are not opened") from None
    return array


def _from_hdf5(who: str, path: Path, name: str | None) -> Any:
    h5py = needed(who, "h5py")
    file = h5py.File(path, "r")
    names: list[str] = []
    file.visititems(lambda key, item: names.append(key) if isinstance(item, h5py.Dataset) else None)
    return file[_named(who, path, name, names)]


def _from_netcdf(who: str, path: Path, name: str | None) -> Any:
    data = needed(who, "xarray").open_dataset(path, mask_and_scale=False, decode_times=False, chunks=None)
    return data[_named(who, path, name, [str(key) for key in data.data_vars])]


def needed(who: str, name: str) -> Any:
    """A package of the extra `grids`, imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{who}: {name} is needed for this; pip install 'tnlayers[grids]'") from error
