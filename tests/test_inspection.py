"""Inspection of files of weights: the numbers against numpy, the refusals, the page."""

import json
import math
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_report import EVIL, check_page
from torch import nn

from tnlayers.inspection import TOLERANCES, inspect_file, inspect_tensor


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decaying(m, n, power=1.0, dtype=torch.float32):
    u, _ = torch.linalg.qr(normal(m, min(m, n), dtype=torch.float64))
    v, _ = torch.linalg.qr(normal(n, min(m, n), dtype=torch.float64, seed=1))
    s = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power
    return ((u * s) @ v.T).to(dtype)


def reference(x):
    """Stable rank, effective rank and suggested ranks, by numpy alone."""
    a = x.to(torch.complex128 if x.is_complex() else torch.float64).numpy()
    a = a.reshape(a.shape[0], -1)
    s = np.linalg.svd(a, compute_uv=False)
    p = s[s > 0] / s.sum()
    tails = [np.sqrt(np.sum(s[k:] ** 2) / np.sum(s**2)) for k in range(len(s) + 1)]
    ranks = [next(k for k, tail in enumerate(tails) if tail <= tol) for tol in TOLERANCES]
    return np.sum(np.abs(a) ** 2) / s[0] ** 2, np.exp(-np.sum(p * np.log(p))), ranks, s


@pytest.mark.parametrize(
    "x",
    [
        normal(20, 30),
        normal(30, 20, dtype=torch.float64),
        normal(40, 3, 3, 3),
        decaying(64, 700),
        decaying(700, 64, 0.5),
        decaying(50, 50, 2.0, torch.float16),
        decaying(60, 200, 1.0, torch.bfloat16),
        decaying(16, 16, 1.0).to(torch.float8_e4m3fn),
        torch.complex(normal(9, 12, dtype=torch.float64), normal(9, 12, dtype=torch.float64, seed=1)),
        torch.complex(normal(6, 30), normal(6, 30, seed=1)),
        normal(7, 9) * 1e30,
        normal(7, 9) * 1e-38,
        normal(7, 9, dtype=torch.float64) * 1e200,
        normal(7, 19, dtype=torch.bfloat16) * 1e38,
        torch.ones(5, 5),
        torch.full((1, 1), -3.0),
        normal(1, 50),
    ],
    ids=lambda x: f"{tuple(x.shape)}-{x.dtype}",
)
def test_values_agree_with_numpy(x):
    row = inspect_tensor("w", x)
    with np.errstate(over="ignore"):
        if float(x.to(torch.complex128).abs().max()) > 1e150:  # numpy's squares overflow: a multiple has the same ranks
            stable, effective, ranks, s = reference(x / 1e200)
            s = s * 1e200
        else:
            stable, effective, ranks, s = reference(x)
    assert row.status == "measured"
    assert row.stable_rank == pytest.approx(stable, rel=1e-9)
    assert row.effective_rank == pytest.approx(effective, rel=1e-5)
    assert [rank for _, rank in row.suggested] == ranks
    np.testing.assert_allclose(row.spectrum, s, rtol=1e-5, atol=1e-6 * s[0])
    m, n = row.matrix
    assert row.break_even_rank == max(r for r in range(max(m, n)) if r * (m + n) < m * n)
    assert [row.gains(tol) for tol in TOLERANCES] == [k * (m + n) < m * n for k in ranks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "small"), [((80, 80), 100), ((80, 80), 1), ((80, 400), 100)])
def test_numerical_rank_sees_through_rounding(dtype, shape, small, monkeypatch):
    monkeypatch.setattr("tnlayers.inspection.SMALL", small)
    m, n = shape
    low = (normal(m, 8, dtype=torch.float64) @ normal(8, n, dtype=torch.float64, seed=1)).to(dtype)
    row = inspect_tensor("low", low)
    assert row.numerical_rank == 8
    assert row.method == ("gram" if dtype != torch.float64 and (small == 1 or n > m) else "svd")
    assert inspect_tensor("full", normal(m, n, dtype=dtype)).numerical_rank > 0.9 * m


def test_suggested_ranks_are_the_smallest():
    x = decaying(64, 64, 0.7, torch.float64)
    u, s, vh = torch.linalg.svd(x)
    for tol, rank in inspect_tensor("w", x).suggested:
        assert torch.linalg.norm(x - (u[:, :rank] * s[:rank]) @ vh[:rank]) <= tol * torch.linalg.norm(x)
        assert torch.linalg.norm(x - (u[:, : rank - 1] * s[: rank - 1]) @ vh[: rank - 1]) > tol * torch.linalg.norm(x)


def test_huge_matrices_say_so(monkeypatch):
    monkeypatch.setattr("tnlayers.inspection.LEADING", 60)
    s = torch.arange(1, 301, dtype=torch.float32) ** -1.5
    x = torch.zeros(300, 320)
    x[torch.arange(300), torch.randperm(320, generator=torch.Generator().manual_seed(0))[:300]] = s
    row = inspect_tensor("w", x, max_side=250)
    squares = s.double() ** 2
    assert row.method == "leading"
    assert "60 leading of 300" in row.note
    assert row.effective_rank is None
    assert row.numerical_rank is None
    assert len(row.spectrum) == 60
    assert row.stable_rank == pytest.approx(float(squares.sum() / squares[0]), rel=1e-5)
    np.testing.assert_allclose(row.spectrum[:12], s[:12], rtol=1e-3)
    for tol, rank in row.suggested:  # randomized values are never too large: the rank is enough
        assert float(squares[rank:].sum()) <= tol**2 * float(squares.sum())
    flat = inspect_tensor("w", torch.eye(300), max_side=250)
    assert [rank for _, rank in flat.suggested] == [None, None, None]
    assert [flat.gains(tol) for tol in TOLERANCES] == [None, None, None]


def test_zero_and_empty_tensors():
    row = inspect_tensor("w", torch.zeros(4, 6))
    assert (row.stable_rank, row.effective_rank, row.numerical_rank) == (0.0, 0.0, 0)
    assert [rank for _, rank in row.suggested] == [0, 0, 0]
    assert row.note == "all zero"
    assert inspect_tensor("w", torch.zeros(0, 6)).status == "skipped"
    assert inspect_tensor("w", torch.zeros(4, 4).to_sparse()).status == "skipped"


def test_non_finite_tensors_are_named_and_counted():
    x = torch.zeros(4, 6)
    x[0, 0], x[1, 1], x[1, 2] = math.nan, math.inf, -math.inf
    row = inspect_tensor("w", x)
    assert row.status == "not finite"
    assert "1 NaN and 2 infinite of 24 entries" in row.note
    assert row.stable_rank is None
    assert row.suggested == ()


def test_kinds():
    names = {"wte.weight": (9, 4), "fc.weight": (9, 4), "conv.weight": (9, 4, 3), "net.cores.0": (2, 3, 4)}
    rows = [inspect_tensor(name, torch.ones(shape)) for name, shape in names.items()]
    assert [row.kind for row in rows] == ["embedding", "matrix", "kernel", "core"]
    assert rows[2].matrix == (9, 12)


def weights():
    zero_nan = {"zero": torch.zeros(5, 7), "nan": torch.full((3, 3), math.nan), "one": torch.ones(1, 1)}
    more = {"conv.weight": normal(8, 4, 3, 3), "bias": torch.zeros(9), "ids": torch.arange(6).reshape(2, 3)}
    return {"layers.10.w": normal(20, 30), "layers.2.w": decaying(30, 20), **zero_nan, **more, EVIL[:-1]: normal(4, 4)}


@pytest.fixture(scope="module", params=["safetensors", "pt", "legacy"])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / f"model.{request.param}"
    if request.param == "safetensors":
        save_file(weights(), path)
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=request.param == "pt")
    return path


def test_inspect_file_reads_every_kind_of_file(file):
    seen = []
    found = inspect_file(file, progress=lambda *args: seen.append(args))
    rows = {row.name: row for row in found.rows}
    assert set(rows) == set(weights()) - {"bias", "ids"}
    assert (found.other, found.other_params) == (2, 15)
    assert found.params == sum(x.numel() for x in weights().values())
    assert [rows[name].status for name in ("nan", "zero", "one")] == ["not finite", "measured", "measured"]
    assert rows["conv.weight"].stable_rank == pytest.approx(reference(weights()["conv.weight"])[0])
    assert [row.name for row in found.rows].index("layers.2.w") < len(found.rows)
    assert [done for done, _, _ in seen] == list(range(len(weights()) + 1))
    assert seen[-1] == (len(weights()), len(weights()), "")


def test_safetensors_rows_count_their_numbers(tmp_path):
    save_file({f"layers.{k}.w": torch.ones(2, 2) for k in range(12)}, tmp_path / "x")  # found out by its content
    assert [row.name for row in inspect_file(tmp_path / "x").rows] == [f"layers.{k}.w" for k in range(12)]
    assert {row.status for row in inspect_file(tmp_path / "x").rows} == {"measured"}


def test_table_json_and_page(file, tmp_path):
    found = inspect_file(file)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text
    assert "not finite: 9 NaN and 0 infinite of 9 entries" in text
    data = json.loads(found.to_json(tmp_path / "x.json"), parse_constant=lambda name: pytest.fail(name))
    assert data == json.loads((tmp_path / "x.json").read_text())
    assert len(data["rows"]) == len(found.rows)
    assert all(row["spectrum"] == [] for row in found.to_dict(spectra=False)["rows"])
    page = check_page(found.html(tmp_path / "x.html"))
    assert page.rows == len(found.rows) + 1
    assert len(page.alts) == len(found.rows) - 1
    assert "<script>alert" in page.text
    assert "Not finite" in page.text
    assert (tmp_path / "x.html").stat().st_size > 10_000


@pytest.mark.parametrize("wrap", [lambda d: {"state_dict": d, "epoch": 3}, lambda d: {"model": d}, lambda d: d])
def test_checkpoints_are_unwrapped(wrap, tmp_path):
    torch.save(wrap(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).state_dict()), tmp_path / "x.pt")
    assert [row.name for row in inspect_file(tmp_path / "x.pt").rows] == ["0.weight", "1.weight"]


def test_nested_wrappers_and_single_tensors(tmp_path):
    torch.save({"model": {"state_dict": {"w": torch.ones(2, 2)}}}, tmp_path / "x.pt")
    assert inspect_file(tmp_path / "x.pt").rows[0].name == "w"
    torch.save({"model": torch.ones(2, 2)}, tmp_path / "x.pt")
    assert inspect_file(tmp_path / "x.pt").rows[0].name == "model"
    torch.save(torch.ones(2, 2), tmp_path / "x.pt")
    assert inspect_file(tmp_path / "x.pt").rows[0].name == "tensor"


def test_tied_tensors_are_counted_once(tmp_path):
    w = normal(6, 4)
    torch.save({"embed.weight": w, "head.weight": w, "view": w[:2], "t": w.T}, tmp_path / "x.pt")
    found = inspect_file(tmp_path / "x.pt")
    assert [row.status for row in found.rows] == ["measured", "tied", "measured", "measured"]
    assert "embed.weight" in found.rows[1].note
    assert found.params == 24 + 8 + 24
    check_page(found.html())


def refused(path, match, error=ValueError):
    with pytest.raises(error, match=match) as caught:
        inspect_file(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("inspect_file: ")


def test_what_is_no_file_is_refused(tmp_path):
    refused(tmp_path / "none.pt", "expected an existing file", FileNotFoundError)
    refused(tmp_path, "got the folder")
    with pytest.raises(ValueError, match="max_side must be at least 1, got 0"):
        inspect_file(tmp_path, max_side=0)


def test_pickled_modules_are_refused_with_a_next_step(tmp_path):
    for zipped in (True, False):
        torch.save(nn.Linear(2, 2), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "x.pt", r"save model.state_dict\(\)")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, {"state_dict": {"step": 1}}, "text"])
def test_files_without_tensors_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "expected a state dict")


def test_files_without_matrices_are_refused(tmp_path):
    torch.save({"b": torch.zeros(3), "i": torch.zeros(2, 2, dtype=torch.int64)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "order 2 or more .* got 2 vectors")
    save_file({"b": torch.zeros(3)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "order 2 or more .* got 1 vectors")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_random_bytes_are_refused(suffix, tmp_path):
    source = random.Random(0)
    path = tmp_path / f"x.{suffix}"
    for length in (0, 1, 7, 8, 9, 100, 5000):
        path.write_bytes(source.randbytes(length))
        refused(path, "the file is damaged")
    path.write_bytes(b"\x80\x02" + source.randbytes(200))
    refused(path, "the file is damaged|pickled Python objects")


def test_truncated_files_are_refused(file, tmp_path):
    content = file.read_bytes()
    path = tmp_path / file.name
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        refused(path, "the file is damaged")


def test_zip_and_text_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(tmp_path / "x.pt", "the file is damaged or of another kind")
    (tmp_path / "x.txt").write_text('{"weight": [1, 2, 3]}\n' * 9)
    refused(tmp_path / "x.txt", "the file is damaged or of another kind")
