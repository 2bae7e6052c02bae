"""Geometry of Tucker tensors with shared factors, against dense projections and the geometry of trees."""

import pytest
import torch

from decompositions import Tucker, to_dense
from decompositions.geometry import gauges, project
from decompositions.geometry.shared_tucker import (
    SharedGauges,
    SharedTangent,
    possible_shared_ranks,
    retract_by,
    shared_gauge_fix,
    shared_gauges,
    shared_project,
    shared_retract,
    shared_transport,
)

F64 = torch.float64
CASES = {  # sizes and ranks of the groups, groups
    "graph": ((5, 7), (2, 3), ((0,), (1, 2))),
    "wide relation": ((9, 6), (6, 3), ((0,), (1, 2))),
    "symmetric": ((6,), (2,), ((0, 1, 2),)),
    "pairs": ((4, 5), (2, 3), ((0, 2), (1, 3))),
    "matrix": ((7,), (3,), ((0, 1),)),
    "square basis": ((5, 3), (2, 3), ((0,), (1, 2))),
    "rank 1": ((5, 7), (1, 1), ((0,), (1, 2))),
    "order 1": ((5,), (1,), ((0,),)),
}


def point(case, seed=0, dtype=F64):
    sizes, ranks, groups = CASES[case]
    torch.manual_seed(seed)
    owner = {k: g for g, own in enumerate(groups) for k in own}
    core = torch.randn([ranks[owner[k]] for k in range(len(owner))], dtype=dtype)
    return shared_gauges(core, [torch.randn(n, r, dtype=dtype) for n, r in zip(sizes, ranks, strict=True)], groups)


def dense_like(at, seed=1):
    torch.manual_seed(seed)
    return torch.randn([len(at.factors[g]) for g in at.owner], dtype=at.core.dtype)


def rebased(at, seed=2):
    """The same tensor by other cores."""
    torch.manual_seed(seed)
    core, factors = at.core, []
    for u, own in zip(at.factors, at.groups, strict=True):
        change = torch.randn(u.shape[1], u.shape[1], dtype=u.dtype)
        factors.append(u @ change)
        for k in own:
            core = torch.tensordot(core, torch.linalg.inv(change), ([k], [1])).movedim(-1, k)
    return shared_gauges(core, factors, at.groups)


def jacobian(at):
    """Orthonormal basis of the span of all derivatives of X with respect to core and factors: the tangent space."""
    sizes = [x.numel() for x in (at.core, *at.factors)]

    def build(flat):
        core, *factors = [part.view_as(x) for part, x in zip(flat.split(sizes), (at.core, *at.factors), strict=True)]
        return SharedGauges(core, tuple(factors), at.groups, (), ()).to_dense().reshape(-1)

    flat = torch.cat([x.reshape(-1) for x in (at.core, *at.factors)])
    u, s, _ = torch.linalg.svd(torch.autograd.functional.jacobian(build, flat), full_matrices=False)
    return u[:, s > 1e-10 * s[0]]


@pytest.mark.parametrize("case", CASES)
def test_gauges_keep_the_tensor_and_are_orthonormal(case):
    sizes, ranks, groups = CASES[case]
    torch.manual_seed(0)
    owner = {k: g for g, own in enumerate(groups) for k in own}
    core = torch.randn([ranks[owner[k]] for k in range(len(owner))], dtype=F64)
    factors = [torch.randn(n, r, dtype=F64) for n, r in zip(sizes, ranks, strict=True)]
    at = shared_gauges(core, factors, groups)
    dense = SharedGauges(core, tuple(factors), groups, (), ()).to_dense()
    torch.testing.assert_close(at.to_dense(), dense, rtol=1e-12, atol=1e-12)
    for u, own, link in zip(at.factors, groups, at.links, strict=True):
        torch.testing.assert_close(u.mT @ u, torch.eye(u.shape[1], dtype=F64), rtol=0, atol=1e-13)
        square = 0
        for k in own:
            rows = at.rest[k].movedim(k, -1).reshape(-1, at.rest[k].shape[k])
            square = square + rows.mT @ rows
            back = torch.tensordot(at.rest[k], link, ([k], [1])).movedim(-1, k)
            torch.testing.assert_close(back, at.core, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(square, torch.eye(len(square), dtype=F64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_the_projector_is_that_of_the_span_of_all_derivatives(case):
    at = point(case)
    basis, z = jacobian(at), dense_like(at)
    expected = (basis @ (basis.mT @ z.reshape(-1))).view_as(z)
    xi = shared_project(at, z)
    torch.testing.assert_close(xi.to_dense(), expected, rtol=0, atol=1e-12 * float(z.norm()))
    torch.testing.assert_close(shared_project(at, xi.to_dense()).to_dense(), xi.to_dense(), rtol=0, atol=1e-12)
    for mine, again in zip(xi.deltas, shared_project(at, xi.to_dense()).deltas, strict=True):
        torch.testing.assert_close(again, mine, rtol=0, atol=1e-12)
    other = dense_like(at, 5)
    assert abs(float((xi.to_dense() * other).sum() - (z * shared_project(at, other).to_dense()).sum())) < 1e-11
    assert abs(float(xi.inner(shared_project(at, other)) - (xi.to_dense() * other).sum())) < 1e-11
    assert abs(float(xi.norm() - xi.to_dense().norm())) < 1e-12
    # the point itself is a tangent vector
    torch.testing.assert_close(shared_project(at, at.to_dense()).to_dense(), at.to_dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_all_depends_on_the_tensor_alone(case):
    at = point(case)
    z, other = dense_like(at), rebased(at)
    a, b = shared_project(at, z), shared_project(other, z)
    torch.testing.assert_close(b.to_dense(), a.to_dense(), rtol=0, atol=1e-10)
    moved = [shared_retract(xi, -0.3) for xi in (a, b)]
    torch.testing.assert_close(moved[1].to_dense(), moved[0].to_dense(), rtol=0, atol=1e-10)
    carried = [shared_transport(new, xi) for new, xi in zip(moved, (a, b), strict=True)]
    torch.testing.assert_close(carried[1].to_dense(), carried[0].to_dense(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("far", [False, True])
def test_transport_is_the_projection(case, far):
    at = point(case)
    xi = shared_project(at, dense_like(at))
    new = point(case, seed=9) if far else shared_retract(xi, 0.2)
    carried = shared_transport(new, xi)
    torch.testing.assert_close(carried.to_dense(), shared_project(new, xi.to_dense()).to_dense(), rtol=0, atol=1e-11)
    torch.testing.assert_close(shared_transport(at, xi, lost=False).to_dense(), xi.to_dense(), rtol=0, atol=1e-11)


def slope(errors):
    return torch.tensor(errors, dtype=F64).log2().diff().neg().tolist()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("order 1",)])
def test_retraction_is_of_second_order(case):
    at = point(case)
    xi = shared_project(at, dense_like(at))
    steps = [0.02 / 2**k for k in range(4)]
    apart, along = [], []
    for t in steps:
        gap = shared_retract(xi, t).to_dense() - at.to_dense() - t * xi.to_dense()
        apart.append(float(gap.norm()))
        along.append(float(shared_project(at, gap).norm()))
    assert min(slope(apart)) > 1.9 or max(apart) < 1e-12
    assert min(slope(along)) > 2.8 or max(along) < 1e-12


def test_transport_without_what_was_lost_is_of_first_order_in_the_move():
    at = point("graph")
    xi = shared_project(at, dense_like(at))
    gaps = []
    for t in (0.02, 0.01, 0.005):
        new = shared_retract(xi, t)
        gap = shared_transport(new, xi, lost=False).to_dense() - shared_transport(new, xi).to_dense()
        gaps.append(float(gap.norm()))
    assert gaps[0] > 1e-6
    assert min(slope(gaps)) > 0.9


@pytest.mark.parametrize("tol", [0.5, 0.1, 1e-3, 0.0])
def test_tolerance_is_kept(tol):
    found = set()
    for seed in range(12):
        at = point("graph", seed)
        xi = shared_project(at, dense_like(at, seed + 50))
        wanted = at.to_dense() + 0.7 * xi.to_dense()
        made = shared_retract(xi, 0.7, tol=tol)
        assert float((made.to_dense() - wanted).norm()) <= tol * float(wanted.norm()) + 1e-12
        assert made.ranks == tuple(u.shape[1] for u in made.factors)
        found.add(made.ranks)
    if tol == 0:
        assert found == {(4, 6)}
    assert max(map(max, found)) > 1


def test_rank_is_a_cap_beside_a_tolerance():
    at = point("graph")
    xi = shared_project(at, dense_like(at))
    assert shared_retract(xi, tol=0.0, rank=(3, 4)).ranks == (3, 4)
    assert shared_retract(xi, rank=2).ranks == (2, 2)


def test_without_sharing_it_is_the_geometry_of_tucker_tensors():
    torch.manual_seed(0)
    core, factors = torch.randn(2, 3, 2, dtype=F64), [torch.randn(n, r, dtype=F64) for n, r in ((5, 2), (6, 3), (4, 2))]
    at, z = shared_gauges(core, factors, [(0,), (1,), (2,)]), torch.randn(5, 6, 4, dtype=F64)
    expected = project(gauges(Tucker(core, factors)), z).to_dense()
    torch.testing.assert_close(shared_project(at, z).to_dense(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(at.to_dense(), to_dense(Tucker(core, factors)), rtol=0, atol=1e-12)


def test_sharing_restricts_the_tangent_space():
    """A direction that moves the head factor alone is not tangent."""
    at = point("graph")
    free = shared_gauges(at.core, [at.factors[0], at.factors[1], at.factors[1]], [(0,), (1,), (2,)])
    z = dense_like(at)
    assert float(shared_project(free, z).norm()) > float(shared_project(at, z).norm()) + 1e-3


def test_doubled_gives_the_gradients_of_the_deltas():
    """Derivatives of a function of X + xi with respect to the deltas, gauge-fixed, project its gradient."""
    at, z = point("graph"), dense_like(point("graph"))
    deltas = [torch.zeros(shape, dtype=F64, requires_grad=True) for shape in at.shapes]
    core, factors = SharedTangent(at, tuple(deltas)).doubled(point=True)
    torch.einsum("abc,ia,jb,kc,ijk->", core, factors[0], factors[1], factors[1], z).backward()
    found = shared_gauge_fix(at, [delta.grad for delta in deltas])
    torch.testing.assert_close(found.to_dense(), shared_project(at, z).to_dense(), rtol=0, atol=1e-11)


def test_descent_along_the_negative_projection():
    at, target = point("graph"), dense_like(point("graph"))
    gradient = at.to_dense() - target
    xi = shared_project(at, gradient)
    moved = shared_retract(xi, -1e-4).to_dense()
    gain = 0.5 * ((at.to_dense() - target).square().sum() - (moved - target).square().sum())
    assert abs(float(gain / (1e-4 * xi.norm().square())) - 1) < 1e-2


def test_redundant_ranks_are_dropped_and_singular_cores_are_fine():
    torch.manual_seed(0)
    core, factors = torch.randn(9, 2, 2, dtype=F64), [torch.randn(10, 9, dtype=F64), torch.randn(7, 2, dtype=F64)]
    at = shared_gauges(core, factors, [(0,), (1, 2)])
    assert at.ranks == (4, 2) == possible_shared_ranks((9, 2), (10, 7), [(0,), (1, 2)])
    expected = torch.einsum("abc,ia,jb,kc->ijk", core, factors[0], factors[1], factors[1])
    torch.testing.assert_close(at.to_dense(), expected, rtol=1e-12, atol=1e-12)
    singular = torch.zeros(2, 3, 3, dtype=F64)
    singular[0, 0, 0] = 1.0
    at = shared_gauges(singular, [torch.randn(5, 2, dtype=F64), torch.randn(7, 3, dtype=F64)], [(0,), (1, 2)])
    xi = shared_project(at, dense_like(at))
    torch.testing.assert_close(shared_project(at, xi.to_dense()).to_dense(), xi.to_dense(), rtol=0, atol=1e-11)
    assert shared_retract(xi, 0.1, tol=0.0).ranks == (4, 6)
    made = retract_by(xi, lambda group, squares, norm: 5 if group == 0 else 1)
    assert made.ranks == (1, 1)


def test_refusals():
    core, factors = torch.randn(2, 3, 3), [torch.randn(5, 2), torch.randn(7, 3)]
    with pytest.raises(ValueError, match="groups must hold each of the 3 modes once"):
        shared_gauges(core, factors, [(0,), (1,)])
    with pytest.raises(ValueError, match="widths equal to the core's axes"):
        shared_gauges(core, factors, [(0, 1), (2,)])
    with pytest.raises(TypeError, match="expected real tensors"):
        shared_gauges(core.cfloat(), factors, [(0,), (1, 2)])
    at = shared_gauges(core, factors, [(0,), (1, 2)])
    with pytest.raises(ValueError, match=r"z must have the shape of the point, expected \(5, 7, 7\)"):
        shared_project(at, torch.randn(5, 7, 6))
    xi = shared_project(at, torch.randn(5, 7, 7))
    with pytest.raises(ValueError, match="step must be finite"):
        shared_retract(xi, float("nan"))
    with pytest.raises(ValueError, match="a rank >= 1 for each of the 2 groups"):
        shared_retract(xi, rank=(1, 2, 3))
    with pytest.raises(ValueError, match="one delta for the core and each factor"):
        SharedTangent(at, xi.deltas[:2])
