"""Entries, parts, integrals, interpolation and functions of networks: against the dense tensor, value and gradient."""

import itertools
import math

import numpy as np
import pytest
import torch
from cases import ALL, Case

import cross_approx.calculus.entries
from cross_approx import apply_function, decode, gather, integrate, interpolate, quadrature, subtensor
from decompositions import CP, TT, Network, TensorRing, Tree, TTMatrix, Tucker, to_dense

F64 = torch.float64
every = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)


def random_index(shape, count, rng):
    return torch.stack([torch.randint(n, (count,), generator=rng) for n in shape], 1)


def tracked(case: Case, dtype=F64) -> Network:
    net = case(dtype)
    return net.replace([core.detach().requires_grad_() for core in net.cores])


def assert_same(found, expected, net, rng):
    """Values, and the gradients of a random linear functional of them."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    probe = torch.randn(expected.shape, dtype=expected.dtype, generator=rng)
    gradients = [
        torch.autograd.grad((value * probe).sum().abs().square(), net.cores, allow_unused=True, retain_graph=True)
        for value in (found, expected)
    ]
    for a, b, core in zip(*gradients, net.cores, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(core) if a is None else a, torch.zeros_like(core) if b is None else b, rtol=1e-9, atol=1e-9
        )


def dense(value):
    return value if isinstance(value, torch.Tensor) else to_dense(value)


# --- gather ---


@every
@pytest.mark.parametrize(("dtype", "count"), [(F64, 5), (torch.complex128, 5), (F64, 300), (torch.complex128, 300)])
def test_gather_is_dense_indexing(case, dtype, count, rng):
    """Few rows go one by one, many are grouped by their index."""
    net = tracked(case, dtype)
    index = random_index(net.shape, count, rng)
    assert_same(gather(net, index), to_dense(net)[tuple(index.T)], net, rng)
    assert gather(net, index[:0]).shape == (0,)


@pytest.mark.parametrize("entries", [1, 40, 1 << 21])
def test_gather_in_chunks(entries, rng, monkeypatch):
    monkeypatch.setattr(cross_approx.calculus.entries, "ENTRIES", entries)
    for net in (
        TT.random(row_modes=(4, 3, 5), rank=3, dtype=F64, generator=rng),
        CP.random(row_modes=(4, 3, 5), rank=3, dtype=F64, generator=rng),
    ):
        index = random_index(net.shape, 57, rng)
        torch.testing.assert_close(gather(net, index), to_dense(net)[tuple(index.T)])


def test_gather_from_a_tensor_that_nobody_can_hold(rng):
    """2^60 entries, and rank-one values known by themselves; in float32 too."""
    vectors = torch.rand(60, 2, dtype=F64, generator=rng) + 0.5
    net = TT([v.reshape(*[1] * (k > 0), 2, *[1] * (k < 59)) for k, v in enumerate(vectors)])
    index = torch.randint(2, (100, 60), generator=rng)
    exact = vectors[torch.arange(60), index].prod(1)
    torch.testing.assert_close(gather(net, index), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(gather(net.to(torch.float32), index).double(), exact, rtol=1e-4, atol=0)
    half = gather(net.to(torch.bfloat16), index)
    assert half.dtype == torch.bfloat16


def test_gather_refuses(unchecked):
    net = TT.random(row_modes=(4, 5), rank=2)
    with pytest.raises(TypeError, match=r"gather: index must be an integer tensor, got torch\.float32"):
        gather(net, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"shape \(B, d = 2\), got \(3,\)"):
        gather(net, torch.zeros(3, dtype=torch.long))
    for bad in ([[0, 0], [4, 0]], [[0, 0], [0, -1]]):
        with pytest.raises(ValueError, match=r"in range of the shape \(4, 5\).*in row 1"):
            gather(net, torch.tensor(bad))


# --- subtensor ---


def keys(order):
    """A handful of keys of every kind for a network of this order."""
    yield (..., 0)
    yield (0, ...)
    yield tuple([-1] * order)
    yield tuple([slice(None, None, -1)] * order)
    yield tuple(torch.tensor([0, 0, -1]) if k < 5 else slice(None) for k in range(order))
    yield tuple(0 if k % 2 else slice(0, None, 2) for k in range(order))
    yield tuple(slice(0, 1) if k % 2 else -1 for k in range(order))
    yield tuple([slice(None)] + [0] * (order - 1))


def dense_part(x, key):
    entries = list(key)
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (x.ndim - len(entries) + 1)
    for axis in reversed(range(x.ndim)):
        entry = entries[axis] if axis < len(entries) else slice(None)
        if isinstance(entry, int):
            x = x.select(axis, entry % x.shape[axis])
        else:
            n = x.shape[axis]
            which = torch.arange(n)[entry] if isinstance(entry, torch.Tensor) else torch.tensor(range(n)[entry])
            x = x.index_select(axis, which)
    return x


@every
def test_subtensor_is_dense_slicing(case, rng):
    net = tracked(case)
    x = to_dense(net)
    for key in keys(net.order):
        if len(key) > net.order and Ellipsis not in key:
            continue
        part = subtensor(net, key)
        expected = dense_part(x, key)
        assert isinstance(part, torch.Tensor) == (expected.ndim == 0)
        assert_same(dense(part), expected, net, rng)


@every
def test_every_choice_of_removed_axes_keeps_a_valid_network(case, rng):
    """All subsets of axes, up to 32 of them; ranks never grow, and the format stays where it can."""
    net = case()
    if net.order > 6:
        pytest.skip("too many subsets")
    x = to_dense(net)
    own = type(net) in (TT, CP, Tree, TensorRing) and bool(net.is_tree or type(net) is not Tree)
    for keep in itertools.product((0, slice(None)), repeat=net.order):
        part = subtensor(net, keep)
        torch.testing.assert_close(dense(part), dense_part(x, keep), rtol=1e-11, atol=1e-11)
        if isinstance(part, Network):
            kept_rows = sum(entry != 0 for entry in keep[: len(net.rows)])
            assert len(part.rows) == kept_rows
            assert set(part.ranks) <= set(net.ranks)
            assert sum(core.numel() for core in part.cores) <= sum(core.numel() for core in net.cores)
            if own:
                assert type(part) is type(net)
                type(part)(
                    *((part.cores, part.tree) if isinstance(part, Tree) else (part.cores,)),
                )  # the constructor takes them


def test_formats_of_parts(rng):
    tucker = Tucker.random(row_modes=(4, 5, 6), rank=3, dtype=F64, generator=rng)
    part = subtensor(tucker, (1,))
    assert isinstance(part, Tucker)
    assert part.core.shape == (3, 3)
    assert part.shape == (5, 6)
    assert isinstance(subtensor(tucker, (1, 2)), Tucker)
    matrix = TTMatrix.random(row_modes=(2, 3), col_modes=(4, 5), rank=3, dtype=F64, generator=rng)
    part = subtensor(matrix, (..., 0, 0))
    assert isinstance(part, TT)
    assert part.cols == ()
    train = TT.random(row_modes=(4, 5, 6), rank=3, dtype=F64, generator=rng)
    from decompositions import add  # canonical labels: parts of different axes add up

    total = add(subtensor(train, (0, slice(0, 4))), subtensor(train, (slice(None), 0)))
    torch.testing.assert_close(to_dense(total), to_dense(train)[0, :4] + to_dense(train)[:, 0])


def test_subtensor_refuses(unchecked):
    net = TT.random(row_modes=(4, 5), rank=2)
    for key, message in (
        ((0, 0, 0), r"at most one entry an axis \(d = 2\), got 3"),
        ((..., 0, ...), "one Ellipsis, got 2"),
        ((4,), r"index of axis 0 must be in -4..3, got 4"),
        ((slice(2, 2),), "nothing of axis 0"),
        ((slice(None), torch.tensor([0, 5])), r"indices of axis 1 must be in -5..4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            subtensor(net, key)
    for key in ((True,), (None,), (1.0,), (torch.tensor([True, False, True, True]),), (torch.zeros(2),)):
        with pytest.raises(TypeError, match="subtensor: "):
            subtensor(net, key)


# --- decode ---


@every
def test_decode_puts_the_tensor_together(case, rng):
    net = case()
    x = to_dense(net)
    for blocks, average in ((None, 1), ([2] * net.order, 1), (None, 2)):
        whole = torch.full([-(-n // average) for n in net.shape], math.nan, dtype=F64)
        for place, values in decode(net, blocks=blocks, average=average):
            assert bool(whole[place].isnan().all())  # each entry once
            whole[place] = values
        expected = x
        for axis in range(x.ndim if average > 1 else 0):
            expected = torch.stack([part.mean(axis) for part in expected.split(average, axis)], axis)
        torch.testing.assert_close(whole, expected, rtol=1e-11, atol=1e-11)


def test_decode_of_a_part_under_a_limit(rng):
    net = TT.random(row_modes=(16, 9, 12), rank=4, dtype=F64, generator=rng)
    x = to_dense(net)[3, ::2, 1:9]
    for limit in (1 << 20, 2000, 300):
        whole = torch.zeros_like(x)
        for place, values in decode(net, (3, slice(None, None, 2), slice(1, 9)), max_bytes=limit):
            assert values.numel() * 8 <= limit
            whole[place] = values
        torch.testing.assert_close(whole, x)
    assert [value.shape for _, value in decode(net, (0, 0, 0))] == [()]
    with pytest.raises(ValueError, match="decode: one entry takes"):
        decode(net, max_bytes=8)
    with pytest.raises(ValueError, match="blocks must be one int >= 1, or one for each of the 3 axes"):
        decode(net, blocks=(1, 2))
    with pytest.raises(ValueError, match="average must be"):
        decode(net, average=0)
    with pytest.raises(ValueError, match="max_bytes must be a positive int"):
        decode(net, max_bytes=0)


def test_decode_makes_nothing_finer_than_its_result(rng):
    """A tensor of 2^90 entries, decoded at 8^3."""
    net = CP([torch.ones(1 << 12, 2, dtype=F64), *[torch.full((1 << 12, 2), 0.5, dtype=F64)] * 2])
    ((place, values),) = decode(net, average=1 << 9)
    assert place == (slice(0, 8),) * 3
    torch.testing.assert_close(values, torch.full((8, 8, 8), 0.5, dtype=F64))


# --- sums and integrals ---


@every
@pytest.mark.parametrize("weights", ["sum", "mean", "vectors"])
def test_integrals_of_dense(case, weights, rng):
    net = tracked(case)
    x = to_dense(net)
    subsets = [None, (0,), (-1,), tuple(range(0, net.order, 2))]
    for axes in subsets:
        numbers = sorted({axis % net.order for axis in (range(net.order) if axes is None else axes)})
        if weights == "vectors":
            given = [torch.randn(net.shape[axis], dtype=F64, generator=rng) for axis in numbers]
            found = integrate(net, axes if axes is None else numbers, given)
            expected = x
            for axis, w in reversed(list(zip(numbers, given, strict=True))):
                expected = torch.tensordot(expected, w, dims=([axis], [0]))
        else:
            found = integrate(net, axes, weights)
            expected = getattr(x, weights)(numbers)
        assert_same(dense(found), expected, net, rng)


def test_integrals_are_differentiable_in_the_weights(rng):
    net = TT.random(row_modes=(3, 4), rank=2, dtype=F64, generator=rng)
    w = torch.randn(4, dtype=F64, generator=rng, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: integrate(net, [0, 1], [torch.ones(3, dtype=F64), w]), w)


def test_quadrature_rules(rng):
    """Each rule integrates exactly what it says, on nodes of any spacing."""
    for n in (2, 3, 6, 7):
        x = torch.rand(n, dtype=F64, generator=rng).cumsum(0)
        a, b = x[0], x[-1]
        for rule, degree in (("trapezoid", 1), ("simpson", 2), ("polynomial", n - 1)):
            if rule == "simpson" and n < 3:
                continue
            w = quadrature(x, rule)
            for power in range(degree + 1):
                exact = (b ** (power + 1) - a ** (power + 1)) / (power + 1)
                torch.testing.assert_close((w * x**power).sum(), exact, rtol=1e-9, atol=1e-9)
    x = torch.linspace(0, 1, 9, dtype=F64)
    torch.testing.assert_close((quadrature(x, "simpson") * x**3).sum(), torch.tensor(0.25, dtype=F64))
    assert quadrature(x.float()).dtype == torch.float32
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(12))
    torch.testing.assert_close(quadrature(nodes, "polynomial", (-1.0, 1.0)), weights, rtol=1e-12, atol=1e-12)
    half = quadrature((nodes + 1) / 2, "polynomial", (0.0, 1.0))
    torch.testing.assert_close(half, weights / 2, rtol=1e-12, atol=1e-12)


def test_an_integral_of_a_function_on_a_grid():
    """The integral of exp(-(x + y + z)) over the unit cube: (1 - 1 / e)^3, by twelve Gauss nodes a mode."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(12))
    x, w = (nodes + 1) / 2, weights / 2
    e = torch.exp(-x)[:, None]
    found = integrate(CP([e, e, e]), weights=[w, w, w])
    assert abs(float(found) - (1 - math.exp(-1)) ** 3) < 1e-14


def test_integrals_refuse(unchecked):
    net = TT.random(row_modes=(4, 5), rank=2)
    ones = torch.ones(4)
    for call, message in (
        (lambda: integrate(net, (0, 0)), "none twice"),
        (lambda: integrate(net, 2), r"axes must be ints in -2..1, got 2"),
        (lambda: integrate(net, weights="max"), "'sum', 'mean' or vectors"),
        (lambda: integrate(net, weights=[ones]), "one vector of weights an axis, 2, got 1"),
        (lambda: integrate(net, 1, [ones]), r"shape \(5,\), got \(4,\)"),
        (lambda: quadrature(ones), "strictly increasing"),
        (lambda: quadrature(ones[:1]), "at least 2 nodes"),
        (lambda: quadrature(torch.arange(3.0), "gauss"), "rule must be one of"),
        (lambda: quadrature(torch.arange(3.0), interval=(0.0, 1.0)), "interval is for"),
        (lambda: quadrature(torch.zeros(1), "polynomial"), r"\(a, b\) with a < b"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="needs real weights"):
        integrate(net, 0, [ones.cfloat()])


# --- interpolation ---


def dense_interpolation(x, positions, extrapolate=False):
    """The 2^d corners one by one."""
    values = []
    for point in positions:
        total = 0
        for corner in itertools.product((0, 1), repeat=x.ndim):
            weight, at = 1.0, []
            for p, c, n in zip(point, corner, x.shape, strict=True):
                low = int(min(max(math.floor(p), 0), max(n - 2, 0)))
                w = float(p) - low
                weight = weight * (w if c else 1 - w) if n > 1 else weight * (1 - c)
                at.append(min(low + c, n - 1))
            total = total + weight * x[tuple(at)]
        values.append(total)
    return torch.stack(values)


@every
def test_interpolation_is_that_of_the_dense_tensor(case, rng):
    net = tracked(case)
    if net.order > 8:
        pytest.skip("2^31 corners")
    top = torch.tensor(net.shape, dtype=F64) - 1
    points = torch.rand(5, net.order, dtype=F64, generator=rng) * top
    points[0], points[1] = 0, top
    assert_same(interpolate(net, points), dense_interpolation(to_dense(net), points), net, rng)
    index = random_index(net.shape, 4, rng)
    torch.testing.assert_close(interpolate(net, index.double()), gather(net, index), rtol=1e-13, atol=1e-13)
    many = torch.rand(200, net.order, dtype=F64, generator=rng) * top
    one_by_one = torch.cat([interpolate(net, point) for point in many[:, None]])
    torch.testing.assert_close(interpolate(net, many), one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("align", ["corners", "cells"])
@pytest.mark.parametrize("outside", ["clamp", "zero"])
def test_conventions_are_those_of_grid_sample(align, outside, rng):
    net = TT.random(row_modes=(4, 5, 3), rank=3, dtype=F64, generator=rng)
    points = (2.6 * torch.rand(60, 3, dtype=F64, generator=rng) - 1.3).requires_grad_()
    found = interpolate(net, points, align=align, outside=outside)
    expected = torch.nn.functional.grid_sample(
        to_dense(net)[None, None],
        points.flip(1)[None, None, None],
        align_corners=align == "corners",
        padding_mode={"clamp": "border", "zero": "zeros"}[outside],
    ).flatten()
    torch.testing.assert_close(found, expected)
    (a,) = torch.autograd.grad(found.sum(), points)
    (b,) = torch.autograd.grad(expected.sum(), points)
    torch.testing.assert_close(a, b)


def test_interpolation_between_nodes_of_any_spacing(rng):
    """A multilinear function is exact, extrapolated too; slopes in the points are its partial derivatives."""
    grids = [torch.rand(n, dtype=F64, generator=rng).cumsum(0) for n in (4, 2, 6)]
    net = CP([torch.stack([torch.ones_like(g), g], 1) for g in grids])  # 1 + x y z
    points = torch.randn(40, 3, dtype=F64, generator=rng, requires_grad=True)
    found = interpolate(net, points, nodes=grids, outside="extrapolate")
    torch.testing.assert_close(found, 1 + points.prod(1))
    (slope,) = torch.autograd.grad(found.sum(), points)
    x, y, z = points.detach().unbind(1)
    torch.testing.assert_close(slope, torch.stack([y * z, x * z, x * y], 1))


def test_interpolation_gradients(rng):
    net = Tucker.random(row_modes=(3, 1, 4), rank=2, dtype=F64, generator=rng)
    net = net.replace([core.detach().requires_grad_() for core in net.cores])
    points = torch.tensor([[0.3, 0.0, 2.6], [1.7, 0.0, 0.2]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, *cores: interpolate(net.replace(cores), p, outside="clamp"),
                                    (points, *net.cores))  # fmt: skip


def test_interpolation_out_of_range(unchecked):
    net = CP([torch.arange(4.0)[:, None] + 1, torch.ones(1, 1)])
    point = torch.tensor([[3.5, 0.0]])
    with pytest.raises(ValueError, match=r"positions in 0..3 along axis 0, got 3.5 .* in row 0"):
        interpolate(net, point)
    for outside, value in (("clamp", 4.0), ("zero", 2.0), ("extrapolate", 4.5)):
        assert interpolate(net, point, outside=outside).item() == pytest.approx(value)
    edge = torch.linspace(-1, 1, 1000)[:, None] * torch.tensor([1.0, 0.0])
    assert interpolate(net, edge, align="corners").shape == (1000,)  # rounding at the ends is inside
    with pytest.raises(ValueError, match=r"points must be finite, got .* in row 0"):
        interpolate(net, torch.full((1, 2), math.nan))
    with pytest.raises(TypeError, match="integer ones are for gather"):
        interpolate(net, torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="nodes of axis 0 must be a strictly increasing vector"):
        interpolate(net, point, nodes=[torch.zeros(4), torch.zeros(1)])
    with pytest.raises(ValueError, match="got align='cells' too"):
        interpolate(net, point, nodes=[torch.arange(4.0), torch.zeros(1)], align="cells")
    with pytest.raises(ValueError, match="align must be one of"):
        interpolate(net, point, align="center")


# --- functions of networks ---


def test_functions_of_networks_by_cross(rng):
    x = torch.linspace(0, 1, 12, dtype=F64)
    ones = torch.ones(12, dtype=F64)
    total = CP([torch.stack([x if j == k else ones for j in range(4)], 1) for k in range(4)])  # x + y + z + w
    for function, exact in ((torch.exp, torch.exp), (lambda v: (1 + v).sqrt(), lambda v: (1 + v).sqrt())):
        result = apply_function(function, total, tol=1e-9, generator=rng)
        assert result.converged
        error = (to_dense(result.network) - exact(to_dense(total))).norm() / exact(to_dense(total)).norm()
        assert float(error) <= 1e-8
    train = TT.random(row_modes=(12,) * 4, rank=2, dtype=F64, generator=rng)
    result = apply_function(lambda a, b: a / (2 + b), train, total, tol=1e-9, generator=rng)
    expected = to_dense(train) / (2 + to_dense(total))
    assert float((to_dense(result.network) - expected).norm() / expected.norm()) <= 1e-8
    assert result.evaluations < 12**4


def test_functions_refuse(rng):
    a, b = TT.random(row_modes=(4, 4), rank=1), TT.random(row_modes=(4, 5), rank=1)
    with pytest.raises(ValueError, match=r"same modes, expected \(4, 4\), got \(4, 5\)"):
        apply_function(torch.add, a, b)
    with pytest.raises(TypeError, match="one or more networks"):
        apply_function(torch.exp)
    with pytest.raises(ValueError, match="values must be finite, got nan"):
        apply_function(lambda v: v * math.nan, a)


@pytest.mark.parametrize("empty", [slice(5, 2), slice(100, 200), slice(0, 3, -1)])
def test_an_empty_slice_is_refused_by_name(empty):
    net = TT.random(row_modes=(9, 4), rank=2)
    with pytest.raises(ValueError, match=r"subtensor: sizes of a network are at least 1, got nothing of axis 0"):
        subtensor(net, empty)
    with pytest.raises(ValueError, match=r"decode: sizes of a network are at least 1, got nothing of axis 0"):
        decode(net, empty)
