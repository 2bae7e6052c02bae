"""Stores on disk: each agrees with the array written to it, reads only what it needs, and names what is broken."""

import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cross_approx import (
    ChunkError,
    DaskSource,
    FolderSource,
    Hdf5Source,
    SafetensorsSource,
    XarraySource,
    ZarrSource,
    as_source,
)

INDEX = torch.tensor([[0, 0, 0], [4, 2, 5], [1, 2, 3], [4, 2, 5]])


@pytest.fixture
def x(rng):
    return torch.randn(5, 3, 6, generator=rng, dtype=torch.float64).numpy()


def check(source, x, missing=None):
    """The three kinds of request against the array."""
    truth = torch.from_numpy(np.asarray(x)).to(source.dtype)
    if missing is not None:
        truth = truth.nan_to_num(missing)
    assert source.shape == truth.shape
    assert torch.equal(source.entries(INDEX), truth[INDEX.unbind(1)])
    for axis in range(3):
        fibers = truth.movedim(axis, -1)
        rest = [INDEX[:, k] for k in range(3) if k != axis]
        assert torch.equal(source.fibers(INDEX, axis), fibers[tuple(rest)])
    assert torch.equal(source.slab((slice(1, 5, 3), slice(None), slice(2, 6))), truth[1:5:3, :, 2:6])


# --- folders ---


@pytest.mark.parametrize("chunk_bytes", [8, 100, 1 << 20])
def test_folder_of_npy(tmp_path, x, chunk_bytes):
    for k in range(5):
        np.save(tmp_path / f"slice_{k + 8}.npy", np.asfortranarray(x[k].astype(">f8")))  # natural order: 8, 9, 10, ...
    (tmp_path / "README.txt").write_text("not a slice")
    source = as_source(tmp_path, chunk_bytes=chunk_bytes)
    assert isinstance(source, FolderSource)
    check(source, x)
    source = FolderSource(tmp_path)
    source.entries(torch.tensor([[3, 0, 0], [3, 2, 2]]))
    assert (source.chunks_read, source.bytes_read) == (1, 3 * 6 * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.float8_e4m3fn, torch.bool])
def test_folder_of_pt(tmp_path, x, dtype):
    slices = torch.from_numpy(x).to(dtype)
    for k in range(5):
        torch.save(slices[k].clone(), tmp_path / f"{k}.pt")
    check(as_source(tmp_path, chunk_bytes=32), slices.to(torch.float64).numpy())


def test_a_slice_that_is_not_like_the_first_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    np.save(tmp_path / "b.npy", np.zeros((2, 3)))
    np.save(tmp_path / "c.npy", np.zeros((2, 2), "f4"))
    (tmp_path / "d.npy").write_bytes(b"torn")
    source = as_source(tmp_path, retries=1, backoff=0)
    assert source.entries(torch.tensor([[0, 1, 1]])).tolist() == [0.0]
    for k, message in ((1, r"\(2, 2\), got \(2, 3\) in b\.npy"), (2, "float64, got torch.float32"), (3, "2 attempts")):
        with pytest.raises(ChunkError, match=message) as caught:
            source.entries(torch.tensor([[k, 0, 0], [0, 0, 0]]))
        assert caught.value.key == (k, 0, 0)
        assert caught.value.read.tolist() == [False, True]


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder of \.npy or of \.pt slices, got neither"):
        as_source(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros(2))
    torch.save(torch.zeros(2), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"got \.npy and \.pt"):
        as_source(tmp_path)
    (tmp_path / "a.npy").unlink()
    torch.save({"w": torch.zeros(2)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="hold one tensor, got dict"):
        as_source(tmp_path)


def test_npy_files_are_mapped(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    source = as_source(str(tmp_path / "x.npy"))
    assert isinstance(source._x, np.memmap)
    check(source, x)


# --- safetensors ---


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.uint8, torch.bool]
)
def test_safetensors(tmp_path, x, dtype):
    tensor = (torch.from_numpy(x) * 3).to(dtype)
    save_file({"w": tensor, "other": torch.zeros(2)}, tmp_path / "m.safetensors")
    truth = tensor.to(torch.float64).numpy()
    check(as_source(tmp_path / "m.safetensors", name="w", chunk_bytes=40), truth)
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        check(as_source(file.get_slice("w")), truth)


def test_safetensors_read_only_the_rows_asked_for(tmp_path):
    save_file({"w": torch.arange(4000.0).reshape(100, 40)}, tmp_path / "m.safetensors")
    source = as_source(tmp_path / "m.safetensors", chunk_bytes=160)
    assert source.chunks == (1, 40)
    assert source.entries(torch.tensor([[99, 39], [99, 0], [7, 1]])).tolist() == [3999.0, 3960.0, 281.0]
    assert (source.chunks_read, source.bytes_read) == (2, 320)
    assert all(chunk.base is None for chunk in source._cache.chunks.values())  # not views of the mapped file


def test_safetensors_of_order_zero_and_size_zero(tmp_path):
    save_file({"s": torch.tensor(3.0), "e": torch.zeros(0, 4)}, tmp_path / "m.safetensors")
    scalar = SafetensorsSource(tmp_path / "m.safetensors", "s")
    assert scalar.entries(torch.zeros(2, 0).long()).tolist() == [3.0, 3.0]
    assert scalar.slab(()).item() == 3.0
    empty = SafetensorsSource(tmp_path / "m.safetensors", "e")
    assert empty.slab((slice(None), slice(None))).shape == (0, 4)
    with pytest.raises(ValueError, match=r"axis 0 must be in 0\.\.-1"):
        empty.entries(torch.zeros(1, 2).long())


def test_safetensors_that_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="expected one of a, b, got 'c'"):
        as_source(path, name="c")
    with pytest.raises(ValueError, match="expected one of a, b, got None"):
        as_source(path)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        as_source(path)
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(ValueError, match="another kind"):
        as_source(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="missing"):
        as_source(tmp_path / "nothing.npy")


def test_a_missing_package_says_which_extra(monkeypatch, tmp_path):
    (tmp_path / "zarr.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=r"zarr is needed to read this; pip install 'tnlayers\[grids\]'"):
        as_source(tmp_path)


# --- stores of other packages ---


@pytest.fixture
def zarr():
    return pytest.importorskip("zarr")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", ["f8", ">f4", "i2", "c8", "?"])
def test_zarr(zarr, tmp_path, x, version, dtype):
    stored = (x * 3).astype(dtype)
    options = {"chunks": (2, 2, 4)} if version == 2 else {"chunks": (2, 2, 2), "shards": (4, 2, 4)}
    array = zarr.create_array(tmp_path / "x", shape=x.shape, dtype=dtype, zarr_format=version, **options)
    array[:] = stored
    truth = stored.astype(stored.dtype.newbyteorder("="))
    for source in (as_source(array), as_source(tmp_path / "x", cache_bytes=0)):
        assert isinstance(source, ZarrSource)
        check(source, truth)
    source = as_source(array)
    source.entries(torch.tensor([[0, 0, 0], [1, 1, 1], [4, 2, 5]]))
    last = 1 * 1 * 2 * stored.itemsize  # the corner chunk, without what is beyond the edge
    assert (source.chunks_read, source.bytes_read) == (2, int(np.prod(options["chunks"])) * stored.itemsize + last)


def test_zarr_of_order_zero_and_its_own_fill(zarr):
    array = zarr.create_array({}, shape=(), dtype="f4")
    array[...] = 2.5
    assert as_source(array).slab(()).item() == 2.5
    never_written = zarr.create_array({}, shape=(4, 4), chunks=(2, 2), dtype="i2", fill_value=0)
    assert as_source(never_written).entries(torch.tensor([[3, 3]])).tolist() == [0.0]
    with pytest.raises(TypeError, match="expected a zarr array, got Group"):
        ZarrSource(zarr.group())


@pytest.mark.parametrize("version", [2, 3])
def test_what_xarray_writes_means_the_same_here(zarr, tmp_path, x, version):
    xarray = pytest.importorskip("xarray")
    x[4, 2, 5] = np.nan
    array = xarray.DataArray(x, dims=("a", "b", "c"), name="t")
    for name, encoding in (
        ("packed", {"dtype": "int16", "scale_factor": 0.01, "add_offset": 1.0, "_FillValue": -32768}),
        ("plain", {"_FillValue": -1e30}),
    ):
        path = tmp_path / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # consolidated metadata and zarr 3
            array.to_zarr(path, encoding={"t": encoding | {"chunks": (2, 2, 4)}}, zarr_format=version)
            decoded = xarray.open_zarr(path, chunks=None)["t"]
            raw = xarray.open_zarr(path, chunks=None, mask_and_scale=False)["t"]
            in_dask = xarray.open_zarr(path)["t"]
        truth = decoded.values
        assert np.isnan(truth[4, 2, 5])
        for source in (
            as_source(path / "t", missing=-5, dtype=torch.float64),
            as_source(decoded, missing=-5, dtype=torch.float64),
            as_source(raw, missing=-5, dtype=torch.float64),
            as_source(in_dask, missing=-5, dtype=torch.float64),
        ):
            assert source.chunks == (2, 2, 4)
            check(source, truth.astype("f8"), missing=-5.0)
        with pytest.raises(ValueError, match=r"got nan at index \(4, 2, 5\)"):
            as_source(path / "t").entries(INDEX)


def test_xarray_in_memory(x):
    xarray = pytest.importorskip("xarray")
    source = as_source(xarray.DataArray(x), chunk_bytes=64)
    assert isinstance(source, XarraySource)
    check(source, x)
    assert source.chunks == (1, 1, 6)
    with pytest.raises(TypeError, match="numbers of torch, got datetime64"):
        as_source(xarray.DataArray(np.zeros(2, "datetime64[ns]")))


def test_dask(x):
    dask = pytest.importorskip("dask.array")
    runs = []

    def block(part):
        runs.append(part.shape)
        return part * 2

    lazy = dask.from_array(x, chunks=((2, 0, 3), (1, 2), (6,))).map_blocks(block, dtype="f8", meta=np.zeros((0, 0, 0)))
    source = as_source(lazy)
    assert isinstance(source, DaskSource)
    check(source, 2 * x)
    assert source.chunks == (3, 2, 6)
    assert len(runs) == source.chunks_read == 4
    assert as_source(dask.ones(())).slab(()).item() == 1.0
    with pytest.raises(ValueError, match="known sizes"):
        as_source(lazy[lazy > 0])
    with pytest.raises(TypeError, match="masked arrays"):
        as_source(dask.ma.masked_less(lazy, 0))


def test_a_dask_block_that_fails_is_named(x):
    dask = pytest.importorskip("dask.array")

    def block(part, block_info=None):
        if block_info[0]["chunk-location"] == (1, 0, 0):
            raise ZeroDivisionError("no")
        return part

    lazy = dask.from_array(x, chunks=(3, 3, 6)).map_blocks(block, dtype="f8", meta=np.zeros((0, 0, 0)))
    with pytest.raises(ChunkError, match=r"chunk \(1, 0, 0\) .* \(ZeroDivisionError: no\)") as caught:
        as_source(lazy, retries=0).entries(INDEX)
    assert caught.value.read.tolist() == [True, False, True, False]


@pytest.mark.parametrize("chunks", [None, (2, 3, 4)])
@pytest.mark.parametrize("dtype", [">f8", "i4", "f2"])
def test_hdf5(tmp_path, x, chunks, dtype):
    h5py = pytest.importorskip("h5py")
    stored = (x * 3).astype(dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=stored, chunks=chunks)
        source = as_source(dataset, chunk_bytes=100)
        assert isinstance(source, Hdf5Source)
        check(source, stored.astype(stored.dtype.newbyteorder("=")))
        dataset.attrs["scale_factor"] = np.array([0.5], "f4")
        dataset.attrs["_FillValue"] = stored[4, 2, 5]
        truth = stored.astype("f8") * 0.5
        truth[stored == stored[4, 2, 5]] = 7
        check(as_source(dataset, missing=7, dtype=torch.float64), truth)
        check(as_source(dataset, cf=False), stored.astype(stored.dtype.newbyteorder("=")))
        assert as_source(file.create_dataset("s", data=2.5)).slab(()).item() == 2.5
