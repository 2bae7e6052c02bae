"""tucker_cross: exact at the true rank, honest where it is not, and within its limits to the entry."""

import pytest
import torch

from cross_approx import tucker_cross
from cross_approx.reading.sampled_fit import Block, fit_train, fit_tucker
from cross_approx.tucker import tucker_entries
from decompositions import TT, Tucker, st_hosvd, to_dense

F64 = torch.float64

SHAPES = [
    ((7,), 1),
    ((6, 9), 3),
    ((5, 1, 6), (2, 1, 2)),
    ((1, 1, 1), 1),
    ((12, 10, 14), 4),
    ((12, 10, 9, 11), (3, 2, 3, 4)),
    ((3, 4, 3, 4, 3), 2),
]


class Counting:
    def __init__(self, x):
        self.x, self.count, self.seen = x, 0, set()

    def __call__(self, index):
        self.count += len(index)
        self.seen |= {tuple(row) for row in index.tolist()}
        return self.x[tuple(index.unbind(1))]


def distance(net, x):
    return float((to_dense(net) - x).norm() / x.norm())


@pytest.fixture
def smooth():
    """1 / sqrt(1 + sum of squares): singular values that fall fast, no exact rank."""
    axes = torch.meshgrid(*(torch.linspace(0, 3, n, dtype=F64) for n in (40, 35, 30)), indexing="ij")
    return (1 + sum(a.square() for a in axes)).rsqrt()


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_exact_at_the_true_rank(shape, rank, dtype, rng):
    net = Tucker.random(row_modes=shape, rank=rank, generator=rng, dtype=dtype)
    x = to_dense(net)
    for cap in (rank, None):
        result = tucker_cross(x, rank=cap, tol=1e-11, generator=rng)
        assert result.converged, result.reason
        assert distance(result.network, x) <= 1e-10
        assert result.network.ranks == net.ranks
        assert result.network.core.dtype == dtype


@pytest.mark.parametrize("seed", range(5))
def test_few_evaluations_and_each_entry_once(seed):
    generator = torch.Generator().manual_seed(seed)
    x = to_dense(Tucker.random(row_modes=(60, 70, 80), rank=8, generator=generator, dtype=F64))
    counting = Counting(x)
    result = tucker_cross(counting, shape=x.shape, tol=1e-11, generator=generator)
    assert result.converged
    assert counting.count == len(counting.seen) == result.evaluations
    # fibers, core, and the two held-out samples
    assert result.evaluations <= 210 * 2 * 8 + 2 * 8**3 + 1200


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("value", [0.0, -3.0])
def test_constants(d, value):
    x = torch.full((6,) * d, value, dtype=F64)
    result = tucker_cross(x)
    assert result.converged
    assert result.network.ranks == (1,) * d
    torch.testing.assert_close(to_dense(result.network), x, rtol=0, atol=1e-13)


def test_rank_larger_than_a_mode(rng):
    x = torch.randn(4, 5, 3, generator=rng, dtype=F64)
    result = tucker_cross(x, rank=50, tol=1e-10, generator=rng)
    assert result.converged
    assert distance(result.network, x) <= 1e-10
    with pytest.raises(ValueError, match=r"rank of mode 2 must be in 1\.\.3"):
        tucker_cross(x, rank=(4, 4, 4))


def test_interpolates_at_its_pivots(smooth, rng):
    result = tucker_cross(smooth, tol=1e-4, generator=rng)
    assert result.converged
    at = torch.cartesian_prod(*result.pivots)
    exact = smooth[tuple(at.unbind(1))]
    torch.testing.assert_close(tucker_entries(result.network.core, result.network.factors, at), exact)


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
def test_claimed_error_is_honest(smooth, tol, rng):
    result = tucker_cross(smooth, tol=tol, generator=rng)
    assert result.converged
    assert result.error <= tol
    assert distance(result.network, smooth) <= 2 * tol


@pytest.mark.parametrize("seed", range(3))
def test_capped_rank_comes_close_to_the_best(seed):
    """Noise above the cap: a bare cross loses several times the error of HOSVD, the fit at most a quarter."""
    generator = torch.Generator().manual_seed(seed)
    x = to_dense(Tucker.random(row_modes=(40, 36, 44), rank=5, generator=generator, dtype=F64))
    x = x / x.norm() * x.numel() ** 0.5
    x = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=F64)
    result = tucker_cross(x, rank=5, tol=1e-6, generator=generator)
    assert not result.converged
    assert result.reason == "the rank cap binds"
    best = distance(st_hosvd(x, rank=5), x)
    assert distance(result.network, x) <= 1.25 * best
    assert result.evaluations < x.numel() // 2
    assert 0.8 <= result.error / distance(result.network, x) <= 1.3


def test_a_cap_for_one_mode_leaves_the_others_exact(rng):
    x = to_dense(Tucker.random(row_modes=(30, 32, 34), rank=(6, 6, 2), generator=rng, dtype=F64))
    result = tucker_cross(x, rank=(3, 6, 6), tol=1e-6, generator=rng)
    assert result.reason == "the rank cap binds"
    assert result.network.ranks == (3, 6, 2)
    best = distance(st_hosvd(x, rank=(3, 6, 2)), x)
    assert distance(result.network, x) <= 1.5 * best  # a bare cross has more than twice that error


def test_a_peak_beside_the_fibers_is_found(rng):
    """A box of rank one on a constant: fibers miss it, held-out entries see it and bring fibers through it."""
    x = torch.ones(20, 20, 20, dtype=F64)
    x[7:11, 3:8, 12:17] = 50.0
    result = tucker_cross(x, tol=1e-9, generator=rng)
    assert result.converged
    assert distance(result.network, x) <= 1e-9


def test_float32_stops_at_its_floor(smooth, rng):
    result = tucker_cross(smooth.float(), tol=1e-12, generator=rng)
    assert not result.converged
    assert "noise floor of torch.float32" in result.reason
    assert distance(result.network, smooth.float()) <= 1e-4


@pytest.mark.parametrize("most", [1, 50, 700, 3000])
def test_max_evals_is_never_exceeded(smooth, most, rng):
    counting = Counting(smooth)
    result = tucker_cross(counting, shape=smooth.shape, tol=1e-12, max_evals=most, generator=rng)
    assert counting.count == result.evaluations <= most
    assert not result.converged
    assert f"max_evals = {most}" in result.reason
    assert to_dense(result.network).shape == smooth.shape


def test_refusals(smooth):
    with pytest.raises(ValueError, match="max_evals must be positive, got 0"):
        tucker_cross(smooth, max_evals=0)
    with pytest.raises(ValueError, match="held_out must be positive, got 0"):
        tucker_cross(smooth, held_out=0)
    with pytest.raises(ValueError, match="chunk_fraction is for sources with chunks"):
        tucker_cross(smooth, chunk_fraction=0.3)
    bad = smooth.clone()
    bad[3] = float("nan")
    with pytest.raises(ValueError, match=r"entries must be finite|values must be finite"):
        tucker_cross(bad)
    with pytest.raises(TypeError, match="rank must be an int, a sequence of ints or None"):
        tucker_cross(smooth, rank="two")


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("masked", [False, True])
def test_fits_lower_the_error_on_their_blocks(dtype, masked, rng):
    """Blocks of a tensor of the ranks asked for, entries of weight zero wrong: the fits find the tensor."""
    sizes = (9, 8, 10)
    sets = [torch.arange(0, n, 2) for n in sizes]
    for kind in (Tucker, TT):
        net = kind.random(row_modes=sizes, rank=2, generator=rng, dtype=dtype)
        x = to_dense(net)
        blocks = []
        for mode in range(3):
            product = [torch.arange(n) if k == mode else sets[k] for k, n in enumerate(sizes)]
            values = x[product[0]][:, product[1]][:, :, product[2]]
            weights = None
            if masked:
                weights = (torch.rand(values.shape, generator=rng, dtype=F64) < 0.9).double()
                values = torch.where(weights > 0, values, 100.0)
            blocks.append(Block(tuple(product), values, weights))
        cores = [core + 0.1 * torch.randn(core.shape, generator=rng, dtype=dtype) for core in net.cores]
        if kind is Tucker:
            core, factors = fit_tucker(blocks, cores[0], cores[1:], 40)
            found = Tucker(core, factors)
        else:
            fitted = fit_train(blocks, [cores[0][None], cores[1], cores[2][..., None]], 40)
            found = TT([fitted[0][0], fitted[1], fitted[2][..., 0]])
        assert distance(found, x) <= 0.02  # the ridge is all that is left


def test_what_the_reason_and_the_refusals_say():
    result = tucker_cross(lambda i: torch.zeros(len(i)), shape=(40, 40, 40))
    assert result.converged
    assert result.reason == "the held-out error meets tol; every entry read is zero"
    with pytest.raises(TypeError, match=r"tucker_cross: max_evals is a count, expected an integer, got 100.5"):
        tucker_cross(lambda i: torch.zeros(len(i)), shape=(4, 4), max_evals=100.5)
    with pytest.raises(ValueError, match=r"expected mode sizes in a sequence, got shape=30; pass shape=\(30,\)"):
        tucker_cross(lambda i: torch.zeros(len(i)), shape=30)
