"""Stores larger than memory, read chunk by chunk: zarr, dask, xarray, HDF5, folders of slices, safetensors.

Their packages are imported where they are needed; `pip install tnlayers[grids]` brings them.
"""

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cross_approx.sources.chunked import ChunkedSource, Key, regular, row_chunks
from cross_approx.sources.packing import torch_dtype
from cross_approx.sources.source import CHUNK_BYTES, Source

SAFETENSORS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class ZarrSource(ChunkedSource):
    """Entries of a zarr array (formats 2 and 3), chunk by chunk.

    The CF attributes `scale_factor`, `add_offset`, `_FillValue`, `missing_value` are applied. zarr's own fill value
    stands for chunks never written and is a value like others, except in arrays of format 2 that xarray wrote
    (they carry `_ARRAY_DIMENSIONS`), where it means missing.

    Args:
        array: a `zarr.Array`, or the path of one.
        cf: whether attributes are looked at.
        **options: of `ChunkedSource`: dtype, device, scale, offset, fill_value, missing, mask, cache_bytes, retries,
            backoff.

    Raises:
        ImportError: zarr is missing and a path was given.
        TypeError: no array of numbers.

    Example:
        >>> import torch
        >>> import zarr  # doctest: +SKIP
        >>> array = zarr.create_array({}, shape=(8, 8), chunks=(4, 4), dtype="f4")  # doctest: +SKIP
        >>> array[:] = 1  # doctest: +SKIP
        >>> source = ZarrSource(array)  # doctest: +SKIP
        >>> source.fibers(torch.tensor([[3, 0]]), axis=1).sum(), source.chunks_read  # doctest: +SKIP
        (tensor(8.), 2)
    """

    _joint = True

    def __init__(self, array: Any, *, cf: bool = True, **options: Any) -> None:
        if isinstance(array, str | os.PathLike):
            array = _package("zarr").open_array(os.fspath(array), mode="r")
        _numbers_in(array, "zarr array")
        attributes = dict(array.attrs) if cf else {}
        if "_ARRAY_DIMENSIONS" in attributes and getattr(array, "fill_value", None) is not None:
            attributes.setdefault("_FillValue", array.fill_value)
        grid = regular(array.shape, [max(1, size) for size in array.chunks])
        super().__init__(array.shape, torch_dtype("as_source", array.dtype), grid, attributes=attributes, **options)
        self._array = array

    def _read(self, key: Key, region: tuple[slice, ...]) -> Any:
        return self._array[region]


class DaskSource(ChunkedSource):
    """Entries of a dask array, block by block, each computed alone by the synchronous scheduler.

    Args:
        array: a `dask.array.Array` whose block sizes are known.
        **options: of `ChunkedSource`.

    Raises:
        ValueError: unknown block sizes.
        TypeError: no array of numbers, or blocks that are masked arrays.

    Example:
        >>> import torch
        >>> import dask.array as dask  # doctest: +SKIP
        >>> source = DaskSource(dask.ones((8, 6), chunks=((3, 5), 6)))  # doctest: +SKIP
        >>> source.entries(torch.tensor([[0, 0], [2, 5]])), source.chunks_read  # doctest: +SKIP
        (tensor([1., 1.], dtype=torch.float64), 1)
    """

    def __init__(self, array: Any, **options: Any) -> None:
        _numbers_in(array, "dask array")
        if any(size != size for sizes in array.chunks for size in sizes):
            raise ValueError("as_source: dask blocks must have known sizes, got nan; call compute_chunk_sizes()")
        if isinstance(getattr(array, "_meta", None), np.ma.MaskedArray):
            raise TypeError("as_source: expected plain dask blocks, got masked arrays; fill them and pass mask=")
        # blocks of size zero hold nothing, and a chunk number must mean a chunk
        self._blocks = [[c for c, size in enumerate(sizes) if size] for sizes in array.chunks]
        grid = [tuple(size for size in sizes if size) for sizes in array.chunks]
        super().__init__(array.shape, torch_dtype("as_source", array.dtype), grid, **options)
        self._array = array

    def _read(self, key: Key, region: tuple[slice, ...]) -> Any:
        block = self._array
        if key:
            block = block.blocks[tuple(axis[c] for axis, c in zip(self._blocks, key, strict=True))]
        return block.compute(scheduler="synchronous")


class XarraySource(ChunkedSource):
    """Entries of an xarray DataArray, read by positions, in the chunks that its file or its dask array has.

    NaN means missing in floating data, and the CF attributes that xarray left in place are applied.

    Args:
        array: the DataArray; opened lazily, only the chunks asked for are read.
        cf: whether attributes are looked at.
        chunk_bytes: size of the pieces where the file has no chunks.
        **options: of `ChunkedSource`.

    Raises:
        TypeError: no array of numbers (dates, strings).

    Example:
        >>> import torch
        >>> import xarray  # doctest: +SKIP
        >>> source = XarraySource(xarray.DataArray([[1.0, 2.0]]))  # doctest: +SKIP
        >>> source.entries(torch.tensor([[0, 1]]))  # doctest: +SKIP
        tensor([2.], dtype=torch.float64)
    """

    def __init__(self, array: Any, *, cf: bool = True, chunk_bytes: int = CHUNK_BYTES, **options: Any) -> None:
        _numbers_in(array, "xarray DataArray")
        shape, stored = array.shape, torch_dtype("as_source", array.dtype)
        preferred = array.encoding.get("preferred_chunks") or {}
        if array.chunks is not None:
            grid: Sequence[Sequence[int]] = [[size for size in sizes if size] for sizes in array.chunks]
        elif all(isinstance(preferred.get(dim), int) and preferred[dim] > 0 for dim in array.dims) and array.dims:
            grid = regular(shape, [preferred[dim] for dim in array.dims])
        else:
            grid = row_chunks(shape, stored.itemsize, chunk_bytes)
        attributes = dict(array.attrs) if cf else {}
        if stored.is_floating_point:
            attributes.setdefault("missing_value", float("nan"))
        super().__init__(shape, stored, grid, attributes=attributes, **options)
        self._array = array

    def _read(self, key: Key, region: tuple[slice, ...]) -> Any:
        part = self._array[region]
        return part.compute(scheduler="synchronous").values if part.chunks is not None else part.values


class Hdf5Source(ChunkedSource):
    """Entries of an HDF5 dataset (h5py), chunk by chunk; a contiguous dataset in pieces of rows.

    Args:
        dataset: an open `h5py.Dataset`.
        cf: whether the attributes `scale_factor`, `add_offset`, `_FillValue`, `missing_value` are applied.
        chunk_bytes: size of the pieces of a contiguous dataset.
        **options: of `ChunkedSource`.

    Raises:
        TypeError: no dataset of numbers.

    Example:
        >>> import torch
        >>> import h5py  # doctest: +SKIP
        >>> file = h5py.File("x.h5", "w", driver="core", backing_store=False)  # doctest: +SKIP
        >>> source = Hdf5Source(file.create_dataset("x", data=[[1.0, 2.0]]))  # doctest: +SKIP
        >>> source.entries(torch.tensor([[0, 1]]))  # doctest: +SKIP
        tensor([2.], dtype=torch.float64)
    """

    def __init__(self, dataset: Any, *, cf: bool = True, chunk_bytes: int = CHUNK_BYTES, **options: Any) -> None:
        _numbers_in(dataset, "HDF5 dataset")
        stored = torch_dtype("as_source", dataset.dtype)
        if dataset.chunks is None:
            grid = row_chunks(dataset.shape, stored.itemsize, chunk_bytes)
        else:
            grid = regular(dataset.shape, dataset.chunks)
        super().__init__(dataset.shape, stored, grid, attributes=dict(dataset.attrs) if cf else {}, **options)
        self._dataset = dataset

    def _read(self, key: Key, region: tuple[slice, ...]) -> Any:
        return self._dataset[region]


class FolderSource(ChunkedSource):
    """A folder of slices, one array a file (.npy, or .pt that holds a tensor), stacked along a new first axis.

    The files are taken in natural order (slice_2 before slice_10) and mapped, so a large slice is read in pieces; all
    must have the shape and dtype of the first, which is checked when they are read. Other files are left alone.

    Args:
        folder: the path.
        chunk_bytes: size of the pieces.
        **options: of `ChunkedSource`.

    Raises:
        ValueError: no slices, or both kinds.

    Example:
        >>> import tempfile, numpy as np, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> for k in range(3):
        ...     np.save(folder / f"slice_{k}.npy", np.full((2, 2), k))
        >>> source = FolderSource(folder)
        >>> source.shape, source.entries(torch.tensor([[2, 0, 1]])).tolist(), source.bytes_read
        ((3, 2, 2), [2.0], 32)
    """

    def __init__(self, folder: str | os.PathLike[str], *, chunk_bytes: int = CHUNK_BYTES, **options: Any) -> None:
        files = [path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith(".")]
        self._files = sorted((path for path in files if path.suffix in (".npy", ".pt")), key=_natural)
        kinds = sorted({path.suffix for path in self._files})
        if len(kinds) != 1:
            found = " and ".join(kinds) or "neither"
            raise ValueError(f"as_source: expected a folder of .npy or of .pt slices, got {found} in {folder}")
        first = _open_slice(self._files[0])
        dtype = first.dtype
        self._bits = isinstance(dtype, torch.dtype)
        stored = dtype if isinstance(dtype, torch.dtype) else torch_dtype("as_source", dtype)
        self._held = _held(stored) if self._bits else None
        grid = [(1,) * len(self._files), *row_chunks(first.shape, stored.itemsize, chunk_bytes)]
        super().__init__((len(self._files), *first.shape), stored, grid, **options)

    def _read(self, key: Key, region: tuple[slice, ...]) -> Any:
        path = self._files[key[0]]
        opened = _open_slice(path)
        if tuple(opened.shape) != self.shape[1:]:
            raise ValueError(f"expected slices of shape {self.shape[1:]}, got {tuple(opened.shape)} in {path.name}")
        part = opened[region[1:]][None]
        if not isinstance(part, torch.Tensor):
            return np.asarray(part)
        if part.dtype != self._stored:
            raise ValueError(f"expected slices of {self._stored}, got {part.dtype} in {path.name}")
        return _bits(part)

    def _tensor(self, values: Any) -> torch.Tensor:
        tensor = super()._tensor(values)
        return tensor.view(self._stored) if self._bits else tensor


class SafetensorsSource(ChunkedSource):
    """Entries of one tensor in a safetensors file, read in pieces of rows; the weight is never loaded whole.

    Args:
        tensor: path of the file, or what `safe_open(...).get_slice(name)` returned (of order 1 or more).
        name: of the tensor, with a path; it may be left out where the file holds one.
        chunk_bytes: size of the pieces.
        **options: of `ChunkedSource`.

    Raises:
        ValueError: no such tensor, a file that is damaged, a dtype that torch lacks.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"emb": torch.arange(12.0).reshape(4, 3)}, path)
        >>> source = SafetensorsSource(path, "emb", chunk_bytes=12)
        >>> source.entries(torch.tensor([[3, 0], [3, 2]])), source.bytes_read
        (tensor([ 9., 11.]), 12)
    """

    def __init__(self, tensor: Any, name: str | None = None, *, chunk_bytes: int = CHUNK_BYTES, **options: Any) -> None:
        if isinstance(tensor, str | os.PathLike):
            tensor = _open_tensor(tensor, name)
        kind = tensor.get_dtype()
        if kind not in SAFETENSORS:
            raise ValueError(
                f"as_source: expected one of {', '.join(SAFETENSORS)}, got {kind}; save it in another dtype"
            )
        stored = SAFETENSORS[kind]
        self._held = _held(stored)
        shape = tuple(tensor.get_shape())
        super().__init__(shape, stored, row_chunks(shape, stored.itemsize, chunk_bytes), **options)
        self._slice = tensor

    def _read(self, key: Key, region: tuple[slice, ...]) -> Any:
        return _bits(torch.as_tensor(self._slice[region if region else ...]))

    def _tensor(self, values: Any) -> torch.Tensor:
        return super()._tensor(values).view(self._stored)


def open_store(x: Any, *, name: str | None = None, cf: bool, chunk_bytes: int, **options: Any) -> Source:
    """The source of a store or a path, by its kind; `as_source` comes here for what is not in memory.

    Raises:
        TypeError: a kind that is not known.
        ValueError: a path that is none of the known ones, or a name where there is one tensor.

    Example:
        >>> open_store({}, cf=True, chunk_bytes=1)
        Traceback (most recent call last):
        TypeError: as_source: expected a tensor, an array, a function with shape=, ... or a path, got dict; ...
    """
    if isinstance(x, str | os.PathLike):
        path = Path(x)
        if path.suffix == ".safetensors" and path.is_file():
            return SafetensorsSource(path, name, chunk_bytes=chunk_bytes, **options)
        if name is not None:
            raise ValueError(f"as_source: name is for .safetensors files, got {path}; leave it out")
        if path.is_dir() and any((path / mark).exists() for mark in ("zarr.json", ".zarray")):
            return ZarrSource(path, cf=cf, **options)
        if path.is_dir():
            return FolderSource(path, chunk_bytes=chunk_bytes, **options)
        raise ValueError(
            "as_source: a path must be a zarr array, a folder of slices, a .npy or a .safetensors file, "
            f"got {path} ({'another kind' if path.exists() else 'missing'}); open it and pass the array"
        )
    # by the names of their packages, so that none is imported for the question
    kind, what = type(x).__module__.split(".")[0], type(x).__name__
    if kind == "zarr" and what == "Array":
        return ZarrSource(x, cf=cf, **options)
    if kind == "dask" and what == "Array":
        return DaskSource(x, **options)
    if kind == "xarray" and what == "DataArray":
        return XarraySource(x, cf=cf, chunk_bytes=chunk_bytes, **options)
    if kind == "h5py" and what == "Dataset":
        return Hdf5Source(x, cf=cf, chunk_bytes=chunk_bytes, **options)
    if hasattr(x, "get_shape") and hasattr(x, "get_dtype"):
        return SafetensorsSource(x, chunk_bytes=chunk_bytes, **options)
    raise TypeError(
        "as_source: expected a tensor, an array, a function with shape=, an array of zarr, dask, xarray or h5py, "
        f"a safetensors slice or a path, got {what}; convert it"
    )


class _Whole:
    """A safetensors tensor of order 0, which its library does not slice."""

    def __init__(self, tensor: torch.Tensor, kind: str) -> None:
        self._tensor, self._kind = tensor, kind

    def get_shape(self) -> list[int]:
        return []

    def get_dtype(self) -> str:
        return self._kind

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._tensor


def _open_tensor(path: str | os.PathLike[str], name: str | None) -> Any:
    safetensors = _package("safetensors")
    try:
        file = safetensors.safe_open(path, framework="pt", device="cpu")
    except safetensors.SafetensorError as error:
        raise ValueError(f"as_source: expected a safetensors file, got {path} ({error}); fetch it again") from error
    names = list(file.keys())
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"as_source: name must be a tensor of {path}, expected one of {listed}, got {name!r}")
    opened = file.get_slice(name)
    return opened if opened.get_shape() else _Whole(file.get_tensor(name), opened.get_dtype())


def _open_slice(path: Path) -> Any:
    """A mapped array, or a mapped tensor."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"as_source: {path} must hold one tensor, got {type(tensor).__name__}; save the tensor alone")
    return tensor.detach()


def _held(stored: torch.dtype) -> torch.dtype:
    """Dtype under which numpy keeps the bits of a torch dtype."""
    exotic = stored is torch.bfloat16 or (stored.is_floating_point and stored.itemsize == 1)
    return {1: torch.uint8, 2: torch.int16}[stored.itemsize] if exotic else stored


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(_held(tensor.dtype)).numpy()


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key under which slice_2 comes before slice_10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(0, int(part), "") if k % 2 else (1, 0, part) for k, part in enumerate(parts)]


def _numbers_in(x: Any, what: str) -> None:
    if not isinstance(getattr(x, "dtype", None), np.dtype) or getattr(x, "shape", None) is None:
        raise TypeError(f"as_source: expected a {what}, got {type(x).__name__}; open the array itself")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"as_source: {name} is needed to read this; pip install 'tnlayers[grids]'") from error
