"""HOSVD, ST-HOSVD, HOOI and Tucker-2: orthogonality, quasi-optimality, recovery, and a cross-check with tensorly."""

from functools import partial
from math import prod, sqrt

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_linalg import tensors

from decompositions import Tucker, hooi, hosvd, st_hosvd, to_dense, tucker2

EVERY = pytest.mark.parametrize("decompose", [hosvd, st_hosvd, hooi], ids=lambda f: f.__name__)
DTYPES = (torch.float64, torch.complex128)


def factor_defect(net: Tucker) -> float:
    return max((float((u.mH @ u - torch.eye(u.shape[1], dtype=u.dtype)).abs().max()) for u in net.factors), default=0.0)


@st.composite
def caps(draw, x):
    """A possible rank for every mode."""
    return tuple(draw(st.integers(1, min(n, x.numel() // n))) for n in x.shape)


@EVERY
@given(x=tensors(DTYPES, max_order=5, kinds=("gaussian", "graded", "deficient")), data=st.data())
def test_quasi_optimality_and_pythagoras(decompose, x, data):
    """`‖X - X̂‖^2` is at most the sum of the modes' tails, each a lower bound of the best: a factor sqrt(d)."""
    ranks = data.draw(caps(x))
    net = decompose(x, rank=ranks, method="exact")
    assert factor_defect(net) < 1e-12
    value = reference.dense(net)
    size = float(torch.linalg.vector_norm(x))
    error = float(torch.linalg.vector_norm(x - value))
    tails = [reference.tail(x, [k], r) for k, r in enumerate(ranks)]
    assert error <= sqrt(sum(t**2 for t in tails)) * (1 + 1e-9) + 1e-13 * size
    assert error >= max(tails) * (1 - 1e-9) - 1e-13 * size
    assert abs(float(torch.linalg.vector_norm(value)) ** 2 + error**2 - size**2) <= 1e-12 * size**2
    assert reference.relative(torch.linalg.vector_norm(net.core), torch.linalg.vector_norm(value)) < 1e-12
    # the core is what the factors see of x: the best one for them
    core = x
    for k, u in enumerate(net.factors):
        core = torch.movedim(torch.tensordot(u.mH, core, dims=([1], [k])), 0, k)
    assert float(torch.linalg.vector_norm(core - net.core)) <= 1e-12 * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("method", ["exact", "auto"])
def test_hosvd_core_is_all_orthogonal_and_sorted(dtype, method, rng):
    x = torch.randn(5, 4, 6, dtype=dtype, generator=rng)
    net = hosvd(x, method=method)
    assert reference.relative(reference.dense(net), x) < 1e-13
    for k in range(3):
        rows = torch.from_numpy(reference.unfolding(net.core, [k]))
        products = rows @ rows.mH
        values = torch.from_numpy(reference.singular_values(x, [k]).copy())
        assert float((products - torch.diag(products.diagonal())).abs().max()) < 1e-12 * float(products.abs().max())
        assert reference.relative(products.diagonal().real.sqrt(), values) < 1e-12


@given(x=tensors(DTYPES, max_order=4, kinds=("gaussian", "graded", "deficient", "peak")), data=st.data())
def test_hooi_is_never_worse_than_st_hosvd(x, data):
    ranks = data.draw(caps(x))
    start, refined = (f(x, rank=ranks, with_error=True)[1] for f in (st_hosvd, hooi))
    assert refined <= start * (1 + 1e-10) + 1e-13
    assert hooi(x, rank=ranks, max_sweeps=0, with_error=True)[1] == start


def test_hooi_improves_where_it_can_and_keeps_what_tol_chose(rng):
    x = torch.randn(8, 8, 8, dtype=torch.float64, generator=rng)
    start, refined = (f(x, rank=2, with_error=True)[1] for f in (st_hosvd, hooi))
    assert refined < start - 1e-3
    assert hooi(x, tol=0.5).ranks == st_hosvd(x, tol=0.5).ranks
    by_gram = hooi(x, rank=2, method="gram", with_error=True)[1]
    assert by_gram == pytest.approx(refined, rel=1e-6)
    with pytest.raises(ValueError, match="hooi: max_sweeps must be at least 0, got -1"):
        hooi(x, max_sweeps=-1)


def test_hooi_drops_the_ranks_that_the_others_make_redundant(rng):
    x = torch.randn(6, 6, 6, dtype=torch.float64, generator=rng)
    assert st_hosvd(x, rank=(5, 2, 1)).ranks == (5, 2, 1)
    assert hooi(x, rank=(5, 2, 1)).ranks == (2, 2, 1)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("method", ["auto", "exact", "gram", "randomized"])
def test_exact_recovery(decompose, dtype, method, rng):
    truth = Tucker.random(row_modes=(7, 1, 6, 5), rank=(3, 1, 2, 4), dtype=dtype, generator=rng)
    x = to_dense(truth)
    net, error = decompose(x, rank=(3, 1, 2, 4), method=method, with_error=True, generator=rng)
    assert error < 20 * torch.finfo(dtype).eps
    assert net.ranks == (3, 1, 2, 4)
    assert decompose(x, tol=1e-5).ranks == (3, 1, 2, 4)


@EVERY
def test_some_modes_only(decompose, rng):
    x = reference.graded((6, 5, 4, 3), 2.0, torch.float64, rng)
    for modes in ((), (2,), (0, 1), (3, 0)):
        net, error = decompose(x, tol=0.05, modes=modes, num_rows=1, with_error=True)
        assert (len(net.factors), net.row_modes, net.col_modes) == (len(modes), (6,), (5, 4, 3))
        assert error == pytest.approx(reference.relative(reference.dense(net), x), abs=1e-14)
        assert error <= 0.05
        assert [u.shape[0] for u in net.factors] == [x.shape[k] for k in modes]
        assert all(net.core.shape[k] == 6 - k for k in range(4) if k not in modes)
    with pytest.raises(ValueError, match=r"modes must be distinct axes in 0\.\.3, got \(0, 4\)"):
        decompose(x, modes=(0, 4))
    with pytest.raises(ValueError, match=r"modes must be distinct axes in 0\.\.3, got \(1, 1\)"):
        decompose(x, modes=(1, 1))
    with pytest.raises(ValueError, match=r"rank of mode 1 must be in 1\.\.5 .* got 6"):
        decompose(x, rank=(2, 6, 1, 1))
    with pytest.raises(ValueError, match=r"one entry per mode, expected 4, got 2"):
        decompose(x, rank=(2, 2))


def test_a_rank_above_what_the_unfolding_has_is_capped_or_refused(rng):
    """peers.md 15: tensorly returns a core larger than the tensor."""
    x = torch.randn(6, 6, 6, generator=rng)
    assert hosvd(x, rank=9).core.shape == (6, 6, 6)
    assert st_hosvd(torch.randn(30, 2, 3, generator=rng), rank=99).core.shape == (6, 2, 3)
    with pytest.raises(ValueError, match=r"rank of mode 0 must be in 1\.\.6 .* got 30"):
        st_hosvd(torch.randn(30, 2, 3, generator=rng), rank=(30, 2, 3))


def test_tucker2_is_a_convolution_of_three(rng):
    kernel = reference.graded((8, 6, 3, 3), 1.5, torch.float64, rng)
    net, error = tucker2(kernel, tol=0.1, with_error=True)
    assert error <= 0.1
    assert (net.row_modes, net.col_modes) == ((8,), (6, 3, 3))
    assert net.core.shape[2:] == (3, 3)
    u, v = net.factors
    x = torch.randn(2, 6, 10, 9, dtype=torch.float64, generator=rng)
    conv = torch.nn.functional.conv2d
    chain = conv(conv(conv(x, v.T[:, :, None, None]), net.core), u[:, :, None, None])
    assert reference.relative(chain, conv(x, reference.dense(net))) < 1e-13
    assert tucker2(kernel, rank=(3, 2)).core.shape == (3, 2, 3, 3)
    matrix = kernel.flatten(1)
    assert tucker2(matrix, rank=3, with_error=True)[1] == pytest.approx(
        reference.tail(matrix, [0], 3) / float(torch.linalg.vector_norm(matrix)), rel=1e-9
    )


@pytest.mark.usefixtures("unchecked")
def test_tucker2_needs_out_and_in():
    with pytest.raises(ValueError, match=r"tucker2: expected a tensor of order >= 2, got shape \(4,\)"):
        tucker2(torch.ones(4))


@pytest.mark.parametrize("shape", [(40, 3, 5), (3, 40, 5), (2, 2, 60)], ids=str)
def test_methods_agree(shape, rng):
    x = reference.graded(shape, 3.0, torch.float32, rng)
    ranks = tuple(min(3, n) for n in shape)
    errors = {
        method: st_hosvd(x, rank=ranks, method=method, with_error=True, generator=rng)[1]
        for method in ("exact", "auto", "gram", "randomized")
    }
    assert errors["auto"] == pytest.approx(errors["exact"], rel=1e-3, abs=1e-6)
    assert errors["gram"] == pytest.approx(errors["exact"], rel=1e-3, abs=1e-6)
    assert errors["randomized"] <= 1.01 * errors["exact"] + 1e-6


def test_graded_spectrum_in_single_precision(rng):
    """peers.md 16: 40^3 graded over ten decades, rank 5: float32 reaches the best error."""
    x = reference.graded((40, 40, 40), 10.0, torch.float32, rng)
    tails = [reference.tail(x.double(), [k], 5) for k in range(3)]
    size = float(torch.linalg.vector_norm(x.double()))
    for decompose in (hosvd, st_hosvd, hooi):
        error = decompose(x, rank=5, with_error=True)[1]
        assert error <= sqrt(sum(t**2 for t in tails)) / size * 1.001 + 1e-6


def test_against_tensorly(rng):
    """The same HOOI from the same kind of start: low rank plus noise, where the optimum is unique."""
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tucker

    tensorly.set_backend("numpy")
    truth = Tucker.random(row_modes=(8, 7, 6), rank=(3, 2, 2), dtype=torch.float64, generator=rng)
    x = to_dense(truth) + 1e-2 * torch.randn(8, 7, 6, dtype=torch.float64, generator=rng)
    core, factors = tucker(x.numpy(), rank=[3, 2, 2], init="svd", tol=1e-14, n_iter_max=100)
    theirs = torch.from_numpy(tensorly.tucker_to_tensor((core, factors)))
    ours = reference.dense(hooi(x, rank=(3, 2, 2), improvement=1e-16, max_sweeps=100))
    assert reference.relative(ours, theirs) < 1e-7
    assert reference.relative(ours, x) <= reference.relative(theirs, x) * (1 + 1e-12)


@pytest.mark.parametrize("order", range(1, 9))
def test_every_order(order, rng):
    shape = (3, 2, 4, 1, 2, 3, 2, 2)[:order]
    x = torch.randn(shape, dtype=torch.float64, generator=rng)
    for decompose in (hosvd, st_hosvd, partial(hooi, max_sweeps=2)):
        net = decompose(x)
        assert reference.relative(reference.dense(net), x) < 1e-13
        assert net.order == order
        assert prod(net.core.shape) <= x.numel()
