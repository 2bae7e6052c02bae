"""Jobs in lockstep: the same results as one by one, from one batched call for all equal requests."""

import pytest
import torch
from torch import nn

import tnlayers
from decompositions import LowRank, TTMatrix, Tucker, orthogonalize, to_dense
from decompositions.formats.gauge import cut_by, cutting, orthogonalizing
from decompositions.geometry import gauges, project
from decompositions.geometry.gauges import gauging
from decompositions.geometry.retraction import extend, extending
from decompositions.linalg import safe_svd
from decompositions.lockstep import alone, together


def trees(dtype=torch.float64):
    torch.manual_seed(0)
    return [
        *(LowRank.random(row_modes=(12,), col_modes=(9,), rank=r, dtype=dtype) for r in (3, 3, 2, 3)),
        *(TTMatrix.random(row_modes=(3, 4, 2), col_modes=(2, 3, 4), rank=3, dtype=dtype) for _ in range(3)),
        *(Tucker.random(row_modes=(5, 6), col_modes=(4,), rank=2, dtype=dtype) for _ in range(2)),
    ]


def keep(net):
    """A choice of ranks that differs from network to network: what is left after a tenth of the norm is cut."""
    return lambda bond, squares, norm: int((squares.flip(0).cumsum(0).flip(0) > 0.1 * norm**2).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_results_are_those_of_one_by_one(dtype):
    nets = trees(dtype)
    for a, b in zip(together([orthogonalizing(net) for net in nets]), map(orthogonalize, nets), strict=True):
        assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a.cores, b.cores, strict=True))
    for (a, error), net in zip(together([cutting(net, keep(net)) for net in nets]), nets, strict=True):
        b, expected = cut_by(net, keep(net))
        assert a.ranks == b.ranks
        assert error == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert torch.allclose(to_dense(a), to_dense(b), rtol=1e-4, atol=1e-5)
    points = together([gauging(net) for net in nets])
    vectors = [project(at, torch.randn(net.shape, dtype=dtype)) for at, net in zip(points, nets, strict=True)]
    for at, net in zip(points, nets, strict=True):
        assert torch.allclose(to_dense(at.net), to_dense(gauges(net).net), rtol=1e-4, atol=1e-5)
    for a, xi in zip(together([extending(xi) for xi in vectors]), vectors, strict=True):
        assert a.ranks == extend(xi).ranks
        assert torch.allclose(to_dense(a), to_dense(xi.at.net) + xi.to_dense(), rtol=1e-4, atol=1e-4)


def test_equal_requests_are_one_call():
    seen = []

    def double(matrix):
        seen.append(tuple(matrix.shape))
        return (2 * matrix,)

    def job(rows, rounds):
        total = 0.0
        for k in range(rounds):
            (found,) = yield double, torch.full((rows, 2), float(k + 1))
            total += float(found.sum())
        return rows, total

    found = together([job(3, 2), job(3, 2), job(4, 2), job(3, 1)])
    assert found == [(3, 36.0), (3, 36.0), (4, 48.0), (3, 12.0)]
    assert sorted(seen) == [(2, 3, 2), (3, 3, 2), (4, 2), (4, 2)]
    assert together([]) == []


def test_an_error_of_a_job_reaches_the_caller():
    def bad():
        yield torch.linalg.eigh, torch.eye(2)
        raise ValueError("its own")

    def good():
        yield torch.linalg.eigh, torch.eye(2)
        return 1

    with pytest.raises(ValueError, match="its own"):
        together([good(), bad()])
    with pytest.raises(ValueError, match="its own"):
        alone(bad())


def test_an_svd_that_fails_in_a_stack_is_found_one_by_one(monkeypatch):
    plain, calls = torch.linalg.svd, []

    def gives_up(matrix, **options):
        calls.append(matrix.ndim)
        if matrix.ndim > 2:
            raise torch.linalg.LinAlgError("no convergence")
        return plain(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    u, s, vh = safe_svd(x)
    assert torch.allclose(u * s[:, None] @ vh, x)
    assert calls == [3, 2, 2, 2]


def calls_of_a_step(layers, every):
    """QRs and eigenvalue problems of the second closing step of a model with equal layers."""
    torch.manual_seed(0)
    make = tnlayers.random_network(LowRank, rank=4)
    model = nn.Sequential(*(tnlayers.Linear(16, 16, network=make) for _ in range(layers)))
    optimizer = tnlayers.RankAdaptive(model, 1e-4, tol=1e-9, reserve=1, max_rank=4, every=every)
    x, count = torch.randn(8, 16), [0]

    def counting(plain):
        def call(*arguments, **options):
            count[0] += 1
            return plain(*arguments, **options)

        return call

    def backward():
        optimizer.zero_grad()
        model(x).square().sum().backward()

    for _ in range(2 * every - 1):
        backward()
        optimizer.step()
    backward()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("qr", "eigh", "svd"):
            patch.setattr(torch.linalg, name, counting(getattr(torch.linalg, name)))
        optimizer.step()
    return count[0]


@pytest.mark.filterwarnings("ignore::tnlayers.optim.rank_adaptive.RankLimitWarning")
@pytest.mark.parametrize("every", [1, 3])
def test_layers_of_equal_shape_share_their_factorizations(every):
    one, seven = calls_of_a_step(1, every), calls_of_a_step(7, every)
    assert 0 < one <= seven <= one + 3  # a layer whose delta has no full rank asks once more, in another stack
