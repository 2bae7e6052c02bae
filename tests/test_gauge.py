"""Orthogonalization, bond singular values and rounding on every tree, against unfoldings of the dense tensor."""

import re
import warnings
from functools import partial
from math import prod, sqrt

import pytest
import reference
import torch
from cases import TREES, network
from hypothesis import given
from hypothesis import strategies as st

from decompositions import (
    TT,
    LowRank,
    Network,
    TruncationWarning,
    Tucker,
    add,
    bond_sides,
    bond_singular_values,
    inner,
    norm,
    orthogonalize,
    possible_ranks,
    round,
    scale,
    to_dense,
    tt_svd,
)

TREE = pytest.mark.parametrize("case", TREES, ids=repr)
DOUBLE = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
EPS = 1e-12


def centers(net: Network) -> range:
    """Every core, or some of a long chain."""
    return range(0, len(net.cores), 1 if len(net.cores) < 10 else 17)


def error_of(net: Network, exact: Network) -> float:
    double = torch.promote_types(exact.dtype, torch.float64)
    return reference.relative(reference.dense(net.to(double)), reference.dense(exact.to(double)))


@st.composite
def trees(draw, dtypes=(torch.float64,), max_decades=0.0):
    """Any tree of up to seven cores: shape, outside legs, sizes; bonds graded over up to `max_decades` decades."""
    count = draw(st.integers(1, 7))
    parents = [draw(st.integers(0, k - 1)) for k in range(1, count)]
    legs: list[list[str]] = [[] for _ in range(count)]
    sizes: dict[str, int] = {}
    for child, parent in enumerate(parents, start=1):
        legs[child].append(f"b{child}")
        legs[parent].append(f"b{child}")
        sizes[f"b{child}"] = draw(st.integers(1, 4))
    for k in range(count):
        for _ in range(draw(st.integers(0 if count > 1 else 1, 2))):
            label = f"i{len(sizes)}"
            if prod(size for name, size in sizes.items() if name[0] == "i") < 500:
                legs[k].append(label)
                sizes[label] = draw(st.integers(1, 4))
    legs = tuple(tuple(draw(st.permutations(leg))) for leg in legs)
    outside = draw(st.permutations([label for label in sizes if label[0] == "i"]))
    dtype, decades, seed = draw(st.sampled_from(dtypes)), draw(st.floats(0, max_decades)), draw(st.integers(0, 2**31))
    return partial(build_tree, legs, tuple(outside), draw(st.integers(0, len(outside))), sizes, dtype, decades, seed)


def build_tree(legs, outside, num_rows, sizes, dtype, decades, seed) -> Network:
    """Gaussian cores, graded along every bond (built in the test: the shape checker may not run inside a strategy)."""
    generator = torch.Generator().manual_seed(seed)
    double = torch.complex128 if dtype.is_complex else torch.float64
    cores = []
    for leg in legs:
        core = torch.randn([sizes[label] for label in leg], dtype=double, generator=generator)
        for axis, label in enumerate(leg):
            if label[0] == "b":
                weights = 10.0 ** (-decades * torch.arange(sizes[label], dtype=torch.float64))
                core = core * weights.reshape([-1 if a == axis else 1 for a in range(core.ndim)])
        cores.append(core.to(dtype))
    return Network(tuple(cores), legs, outside[:num_rows], outside[num_rows:])


# --- orthogonalize ---


@TREE
@DOUBLE
def test_every_center_is_an_orthogonal_gauge(case, dtype):
    net = case(dtype)
    exact = reference.dense(net)
    for center in centers(net):
        gauged = orthogonalize(net, center)
        assert type(gauged) is type(net)
        assert reference.isometry_defect(gauged, center) < EPS
        assert reference.relative(reference.dense(gauged), exact) < EPS
        size = torch.linalg.vector_norm(gauged.cores[center])
        assert reference.relative(size, torch.linalg.vector_norm(exact)) < EPS
    last = orthogonalize(net, -1)
    assert all(torch.equal(a, b) for a, b in zip(last.cores, orthogonalize(net, len(net.cores) - 1).cores, strict=True))


@TREE
def test_orthogonalize_of_the_half_types_stays_in_the_dtype(case):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        net = case(dtype)
        gauged = orthogonalize(net, 0)
        eps = torch.finfo(dtype).eps
        assert gauged.dtype == dtype
        # rounding is relative to the product of the cores' magnitudes, which a long chain's cancellation dwarfs
        double = net.to(torch.float64)
        made = gauged.to(torch.float64)
        sizes = [reference.dense(w.replace([core.abs() for core in w.cores])).norm() for w in (double, made)]
        size = float(max(sizes) / reference.dense(double).norm())
        assert error_of(gauged, net) < eps * len(net.cores) * size
        assert reference.isometry_defect(gauged.to(torch.float64), 0) < 8 * eps


@pytest.mark.parametrize("name", ["lowrank", "tucker", "tt", "ttm", "tree-irregular"])
def test_orthogonalize_is_differentiable(name, rng):
    net = next(case for case in TREES if case.id == name)()
    cores = [core.clone().requires_grad_() for core in net.cores]
    weight = torch.randn(net.shape, dtype=net.dtype, generator=rng)
    gauged = orthogonalize(net.replace(cores), 1)
    got = torch.autograd.grad(torch.sum(weight * to_dense(gauged)), cores, retain_graph=True)
    want = torch.autograd.grad(torch.sum(weight * reference.dense(net, cores)), cores)
    assert max(map(reference.relative, got, want)) < 1e-10
    size = torch.linalg.vector_norm(gauged.cores[1])  # not invariant by accident: the norm sits in the center
    (slope,) = torch.autograd.grad(size, cores[0])
    (truth,) = torch.autograd.grad(torch.linalg.vector_norm(reference.dense(net, cores)), cores[0])
    assert reference.relative(slope, truth) < 1e-10


@given(trees(dtypes=(torch.float64, torch.complex128)), st.data())
def test_gauge_of_any_tree(tree, data):
    net = tree()
    center = data.draw(st.integers(0, len(net.cores) - 1))
    gauged = orthogonalize(net, center)
    assert reference.isometry_defect(gauged, center) < EPS
    assert reference.relative(reference.dense(gauged), reference.dense(net)) < 1e-11


# --- singular values ---


@TREE
@DOUBLE
def test_bond_singular_values_are_those_of_the_unfoldings(case, dtype):
    net = case(dtype)
    exact = reference.dense(net)
    spectra = bond_singular_values(net)
    assert tuple(spectra) == net.bonds
    for bond, most in zip(net.bonds, possible_ranks(net), strict=True):
        first, second = bond_sides(net, bond)
        axes = reference.bond_axes(net, bond)
        assert first == tuple(net.outside[k] for k in axes)
        assert second == tuple(net.outside[k] for k in range(net.order) if k not in axes)
        want = torch.from_numpy(reference.singular_values(exact, axes))
        assert most == len(want)
        got = spectra[bond]
        assert not got.is_complex()
        assert bool((got.diff() <= 0).all())
        assert len(got) <= most
        assert torch.linalg.vector_norm(got - want[: len(got)]) < EPS * want[0]
        assert torch.linalg.vector_norm(want[len(got) :]) < EPS * want[0]


@given(trees())
def test_singular_values_of_any_tree(tree):
    net = tree()
    exact = reference.dense(net)
    for bond, got in bond_singular_values(net).items():
        want = torch.from_numpy(reference.singular_values(exact, reference.bond_axes(net, bond)))
        k = min(len(got), len(want))
        assert torch.linalg.vector_norm(got[:k] - want[:k]) < 1e-11 * want[0]


# --- rounding ---


@TREE
@DOUBLE
def test_round_without_arguments_removes_only_what_no_bond_can_hold(case, dtype):
    net = case(dtype)
    for center in centers(net):
        rounded = round(net, center=center)
        assert error_of(rounded, net) < EPS
        assert reference.isometry_defect(rounded, center) < EPS
        assert all(
            r <= min(have, most) for r, have, most in zip(rounded.ranks, net.ranks, possible_ranks(net), strict=True)
        )


@TREE
@DOUBLE
def test_round_of_a_doubled_network_gives_the_ranks_back(case, dtype):
    net = case(dtype)
    lean = round(net, tol=1e-10)
    for center in centers(net):
        halved = round(add(net, net), tol=1e-10, center=center)
        assert halved.ranks == lean.ranks
        assert error_of(halved, scale(net, 2.0)) < 1e-10


@TREE
@pytest.mark.parametrize("tol", [0.7, 0.3, 0.05])
def test_round_keeps_the_tolerance_with_the_center_anywhere(case, tol):
    net = case()
    exact = reference.dense(net)
    for center in centers(net):
        rounded = round(net, tol=tol, center=center)
        value = reference.dense(rounded)
        error = reference.relative(value, exact)
        assert error <= tol
        assert reference.isometry_defect(rounded, center) < EPS
        # an orthogonal projection: the discarded part is orthogonal to what is kept
        total = torch.linalg.vector_norm(exact).square()
        assert abs(torch.linalg.vector_norm(value).square() / total + error**2 - 1) < EPS


@TREE
@pytest.mark.parametrize("rank", [1, 2])
def test_round_to_a_rank_is_quasi_optimal_and_idempotent(case, rank):
    net = case()
    exact = reference.dense(net)
    tails = [reference.tail(exact, reference.bond_axes(net, bond), rank) for bond in net.bonds]
    for center in centers(net):
        rounded = round(net, rank=rank, center=center)
        assert all(r <= rank for r in rounded.ranks)
        value = reference.dense(rounded)
        error = float(torch.linalg.vector_norm(value - exact))
        # the best network of these ranks is no better than the largest tail; the sum of tails bounds ours
        assert error <= sqrt(sum(t**2 for t in tails)) * (1 + 1e-10) + 1e-12
        assert error >= max(tails, default=0.0) * (1 - 1e-10) - 1e-12
        again = round(rounded, rank=rank, center=center)
        assert reference.relative(reference.dense(again), value) < EPS


@given(trees(dtypes=(torch.float64, torch.complex128), max_decades=6.0), st.floats(1e-9, 0.5), st.data())
def test_round_error_of_any_tree(tree, tol, data):
    net = tree()
    center = data.draw(st.integers(0, len(net.cores) - 1))
    rounded = round(net, tol=tol, center=center)
    assert error_of(rounded, net) <= tol
    assert all(a <= b for a, b in zip(rounded.ranks, net.ranks, strict=True))
    assert reference.isometry_defect(rounded, center) < EPS


@given(trees(dtypes=(torch.float32, torch.complex64), max_decades=3.0), st.floats(-6, -0.3))
def test_round_error_in_single_precision(tree, exponent):
    """Down to 1e-6, which single precision holds for few cores: no excess, or a warning with the error."""
    net = tree()
    tol = 10.0**exponent
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rounded = round(net, tol=tol)
    assert rounded.dtype == net.dtype
    error = error_of(rounded, net)
    if tol > 4e-6:
        assert not caught
    if caught:
        assert stated(caught[0].message) == pytest.approx(error, rel=0.02)
        assert error > tol
    else:
        assert error <= tol


def stated(message: Warning) -> float:
    """The error that a TruncationWarning states."""
    found = re.search(r"got ([0-9.e+-]+) \(", str(message))
    assert isinstance(message, TruncationWarning)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tol", [0.3, 0.05, 1e-3])
@TREE
def test_round_in_half_precision_is_honest(case, dtype, tol):
    net = case(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rounded = round(net, tol=tol)
    error = error_of(rounded, net)
    assert rounded.dtype == dtype
    if caught:
        assert stated(caught[0].message) == pytest.approx(error, rel=0.02)
    assert bool(caught) == (error > tol)


def test_single_precision_finds_the_rank_at_1e_6(rng):
    """Two networks that cancel to 1e-4: in single precision their redundant part is rounding noise."""
    a = TT.random(row_modes=(6, 6, 6), rank=2, generator=rng, dtype=torch.float32)
    assert round(add(a, a), tol=1e-6).ranks == a.ranks
    assert error_of(round(add(a, a), tol=1e-6), scale(a, 2.0)) < 1e-6


def test_tolerance_below_the_dtype_warns(rng):
    net = TT.random(row_modes=(6, 6, 6, 6), rank=4, generator=rng, dtype=torch.float32)
    with pytest.warns(TruncationWarning, match=r"expected relative error <= 1e-09, got .*torch.float32"):
        rounded = round(net, tol=1e-9)
    assert 1e-9 < error_of(rounded, net) < 1e-6


@TREE
def test_a_binding_rank_warns_with_the_true_error(case):
    net = case()
    if max(round(net, tol=1e-10).ranks, default=1) == 1:
        assert round(net, rank=1, tol=0.1).order == net.order  # nothing binds, nothing is said
        return
    with pytest.warns(TruncationWarning, match="rank=1 binds") as caught:
        rounded = round(net, rank=1, tol=1e-4)
    assert stated(caught[0].message) == pytest.approx(error_of(rounded, net), rel=0.01)
    assert set(rounded.ranks) == {1}


@pytest.mark.parametrize("decades", [0.0, 1.5, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_round_by_gram_is_round_by_svd(decades, dtype, rng, monkeypatch):
    """In single precision the cuts read Gram matrices in double; graded bonds beyond their reach go to the SVD."""
    weights = 10.0 ** (-decades * torch.arange(12) / 6)
    net = TT.random(row_modes=(4,) * 8, rank=12, dtype=dtype, generator=rng)
    net = net.replace([core * weights[: core.shape[-1]] if k < 7 else core for k, core in enumerate(net.cores)])
    for options in ({"rank": 5}, {"rank": 11}, {"tol": 0.1}, {"tol": 1e-3}):
        for center in (0, 3, 7):
            ours = round(net, **options, center=center)
            with monkeypatch.context() as patch:
                patch.setattr(torch.linalg, "eigh", None)
                patch.setattr("decompositions.formats.gauge._HALF_PRICE", ())
                slow = round(net, **options, center=center)
            assert all(abs(a - b) <= 1 for a, b in zip(ours.ranks, slow.ranks, strict=True))
            assert error_of(ours, net) <= 1.001 * error_of(slow, net) + 2e-6 or error_of(ours, net) <= options["tol"]
            assert reference.isometry_defect(ours.to(torch.promote_types(dtype, torch.float64)), center) < 2e-6


@pytest.mark.parametrize("name", ["lowrank", "tucker", "tt", "tree-irregular"])
def test_round_is_differentiable_where_nothing_is_cut(name, rng):
    net = next(case for case in TREES if case.id == name)()
    cores = [core.clone().requires_grad_() for core in net.cores]
    weight = torch.randn(net.shape, dtype=net.dtype, generator=rng)
    got = torch.autograd.grad(torch.sum(weight * to_dense(round(net.replace(cores)))), cores)
    want = torch.autograd.grad(torch.sum(weight * reference.dense(net, cores)), cores)
    assert max(map(reference.relative, got, want)) < 1e-8


def test_autocast_changes_nothing(rng):
    """A rank change, or a penalty on the norm, inside the autocast region of a training step."""
    net = TT.random(row_modes=(5, 6, 4), rank=4, generator=rng)
    other = TT.random(row_modes=(5, 6, 4), rank=3, generator=rng)
    tracked = net.replace([core.clone().requires_grad_() for core in net.cores])
    plain = [round(net, tol=1e-3), orthogonalize(net, 1)]
    numbers = [norm(net), norm(tracked), inner(net, other), *bond_singular_values(net).values()]
    with torch.autocast("cpu", torch.bfloat16):
        cast = [round(net, tol=1e-3), orthogonalize(net, 1)]
        again = [norm(net), norm(tracked), inner(net, other), *bond_singular_values(net).values()]
        drawn = TT.random(row_modes=(5, 6, 4), rank=4, std=0.1)
    for a, b in zip(plain, cast, strict=True):
        assert all(torch.equal(*pair) for pair in zip(a.cores, b.cores, strict=True))
    assert all(torch.equal(*pair) for pair in zip(numbers, again, strict=True))
    assert float(norm(drawn)) == pytest.approx(0.1 * sqrt(120), rel=1e-6)


def test_the_tolerance_is_shared_by_the_cuts(rng):
    """The first cut, at the far end, may spend tol^2 / #cuts; what it leaves goes on."""
    x = reference.graded((6, 6, 6, 6), 1.5, torch.float64, rng)
    net, size = tt_svd(x), float(torch.linalg.vector_norm(x))
    for tol in (0.3, 0.1, 0.03, 0.01):
        for center, first_cut in ((0, 2), (3, 0)):
            share = (tol * size) ** 2 / 3
            axes = list(range(first_cut + 1))
            want = next(r for r in range(1, 40) if reference.tail(x, axes, r) ** 2 <= share)
            assert round(net, tol=tol, center=center).ranks[first_cut] == want


def test_the_smaller_of_rank_and_tolerance_wins(rng):
    net = TT.random(row_modes=(5, 5, 5), rank=4, dtype=torch.float64, generator=rng)
    free = round(net, tol=0.5)
    assert round(net, rank=5, tol=0.5).ranks == free.ranks
    assert round(net, rank={"b1": 1}).ranks == (4, 1)
    assert round(net, rank=(2, 3)).ranks == (2, 3)
    assert round(net, rank=100).ranks == net.ranks


@TREE
def test_round_of_zero_and_of_deficient_networks(case):
    net = case()
    zero = round(scale(net, 0.0), tol=0.1)
    assert set(zero.ranks) <= {1}
    assert not reference.dense(zero).any()
    assert all(bool(core.isfinite().all()) for core in zero.cores)
    assert not any(s.any() for s in bond_singular_values(scale(net, 0.0)).values())
    # a repeated slice along every bond of one core: the bonds' ranks fall, QR meets exact zeros
    deficient = net.replace([torch.ones_like(core) for core in net.cores])
    exact = reference.dense(deficient)
    assert set(round(deficient, tol=1e-10).ranks) <= {1}
    assert reference.relative(reference.dense(round(deficient, tol=1e-10)), exact) < 1e-10
    assert reference.relative(reference.dense(orthogonalize(deficient)), exact) < EPS


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_scales_at_the_edge_of_single_precision(factor, rng):
    net = scale(TT.random(row_modes=(4, 5, 6), rank=4, dtype=torch.float32, generator=rng), factor)
    for tol in (0.3, 1e-3):
        rounded = round(net, tol=tol)
        assert error_of(rounded, net) <= tol
    assert reference.relative(norm(net), torch.linalg.vector_norm(reference.dense(net.to(torch.float64)))) < 1e-6


def test_fat_bonds_shrink_to_what_the_sides_allow():
    net = network("ia,ajb,bk->ijk|", 2, dtype=torch.float64, a=7, b=9)
    assert (net.ranks, possible_ranks(net), round(net).ranks) == ((7, 9), (2, 2), (2, 2))
    assert orthogonalize(net, 1).ranks == (2, 2)
    assert LowRank.random(row_modes=(3,), col_modes=(8,), rank=2).ranks == (2, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad, rng):
    net = Tucker.random(row_modes=(4, 5, 6), rank=2, generator=rng)
    net.cores[2][1, 1] = bad
    with pytest.raises(ValueError, match="round: the network must have a finite norm"):
        round(net, tol=0.1)
    with pytest.raises(ValueError, match="bond_singular_values: the network must have a finite norm"):
        bond_singular_values(net)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tol": -0.1}, ValueError, "tol must be a finite relative error >= 0, got -0.1"),
        ({"tol": float("nan")}, ValueError, "tol must be a finite relative error >= 0, got nan"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": (2,)}, ValueError, "one entry per bond, expected 2, got 1"),
        ({"rank": (2, 0)}, ValueError, r"rank of bond 1 must be in 1\.\.3 .* got 0"),
        ({"rank": {"b7": 2}}, ValueError, r"expected some of \('b0', 'b1'\), got \['b7'\]"),
        ({"tol": 0.1, "center": 3}, ValueError, "center must name one of the 3 cores, got 3"),
    ],
)
def test_refusals(arguments, error, message):
    net = TT.random(row_modes=(4, 5, 6), rank=3)
    with pytest.raises(error, match=message):
        round(net, **arguments)
    with pytest.raises(ValueError, match="one entry per bond, expected 0, got 1"):
        round(TT([torch.ones(3)]), rank=(3,))
    with pytest.raises(ValueError, match=r"bond_sides: expected one of the bonds \('b0', 'b1'\), got 'x'"):
        bond_sides(net, "x")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tol": "small"}, ValueError, "tol must be a finite relative error >= 0, got 'small'"),
        ({"rank": {"b0": 1.5}}, TypeError, "rank entries must be ints, got 1.5"),
        ({"rank": 2.5}, TypeError, "rank must be an int, a sequence of ints or None, got 2.5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_types(arguments, error, message):
    with pytest.raises(error, match=message):
        round(TT.random(row_modes=(4, 5, 6), rank=3), **arguments)
