"""The balanced gauge: the same tensor, equal Gram matrices."""

import pytest
import torch

from decompositions import LowRank, TTMatrix, to_dense
from decompositions.balance import balanced


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize("shape", [(7, 5, 3), (5, 7, 5), (4, 4, 1)])
def test_low_rank(dtype, shape, rng):
    m, n, r = shape
    net = LowRank.random(row_modes=(m,), col_modes=(n,), rank=r, dtype=dtype, generator=rng)
    made, still = balanced(net)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(to_dense(made), to_dense(net), atol=limit)
    grams = made.U.mH @ made.U, made.V.mH @ made.V
    values = torch.linalg.svdvals(to_dense(net))[:r]
    for gram in grams:
        assert torch.allclose(gram, torch.diag(values).to(gram), atol=limit)
    assert still == (1,)
    assert torch.equal(made.S, torch.eye(made.S.shape[0], dtype=dtype))
    assert balanced(net.to(torch.float32))[0].dtype == torch.float32 if dtype != torch.complex128 else True


def test_others_come_back_as_they_are(rng):
    net = TTMatrix.random(row_modes=(2, 3), col_modes=(3, 2), rank=2, generator=rng)
    assert balanced(net) == (net, ())
