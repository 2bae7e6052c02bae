"""The grid commands end to end: targets are met by the file as read back, or missed loudly; parts decode; refusals."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cross_approx import as_source
from decompositions import Tucker
from tnlayers.cli import app
from tnlayers.grids import compress as job
from tnlayers.grids.compress import GridConfig, TargetMissed, run
from tnlayers.grids.info import CompareConfig, DecodeConfig, compare, decode, facts, info
from tnlayers.grids.making import rank_for_bytes
from tnlayers.grids.measures import compare_grid
from tnlayers.grids.opening import open_grid_source, parse_slices, stored_bytes, stored_dtype
from tnlayers.grids.page import decibels
from tnlayers.grids.store import Grid, load_grid


def field(shape=(24, 20, 18)):
    """Smooth, with a peak, and 0 outside a ball."""
    axes = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    distance = sum((a - 0.5) ** 2 for a in axes)
    return np.where(distance < 0.2, 1 / (0.2 + sum(axes)) + np.exp(-30 * distance), 0).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grids")
    np.save(folder / "x.npy", field())
    smooth = 1 / (1 + sum(np.meshgrid(*(np.arange(n) / n for n in (24, 20, 18)), indexing="ij")))
    np.save(folder / "smooth.npy", smooth)
    np.savez(folder / "two.npz", vol=(255 * field() / field().max()).astype(np.uint8), affine=np.eye(4))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Without the pictures, which have tests of their own."""
    if "page" not in request.node.name:
        monkeypatch.setattr(job._Job, "page", lambda self, folder, attempt: None)


def error_of(folder, x):
    made = load_grid(folder).block(tuple(slice(0, n) for n in x.shape)).numpy()
    return float(np.linalg.norm(made - x) / np.linalg.norm(x))


# --- targets ---


@pytest.mark.parametrize("format", ["tucker", "tt", "qtt"])
@pytest.mark.parametrize("coding", ["none", "int8", "planes"])
def test_a_relative_error_is_met_by_the_file(place, tmp_path, format, coding):
    result = run(GridConfig(str(place / "x.npy"), tmp_path / "g", format, tol=0.05, coding=coding))
    error = error_of(tmp_path / "g", field())
    assert error <= 0.05
    assert result.measures.relative_error == pytest.approx(error, rel=1e-5)
    assert error >= 0.018  # and no more is stored than the target asks for
    assert result.measures.whole
    assert result.about["target"] == {"kind": "tol", "value": 0.05, "met": True}
    assert json.loads((tmp_path / "g" / "grid.json").read_text())["measured"]["relative_error"] <= 0.05


@pytest.mark.parametrize(
    ("format", "method"),
    [(f, m) for f in ("tucker", "tt") for m in ("gram", "sketch", "cross")] + [("qtt", "cross")],
)
@pytest.mark.parametrize("target", ["tol", "psnr", "bytes"])
def test_every_method_meets_every_target(place, tmp_path, format, method, target):
    value = {"tol": 1e-3, "psnr": 45.0, "bytes": 4000}[target]
    rank = 10 if method == "sketch" else None
    config = GridConfig(str(place / "smooth.npy"), tmp_path / "g", format, method=method, rank=rank, **{target: value})
    result = run(config)
    assert result.about["method"] == method
    if target == "tol":
        assert error_of(tmp_path / "g", np.load(place / "smooth.npy")) <= value
    elif target == "psnr":
        assert value <= result.measures.psnr <= value + 8
    else:
        assert (tmp_path / "g" / "grid.safetensors").stat().st_size <= value
        assert result.measures.relative_error < 1e-2
    read = result.about["read"]["evaluations"]
    assert read < 24 * 20 * 18 if method == "cross" else read >= 24 * 20 * 18


def test_psnr_is_over_the_range_and_the_foreground_stands_beside_it(place, tmp_path):
    result = run(GridConfig(str(place / "two.npz"), tmp_path / "g", psnr=35, name="vol"))
    x = np.load(place / "two.npz")["vol"].astype(float)
    made = load_grid(tmp_path / "g").block(tuple(slice(0, n) for n in x.shape)).numpy()
    square = (made - x) ** 2
    assert result.measures.psnr == pytest.approx(10 * math.log10(255**2 / square.mean()), abs=1e-4)
    assert result.measures.foreground_psnr == pytest.approx(10 * math.log10(255**2 / square[x != 0].mean()), abs=1e-4)
    assert 35 <= result.measures.psnr < 36
    assert result.measures.foreground == (x != 0).sum()
    assert result.measures.max_error == pytest.approx(np.sqrt(square.max()), rel=1e-5)


def test_more_bytes_buy_less_error(place, tmp_path):
    errors = []
    for size in (3000, 6000, 12000):
        result = run(GridConfig(str(place / "x.npy"), tmp_path / str(size), bytes=size))
        assert 0.75 * size < result.grid.nbytes <= size
        errors.append(result.measures.relative_error)
    assert errors[0] > 1.3 * errors[1] > 1.5 * errors[2]


def test_coded_files_are_small(tmp_path):
    """At the same error, against float32 factors; a volume of real size is in the benchmark."""
    np.save(tmp_path / "x.npy", field((48, 44, 40)))  # the header is a kilobyte
    for format in ("tucker", "tt"):
        sizes = {}
        for tol, coding in ((0.05, "none"), (0.05, "int8"), (0.01, "none"), (0.01, "planes")):
            out = tmp_path / f"{format}{tol}{coding}"
            config = GridConfig(str(tmp_path / "x.npy"), out, format, tol=tol, coding=coding)
            sizes[tol, coding] = run(config).grid.nbytes
        assert sizes[0.01, "planes"] < 0.3 * sizes[0.01, "none"]
        assert sizes[0.05, "int8"] < 0.7 * sizes[0.05, "none"]


# --- missed targets ---


def test_a_missed_target_fails_loudly_and_keeps_the_file_elsewhere(place, tmp_path):
    config = GridConfig(str(place / "x.npy"), tmp_path / "g", "tt", tol=1e-3, rank=2)
    with pytest.raises(TargetMissed, match=r"--tol 0\.001 was missed, measured on all entries of the file: 0\.\d+; .*"):
        run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.missed"]
    grid = load_grid(tmp_path / "g.missed")
    assert grid.about["target"]["met"] is False
    assert grid.about["measured"]["relative_error"] > 1e-3
    with pytest.raises(TargetMissed):
        run(config)  # an earlier one is replaced
    (tmp_path / "h.missed").write_text("mine")
    with pytest.raises(TargetMissed, match=r"of the file: [0-9.e-]+$"):
        run(GridConfig(str(place / "x.npy"), tmp_path / "h", "tt", tol=1e-3, rank=2))
    assert (tmp_path / "h.missed").read_text() == "mine"


def test_what_is_verified_is_the_file(place, tmp_path, monkeypatch):
    """A store that loses accuracy on the way is noticed, and made up for or refused."""
    original = job.load_grid

    def worse(folder):
        grid = original(folder)
        cores = list(grid.network.cores)
        cores[0] = cores[0] * 1.2
        return replace(grid, network=grid.network.replace(cores))

    monkeypatch.setattr(job, "load_grid", worse)
    with pytest.raises(TargetMissed, match=r"--tol 0\.05 was missed"):
        run(GridConfig(str(place / "x.npy"), tmp_path / "g", tol=0.05))


def test_limits_of_a_cross(place, tmp_path):
    config = GridConfig(str(place / "x.npy"), tmp_path / "g", "tt", tol=1e-4, method="cross", max_evals=1500)
    with pytest.raises(TargetMissed):
        run(config)
    about = load_grid(tmp_path / "g.missed").about
    assert about["read"]["evaluations"] <= 1500
    assert "max_evals" in about["reason"]


def test_an_interruption_leaves_nothing(place, tmp_path):
    def stop(done, total, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(GridConfig(str(place / "x.npy"), tmp_path / "g", tol=0.1), stop)
    assert list(tmp_path.iterdir()) == []


def test_verification_on_a_stated_number_of_entries(place, tmp_path):
    result = run(GridConfig(str(place / "x.npy"), tmp_path / "g", tol=0.05, verify="500"))
    assert (result.measures.entries, result.measures.whole) == (500, False)
    assert "500 entries drawn at random" in result.text()


# --- decode, compare, info ---


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "g"
    original, job._Job.page = job._Job.page, lambda self, folder, attempt: None
    try:
        run(GridConfig(str(place / "x.npy"), folder, tol=0.02))
    finally:
        job._Job.page = original
    return folder


@pytest.mark.parametrize("max_bytes", [8, 1000, 1 << 26])
@pytest.mark.parametrize(
    ("text", "stride", "expected"),
    [
        (None, None, np.s_[:, :, :]),
        (":,:,5", None, np.s_[:, :, 5]),
        ("2:-2,...,-3", "2,3,1", np.s_[2:-2:2, ::3, -3]),
        ("4:4", None, np.s_[4:4]),
        ("1,2,3", None, np.s_[1, 2, 3]),
        ("::5,1::2", "2", np.s_[::10, 1::4, ::2]),
    ],
)
def test_parts_are_decoded(made, tmp_path, text, stride, expected, max_bytes):
    if max_bytes == 8 and text is None:
        pytest.skip("an entry at a time takes long")
    whole = load_grid(made).block(tuple(slice(0, n) for n in (24, 20, 18))).numpy()
    file, shape = decode(DecodeConfig(made, tmp_path / "part.npy", text, stride, "float64", max_bytes))
    assert np.load(file).shape == shape == whole[expected].shape
    assert np.allclose(np.load(file), whole[expected], atol=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["part.npy"]


def test_integers_are_rounded_and_clipped(made, tmp_path):
    file, _ = decode(DecodeConfig(made, tmp_path / "x.npy", dtype="uint8"))
    whole = load_grid(made).block(tuple(slice(0, n) for n in (24, 20, 18))).numpy()
    assert whole.min() < -0.001
    assert np.array_equal(np.load(file), np.clip(np.rint(whole), 0, 255).astype(np.uint8))


def test_zarr_stores_are_read_and_written(made, tmp_path):
    zarr = pytest.importorskip("zarr")
    file, shape = decode(DecodeConfig(made, tmp_path / "x.zarr", "3:20", max_bytes=2000))
    assert zarr.open_array(str(file))[:].shape == shape == (17, 20, 18)
    array = zarr.create_array(str(tmp_path / "s.zarr"), shape=(24, 20, 18), chunks=(8, 8, 8), dtype="f4")
    array[:] = field()
    result = run(GridConfig(str(tmp_path / "s.zarr"), tmp_path / "z", tol=0.05, memory=1))
    assert result.about["method"] == "gram"
    assert result.about["read"]["chunks_read"] >= 27
    assert error_of(tmp_path / "z", field()) <= 0.05


def test_compare_agrees_with_the_arrays(made, place, tmp_path):
    found = compare(CompareConfig(made))
    assert found.relative_error == pytest.approx(error_of(made, field()), rel=1e-6)
    assert compare(CompareConfig(made, entries=2000)).relative_error == pytest.approx(found.relative_error, rel=0.2)
    np.save(tmp_path / "other.npy", np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"must have the shape \(24, 20, 18\), got \(3, 4\)"):
        compare(CompareConfig(made, str(tmp_path / "other.npy")))


def test_compare_of_exact_and_constant_grids():
    net = Tucker.random(row_modes=(4, 5), rank=2, dtype=torch.float64)
    grid = Grid(net, (4, 5))
    exact = compare_grid(as_source(grid.block((slice(0, 4), slice(0, 5)))), grid)
    assert exact.max_error < 1e-14
    zero = Grid(Tucker(torch.zeros(1, 1), [torch.ones(4, 1), torch.ones(5, 1)]), (4, 5))
    constant = compare_grid(as_source(torch.zeros(4, 5)), zero)
    assert (constant.relative_error, constant.psnr, constant.foreground_psnr) == (0.0, math.inf, None)
    assert constant.to_dict()["psnr"] is None


def test_info_says_what_is_there(made):
    found = info(made)
    assert found["shape"] == [24, 20, 18]
    assert found["format"] == "Tucker"
    assert found["bytes"] == (made / "grid.safetensors").stat().st_size
    assert found["source"]["dtype"] == "float32"
    assert found["promised"] == 0.02
    assert found["measured"]["relative_error"] <= 0.02
    assert facts(load_grid(made))["bits_per_entry"] == pytest.approx(8 * found["bytes"] / 8640)


# --- edges ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of --tol, --psnr, --bytes, got none"),
        ({"tol": 0.1, "psnr": 30}, "exactly one of --tol, --psnr, --bytes, got --tol, --psnr"),
        ({"tol": 1.5}, "--tol must be between 0 and 1, got 1.5"),
        ({"psnr": math.nan}, "--psnr must be above 0, got nan"),
        ({"tol": 0.1, "format": "cp"}, "--format must be one of tucker, tt, qtt, got 'cp'"),
        ({"tol": 0.1, "method": "magic"}, "--method must be one of"),
        ({"tol": 0.1, "coding": "zip"}, "--coding must be one of none, int8, planes"),
        ({"tol": 0.1, "rank": 0}, "--rank must be above 0, got 0"),
        ({"tol": 0.1, "order": "C"}, "--order is for --format qtt"),
        ({"tol": 0.1, "method": "sketch"}, "--method sketch needs --rank"),
        ({"tol": 0.1, "verify": "most"}, "--verify must be auto, full, sample or a number"),
        ({"bytes": 100}, "--bytes 100 is too small for any network of this grid; the smallest is"),
        ({"tol": 0.1, "max_evals": 5}, "--max-evals is for --method cross, got dense"),
        ({"tol": 0.1, "format": "qtt", "method": "gram"}, "--format qtt takes --method dense, cross, got gram"),
        ({"tol": 1e-3, "coding": "int8"}, "int8 alone changes the grid by"),
    ],
)
def test_settings_are_refused(place, tmp_path, options, message):
    with pytest.raises(ValueError) as caught:
        run(GridConfig(str(place / "x.npy"), tmp_path / "g", **options))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_sources_are_refused(place, tmp_path):
    def opened(path, **options):
        return open_grid_source("grid compress", path, **options)

    with pytest.raises(FileNotFoundError, match="which does not exist"):
        opened(tmp_path / "no.npy")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    with pytest.raises(ValueError, match="must hold real numbers"):
        opened(tmp_path / "words.npy")
    np.save(tmp_path / "c.npy", np.ones((2, 2), dtype="c8"))
    with pytest.raises(ValueError, match=r"must hold real numbers, got torch\.complex64"):
        opened(tmp_path / "c.npy")
    np.save(tmp_path / "empty.npy", np.ones((2, 0)))
    with pytest.raises(ValueError, match="expected a grid with entries"):
        opened(tmp_path / "empty.npy")
    with pytest.raises(ValueError, match=r"--name must be an array of .*expected one of vol, affine, got None"):
        opened(place / "two.npz")
    (tmp_path / "cut.npz").write_bytes((place / "two.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"not a readable \.npz"):
        opened(tmp_path / "cut.npz")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="Python objects, which are not opened"):
        opened(tmp_path / "objects.npz")
    source = opened(place / "two.npz", name="vol")
    assert (stored_dtype(source), stored_bytes(source)) == ("uint8", 8640)


def test_hdf5_and_netcdf(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("group/x", data=field(), chunks=(8, 8, 8))
    source = open_grid_source("grid compress", tmp_path / "x.h5")
    assert torch.equal(source.slab((slice(0, 24),) + (slice(None),) * 2), torch.from_numpy(field()))
    assert (source.chunks, stored_dtype(source)) == ((8, 8, 8), "float32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3,4", "one part an axis"),
        ("...,...", "one part an axis"),
        ("99", "indices of axis 0 must be in -24..23"),
        ("a:b", "must be like 10:20,:,5"),
        ("::-1", "step >= 1"),
        ("1:2:3:4", "step >= 1"),
        (",", "indices of axis 0"),
    ],
)
def test_slices_are_refused(text, message):
    with pytest.raises(ValueError) as caught:
        parse_slices("grid decode", text, (24, 20, 18))
    assert message in str(caught.value)


def test_decode_refuses(made, tmp_path):
    (tmp_path / "x.npy").write_text("")
    for options, message in (
        ({"out": tmp_path / "x.tif"}, r"must end in \.npy or \.zarr"),
        ({"out": tmp_path / "x.npy"}, "exists; give another --out"),
        ({"out": tmp_path / "y.npy", "dtype": "complex64"}, "--dtype must be one of"),
        ({"out": tmp_path / "y.npy", "max_bytes": 1}, "--max-bytes must hold a number"),
        ({"out": tmp_path / "y.npy", "stride": "0"}, "--stride must be a number >= 1"),
        ({"out": tmp_path / "y.npy", "stride": "1,2"}, "--stride must be a number >= 1 or one an axis"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(DecodeConfig(made, **options))
    with pytest.raises(FileNotFoundError, match="the folder must exist"):
        DecodeConfig(made, tmp_path / "no" / "y.npy")


def test_ranks_for_bytes_are_monotone():
    for format in ("tucker", "tt"):
        for coding in ("none", "int8", "planes"):
            ranks = [rank_for_bytes((50, 60, 70), format, coding, size) for size in (1, 10**4, 10**5, 10**8)]
            assert ranks == sorted(ranks)
            assert ranks[0] == 1


# --- command line ---


def call(*arguments):
    return CliRunner().invoke(app, ["grid", *map(str, arguments)])


def test_the_commands(place, tmp_path):
    out = tmp_path / "g"
    done = call("compress", place / "two.npz", "--name", "vol", "--format", "tt", "--tol", 0.1, "--out", out)
    assert done.exit_code == 0, done.output
    assert "target    tol 0.1, met" in done.output
    assert "relative error" in done.output
    assert "foreground" in done.output
    assert call("info", out).output.splitlines()[0] == "grid      24x20x18, 8640 entries"
    assert json.loads(call("info", out, "--json").output)["source"]["dtype"] == "uint8"
    done = call("decode", out, "--slice", ":,:,9", "--stride", 2, "--dtype", "uint8", "--out", tmp_path / "s.npy")
    assert done.output.strip() == f"{tmp_path / 's.npy'} written, 12x10 uint8"
    assert json.loads(call("compare", out, "--json").output)["relative_error"] <= 0.1
    assert "relative error" in call("compare", out, place / "two.npz", "--name", "vol").output
    again = call("compress", place / "x.npy", "--tol", 0.1, "--out", out)
    assert again.exit_code == 2
    assert "must be empty or new" in again.output
    document = json.loads(call("compress", place / "x.npy", "--tol", 0.1, "--out", out, "--overwrite", "--json").output)
    assert document["target"]["met"] is True


def test_exit_codes(place, tmp_path, monkeypatch):
    missed = call("compress", place / "x.npy", "--tol", 1e-3, "--rank", 2, "--format", "tt", "--out", tmp_path / "g")
    assert missed.exit_code == 3
    assert "was missed" in missed.output
    assert call("compress", tmp_path / "no.npy", "--tol", 0.1, "--out", tmp_path / "g").exit_code == 2
    assert call("info", tmp_path / "no").exit_code == 2

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "make_network", stop)
    stopped = call("compress", place / "x.npy", "--tol", 0.1, "--out", tmp_path / "h")
    assert stopped.exit_code == 130
    assert "interrupted; nothing was written" in stopped.output
    assert not (tmp_path / "h").exists()


# --- grids that other tools trip over ---


def test_a_grid_of_one_axis_is_compressed_in_every_format(tmp_path):
    x = np.sin(np.arange(300) / 20)
    np.save(tmp_path / "x.npy", x)
    for format in ("tucker", "tt", "qtt"):
        run(GridConfig(str(tmp_path / "x.npy"), tmp_path / format, format, tol=0.01))
        assert error_of(tmp_path / format, x) <= 0.01


def test_a_constant_has_no_psnr_and_is_not_called_exact(tmp_path):
    np.save(tmp_path / "x.npy", np.full((12, 10, 8), 3.5))
    result = run(GridConfig(str(tmp_path / "x.npy"), tmp_path / "g", tol=0.01))
    assert 0 < result.measures.relative_error <= 0.01
    for text in (result.text(), result.measures.text()):
        assert "no PSNR" in text
        assert "inf dB" not in text
    assert decibels(None, result.measures.max_error) == "none (no range)"
    assert decibels(None) == "exact"


@pytest.mark.parametrize("method", ["dense", "gram", "cross"])
def test_half_precision_grids_with_norms_beyond_half_precision(tmp_path, method):
    x = (6e4 * field((12, 11, 10)) / field((12, 11, 10)).max()).astype(np.float16)
    assert np.linalg.norm(x.astype(float)) > 65504
    np.save(tmp_path / "x.npy", x)
    result = run(GridConfig(str(tmp_path / "x.npy"), tmp_path / "g", tol=1e-3, method=method))
    assert error_of(tmp_path / "g", x.astype(float)) <= 1e-3
    assert result.about["source"]["dtype"] == "float16"
    assert result.about["source"]["bytes"] == 2 * x.size


def test_entries_whose_squares_vanish_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", 1e-300 * np.random.default_rng(0).random((5, 5, 5)))
    with pytest.raises(ValueError, match=r"squares of the entries must fit .*, got values up to 9.*e-301"):
        run(GridConfig(str(tmp_path / "x.npy"), tmp_path / "g", tol=0.01))
    assert not (tmp_path / "g").exists()
