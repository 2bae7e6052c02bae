"""Where trains are largest: attained, exact where it is promised, never worse than a local search."""

import pytest
import torch

from cross_approx import argmax, argmin, gather
from decompositions import CP, TT, LowRank, Tree, TTMatrix, Tucker, scale, to_dense, transpose

F64 = torch.float64


def attained(net, found, x):
    """The value is the entry at its index, and no change of one index improves it by more than rounding."""
    at = tuple(found.indices.tolist())
    torch.testing.assert_close(found.value, x[at], rtol=1e-9, atol=1e-12)
    return at


def local(x, at, score):
    best = score(x[at])
    for axis in range(x.ndim):
        line = x[tuple(slice(None) if k == axis else i for k, i in enumerate(at))]
        assert float(score(line).max()) <= float(best) + 1e-9 * float(x.abs().max())


@pytest.mark.parametrize("shape", [(7,), (1,), (5, 6), (1, 4, 1), (4, 3, 5, 2), (2,) * 8])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("beam", [2, 10000])
def test_trains_of_random_cores(shape, rank, beam, rng):
    for _ in range(8):
        net = TT.random(row_modes=shape, rank=rank, dtype=F64, generator=rng)
        x = to_dense(net)
        for found, score in (
            (argmax(net, beam=beam), lambda v: v),
            (argmin(net, beam=beam), lambda v: -v),
            (argmax(net, beam=beam, magnitude=True), torch.abs),
        ):
            at = attained(net, found, x)
            local(x, at, score)
            if rank == 1 or beam > 100:  # the two cases in which it is exact
                torch.testing.assert_close(score(x[at]), score(x).max(), rtol=1e-9, atol=1e-12)


def test_exact_with_the_beam_promised(rng):
    """n_1 ... n_d / max(n_1, n_d) beginnings: nothing is dropped, in one direction at least."""
    for _ in range(10):
        net = TT.random(row_modes=(3, 2, 4, 5), rank=4, dtype=F64, generator=rng)
        x = to_dense(net)
        assert float(argmax(net, beam=24).value) == pytest.approx(float(x.max()))
        assert float(argmin(net, beam=24).value) == pytest.approx(float(x.min()))


@pytest.mark.parametrize("signs", [1.0, -1.0])
def test_rank_one_of_one_sign(signs, rng):
    """The largest of values that are all negative is the smallest in magnitude: a beam by norms alone loses it."""
    for _ in range(20):
        net = scale(CP([torch.rand(6, 1, dtype=F64, generator=rng) + 0.1 for _ in range(5)]), signs)
        train = TT([net.cores[0], *[c.T[..., None] for c in net.cores[1:-1]], net.cores[-1].T])
        x = to_dense(net)
        assert float(argmax(train, beam=1).value) == pytest.approx(float(x.max()), rel=1e-12)
        assert float(argmin(train, beam=1).value) == pytest.approx(float(x.min()), rel=1e-12)


def test_a_minimum_far_from_zero(rng):
    """A smooth function of 20 variables with a large constant: the sign trick finds where the constant is not seen."""
    d, n = 20, 32
    x = torch.linspace(-1, 1, n, dtype=F64)
    center = torch.randint(n, (d,), generator=rng)
    parts = [-((x - x[c]) ** 2) for c in center]  # rank 2: 100 + sum of parts
    cores = [torch.stack([parts[0] + 100, torch.ones(n)], 1)]
    one, zero = torch.ones(n), torch.zeros(n)
    cores += [torch.stack([torch.stack([one, zero], 1), torch.stack([p, one], 1)]) for p in parts[1:-1]]
    cores += [torch.stack([torch.ones(n), parts[-1]])]
    net = TT([core.double() for core in cores])
    found = argmax(net)
    assert found.indices.tolist() == center.tolist()
    assert float(found.value) == pytest.approx(100)
    far = torch.where(center < n // 2, n - 1, 0)
    assert torch.equal(gather(net, argmin(net).indices[None]), gather(net, far[None])) or float(
        argmin(net).value
    ) <= float(gather(net, far[None])) * (1 + 1e-12)


def test_a_needle(rng):
    """One entry of 2^40 is 1 in a background of size 1e-8: rank 2, and found."""
    at = torch.randint(2, (40,), generator=rng)
    cores = []
    for k in range(40):
        core = torch.zeros(2, 2, 2, dtype=F64)
        core[0, at[k], 0], core[1, :, 1] = 1.0, torch.tensor([1.0, -1.0])
        cores.append(core)
    cores[0] = torch.stack([cores[0][0, :, 0], 1e-8 * cores[0][1, :, 1]], 1)
    cores[-1] = torch.stack([cores[-1][0, :, 0], cores[-1][1, :, 1]])
    # the norm of the background is 2^20 * 1e-8
    assert torch.equal(argmax(TT(cores)).indices, at)
    assert torch.equal(argmax(TT(cores), magnitude=True).indices, at)


def test_chains_of_all_kinds(rng):
    nets = [
        TT.random(row_modes=(3, 4), col_modes=(2, 5), rank=3, axes=(2, 0, 3, 1), dtype=F64, generator=rng),
        transpose(TT.random(row_modes=(3, 4), col_modes=(2, 5), rank=3, dtype=F64, generator=rng)),
        TTMatrix.random(row_modes=(3, 2, 2), col_modes=(2, 4, 2), rank=3, dtype=F64, generator=rng),
        LowRank.random(row_modes=(6,), col_modes=(7,), rank=3, dtype=F64, generator=rng),
        Tucker.random(row_modes=(6, 4), rank=3, dtype=F64, generator=rng),
        Tree.random(row_modes=(2, 3, 4), rank=3, tree=((0, 1), (2,)), dtype=F64, generator=rng),
        CP.random(row_modes=(6, 4), rank=3, dtype=F64, generator=rng),
    ]
    for net in nets:
        x = to_dense(net)
        assert float(argmax(net, beam=500).value) == pytest.approx(float(x.max()))
        assert float(x[tuple(argmin(net, beam=500).indices.tolist())]) == pytest.approx(float(x.min()))


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex128])
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_dtypes_scales_and_zero(dtype, factor, rng):
    net = scale(TT.random(row_modes=(4, 5, 3), rank=2, dtype=dtype, generator=rng), factor)
    found = argmax(net, magnitude=True)
    assert found.value.dtype == dtype
    assert float(found.value.abs()) == pytest.approx(float(to_dense(net).abs().max()), rel=1e-5)
    zero = argmax(scale(net, 0.0), magnitude=True)
    assert float(zero.value.abs()) == 0.0
    constant = TT([torch.full((4, 1), -2.0), torch.ones(1, 4)])
    assert float(argmax(constant).value) == float(argmin(constant).value) == -2.0


def test_the_value_is_differentiable(rng):
    net = TT.random(row_modes=(4, 5), rank=2, dtype=F64, generator=rng)
    net = net.replace([core.detach().requires_grad_() for core in net.cores])
    found = argmax(net, beam=50)
    expected = torch.autograd.grad(to_dense(net).max(), net.cores)
    for a, b in zip(torch.autograd.grad(found.value, net.cores), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_refusals(unchecked):
    tucker = Tucker.random(row_modes=(4, 4, 4), rank=2)
    with pytest.raises(ValueError, match=r"argmax: expected a chain of cores .* got Tucker"):
        argmax(tucker)
    with pytest.raises(ValueError, match="argmin: expected a chain"):
        argmin(CP.random(row_modes=(4, 4, 4), rank=2))
    net = TT.random(row_modes=(4, 4), rank=2)
    with pytest.raises(ValueError, match="beam must be an int >= 1, got 0"):
        argmax(net, beam=0)
    with pytest.raises(TypeError, match="complex values have no order"):
        argmax(net.to(torch.complex64))
    with pytest.raises(ValueError, match="argmin: cores must be finite"):
        argmin(net.replace([net.cores[0] / 0, net.cores[1]]))
