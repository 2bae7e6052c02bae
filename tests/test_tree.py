"""Trees and the hierarchical SVD on them: the theorems, and the formats they contain as special cases."""

from math import sqrt

import numpy as np
import pytest
import torch

from decompositions import (
    TT,
    Network,
    Tree,
    TTMatrix,
    Tucker,
    balanced_tree,
    bond_sides,
    bond_singular_values,
    chain_tree,
    orthogonalize,
    st_hosvd,
    to_dense,
    tree_svd,
    tt_svd,
    unfold,
)

SHAPES = {
    "balanced": balanced_tree(5),
    "chain": chain_tree(5),
    "star": tuple((k,) for k in range(5)),
    "degree-four": ((0, (4,)), (1,), ((2,), (3,))),
    "axes-inside": (2, ((4,), 0, (3,)), (1,)),
    "deep": (((((0,), 1), (2,)), 3), (4,)),
}
trees = pytest.mark.parametrize("tree", SHAPES.values(), ids=SHAPES.keys())
SIZES = (3, 4, 2, 5, 3)


def tensor(seed: int = 0, dtype: torch.dtype = torch.float64, decay: float = 0.4) -> torch.Tensor:
    """A tensor whose unfoldings have decaying singular values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZES, generator=generator, dtype=dtype)
    for axis, size in enumerate(SIZES):
        q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=dtype)).Q
        x = torch.tensordot(x, q * decay ** torch.arange(size), dims=([axis], [1])).movedim(-1, axis)
    return x


@trees
def test_exact_at_full_ranks_and_for_a_tree_of_these_ranks(tree):
    x = tensor()
    assert float((to_dense(tree_svd(x, tree=tree)) - x).norm()) <= 1e-13 * float(x.norm())
    net = Tree.random(
        row_modes=SIZES, rank=2, tree=tree, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    again = tree_svd(to_dense(net), tol=1e-12, tree=tree)
    assert all(a <= b for a, b in zip(again.ranks, net.ranks, strict=True))
    assert float((to_dense(again) - to_dense(net)).norm()) <= 1e-12 * float(to_dense(net).norm())


@trees
def test_error_bound_of_the_theorem(tree):
    """sqrt(#bonds) times the best error: no better bound of the best is known than the largest tail of one bond."""
    for seed in range(4):
        x = tensor(seed)
        for rank in (1, 2, 3):
            net, error = tree_svd(x, rank, tree=tree, with_error=True)
            tails = []
            for bond, r in zip(net.bonds, net.ranks, strict=True):
                side = [net.outside.index(label) for label in bond_sides(net, bond)[0]]
                s = torch.linalg.svdvals(unfold(x, side))
                tails.append(float(s[r:].norm()))
            assert error * float(x.norm()) <= sqrt(sum(t * t for t in tails)) * (1 + 1e-12) + 1e-14
            assert error * float(x.norm()) >= max(tails) * (1 - 1e-12)  # no tensor of these ranks is nearer


def test_bound_of_a_binary_tree():
    """2 d - 3: the two bonds of the root cut the same unfolding."""
    for seed in range(10):
        x = tensor(seed, decay=0.7)
        net, error = tree_svd(x, 2, with_error=True)
        s = {
            b: torch.linalg.svdvals(unfold(x, [net.outside.index(k) for k in bond_sides(net, b)[0]])) for b in net.bonds
        }
        best = max(float(values[2:].norm()) for values in s.values())
        assert error * float(x.norm()) <= sqrt(2 * 5 - 3) * best * (1 + 1e-12)


@trees
@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-6])
def test_tolerance_and_isometries(tree, tol):
    x = tensor()
    net, error = tree_svd(x, tol=tol, tree=tree, with_error=True)
    assert error <= tol
    for k, (core, leg) in enumerate(zip(net.cores, net.legs, strict=True)):
        if k:
            assert leg[0] == f"b{k - 1}"
            flat = core.flatten(1)
            assert torch.allclose(flat @ flat.T, torch.eye(flat.shape[0], dtype=x.dtype), atol=1e-12)
    assert float(net.cores[0].norm()) == pytest.approx(float(to_dense(net).norm()), rel=1e-12)


@trees
def test_singular_values_of_every_bond(tree):
    x = tensor()
    net = tree_svd(x, tree=tree)
    for bond, values in bond_singular_values(net).items():
        side = [net.outside.index(label) for label in bond_sides(net, bond)[0]]
        want = torch.linalg.svdvals(unfold(x, side))
        assert torch.allclose(values[: len(want)], want[: len(values)], atol=1e-13)
        assert float(values[len(want) :].norm()) <= 1e-13


def test_train_and_star_are_the_known_decompositions():
    x = tensor()
    for rank in (1, 2, 3):
        rest, cores = x.reshape(-1, 3), []  # TT-SVD from the far end
        for size in SIZES[:0:-1]:
            u, s, vh = torch.linalg.svd(rest.reshape(-1, size * (cores[-1].shape[0] if cores else 1)))
            kept = min(rank, len(s))
            cores.append(vh[:kept])
            rest = u[:, :kept] * s[:kept]
        train = tree_svd(x, rank, tree=chain_tree(5))
        projected = rest
        for core in reversed(cores):
            projected = (projected.reshape(-1, core.shape[0]) @ core).reshape(projected.shape[0], -1)
        assert torch.allclose(projected.reshape(SIZES), to_dense(train), atol=1e-12)
        ends = float((to_dense(tt_svd(x, rank)) - x).norm())  # cut from both ends: as good, not the same
        assert ends == pytest.approx(float((projected.reshape(SIZES) - x).norm()), rel=0.2)
        star = tree_svd(x, rank, tree=SHAPES["star"])
        assert torch.allclose(to_dense(st_hosvd(x, rank)), to_dense(star), atol=1e-12)


def test_other_formats_as_trees():
    generator = torch.Generator().manual_seed(0)
    options = {"dtype": torch.float64, "generator": generator}
    tt = TT.random(row_modes=(3, 4), col_modes=(2,), rank=2, **options)
    as_tree = Tree([tt.cores[0], tt.cores[1], tt.cores[2]], chain_tree(3), num_rows=2)
    assert torch.equal(to_dense(as_tree), to_dense(tt))
    ttm = TTMatrix.random(row_modes=(2, 3), col_modes=(3, 2), rank=2, **options)
    assert Tree(ttm.cores, (0, 2, (1, 3)), num_rows=2).shape == ttm.shape
    tucker = Tucker.random(row_modes=(3, 4), col_modes=(2,), rank=2, **options)
    core, *factors = tucker.core, *(f.T for f in tucker.factors)
    same = Tree([core, *factors], ((0,), (1,), (2,)), num_rows=2)
    assert torch.allclose(to_dense(same), to_dense(tucker))


@trees
def test_the_dimension_tree_is_read_back(tree):
    net = Tree.random(row_modes=SIZES[:2], col_modes=SIZES[2:], rank=2, tree=tree)
    assert net.tree == tree
    assert (net.row_modes, net.col_modes) == (SIZES[:2], SIZES[2:])
    assert orthogonalize(net, center=len(net.cores) - 1).tree == tree
    assert net.is_tree


def test_ranks_are_capped_by_what_a_side_allows():
    net = Tree.random(row_modes=(2, 3, 4, 5), rank=100)
    assert net.bonds == ("b0", "b3", "b1", "b2", "b4", "b5")  # as the cores show them
    assert net.ranks == (6, 6, 2, 3, 4, 5)
    assert Tree.random(row_modes=(2, 3, 4, 5), rank=net.ranks).ranks == net.ranks
    x = torch.randn(2, 3, 4, 5)
    assert tree_svd(x, rank=(5, 5, 2, 3, 4, 4)).ranks == (5, 5, 2, 3, 4, 4)


def test_long_chains_need_no_recursion():
    """A thousand cores in one chain, nested a thousand deep."""
    net = Tree.random(row_modes=(1,) * 1000, rank=1, tree=chain_tree(1000))
    assert len(net.cores) == 1000
    assert net.is_tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ((), "tuples that are not empty"),
        (((0,), ()), "tuples that are not empty"),
        (((0,), "1"), "tuples that are not empty"),
        (((0,), (0,)), "each of the axes 0..2 once"),
        (((0,), (1,)), "each of the axes 0..2 once"),
        (((0,), (1,), (3,)), "each of the axes 0..2 once"),
        (((0,), (1,), (True,)), "tuples that are not empty"),
        (3, "tuples that are not empty"),
    ],
)
def test_refused_trees(tree, message):
    with pytest.raises(ValueError, match=message):
        tree_svd(torch.ones(2, 3, 4), tree=tree)
    with pytest.raises(ValueError, match=message):
        Tree.random(row_modes=(2, 3, 4), rank=1, tree=tree)


def test_refused_cores():
    with pytest.raises(ValueError, match=r"num_rows must be in 0\.\.2"):
        Tree([torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2, 3)], ((0,), (1,)), num_rows=3)
    with pytest.raises(ValueError, match="'b0' must have one size"):
        Tree([torch.zeros(2, 2), torch.zeros(3, 3), torch.zeros(2, 3)], ((0,), (1,)))
    with pytest.raises(ValueError, match="needs a rank"):
        tree_svd(torch.ones(2, 3), method="randomized")
    with pytest.raises(ValueError, match="finite"):
        tree_svd(torch.tensor([[1.0, float("nan")]]))
    assert isinstance(tree_svd(torch.ones(3)), Network)


def test_refused_modes_and_rows():
    for modes in ((0, 3), (3, -1)):
        with pytest.raises(ValueError, match="Tree: every mode size must be at least 1"):
            Tree.random(row_modes=modes, rank=2)
        with pytest.raises(ValueError, match="col_modes"):
            Tree.random(row_modes=(2,), col_modes=modes, rank=2)
    for wrong in ((2.0, 3), ("a",), 3):
        with pytest.raises(TypeError, match="Tree: row_modes must be a tuple of ints"):
            Tree.random(row_modes=wrong, rank=2)
    cores = [torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2, 3)]
    for num_rows in ("a", 1.0, True):
        with pytest.raises(TypeError, match="Tree: num_rows must be an int"):
            Tree(cores, ((0,), (1,)), num_rows=num_rows)
        with pytest.raises(TypeError, match="tree_svd: num_rows must be an int"):
            tree_svd(torch.ones(2, 3), num_rows=num_rows)
    with pytest.raises(ValueError, match=r"tree_svd: num_rows must be in 0\.\.2"):
        tree_svd(torch.ones(2, 3), num_rows=3)


@pytest.mark.parametrize("make", [balanced_tree, chain_tree])
def test_refused_axes(make):
    for wrong in (2.0, "01", None, (k for k in range(2)), [0, 1.0], True):
        with pytest.raises(TypeError, match=f"{make.__name__}: axes must be"):
            make(wrong)
    for wrong in ([0, 0], [-1, 0], [], 0, -2):
        with pytest.raises(ValueError, match=f"{make.__name__}: expected"):
            make(wrong)


def test_ints_of_numpy_are_ints():
    axes = [np.int64(k) for k in range(3)]
    assert balanced_tree(np.int64(3)) == balanced_tree(axes) == balanced_tree(3)
    tree = ((axes[0],), (axes[1], axes[2]))
    net = Tree.random(row_modes=(np.int64(2), 3), col_modes=(4,), rank=2, tree=tree)
    assert net.tree == ((0,), (1, 2))
    assert all(type(axis) is int for child in net.tree for axis in child)
    x = torch.randn(2, 3, 4)
    assert tree_svd(x, 2, tree=tree, num_rows=np.int64(2)).cols == ("i2",)
