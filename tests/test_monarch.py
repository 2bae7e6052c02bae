"""Monarch matrices: what they are as products of matrices, the exact projection, its tolerance, layers."""

from functools import partial
from math import gcd, prod, sqrt

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tnlayers
from decompositions import Monarch, TruncationWarning, als, monarch_projection, norm, numel, round, to_dense, to_matrix
from decompositions.formats.monarch import block_ranks
from decompositions.monarch import group_and_shuffle

F64 = torch.float64


def modes(count):
    return st.tuples(*[st.integers(1, 4)] * count)


def shuffle(x, first, second):
    """P_(first, second) x: the vector read as a first x second matrix, transposed."""
    return x.reshape(first, second).T.reshape(-1)


@given(rows=modes(2), cols=modes(2), rank=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_two_factors_are_two_block_diagonal_matrices_and_a_shuffle(rows, cols, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    net = Monarch.random(row_modes=rows, col_modes=cols, rank=rank, dtype=F64, generator=generator)
    left, right = net.factors
    (r,) = net.ranks
    (m1, m2), (n1, _) = rows, cols
    first = torch.block_diag(*right.reshape(n1, m2 * r, -1))  # block a: x[a, :] to (b, r)
    middle = torch.stack(
        [e.reshape(n1, m2, r).movedim(0, 1).reshape(-1) for e in torch.eye(n1 * m2 * r, dtype=F64)], 1
    )  # (a, b, r) to (b, a, r)
    last = torch.block_diag(*left.reshape(m2, m1, n1 * r))  # block b: (a, r) to y[:, b]
    out = torch.stack([shuffle(e, m2, m1) for e in torch.eye(m1 * m2, dtype=F64)], 1)  # (b, l) to (l, b)
    assert reference.relative(to_matrix(net), out @ last @ middle @ first) < 1e-12
    x = torch.randn(first.shape[1], dtype=F64, generator=generator)
    if r == 1:  # then the middle is a shuffle too
        assert torch.allclose(middle @ (first @ x), shuffle(first @ x, n1, m2))


@given(rows=modes(2), cols=modes(2), rank=st.integers(1, 4), complex_=st.booleans(), seed=st.integers(0, 10**6))
def test_the_projection_is_the_best_block_by_block(rows, cols, rank, complex_, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(prod(rows), prod(cols), dtype=torch.complex128 if complex_ else F64, generator=generator)
    net, error = monarch_projection(w, rows, cols, rank, with_error=True)
    blocks = w.reshape(*rows, *cols).permute(1, 2, 0, 3)  # (b, a): m_1 x n_2
    values = torch.linalg.svdvals(blocks)
    assert error == pytest.approx(float(values[..., rank:].norm() / w.norm()), abs=1e-12)
    assert reference.relative(to_matrix(net), w) == pytest.approx(error, abs=1e-12)
    again, nothing = monarch_projection(to_matrix(net), rows, cols, rank, with_error=True)  # a projection
    assert nothing < 1e-12
    assert reference.relative(to_dense(again), to_dense(net)) < 1e-12
    assert abs(float(norm(net)) ** 2 + float((w - to_matrix(net)).norm()) ** 2 - float(w.norm()) ** 2) < 1e-9 * float(
        w.norm() ** 2
    )


@given(data=st.data(), count=st.integers(1, 4), exponent=st.floats(-9, -0.1), seed=st.integers(0, 10**6))
def test_a_tolerance_is_kept_by_any_number_of_factors(data, count, exponent, seed):
    rows, cols = data.draw(modes(count)), data.draw(modes(count))
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(prod(rows), prod(cols), dtype=F64, generator=generator)
    net, error = monarch_projection(w, rows, cols, tol=10.0**exponent, with_error=True)
    assert error <= 10.0**exponent
    assert reference.relative(to_matrix(net), w) == pytest.approx(error, rel=1e-6, abs=1e-13)
    exact = monarch_projection(w, rows, cols, rank=block_ranks(rows, cols))
    assert reference.relative(to_matrix(exact), w) < 1e-12


@pytest.mark.parametrize("rank", [1, (2, 2), (1, 2)])
def test_three_factors_near_the_best(rank, rng):
    """A member is found exactly; elsewhere sweeps of least squares gain less than the sqrt(d - 1) that is promised."""
    shape = {"row_modes": (3, 2, 3), "col_modes": (2, 3, 3)}
    truth = to_matrix(Monarch.random(**shape, rank=rank, dtype=F64, generator=rng))
    assert monarch_projection(truth, (3, 2, 3), (2, 3, 3), rank, with_error=True)[1] < 1e-12
    w = torch.randn(18, 18, dtype=F64, generator=rng)
    net, error = monarch_projection(w, (3, 2, 3), (2, 3, 3), rank, with_error=True)
    best = als(w.reshape(net.shape), net, max_sweeps=300, with_fit=True)[1].error
    assert best <= error * (1 + 1e-9)
    assert error <= sqrt(2) * best


@pytest.mark.parametrize(("rows", "cols"), [((40, 4), (4, 50)), ((30, 5, 2), (4, 3, 20))])
def test_sketches_find_blocks_of_small_rank(rows, cols, rng):
    exact = Monarch.random(row_modes=rows, col_modes=cols, rank=2, dtype=F64, generator=rng)
    w = to_matrix(exact)
    assert monarch_projection(w, rows, cols, 2, method="randomized", with_error=True, generator=rng)[1] < 1e-12
    w = w + 0.01 * w.norm() / sqrt(w.numel()) * torch.randn(w.shape, dtype=F64, generator=rng)
    best = monarch_projection(w, rows, cols, 2, with_error=True)[1]
    found = monarch_projection(w, rows, cols, 2, method="randomized", with_error=True, generator=rng)[1]
    assert best <= found * (1 + 1e-9) <= 1.05 * best


@given(data=st.data(), kl=st.integers(1, 4), kr=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_any_shuffles_are_a_monarch_matrix_between_two_orders(data, kl, kr, seed):
    generator = torch.Generator().manual_seed(seed)
    width = kl * kr // gcd(kl, kr) * data.draw(st.integers(1, 3))
    a, b = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    left = torch.randn(kl, a, width // kl, dtype=F64, generator=generator)
    right = torch.randn(kr, width // kr, b, dtype=F64, generator=generator)
    inner, rows, cols = (torch.randperm(n, generator=generator) for n in (width, kl * a, kr * b))
    eye = torch.eye(width, dtype=F64)
    whole = (torch.block_diag(*left) @ eye[inner] @ torch.block_diag(*right) @ torch.eye(kr * b, dtype=F64)[cols])[rows]
    net, outer, first = group_and_shuffle(left, right, inner, rows=rows, cols=cols)
    assert reference.relative(to_matrix(net)[outer][:, torch.argsort(first)], whole) < 1e-12
    layer = tnlayers.Linear(kr * b, kl * a, bias=False, network=lambda *_: net, dtype=F64)
    shuffled = tnlayers.Shuffled(layer, outer, first)
    x = torch.randn(3, kr * b, dtype=F64, generator=generator)
    assert torch.allclose(shuffled(x), x @ whole.T, atol=1e-12)
    assert reference.relative(shuffled.weight, whole) < 1e-12


def test_even_shuffles_cost_nothing(rng):
    """P_(k, n) joins every two blocks equally often: the Monarch matrix has as many parameters as the blocks."""
    left, right = torch.randn(4, 6, 8, generator=rng), torch.randn(8, 4, 5, generator=rng)
    net = group_and_shuffle(left, right).network
    assert net.ranks == (1,)
    assert numel(net) == left.numel() + right.numel()


def test_a_shuffled_layer_trains_travels_and_refuses(rng, tmp_path, unchecked):
    inner = tnlayers.Linear(12, 8, network=tnlayers.random_network(Monarch, rank=1, order=2))
    layer = tnlayers.Shuffled(inner, rows=torch.randperm(8, generator=rng), cols=torch.randperm(12, generator=rng))
    x = torch.randn(4, 12, generator=rng)
    layer(x).square().sum().backward()
    dense = nn.functional.linear(x, layer.weight, layer.layer.bias[layer.rows])
    assert torch.allclose(layer(x), dense, atol=1e-5)
    assert all(core.grad is not None for core in inner.cores)
    twin = tnlayers.Shuffled(tnlayers.Linear(12, 8, network=lambda *_: inner.network.detach()), range(8), range(12))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    tnlayers.save(layer, tmp_path / "m.safetensors")
    with torch.no_grad():
        tnlayers.densify(twin)
    assert torch.allclose(twin(x), layer(x), atol=1e-5)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.allclose(exported(x), layer(x), atol=1e-5)
    conv = nn.Conv2d(6, 4, 3)
    images = torch.randn(2, 6, 5, 5, generator=rng)
    moved = tnlayers.Shuffled(conv, cols=torch.randperm(6, generator=rng), dim=1)
    assert torch.allclose(moved(images), nn.functional.conv2d(images, moved.weight, conv.bias), atol=1e-5)
    assert "cols shuffled, dim=1" in repr(moved)
    for order in ([0, 1], [0] * 12, torch.arange(12.0), [list(range(12))]):
        with pytest.raises(ValueError, match=r"Shuffled: cols must be a permutation of 0\.\.11"):
            tnlayers.Shuffled(inner, cols=order)
    with pytest.raises(ValueError, match="expected a layer with in_features and out_features"):
        tnlayers.Shuffled(nn.ReLU())
    blocks = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"L must take what R gives, expected 2 x 4 = 8 inputs, got 2 x 3 = 6"):
        group_and_shuffle(blocks, blocks)
    with pytest.raises(ValueError, match=r"inner must be a permutation of 0\.\.7, got \[0, 0"):
        group_and_shuffle(blocks, torch.zeros(2, 4, 3), [0] * 8)


def test_padding_defaults_and_counts(rng):
    w = torch.randn(13, 7, dtype=F64, generator=rng)
    net, error = monarch_projection(w, with_error=True)
    assert net.ranks == (1,)
    assert prod(net.row_modes) >= 13
    assert error < 1
    padded = torch.zeros(prod(net.row_modes), prod(net.col_modes), dtype=F64)
    padded[:13, :7] = w
    assert reference.relative(to_matrix(net), padded) == pytest.approx(error, rel=1e-9)
    assert numel(Monarch.skeleton((32, 32), (32, 32), 1)) == 65_536  # as in the paper: 2 n sqrt(n)
    with pytest.warns(TruncationWarning, match="monarch_projection: the tolerance was not reached"):
        monarch_projection(w, rank=1, tol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_other_dtypes_and_scales(dtype, rng):
    w = torch.randn(12, 12, generator=rng).to(dtype)
    for factor in (1e-20, 1.0, 1e20):
        net, error = monarch_projection(w * factor, tol=0.2, with_error=True)
        assert (net.dtype, error <= 0.2) == (dtype, True)


def test_layers(rng):
    linear = nn.Linear(12, 20)
    layer = tnlayers.Linear.from_dense(linear, partial(monarch_projection, tol=1e-6))
    x = torch.randn(5, 12, generator=rng)
    assert torch.allclose(layer(x), linear(x), atol=1e-5)
    conv = nn.Conv2d(6, 8, 3, padding=1)
    image = torch.randn(2, 6, 7, 7, generator=rng)
    whole = tnlayers.Conv2d.from_dense(conv, partial(monarch_projection, tol=1e-6))
    assert torch.allclose(whole(image), conv(image), atol=1e-5)
    fresh = tnlayers.Linear(16, 16, network=tnlayers.random_network(Monarch, rank=1, order=2))
    assert fresh.network.ranks == (1,)
    with pytest.raises(ValueError, match="RankAdaptive: the model must have a layer whose weight is a tree network"):
        tnlayers.RankAdaptive(fresh, 0.01)
    with pytest.raises(ValueError, match="round: the network must be a tree"):
        round(fresh.network.detach(), rank=1)


def test_refusals(unchecked):
    w = torch.randn(6, 6)
    with pytest.raises(ValueError, match="the modes must cover the matrix, expected products >= 6 x 6"):
        monarch_projection(w, (2, 2), (2, 3))
    with pytest.raises(ValueError, match=r"pair up, expected equal lengths, got \(2, 3\) and \(6,\)"):
        monarch_projection(w, (2, 3), (6,))
    with pytest.raises(ValueError, match="monarch_projection: rank must be at least 1, got 0"):
        monarch_projection(w, rank=0)
    with pytest.raises(ValueError, match="method must be 'exact' or 'randomized', got 'gram'"):
        monarch_projection(w, method="gram")
    for rank, tol in ((None, None), (2, 0.1)):
        with pytest.raises(ValueError, match="method='randomized' needs a rank and no tol"):
            monarch_projection(w, rank=rank, tol=tol, method="randomized")
    with pytest.raises(ValueError, match="monarch_projection: entries must be finite"):
        monarch_projection(w * torch.nan)
    with pytest.raises(ValueError, match="Monarch: row_modes and col_modes pair up"):
        Monarch.skeleton((2, 3), (4,), 1)
    with pytest.raises(ValueError, match="label 'j0' must have one size"):
        Monarch([torch.zeros(5, 4, 3, 1), torch.zeros(4, 5, 1, 2)])
