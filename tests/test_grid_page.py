"""The page of a grid: self-contained, honest, with the pictures it promises."""

import re

import numpy as np
import pytest
import torch

from decompositions import TT, Tucker, to_dense
from tnlayers.grids.compress import GridConfig, run
from tnlayers.grids.page import plane_figure, rank_curve


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    axes = np.meshgrid(*(np.linspace(0, 1, n) for n in (14, 12, 10)), indexing="ij")
    np.save(folder / "<x>.npy", 1 / (0.1 + sum(axes)))
    result = run(GridConfig(str(folder / "<x>.npy"), folder / "g", tol=0.01))
    return (folder / "g" / "report.html").read_text(), result


def test_the_page_is_self_contained_and_escaped(page):
    text, _ = page
    assert "://" not in text
    assert "<x>" not in text
    assert "&lt;x&gt;.npy" in text
    assert text.count("<img ") == 4  # three planes and the curve
    assert text.count('style="filter:none"') == 3  # pictures of data keep their colours where the page is dark


def test_the_page_says_both_errors_and_what_was_read(page):
    text, result = page
    plain = re.sub(r"<[^>]+>", " ", text)
    for number in (f"{result.measures.psnr:.2f} dB", f"{result.measures.relative_error:.3g}"):
        assert number in plain
    assert "PSNR of the foreground" in plain
    assert "on all entries" in plain
    assert "1680 (100%)" in plain  # entries asked for
    assert "target tol 0.01: met" in plain
    assert f"{result.about['ratio']:.3g}x" in plain


@pytest.mark.parametrize("order", [1, 2])
def test_other_orders_have_a_page_too(tmp_path, order):
    np.save(tmp_path / "x.npy", 1 / (1.0 + np.indices((6,) * order).sum(0)))
    run(GridConfig(str(tmp_path / "x.npy"), tmp_path / "g", "tt", tol=0.05))
    text = (tmp_path / "g" / "report.html").read_text()
    assert text.count("<img ") == order


def test_one_colour_scale_for_original_and_decoded():
    exact, made = np.eye(4), 1.5 * np.eye(4)
    figure = plane_figure(exact, made, (0.0, 1.0), 0.5, (0, 1))
    first, second, third = (axes.images[0] for axes in figure.axes[:3])
    assert first.get_clim() == second.get_clim() == (0.0, 1.0)
    assert third.get_clim() == (-0.5, 0.5)
    assert np.array_equal(third.get_array(), made - exact)


@pytest.mark.parametrize("kind", [TT, Tucker])
def test_the_curve_bounds_the_error_of_lower_ranks(kind, rng):
    from decompositions import st_hosvd, tt_svd

    axes = torch.meshgrid(*(torch.linspace(0, 1, n, dtype=torch.float64) for n in (12, 11, 10)), indexing="ij")
    x = 1 / (0.05 + sum(axes))
    decompose = {TT: tt_svd, Tucker: st_hosvd}[kind]
    net = decompose(x, tol=1e-10)
    for rank, count, bound in rank_curve(net, 1e-10):
        made = decompose(x, rank=[min(rank, r) for r in net.ranks])
        error = float((to_dense(made) - x).norm() / x.norm())
        assert error <= bound * (1 + 1e-9)
        assert bound <= 2 * error + 1e-9
        assert count == sum(core.numel() for core in made.cores)
