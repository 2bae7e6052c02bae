"""Dense points of fixed ranks: the identities of an embedded manifold, and geoopt's optimizers on it."""

import pytest
import torch

from decompositions import CP, TT, LowRank, Tree, TTMatrix, Tucker, numel, to_dense
from decompositions import round as cut
from decompositions.geometry import project
from decompositions.geometry.manifold import FixedRank
from tnlayers.optim import geoopt_manifold

F64 = torch.float64
TREES = {
    "matrix": cut(LowRank.random(row_modes=(7,), col_modes=(6,), rank=2)),
    "tucker": cut(Tucker.random(row_modes=(5,), col_modes=(4, 3), rank=2)),
    "tt": cut(TT.random(row_modes=(4, 3, 5), rank=2)),
    "tt-matrix": cut(TTMatrix.random(row_modes=(3, 2, 3), col_modes=(2, 3, 2), rank=3)),
    "tree": cut(Tree.random(row_modes=(3, 4), col_modes=(3, 3), rank=2)),
}
trees = pytest.mark.parametrize("name", TREES)


def shape_of(net):
    rows, cols = (int(torch.tensor(modes).prod()) for modes in (net.row_modes, net.col_modes or (1,)))
    return (rows, cols) if net.cols else tuple(net.shape)


@trees
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_projections_retraction_and_transport(name, dtype, rng):
    net = TREES[name]
    manifold, shape = FixedRank(net), shape_of(net)
    assert manifold.ndim == len(shape)
    x = manifold.projx(torch.randn(shape, dtype=dtype, generator=rng))
    assert manifold.off_manifold(x) < 1e-12  # idempotent
    assert manifold.network(x).ranks == net.ranks
    z, w = (torch.randn(shape, dtype=dtype, generator=rng) for _ in range(2))
    u, v = manifold.proju(x, z), manifold.egrad2rgrad(x, w)
    assert manifold.off_tangent(x, u) < 1e-12
    assert torch.allclose(manifold.inner(x, u, w), manifold.inner(x, u, v))  # orthogonal
    assert torch.allclose(manifold.inner(x, z - u, v).abs(), torch.zeros((), dtype=F64), atol=1e-10)
    assert manifold.inner(x, u, keepdim=True).shape == (1,) * len(shape)
    exact = project(cut(manifold.network(x)), z.reshape(net.shape)).to_dense().reshape(shape)
    assert torch.allclose(u, exact, atol=1e-12)
    errors = [float((manifold.retr(x, t * u) - x - t * u).norm()) for t in (1e-2, 1e-3, 1e-4)]
    assert errors[1] < 0.03 * errors[0]
    assert errors[2] < 0.03 * errors[1] + 1e-13
    assert torch.equal(manifold.expmap(x, u), manifold.retr(x, u))
    y, carried = manifold.retr_transp(x, u, v)
    assert manifold.off_manifold(y) < 1e-12
    assert manifold.off_tangent(y, carried) < 1e-12
    assert torch.allclose(carried, manifold.transp(x, y, v))


@trees
def test_projx_is_quasi_optimal(name, rng):
    net = TREES[name]
    manifold = FixedRank(net)
    x = torch.randn(net.shape, dtype=F64, generator=rng)
    tails = []
    for bond in net.bonds:
        from decompositions import bond_sides, unfold

        side, _ = bond_sides(net, bond)
        values = torch.linalg.svdvals(unfold(x, [net.outside.index(label) for label in side]))
        tails.append(float(values[net.sizes[bond] :].square().sum()))
    error = float((manifold.projx(x) - x).norm())
    assert max(tails) ** 0.5 * (1 - 1e-9) <= error <= sum(tails) ** 0.5 * (1 + 1e-9)


def test_ranks_beyond_their_sides_equality_and_refusal():
    net = LowRank.random(row_modes=(3,), col_modes=(9,), rank=3)
    wide = FixedRank(Tucker.random(row_modes=(2,), col_modes=(2, 9), rank=(2, 2, 4)))
    x = torch.randn(2, 18, dtype=F64)
    assert torch.allclose(wide.projx(x), x)
    assert FixedRank(net) == FixedRank(LowRank.random(row_modes=(3,), col_modes=(9,), rank=3))
    assert hash(FixedRank(net)) == hash(FixedRank(net))
    assert FixedRank(net) != FixedRank(cut(net, rank=2))
    assert "FixedRank(LowRank(3 | 9" in repr(FixedRank(net))
    assert FixedRank(net).random(3, 9).shape == (3, 9)
    with pytest.raises(ValueError, match="FixedRank: the network must be a tree"):
        FixedRank(CP.random(row_modes=(4, 4, 4), rank=2))


@trees
@pytest.mark.parametrize("optimizer", ["RiemannianAdam", "RiemannianSGD"])
def test_geoopts_optimizers_run_on_it(name, optimizer, rng):
    geoopt = pytest.importorskip("geoopt")
    net = TREES[name]
    manifold, shape = geoopt_manifold(net), shape_of(net)
    target = manifold.random(*shape, dtype=F64)
    point = geoopt.ManifoldParameter(manifold.random(*shape, dtype=F64), manifold=manifold)
    options = {"lr": 0.5, "betas": (0.9, 0.9)} if optimizer == "RiemannianAdam" else {"lr": 0.2, "momentum": 0.5}
    steps = getattr(geoopt.optim, optimizer)([point], **options, stabilize=10)
    schedule = torch.optim.lr_scheduler.LinearLR(steps, 1.0, 0.01, 200)
    for _ in range(200):
        steps.zero_grad()
        (point - target).square().sum().backward()
        steps.step()
        schedule.step()
    assert manifold.check_point_on_manifold(point.detach())
    assert float((point.detach() - target).norm()) < 0.02 * float(target.norm())
    off = torch.randn(shape, dtype=F64, generator=rng)
    assert not manifold.check_point_on_manifold(off)
    assert manifold.check_vector_on_tangent(target, manifold.proju(target, off))
    assert not manifold.check_vector_on_tangent(target, off)
    assert manifold == geoopt_manifold(net)


def test_without_geoopt_one_line_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "geoopt.manifolds.base", None)
    with pytest.raises(ImportError, match="geoopt_manifold: needs geoopt; pip install geoopt"):
        geoopt_manifold(TREES["matrix"])


def test_dense_points_of_a_network_are_on_its_manifold():
    for net in TREES.values():
        manifold = FixedRank(net)
        x = to_dense(net.to(F64))
        assert manifold.off_manifold(x) < 1e-12
        assert numel(manifold.network(x)) == numel(net)
