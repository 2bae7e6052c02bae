"""Round trips with tensorly, core lists and numpy, and networks as parametrizations."""

from functools import partial

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.nn.utils import parametrize

import tnlayers
from decompositions import CP, TT, LowRank, TensorRing, TTMatrix, Tucker, svd, to_dense, tt_svd, ttm_svd
from decompositions.exchange import from_cores, from_tensorly, to_cores, to_numpy, to_tensorly

F64 = torch.float64


def networks(rng):
    return [
        CP.random(row_modes=(3, 4), col_modes=(5,), rank=2, dtype=F64, generator=rng),
        Tucker.random(row_modes=(3, 4), col_modes=(5,), rank=(2, 3, 2), dtype=F64, generator=rng),
        Tucker.random(row_modes=(3, 4), col_modes=(5,), rank=2, modes=(2, 0, 1), dtype=F64, generator=rng),
        TT.random(row_modes=(3, 4), col_modes=(5,), rank=2, dtype=F64, generator=rng),
        TensorRing.random(row_modes=(3, 4), col_modes=(5,), rank=2, dtype=F64, generator=rng),
        TTMatrix.random(row_modes=(3, 2, 2), col_modes=(2, 4, 3), rank=2, dtype=F64, generator=rng),
    ]


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("backend", ["pytorch", "numpy"])
def test_tensorly_and_back(index, backend, rng):
    tensorly = pytest.importorskip("tensorly")
    net = networks(rng)[index]
    theirs = to_tensorly(net)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        dense = theirs.to_tensor()
    exact = to_dense(net)
    assert reference.relative(dense.reshape(exact.shape), exact) < 1e-13
    if backend == "numpy" and hasattr(theirs, "factors") and isinstance(net, TT | TensorRing | TTMatrix):
        theirs.factors = [factor.numpy() for factor in theirs.factors]
    again = from_tensorly(theirs, len(net.row_modes))
    assert type(again) is type(net)
    assert (again.row_modes, again.col_modes) == (net.row_modes, net.col_modes)
    assert reference.relative(to_dense(again), exact) < 1e-13


def test_weights_of_a_cp_are_absorbed():
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import parafac

    tensorly.set_backend("numpy")
    x = np.random.default_rng(0).random((4, 5, 6))
    theirs = parafac(x, 3, normalize_factors=True, random_state=0)
    ours = from_tensorly(theirs, 1)
    assert np.allclose(to_dense(ours).numpy(), theirs.to_tensor())
    assert ours.row_modes == (4,)


def test_lists_of_cores(rng):
    for net in networks(rng):
        if isinstance(net, Tucker):
            with pytest.raises(TypeError, match="to_cores: expected a TT, TTMatrix, TensorRing or CP"):
                to_cores(net)
            continue
        again = from_cores([core.numpy() for core in to_cores(net)], len(net.row_modes))
        assert type(again) is type(net)
        assert reference.relative(to_dense(again), to_dense(net)) < 1e-14
    one = tt_svd(torch.randn(5, dtype=F64, generator=rng))
    assert torch.equal(to_dense(from_cores(to_cores(one))), to_dense(one))
    closed = from_cores([torch.randn(2, 3, 2, dtype=F64, generator=rng)])  # a ring of one core: its trace
    assert closed.shape == (3,)


def test_numpy(rng):
    for net in networks(rng):
        again = net.replace([torch.from_numpy(core) for core in to_numpy(net)])
        assert torch.equal(to_dense(again), to_dense(net))
    half = LowRank.random(row_modes=(3,), col_modes=(4,), rank=2, dtype=torch.bfloat16)
    assert to_numpy(half)[0].dtype == np.float32


def test_refusals(rng, unchecked):
    with pytest.raises(TypeError, match="to_tensorly: tensorly has no counterpart of LowRank"):
        to_tensorly(LowRank.random(row_modes=(3,), col_modes=(3,), rank=1))
    with pytest.raises(TypeError, match="has a factor for every mode, expected 3, got 1"):
        to_tensorly(Tucker.random(row_modes=(3, 4, 5), rank=2, modes=(1,)))
    with pytest.raises(TypeError, match=r"has its axes in order, got axes \(1, 0\)"):
        to_tensorly(TT.random(row_modes=(3, 4), rank=2, axes=(1, 0)))
    with pytest.raises(TypeError, match="from_tensorly: expected a CPTensor"):
        from_tensorly([1])
    with pytest.raises(ValueError, match=r"got 2 cores of \[2, 3\] axes"):
        from_cores([torch.zeros(2, 3), torch.zeros(1, 2, 3)])
    with pytest.raises(ValueError, match="the outer ranks must agree, expected 1 at the end, got 2"):
        from_cores([torch.zeros(1, 2, 3), torch.zeros(3, 2, 2)])
    with pytest.raises(TypeError, match="expected torch tensors or numpy arrays, got list"):
        from_cores([[1.0]])


# --- parametrizations ---


@pytest.mark.parametrize("recipe", [partial(svd, rank=3), partial(ttm_svd, rank=4, order=2)])
def test_any_module_takes_a_network(recipe, rng):
    lstm = nn.LSTM(7, 11)
    plain = lstm.weight_hh_l0.detach().clone()
    parametrize.register_parametrization(lstm, "weight_hh_l0", tnlayers.NetworkWeight(recipe))
    net = recipe(plain)
    error = float((lstm.weight_hh_l0.detach() - plain).norm())
    exact = to_dense(net).reshape(np.prod(net.row_modes), -1)[:44, :11]
    assert error == pytest.approx(float((exact - plain).norm()), rel=1e-4)
    out, _ = lstm(torch.randn(5, 2, 7, generator=rng))
    out.sum().backward()
    originals = list(lstm.parametrizations.weight_hh_l0.parameters())
    assert len(originals) == len(net.cores)
    assert all(p.grad is not None and bool(p.grad.any()) for p in originals)
    torch.optim.SGD(lstm.parameters(), 0.1).step()
    assert float((lstm.weight_hh_l0.detach() - exact).norm()) > 0
    lstm.weight_hh_l0 = plain  # assigning decomposes anew
    assert torch.allclose(lstm.weight_hh_l0, exact, atol=1e-6)
    parametrize.remove_parametrizations(lstm, "weight_hh_l0")
    assert torch.allclose(lstm.weight_hh_l0, exact, atol=1e-6)


def test_state_dicts_and_kernels(rng):
    recipe = partial(svd, rank=5)
    first, second = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    for conv in (first, second):
        parametrize.register_parametrization(conv, "weight", tnlayers.NetworkWeight(recipe))
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 4, 8, 8, generator=rng)
    assert torch.equal(first(x), second(x))


def test_bad_recipes(unchecked):
    with pytest.raises(TypeError, match="NetworkWeight: the recipe must return a Network, got Tensor"):
        parametrize.register_parametrization(nn.Linear(4, 4), "weight", tnlayers.NetworkWeight(lambda w: w))
    small = LowRank.random(row_modes=(2,), col_modes=(4,), rank=1)
    with pytest.raises(ValueError, match="the network must cover the weight, expected 4 x 4"):
        parametrize.register_parametrization(nn.Linear(4, 4), "weight", tnlayers.NetworkWeight(lambda w: small))
