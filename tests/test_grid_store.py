"""Folders of grids: read back exactly, whole or not at all, damage refused by name; boxes decode what is asked for."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cross_approx import Quantization
from decompositions import TT, Tucker, norm, to_dense, tt_svd
from tnlayers.grids.blocks import boxes, decode_block, decode_entries
from tnlayers.grids.coding import code
from tnlayers.grids.store import ABOUT_FILE, GRID_FILE, KEY, load_grid, save_grid


def network(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return Tucker.random(row_modes=(7, 6, 8), rank=(3, 2, 4), generator=generator, dtype=dtype)


@pytest.mark.parametrize("coding", ["none", "int8", "planes"])
def test_a_grid_comes_back(tmp_path, coding):
    net = network()
    stored = net if coding == "none" else code(net, coding, 0.2 * float(norm(net)))
    folder = save_grid(tmp_path / "g", stored, shape=(7, 6, 8), about={"note": "x", "worst": float("inf")})
    grid = load_grid(folder)
    expected = net if coding == "none" else stored.network()
    assert all(torch.equal(a, b) for a, b in zip(grid.network.cores, expected.cores, strict=True))
    assert grid.network.legs == net.legs
    assert (grid.shape, grid.coding, grid.quantization) == ((7, 6, 8), coding, None)
    assert grid.nbytes == (folder / GRID_FILE).stat().st_size
    assert grid.about["note"] == "x"
    assert grid.about["worst"] == "inf"
    assert load_grid(folder, torch.float32).network.dtype == torch.float32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g"]


def test_the_numbers_are_complete_without_the_json(tmp_path):
    folder = save_grid(tmp_path / "g", network(), shape=(7, 6, 8))
    (folder / ABOUT_FILE).unlink()
    assert load_grid(folder).about == {}


def test_a_quantized_train_comes_back(tmp_path):
    x = torch.randn(6, 17, dtype=torch.float64)
    layout = Quantization.of((6, 17), "interleaved")
    net = tt_svd(layout.split(x), tol=1e-12)
    grid = load_grid(save_grid(tmp_path / "g", net, shape=(6, 17), quantization=layout))
    assert grid.quantization == layout
    assert torch.allclose(grid.block((slice(0, 6), slice(0, 17))), x, atol=1e-10)


# --- boxes ---


@given(st.data())
def test_boxes_of_plain_and_quantized_networks(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))
    order = data.draw(st.sampled_from([None, "C", "F", "interleaved"]))
    layout = None if order is None else Quantization.of(shape, order)
    net = tt_svd(x if layout is None else layout.split(x), tol=1e-12)
    slices = []
    for n in shape:
        start = data.draw(st.integers(0, n))
        slices.append(slice(start, data.draw(st.integers(start, n)), data.draw(st.integers(1, 4))))
    found = decode_block(net, shape, layout, slices)
    assert found.shape == x[tuple(slices)].shape
    assert torch.allclose(found, x[tuple(slices)], atol=1e-10)
    index = torch.stack([torch.randint(n, (20,)) for n in shape], 1)
    assert torch.allclose(decode_entries(net, layout, index), x[tuple(index.unbind(1))], atol=1e-10)


def test_a_box_decodes_no_more_than_it_is_asked(monkeypatch):
    from tnlayers.grids import blocks

    sizes = []
    monkeypatch.setattr(blocks, "to_dense", lambda net: sizes.append(net.shape) or to_dense(net))
    decode_block(network(), (7, 6, 8), None, (slice(2, 7, 3), slice(1, 2), slice(0, 8, 4)))
    assert sizes == [(2, 1, 2)]
    sizes.clear()
    layout = Quantization.of((64, 64), "interleaved")
    net = TT.random(row_modes=layout.sizes, rank=2)
    decode_block(net, (64, 64), layout, (slice(16, 32), slice(0, 2)))
    assert sum(torch.Size(size).numel() for size in sizes) == 32


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(1, 60), st.booleans())
def test_boxes_fill_a_grid_once(shape, most, chunked):
    chunks = [2] * len(shape) if chunked else None
    seen = torch.zeros(shape, dtype=torch.int64)
    for box in boxes(shape, most, chunks):
        seen[box] += 1
        assert seen[box].numel() <= most
    assert bool((seen == 1).all())


# --- whole or not at all ---


KILLED = """
import sys, time, torch
from pathlib import Path
from decompositions import TT
from tnlayers.grids import store
def slow(folder, about):
    Path(sys.argv[2]).touch()
    time.sleep(60)
store.write_about = slow  # the numbers are written, the rest is not
store.save_grid(sys.argv[1], TT([torch.ones(3, 2), torch.ones(2, 3)]), shape=(3, 3), overwrite=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_process_leaves_the_old_folder_or_none(tmp_path):
    target, mark = tmp_path / "g", tmp_path / "mark"
    for existing in (False, True):
        if existing:
            save_grid(target, network(), shape=(7, 6, 8))
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(target), str(mark)])
        until = time.monotonic() + 60
        while not mark.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert mark.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        mark.unlink()
        if existing:
            assert load_grid(target).shape == (7, 6, 8)
        else:
            assert not target.exists()
            with pytest.raises(FileNotFoundError, match="missing"):
                load_grid(target)
        left = [path for path in tmp_path.iterdir() if path != target]
        assert all(path.name.startswith(".g.") and path.name.endswith(".tmp") for path in left)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    from tnlayers.grids import store

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(store, "write_about", full)
    with pytest.raises(OSError, match="disk full"):
        save_grid(tmp_path / "g", network(), shape=(7, 6, 8))
    assert list(tmp_path.iterdir()) == []


# --- refusals ---


def test_other_folders_are_not_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(ValueError, match="holds no grid and is not overwritten"):
        save_grid(tmp_path / "photos", network(), shape=(7, 6, 8), overwrite=True)
    save_grid(tmp_path / "g", network(), shape=(7, 6, 8))
    with pytest.raises(ValueError, match="must be empty or new"):
        save_grid(tmp_path / "g", network(), shape=(7, 6, 8))
    save_grid(tmp_path / "g", network(1), shape=(7, 6, 8), overwrite=True)
    assert torch.equal(load_grid(tmp_path / "g").network.cores[0], network(1).cores[0])


def edit(folder, change):
    """The same file with another structure, its checksum made right again."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from tnlayers import checkpoint

    file = folder / GRID_FILE
    with safe_open(file, framework="pt") as handle:
        structure = json.loads(handle.metadata()[KEY])
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(structure, tensors)
    text = json.dumps(structure)
    save_file(tensors, file, metadata={KEY: text, "sha256": checkpoint._digest(text)})


DAMAGES = {
    "version": (lambda s, t: s.update(version=99), "has version 99, expected 1"),
    "format": (lambda s, t: s.update(format="Rope"), "format 'Rope'"),
    "coding": (lambda s, t: s.update(coding="zip"), "unknown coding 'zip'"),
    "shape": (lambda s, t: s.update(shape=[7, 6, 9]), r"outside labels must have the sizes \[7, 6, 9\]"),
    "no shape": (lambda s, t: s.pop("shape"), "does not fit"),
    "huge": (lambda s, t: s["shapes"].__setitem__(1, [1 << 40, s["shapes"][1][1]]), "damaged|outside labels"),
    "digits": (lambda s, t: s.update(digits=[[0, 2]]), "digits must reach the size"),
    "axis": (lambda s, t: s["axes"].__setitem__(1, 7), "expected an axis of a core"),
    "lengths": (lambda s, t: s["lengths"].__setitem__(0, 10**9), "do not fit"),
    "step": (lambda s, t: s.update(step=float("nan")), "finite step"),
    "tensor": (lambda s, t: t.pop("scales"), "expected the tensors"),
    "bytes": (lambda s, t: t["levels"].__setitem__(3, 255 - int(t["levels"][3])), "does not match its checksum"),
    "dtype": (lambda s, t: t.update(levels=t["levels"].float()), "do not fit"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(tmp_path, name):
    change, message = DAMAGES[name]
    folder = save_grid(tmp_path / "g", code(network(), "planes", 0.5), shape=(7, 6, 8))
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_grid(folder)
    assert GRID_FILE in str(caught.value)


def test_every_cut_of_a_file_is_refused(tmp_path):
    folder = save_grid(tmp_path / "g", code(network(), "planes", 0.5), shape=(7, 6, 8))
    data = (folder / GRID_FILE).read_bytes()
    for length in range(0, len(data), 37):
        (folder / GRID_FILE).write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"grid\.safetensors"):
            load_grid(folder)


def test_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"no grid\.safetensors in it"):
        load_grid(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / GRID_FILE)
    with pytest.raises(ValueError, match="holds no grid"):
        load_grid(tmp_path)
    folder = save_grid(tmp_path / "g", network(), shape=(7, 6, 8))
    (folder / ABOUT_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"grid\.json is damaged"):
        load_grid(folder)


def test_a_huge_shape_is_refused_before_anything_is_allocated(tmp_path):
    coded = code(network(), "planes", 0.5)
    shapes = (coded.shapes[0], (1 << 40, coded.shapes[1][1]), *coded.shapes[2:])  # the factor of the first axis
    folder = save_grid(tmp_path / "g", replace(coded, shapes=shapes), shape=(1 << 40, 6, 8))
    with pytest.raises(ValueError, match="bytes cannot hold the planes of a core of shape"):
        load_grid(folder)
