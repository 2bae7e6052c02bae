"""One geometry for every tree: projection, doubled trees, retraction, transport, gradients and Hessians.

The oracle is the Jacobian of the dense tensor with respect to the cores: its range is the tangent space.
"""

from functools import partial
from itertools import pairwise
from math import prod

import pytest
import torch
from cases import TREES, network
from torch import Tensor

from decompositions import TT, LowRank, Network, Tree, TTMatrix, Tucker, add, inner, norm, scale, to_dense
from decompositions import round as cut
from decompositions.geometry import (
    Chain,
    Tangent,
    center_gradients,
    check_geometry,
    check_gradient,
    dimension,
    gauges,
    hessian_vector_product,
    longest_path,
    project,
    retract,
    riemannian_gradient,
    transport,
)
from decompositions.geometry.blocks import BlockTree, flatten
from decompositions.geometry.retraction import extend
from decompositions.geometry.tangent import gauge_fix

DTYPES = [torch.float64, torch.complex128]
trees = pytest.mark.parametrize("case", [case for case in TREES if len(case().cores) < 20], ids=repr)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def minimal(case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Network:
    """A network of a case at ranks that its bonds can have."""
    return cut(case(dtype=dtype, generator=torch.Generator().manual_seed(seed)))


def randn(net: Network, seed: int = 1) -> Tensor:
    return torch.randn(net.shape, dtype=net.dtype, generator=torch.Generator().manual_seed(seed))


def jacobian(net: Network) -> Tensor:
    """Dense derivatives by every entry of every core: (numel of W, parameters)."""
    columns = []
    for k, core in enumerate(net.cores):
        for entry in range(core.numel()):
            unit = torch.zeros(core.numel(), dtype=core.dtype)
            unit[entry] = 1
            cores = [unit.reshape(core.shape) if j == k else other for j, other in enumerate(net.cores)]
            columns.append(to_dense(net.replace(cores)).reshape(-1))
    return torch.stack(columns, 1)


def dense_projection(net: Network, z: Tensor) -> tuple[Tensor, int]:
    """Projection onto the range of the Jacobian, and its dimension."""
    u, s, _ = torch.linalg.svd(jacobian(net), full_matrices=False)
    rank = int((s > 1e-9 * s[0]).sum())
    u = u[:, :rank]
    return (u @ (u.mH @ z.reshape(-1))).reshape(z.shape), rank


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    assert float((got - want).norm()) <= tolerance * max(1.0, float(want.norm()))


@dtypes
@trees
def test_gauges_hold_every_basis(case, dtype):
    net = case(dtype=dtype)
    for root in range(len(net.cores)):
        g = gauges(net, root)
        close(to_dense(g.net), to_dense(net))
        for v in range(len(net.cores)):
            centered = g.centered(v)
            close(to_dense(centered), to_dense(net))
            for edge in g.edges:
                for core, axis in ((g.up[edge.child], edge.child), (g.down[edge.child], edge.parent)):
                    assert core is not None
                    matrix = core.movedim(g.axis(axis, edge.bond), -1)
                    matrix = matrix.reshape(-1, matrix.shape[-1])
                    close(matrix.mH @ matrix, torch.eye(matrix.shape[1], dtype=dtype))
            close(centered.cores[v].norm(), to_dense(net).norm())


@dtypes
@trees
def test_project_is_the_projector_of_the_jacobian(case, dtype):
    net = minimal(case, dtype)
    z = randn(net)
    want, rank = dense_projection(net, z)
    for root in {0, len(net.cores) - 1, len(net.cores) // 2}:
        xi = project(gauges(net, root), z)
        close(xi.to_dense(), want)
        close(xi.norm(), want.norm())
    assert dimension(net) == rank


@dtypes
@trees
def test_project_is_idempotent_and_self_adjoint(case, dtype):
    net = minimal(case, dtype)
    at = gauges(net)
    y, z = randn(net, 2), randn(net, 3)
    py, pz = project(at, y), project(at, z)
    close(project(at, py.to_dense()).to_dense(), py.to_dense())
    left, right = (
        torch.vdot(py.to_dense().reshape(-1), z.reshape(-1)),
        torch.vdot(y.reshape(-1), pz.to_dense().reshape(-1)),
    )
    close(left, right)
    close(left, py.inner(pz))
    # closest point: the rest is orthogonal to the whole space
    for other in (py, pz, project(at, randn(net, 4))):
        assert abs(torch.vdot(other.to_dense().reshape(-1), (z - pz.to_dense()).reshape(-1))) <= 1e-11 * z.norm()


@dtypes
@trees
def test_a_network_is_projected_as_its_dense_tensor_is(case, dtype):
    net = minimal(case, dtype)
    at = gauges(net)
    generator = torch.Generator().manual_seed(5)
    same = case(dtype=dtype, generator=generator)
    for z in (same, *([add(same, net)] if case.summable else ()), net):
        want = project(at, to_dense(z))
        got = project(at, z)
        for a, b in zip(got.deltas, want.deltas, strict=True):
            close(a, b)
    # another tree over the same modes, and labels that clash with ours
    order = len(net.shape)
    if order > 1:
        star = Tucker.random(row_modes=net.row_modes, col_modes=net.col_modes, rank=2, dtype=dtype, generator=generator)
        got, want = project(at, star), project(at, to_dense(star))
        close(got.to_dense(), want.to_dense())


@dtypes
@trees
def test_doubled_tree_is_the_step(case, dtype):
    net = minimal(case, dtype)
    at = gauges(net)
    xi = project(at, randn(net))
    close(to_dense((-0.3 * xi).to_network(point=True)), to_dense(net) - 0.3 * xi.to_dense(), 1e-13)
    blocks = xi.blocks(point=True)
    for v, own in enumerate(blocks.blocks):
        children = len(at.below[v])
        assert len(own) == children + (2 if v != at.root else 1)
    doubled = net.replace(blocks.to_cores())
    assert all(rank <= 2 * old for rank, old in zip(doubled.ranks, net.ranks, strict=True))


@dtypes
@trees
def test_transport_is_projection(case, dtype):
    net = minimal(case, dtype)
    xi = project(net, randn(net))
    other = minimal(case, dtype, seed=9)
    got = transport(other, xi)
    close(got.to_dense(), dense_projection(other, xi.to_dense())[0], 1e-11)
    close(transport(xi.at, xi).to_dense(), xi.to_dense())


def loss_of(target: Tensor, weights: Tensor):
    """A smooth function that is not quadratic."""

    def loss(w: Network) -> Tensor:
        difference = to_dense(w) - target
        square = (difference.abs() ** 2).real if difference.is_complex() else difference.square()
        return (weights * square).sum() / 2 + (weights * square).square().sum() / 4

    return loss


def slopes(function, steps=(4e-4, 2e-4, 1e-4)) -> list[float]:
    """Observed orders of a quantity that vanishes with the step."""
    values = [abs(float(function(h))) for h in steps]
    return [float(torch.log2(torch.tensor(a / b))) for a, b in pairwise(values)]


@dtypes
@trees
def test_gradient_and_hessian_by_taylor_slopes(case, dtype):
    net = minimal(case, dtype)
    net = scale(net, 1 / float(norm(net)))
    at = gauges(net)
    generator = torch.Generator().manual_seed(3)
    weights = 0.5 + torch.rand(net.shape, generator=generator, dtype=torch.float64)
    loss = loss_of(randn(net, 6) / randn(net, 6).norm(), weights)
    xi = project(at, randn(net, 7))
    xi = xi * (1 / float(xi.norm()))
    g = riemannian_gradient(at, loss)
    # the same from the dense Euclidean gradient
    dense = to_dense(net).detach().requires_grad_()
    flat = Network((dense,), (net.outside,), net.rows, net.cols)
    (euclidean,) = torch.autograd.grad(loss(flat), dense)
    close(g.to_dense(), riemannian_gradient(at, euclidean).to_dense())
    h = hessian_vector_product(at, loss, xi)
    checks = check_gradient(loss, net)  # slopes 2 and 3 along the retraction
    assert checks.passed, str(checks)
    wrong = check_gradient(loss, net, gradient=1.01 * g)
    assert float(g.norm()) < 1e-10 or not wrong.passed
    # self-adjoint
    eta = project(at, randn(net, 8))
    other = hessian_vector_product(at, loss, eta)
    close(h.inner(eta).real, xi.inner(other).real, 1e-9)


@trees
def test_retraction_is_first_order_and_obeys_ranks_and_tol(case):
    net = minimal(case)
    at = gauges(net)
    xi = project(at, randn(net))
    xi = xi * (float(norm(net)) / float(xi.norm()))
    dense, tangent = to_dense(net), xi.to_dense()

    def error(t):
        return (to_dense(retract(xi, t)) - dense - t * tangent).norm() + 1e-300

    if float(error(1e-2)) > 1e-10:  # the manifold may be flat (one core, full ranks)
        assert all(s > 1.8 for s in slopes(error))
    assert retract(xi, 0.5).ranks == net.ranks
    exact = dense + 0.5 * tangent
    for tol in (1e-1, 1e-3, 1e-10):
        got = retract(xi, 0.5, tol=tol)
        assert float((to_dense(got) - exact).norm()) <= tol * float(exact.norm()) * (1 + 1e-10)
    assert type(retract(xi, 0.1)) is type(net)


@trees
def test_rank_deficient_points_are_served(case):
    """Bases are orthonormal and the projection is one onto a space that contains W, where singular values are 0 too."""
    net = case(dtype=torch.float64)
    if not case.summable or len(net.cores) == 1:
        return
    doubled = add(net, scale(net, 1e-14))
    at = gauges(doubled)
    close(to_dense(at.net), to_dense(doubled))
    z = randn(net)
    xi = project(at, z)
    close(project(at, xi.to_dense()).to_dense(), xi.to_dense())
    close(project(at, to_dense(net)).to_dense(), to_dense(net), 1e-10)
    close(to_dense(xi.to_network(point=True)), to_dense(doubled) + xi.to_dense())


@trees
def test_shipped_checks_pass_and_draw(case, tmp_path):
    found = check_geometry(case(dtype=torch.float64), figure=tmp_path / "geometry.png")
    assert found.passed, str(found)
    assert (tmp_path / "geometry.png").stat().st_size > 1000


@pytest.mark.parametrize("format", [LowRank, Tucker, TT, TTMatrix, Tree], ids=lambda f: f.__name__)
def test_check_geometry_of_a_format(format):
    assert check_geometry(format).passed


def test_random_trees_of_every_shape():
    """Irregular trees with nodes of degree up to five, outside legs anywhere or nowhere, every root."""
    generator = torch.Generator().manual_seed(0)

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    for _ in range(25):
        count = 3 + pick(5)
        parents = [-1, *(pick(k) for k in range(1, count))]
        legs: list[list[str]] = [[] for _ in range(count)]
        sizes: dict[str, int] = {}
        for k in range(1, count):
            for core in (k, parents[k]):
                legs[core].append(f"b{k}")
            sizes[f"b{k}"] = 2
        for k in range(count):
            leaf = len(legs[k]) == 1
            for j in range(1 if leaf else pick(3) // 2 + (pick(3) == 0)):
                legs[k].append(f"x{k}{j}")
                sizes[f"x{k}{j}"] = 2 + pick(2)
        outside = tuple(label for leg in legs for label in leg if label[0] == "x")
        cores = [torch.randn([sizes[a] for a in leg], generator=generator, dtype=torch.float64) for leg in legs]
        net = cut(Network(tuple(cores), tuple(map(tuple, legs)), outside[:1], outside[1:]))
        z = randn(net)
        want, rank = dense_projection(net, z)
        assert dimension(net) == rank
        for root in range(count):
            xi = project(gauges(net, root), z)
            close(xi.to_dense(), want, 1e-11)
            close(to_dense((-0.1 * xi).to_network(point=True)), to_dense(net) - 0.1 * want, 1e-12)


def test_a_broken_gauge_is_noticed():
    """The tests above fail where a block, a transpose or a gauge is wrong: each of these is tried here."""
    net = cut(Tree.random(row_modes=(3, 4), col_modes=(3, 4), rank=3, dtype=torch.float64))
    at = gauges(net)
    z = randn(net)
    xi = project(at, z)
    want = dense_projection(net, z)[0]
    raw = Tangent(at, tuple(center_gradients(at, z)))  # without the gauge condition
    assert float((raw.to_dense() - want).norm()) > 0.1 * float(want.norm())
    blocks = xi.blocks()
    v = next(v for v, own in enumerate(blocks.blocks) if len(own) > 2)
    for dropped in range(len(blocks.blocks[v])):
        own = tuple(block for k, block in enumerate(blocks.blocks[v]) if k != dropped)
        broken = BlockTree(
            blocks.legs,
            blocks.rows,
            blocks.cols,
            tuple(own if k == v else other for k, other in enumerate(blocks.blocks)),
        )
        try:
            again = center_gradients(at, broken)
        except KeyError:  # nobody stands in that half any more
            continue
        assert any(not torch.allclose(a, b) for a, b in zip(again, center_gradients(at, xi), strict=True))
    stale = gauges(cut(Tree.random(row_modes=(3, 4), col_modes=(3, 4), rank=3, dtype=torch.float64)))
    assert float((project(stale, z).to_dense() - want).norm()) > 0.1 * float(want.norm())


def test_large_networks_are_never_densified():
    """4^30 entries: only sweeps over the cores can do this."""
    generator = torch.Generator().manual_seed(0)
    net = TT.random(row_modes=(4,) * 30, rank=5, dtype=torch.float64, generator=generator)
    z = TT.random(row_modes=(4,) * 30, rank=3, dtype=torch.float64, generator=generator)
    at = gauges(net)
    net, z = scale(net, 1 / float(norm(net))), scale(z, 1 / float(norm(z)))
    xi = project(at, z)
    again = project(at, xi.to_network())
    assert float((again - xi).norm()) <= 1e-13
    close(inner(xi.to_network(), z), xi.inner(xi))
    moved = transport(retract(xi, 0.1), xi)
    assert 0 < float(moved.norm()) <= float(xi.norm()) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: project(net, torch.zeros(3, 3)), r"expected \(4, 5, 6\), got \(3, 3\)"),
        (lambda net: project(net, [1.0]), "dense tensor, a Network or a Tangent, got list"),
        (lambda net: project(net, Tucker.random(row_modes=(4, 5), rank=1)), "must have the modes of the point"),
        (lambda net: gauges(net, 7), "one of the 4 cores, got 7"),
        (lambda net: gauges(network("aib,bjc,cka->ij|k", dtype=torch.float32)), "must be a tree"),
        (lambda net: Tangent(gauges(net), gauges(net).center[:2]), "one delta a core"),
        (lambda net: project(net, torch.zeros(4, 5, 6)) + project(net, torch.zeros(4, 5, 6)), "same Gauges object"),
        (lambda net: retract(project(net, torch.zeros(4, 5, 6)), float("nan")), "step must be finite"),
        (lambda net: riemannian_gradient(net, lambda w: to_dense(w)), "one real number, got shape"),
        (lambda net: riemannian_gradient(net, lambda w: 3.0), "one real number, got float"),
        (lambda net: riemannian_gradient(net, lambda w: torch.zeros(())), "must depend on the network"),
    ],
)
def test_refusals(call, message):
    net = Tucker.random(row_modes=(4, 5, 6), rank=2)
    with pytest.raises((ValueError, TypeError), match=message):
        call(net)


def test_no_hessian_at_deficient_rank():
    net = Tucker.random(row_modes=(4, 5, 6), rank=2, dtype=torch.float64)
    flat = Tucker(
        torch.zeros(2, 2, 2, dtype=torch.float64), net.cores[1:] if net.cores[0].ndim == 3 else net.cores[:-1]
    )
    at = gauges(flat)
    with pytest.raises(ValueError, match="full rank at every bond"):
        hessian_vector_product(at, partial(_square), project(at, randn(net)))
    with pytest.raises(ValueError, match="check_gradient: the point must have full rank at every bond"):
        check_gradient(_square, add(net, scale(net, 1e-20)), hessian=False)


def _square(w: Network) -> Tensor:
    return to_dense(w).square().sum()


@trees
@dtypes
def test_two_gauge_chain(case, dtype):
    """y, the gradient of x, and the gradients of all centers against the dense gradient G = gy^T x."""
    net = minimal(case, dtype)
    rows, cols = prod(net.row_modes), prod(net.col_modes)
    x, gy = (torch.randn(7, n, dtype=dtype, generator=torch.Generator().manual_seed(n)) for n in (cols, rows))
    w = to_dense(net).reshape(rows, cols)
    for path in {longest_path(net), longest_path(net)[::-1], longest_path(net)[:1]}:
        for root in path:
            chain = Chain(gauges(net, root), path)
            y, kept = chain.forward(x)
            gx, found = chain.backward(kept, gy)
            torch.testing.assert_close(y, x @ w.mT, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gx, gy @ w.conj(), rtol=1e-12, atol=1e-12)
            wanted = center_gradients(chain.at, (gy.mT @ x.conj()).reshape(net.shape))
            for mine, dense in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12)


def test_chain_refuses_paths_that_are_none():
    net = TT.random(row_modes=(3, 4, 3), rank=2)
    for path in ((), (0, 2), (1, 0), (1, 2, 1), (0, 1)):
        with pytest.raises(ValueError, match="path must run over neighbouring cores"):
            Chain(gauges(net, 2), path)
    loose = TT([torch.ones(3, 5), torch.ones(5, 2)])
    with pytest.raises(ValueError, match="no larger than its two sides"):
        Chain(gauges(loose, 1), (0, 1))
    chain = Chain(gauges(net, 2), (0, 1, 2))
    with pytest.raises(ValueError, match="x must be"):
        chain.forward(torch.ones(2, 3))
    _, kept = chain.forward(torch.ones(2, 1))
    with pytest.raises(ValueError, match="gy must be"):
        chain.backward(kept, torch.ones(2, 3))


@trees
@dtypes
def test_extended_bases_are_orthonormal_whatever_the_deltas(case, dtype):
    """W + xi in bases [U, Q]: also where deltas vanish, have equal columns, or leave no room."""
    net = minimal(case, dtype)
    at = gauges(net)
    full = project(at, randn(net))
    thin = Tangent(at, [delta * (torch.arange(delta.numel()).reshape(delta.shape) % 2) for delta in full.deltas])
    for xi in (full, full * 0, gauge_fix(at, [delta * 1e-9 for delta in thin.deltas]), full * 1e9):
        wide = extend(xi)
        torch.testing.assert_close(to_dense(wide), to_dense(net) + xi.to_dense(), rtol=1e-12, atol=1e-12)
        for edge in at.edges:
            u = flatten(wide.cores[edge.child], at.axis(edge.child, edge.bond))
            torch.testing.assert_close(u.mH @ u, torch.eye(u.shape[1], dtype=dtype), rtol=0, atol=1e-12)
            old = at.up[edge.child]
            place = wide.cores[edge.child]
            for axis, size in enumerate(old.shape):
                place = place.narrow(axis, 0, size)
            assert torch.equal(place, old)
