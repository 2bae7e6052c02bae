"""Geometry at its edges: dtypes, half precision, points that differ, wrong kinds by name, and checks near rounding."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from test_geometry import _square, close, randn
from torch import Tensor

from decompositions import TT, LowRank, Network, Tree, TTMatrix, Tucker, add, inner, scale, to_dense
from decompositions import round as cut
from decompositions.geometry import (
    Tangent,
    check_gradient,
    gauges,
    hessian_vector_product,
    project,
    retract,
    riemannian_gradient,
    transport,
)

HALVES = [torch.float16, torch.bfloat16]


def transposed(net: Network) -> Network:
    return net.replace(rows=net.cols, cols=net.rows)


@pytest.mark.parametrize("format", [TT, LowRank], ids=lambda f: f.__name__)
def test_equal_legs_with_other_rows_are_no_equal_trees(format):
    """A transposed network has the legs of the first and other rows: labels are matched by place."""
    generator = torch.Generator().manual_seed(0)
    a = format.random(row_modes=(6,), col_modes=(6,), rank=2, dtype=torch.float64, generator=generator)
    b = transposed(a)
    xi = project(a, randn(a))
    want = project(b, xi.to_dense())
    for got in (transport(b, xi), project(b, xi), project(b, xi.blocks()), project(b, xi.to_network())):
        close(got.to_dense(), want.to_dense())
    grown = transport(b, project(cut(add(a, a), rank=1), randn(a)))  # other ranks need no detour
    assert grown.at.net.ranks == b.ranks


def test_transport_between_other_modes_is_refused():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (
        TT.random(row_modes=rows, col_modes=cols, rank=2, dtype=torch.float64, generator=generator)
        for rows, cols in (((6,), (5,)), ((6,), (4,)), ((6, 5), ()))
    )
    xi = project(a, randn(a))
    for other in (b, c, transposed(a)):
        for call in (transport, lambda point, z: project(point, z.blocks())):
            with pytest.raises(ValueError, match="project: z must have the modes of the point, expected TT"):
                call(other, xi)


@pytest.mark.parametrize("point", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_z_of_another_dtype_is_converted_or_refused(point, other):
    double = TT.random(row_modes=(3, 4, 3), rank=2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    net, z = double.to(point), scale(double, 2.0).to(other)
    star = Tucker.random(row_modes=(3, 4, 3), rank=2, dtype=other)
    xi = project(z, randn(z))
    for value in (z, star, to_dense(z), xi, xi.blocks()):
        if other.is_complex and not point.is_complex:
            with pytest.raises(ValueError, match=rf"z of {other} and a point of {point}; use point.to\(torch.complex"):
                project(net, value)
            continue
        got = project(net, value)
        assert all(delta.dtype == point for delta in got.deltas)
    if point.is_complex or not other.is_complex:
        close(project(net, z).to_dense(), 2 * to_dense(net), 1e-5)
        close(transport(net, xi).to_dense(), project(net, xi.to_dense()).to_dense(), 1e-5)


def test_numbers_are_the_only_factors():
    net = TT.random(row_modes=(3, 4), rank=2, dtype=torch.float64)
    xi = project(net, randn(net))
    close((xi / 2).to_dense(), xi.to_dense() / 2)
    for half in (0.5, torch.tensor(0.5), np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        for got in (xi * half, half * xi, xi / (1 / half)):
            assert isinstance(got, Tangent)
            close(got.to_dense(), xi.to_dense() / 2)
    for factor in (1j, torch.tensor(1j), np.complex64(1j)):
        for call in (lambda f: xi * f, lambda f: f * xi, lambda f: xi / f):
            with pytest.raises(TypeError, match=r"expects a complex point, got torch\.float64"):
                call(factor)
    complex_xi = project(net.to(torch.complex128), randn(net))
    close((1j * complex_xi).to_dense(), 1j * xi.to_dense())
    for factor in (torch.ones(2), torch.ones(1)):
        for call in (lambda f: xi * f, lambda f: f * xi, lambda f: xi / f):
            with pytest.raises(ValueError, match="a factor must be a number"):
                call(factor)
    for wrong in (
        lambda: xi + 1,
        lambda: 1 + xi,
        lambda: xi - net,
        lambda: xi - 1.0,
        lambda: xi * "2",
        lambda: xi * [2.0],
        lambda: np.ones(2) * xi,
        lambda: xi * np.ones(2),
        lambda: xi / net,
        lambda: xi * xi,
        lambda: 2 / xi,
    ):
        with pytest.raises(TypeError, match=r"unsupported operand|can't multiply|not support ufuncs"):
            wrong()
    with pytest.raises(TypeError, match="expected another tangent vector, got TT"):
        xi.inner(net)
    with pytest.raises(TypeError, match="deltas must have the point's dtype"):
        Tangent(xi.at, [delta.to(torch.complex128) for delta in xi.deltas])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("format", [TT, Tucker, LowRank, Tree], ids=lambda f: f.__name__)
def test_half_precision(format, dtype):
    """Gauges, projection, transport and retraction work; what needs small differences says that it does not."""
    generator = torch.Generator().manual_seed(3)
    exact = format.random(row_modes=(6,), col_modes=(5,), rank=2, generator=generator)
    net = exact.to(dtype)
    z = torch.randn(6, 5, generator=generator)
    xi, want = project(net, z), project(net.to(torch.float32), z)
    eps = torch.finfo(dtype).eps
    close(xi.to_dense().float(), want.to_dense(), 20 * eps)
    close(xi.norm(), want.norm(), 5 * eps)
    close(xi.inner(xi), want.inner(want), 10 * eps)
    moved = retract(xi, 0.3)
    assert moved.dtype == dtype
    close(to_dense(moved).float(), to_dense(retract(want, 0.3)), 20 * eps)
    assert transport(moved, xi).at.net.dtype == dtype
    g = riemannian_gradient(net, lambda w: (to_dense(w) - z.to(dtype)).square().sum() / 2)
    close(g.to_dense().float(), to_dense(net).float() - want.to_dense(), 40 * eps)
    with pytest.raises(TypeError, match=f"hessian_vector_product: expected single or double precision, got {dtype}"):
        hessian_vector_product(xi.at, _square, xi)
    with pytest.raises(TypeError, match=f"check_gradient: expected single or double precision, got {dtype}"):
        check_gradient(_square, net)


@pytest.mark.parametrize("modes", [(5,), (3, 4)], ids=str)
def test_hessian_of_a_linear_loss(modes):
    """On one core nothing bends: the Hessian of a linear loss is zero. On more it is the curvature of the manifold."""
    net = TT.random(row_modes=modes, rank=2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    target = randn(net)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)  # what else is trained is no business of ours

    for factor in (1.0, weight):

        def loss(w: Network, factor=factor) -> Tensor:
            return factor * (target * to_dense(w)).sum()

        at = gauges(net)
        h = hessian_vector_product(at, loss, project(at, randn(net, 5)))
        assert (float(h.norm()) == 0) == (len(modes) == 1)
        found = check_gradient(loss, net)
        assert found.passed, str(found)
        assert found.conclusive


def test_a_remainder_of_zero_passes():
    q = TT.random(row_modes=(5,), rank=1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = TT.random(row_modes=(5,), rank=1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for point in (q, net, scale(net, 0.0)):
        found = check_gradient(lambda w: ((to_dense(w) - to_dense(q)) ** 2).sum() / 2, point)
        assert found.passed, str(found)
        assert [row.outcome for row in found.rows[1:]] == ["exact", "exact"]
        assert "zero to rounding" in str(found)


def drawn(seed: int, dtype: torch.dtype):
    """A point and a loss at random: formats, ranks, sizes of both over decades, near its minimum or far from it."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    rows, cols, format = [
        ((4, 3), (3, 4), TT),
        ((4, 3, 5), (), Tucker),
        ((6,), (5,), LowRank),
        ((3, 4), (3, 4), Tree),
        ((5,), (), TT),
        ((2, 3), (3, 2), TTMatrix),
    ][pick(6)]
    options = {"rank": 1 + pick(3), "std": 10.0 ** (pick(5) - 2), "dtype": dtype, "generator": generator}
    net = cut(format.random(row_modes=rows, col_modes=cols, **options))
    size = float(to_dense(net).square().mean().sqrt())
    target = torch.randn(net.shape, dtype=dtype, generator=generator) * size
    if pick(3) == 0:
        target = to_dense(net) + 1e-3 * target
    factor, kind = 10.0 ** (pick(7) - 3), pick(6)

    def loss(w: Network) -> Tensor:
        y, z = to_dense(w) / size, target / size
        values = [
            lambda: (y - z).square() / 2,
            lambda: (y - z) ** 4,
            lambda: y.sin(),
            lambda: inner(w, w) / size**2,
            lambda: torch.nn.functional.softplus(y * z),
            lambda: y * z,
        ]
        return factor * values[kind]().sum()

    return net, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("off", [1.0, 1.01, 0.99])
def test_right_derivatives_pass_and_wrong_ones_fail(dtype, off, monkeypatch):
    """A hundred cases: nothing right fails in either precision; in double precision nothing wrong passes."""
    monkeypatch.setattr(
        "decompositions.geometry.checks.hessian_vector_product", lambda *args: off * hessian_vector_product(*args)
    )
    for seed in range(100):
        net, loss = drawn(seed, dtype)
        if off == 1.0:
            found = check_gradient(loss, net)
            assert found.passed, f"{seed} {found}"
        elif dtype == torch.float64:
            at = gauges(net)
            wrong = check_gradient(loss, net, gradient=off * riemannian_gradient(at, loss), hessian=False)
            assert not wrong.passed, f"{seed} {wrong}"
            found = check_gradient(loss, net)
            xi = project(at, randn(net))
            flat = float(hessian_vector_product(at, loss, xi).norm()) == 0  # one per cent of nothing
            assert found.rows[0].passed, f"{seed} {found}"
            assert found.passed == flat, f"{seed} {found}"


def test_rounding_is_told_from_error():
    net = TT.random(row_modes=(3, 4, 3), rank=2, generator=torch.Generator().manual_seed(0))
    found = check_gradient(lambda w: 1e-3 * inner(w, w) + 1e4, net)
    assert found.passed
    assert not found.conclusive
    assert {row.outcome for row in found.rows} == {"inconclusive"}
    assert "unsure" in str(found)
    assert all(len(row.floors) == len(row.steps) for row in found.rows)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, xi: riemannian_gradient(net, xi), TypeError, r"got Tangent; project\(point, xi\)"),
        (lambda net, xi: riemannian_gradient(net, np.ones(3)), TypeError, "riemannian_gradient: .* got ndarray"),
        (lambda net, xi: riemannian_gradient(_square, net), TypeError, "gauges: the point must be a Network"),
        (lambda net, xi: riemannian_gradient(net, to_dense), ValueError, "gradient: the loss .* got shape"),
        (lambda net, xi: riemannian_gradient(net, lambda w: None), ValueError, "got NoneType"),
        (lambda net, xi: riemannian_gradient(net, lambda w: 1j * _square(w)), ValueError, "got shape .*complex"),
        (lambda net, xi: hessian_vector_product(xi.at, to_dense, xi), ValueError, "hessian_vector_product: the loss"),
        (lambda net, xi: hessian_vector_product(xi.at, None, xi), TypeError, "loss must be a function"),
        (lambda net, xi: hessian_vector_product(xi.at, _square, net), TypeError, "xi must be a Tangent"),
        (lambda net, xi: check_gradient(to_dense, net), ValueError, "check_gradient: the loss .* got shape"),
        (lambda net, xi: check_gradient(to_dense, net, gradient=xi), ValueError, "check_gradient: the loss"),
        (lambda net, xi: check_gradient(lambda w: None, net), ValueError, "check_gradient: .* got NoneType"),
        (lambda net, xi: check_gradient(lambda w: 1j * _square(w), net), ValueError, "check_gradient: .*complex"),
        (lambda net, xi: check_gradient(lambda w: _square(w) / 0, net), ValueError, "must be finite at the network"),
        (lambda net, xi: check_gradient(net, _square), TypeError, "check_gradient: network must be a Network"),
        (lambda net, xi: check_gradient(None, net), TypeError, "check_gradient: loss must be a function"),
        (lambda net, xi: check_gradient(_square, net, gradient=net), TypeError, "gradient must be a Tangent"),
        (lambda net, xi: retract(xi, 1j), TypeError, "retract: step must be a real number, got 1j"),
        (lambda net, xi: retract(xi, "a"), TypeError, "retract: step must be a real number, got 'a'"),
        (lambda net, xi: retract(xi, None), TypeError, "retract: step must be a real number, got None"),
        (lambda net, xi: retract(xi, torch.ones(2)), TypeError, "retract: step must be a real number"),
        (lambda net, xi: retract(net), TypeError, "retract: xi must be a Tangent, got TT"),
        (lambda net, xi: gauges(net, root=0.5), TypeError, "gauges: root must be an int"),
        (lambda net, xi: gauges(torch.ones(3)), TypeError, "gauges: the point must be a Network, got Tensor"),
    ],
)
def test_refusals_by_name(call, error, message):
    net = TT.random(row_modes=(3, 4, 3), rank=2, dtype=torch.float64)
    with pytest.raises(error, match=message):
        call(net, project(net, randn(net)))


def test_inference_mode_and_nan_are_named():
    net = TT.random(row_modes=(3, 4, 3), rank=2, dtype=torch.float64)
    xi = project(net, randn(net))
    with torch.inference_mode():
        inside = gauges(net)
        for call in (
            lambda: riemannian_gradient(net, _square),
            lambda: hessian_vector_product(xi.at, _square, xi),
            lambda: check_gradient(_square, net),
        ):
            with pytest.raises(ValueError, match="leave inference_mode"):
                call()
    with pytest.raises(ValueError, match="leave inference_mode"):
        riemannian_gradient(inside, _square)
    assert gauges(net, root=np.int64(1)).root == 1
    assert retract(xi, torch.tensor(0.1)).ranks == net.ranks
    broken = net.replace([net.cores[0] * float("nan"), *net.cores[1:]])
    at = gauges(broken)
    with pytest.raises(ValueError, match=r"hessian_vector_product: entries must be finite, got .* NaN"):
        hessian_vector_product(at, _square, Tangent(at, at.center))
